"""pydantic's findings in the words of a person who wrote YAML: path, expected against got, what to write instead."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from posttrain.config.fields import annotations_at, field_at, known_fields, models, nearest, suggest
from posttrain.config.load import Mark, Path_, dotted, mark_of
from posttrain.config.redact import is_secret_name, redact_text
from posttrain.errors import Problem

_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a block of `key: value`",
    "model_type": "a block of `key: value`",
    "model_attributes_type": "a block of `key: value`",
    "none_required": "nothing",
}
_TRUE, _FALSE = {"true", "yes", "on", "y", "1"}, {"false", "no", "off", "n", "0"}
_HEX40, _NAME = r"^[0-9a-f]{40}$", r"^[a-z0-9][a-z0-9_-]{0,39}$"
_PATTERNS = {
    _HEX40: "a full commit, 40 hex digits in lower case",
    _NAME: "a name of lower-case letters, digits, `-`, `_`, at most 40, starting with a letter or digit",
}


def describe(value: Any) -> str:
    """A value as a message shows it: kind and, where short, content; secrets are left out."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        text = str(value) if not isinstance(value, int) or abs(value) < 10**40 else "a number of more than 40 digits"
        return text
    if isinstance(value, str):
        shown = redact_text(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return f"the text {shown!r}"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return "a block" if value else "an empty block"


def _number_in(text: str) -> str | None:
    """The number that a text probably means, in the form to write it."""
    plain = text.strip().replace("_", "").replace(",", "")
    if re.fullmatch(r"[-+]?\d{1,30}", plain):
        return str(int(plain))
    clock = re.fullmatch(r"(\d{1,6}):([0-5]?\d)", plain)
    if clock:
        return f"{int(clock[1]) + int(clock[2]) / 60:g}"
    return plain if re.fullmatch(r"[-+]?(\d{1,30}\.?\d{0,30}|\.\d{1,30})([eE][-+]?\d{1,2})?", plain) else None


def _type_fix(kind: str, value: Any, mark: Mark | None, fields: str, required: bool) -> str:
    raw = mark.raw if mark and mark.raw is not None else None
    if value is None and kind != "none_required":
        return "give a value" if required else "give a value, or remove the key to use the default"
    if kind == "string_type" and isinstance(value, bool | int | float):
        text = raw if raw is not None else ("true" if value is True else "false" if value is False else str(value)[:60])
        return f"quote it: '{text}'"
    if kind in ("int_type", "int_from_float"):
        if isinstance(value, float):
            return (
                f"write {int(value)}"
                if value == int(value) and abs(value) < 1e15
                else f"write {int(value)} or {int(value) + 1}"
                if abs(value) < 1e15
                else ""
            )
        number = _number_in(value) if isinstance(value, str) else None
        return f"write {number}" if number and re.fullmatch(r"[-+]?\d+", number) else "write digits only, e.g. 100"
    if kind == "float_type":
        number = _number_in(value) if isinstance(value, str) else None
        return f"write {number}" if number else "write a number, e.g. 0.5 or 1e-5"
    if kind == "bool_type":
        word = str(value).lower()
        return "write true" if word in _TRUE else "write false" if word in _FALSE else "write true or false"
    if kind == "list_type":
        return f"write [{value}]" if isinstance(value, str | int | float) and len(str(value)) < 40 else "write a list: [a, b]"
    return f"keys: {fields}" if fields else "write `key: value` lines, indented"


def _bound(error: dict[str, Any]) -> str:
    ctx = error.get("ctx", {})
    words = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than", "multiple_of": "a multiple of"}
    return " and ".join(f"{words[k]} {v if isinstance(v, int) else format(v, 'g')}" for k, v in ctx.items() if k in words)


def _doc(field: FieldInfo | None) -> str:
    return (field.description or "").split("\n")[0] if field else ""


def _literal(error: dict[str, Any], value: Any) -> tuple[str, str]:
    text = str(error.get("ctx", {}).get("expected", ""))
    options = re.findall(r"'([^']*)'", text) or re.split(r", | or ", text)
    near = nearest(str(value), options, 0.5) if isinstance(value, str) else None
    return "one of " + ", ".join(options) if len(options) > 1 else options[
        0
    ], f"did you mean `{near}`?" if near else f"write {options[0]}" if len(options) == 1 else ""


def _name_fix(value: Any) -> str:
    text = re.sub(r"[^a-z0-9_-]+", "-", str(value).lower()).strip("-_")[:40]
    return f"write `{text}`" if text else ""


class _Translator:
    """Turns the errors of one `model_validate` into problems.

    Args:
        root: class that was validated; tree: what it was given; prefix: where that stands in the file.
    """

    def __init__(
        self, root: type[BaseModel], tree: Any, prefix: Path_, document: Any, marks: dict[Path_, Mark] | None, top: Iterable[str]
    ) -> None:
        self.root, self.tree, self.prefix, self.document, self.marks, self.top = root, tree, prefix, document, marks, tuple(top)

    def clean(self, error: dict[str, Any]) -> Path_:
        """The error's location without pydantic's union tags."""
        value, path = self.tree, []
        loc = error["loc"]
        for place, part in enumerate(loc):
            if (isinstance(value, dict) and part in value) or (isinstance(value, list) and isinstance(part, int) and part < len(value)):
                path.append(part)
                value = value[part]
            elif error["type"] == "missing" and place == len(loc) - 1:
                path.append(part)
        return tuple(path)

    def value(self, path: Path_) -> Any:
        """What stands at a path; None where nothing does."""
        value = self.tree
        for part in path:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                return None
        return value

    def problem(self, path: Path_, message: str, fix: str) -> Problem:
        """A problem with its line number."""
        whole = (*self.prefix, *path)
        mark = mark_of(self.marks, whole)
        line = f" (line {mark.line})" if mark else ""
        return Problem(dotted(whole, self.document), message + line, fix)

    def one(self, path: Path_, errors: list[dict[str, Any]]) -> Problem:
        """The problem at one path; several errors are the branches of a union."""
        error, value = errors[0], self.value(path)
        kind = error["type"]
        if kind == "missing":
            return self.problem(path, "is required", _doc(field_at(self.root, path)))
        if kind == "extra_forbidden":
            where = dotted(self.prefix, self.document) + "." if self.prefix else ""
            return self.problem(path, "unknown key", suggest(str(path[-1]), self.root, path[:-1], where, self.top))
        if "[key]" in error["loc"]:
            return self.problem(path, f"expected {_PATTERNS[_NAME]}", _name_fix(path[-1]))
        expected = list(dict.fromkeys(_EXPECTED[e["type"]] for e in errors if e["type"] in _EXPECTED))
        if expected and kind in _EXPECTED:
            return self._wrong_type(path, value, kind, expected)
        return self._wrong_value(path, value, error)

    def _got(self, path: Path_, value: Any) -> str:
        return "a secret" if path and isinstance(path[-1], str) and is_secret_name(path[-1]) else describe(value)

    def _wrong_type(self, path: Path_, value: Any, kind: str, expected: list[str]) -> Problem:
        mark = mark_of(self.marks, (*self.prefix, *path))
        inner = [m for a in annotations_at(self.root, path) for m in models(a)]
        fields = ", ".join(known_fields(inner[0])) if inner and kind not in ("string_type", "list_type") else ""
        field = field_at(self.root, path)
        fix = _type_fix(kind, value, mark, fields, field is None or field.is_required())
        return self.problem(path, f"expected {' or '.join(expected)}, got {self._got(path, value)}", fix)

    def _wrong_value(self, path: Path_, value: Any, error: dict[str, Any]) -> Problem:
        kind, ctx, got = error["type"], error.get("ctx", {}), self._got(path, value)
        if kind == "literal_error":
            expected, fix = _literal(error, value)
            return self.problem(path, f"expected {expected}, got {got}", fix)
        if kind == "string_pattern_mismatch":
            pattern = ctx.get("pattern", "")
            fix = (
                _name_fix(value)
                if pattern == _NAME
                else "give the full commit hash, not a branch or a short hash"
                if pattern == _HEX40
                else ""
            )
            return self.problem(path, f"expected {_PATTERNS.get(pattern, f'text of the form {pattern}')}, got {got}", fix)
        if kind in ("value_error", "assertion_error"):
            text = re.sub(r"^(Value error|Assertion failed), ", "", error["msg"])
            message, _, fix = redact_text(text).partition("; ")
            return self.problem(path, message, fix)
        bound = _bound(error)
        if bound:
            return self.problem(path, f"expected a number {bound}, got {got}", _doc(field_at(self.root, path)))
        if kind in ("string_too_short", "too_short"):
            return self.problem(
                path,
                f"expected at least {ctx.get('min_length', 1)} {'character' if kind == 'string_too_short' else 'item'}(s), got {got}",
                "give a value",
            )
        if kind in ("string_too_long", "too_long"):
            return self.problem(
                path, f"expected at most {ctx.get('max_length')} {'characters' if kind == 'string_too_long' else 'items'}", "shorten it"
            )
        return self.problem(path, f"{error['msg'][:1].lower()}{error['msg'][1:]}, got {got}", "")


def translate(
    errors: list[Any],
    root: type[BaseModel],
    tree: Any,
    prefix: Path_ = (),
    document: Any = None,
    marks: dict[Path_, Mark] | None = None,
    top: Iterable[str] = (),
) -> list[Problem]:
    """Problems for the errors of one `model_validate`, in the order of the file.

    Args:
        errors: `ValidationError.errors()`.
        root: the class validated; `tree`: the value given; `prefix`: its path in `document`.
        top: keys of the other level, top of the file or stage; offered where one of them stands in the wrong one.
    """
    translator = _Translator(root, tree, prefix, document, marks, top)
    grouped: dict[Path_, list[dict[str, Any]]] = {}
    for error in errors:
        grouped.setdefault(translator.clean(error), []).append(error)
    kept = []
    for path, found in grouped.items():
        deeper = any(len(other) > len(path) and other[: len(path)] == path for other in grouped)
        if deeper and all(e["type"] in _EXPECTED for e in found):
            continue
        kept.append(translator.one(path, found))
    return kept

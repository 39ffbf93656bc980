"""Reading a YAML file safely, and strictly enough that nothing changes meaning in silence.

Scalars follow the YAML 1.2 core rules, narrowed: `true`/`false` are the only booleans, `1e-5` is a number, and what
YAML 1.1 would reinterpret (`on`, `yes`, `010`, `1_000`, `1:30`, dates) or what would overflow (`12e4567`) stays text.
Refused with line and column: duplicate keys, tabs as indentation, several documents, tags, and aliases that expand to
more than `MAX_NODES` values. The tree is built from parser events with a stack, so deep nesting cannot exhaust Python's.
"""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from posttrain.errors import ConfigError, Problem

MAX_BYTES = 1 << 20
MAX_NODES = 50_000
MAX_DEPTH = 50

Path_ = tuple[str | int, ...]

_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_NON_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_CONSTANTS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


@dataclass(frozen=True)
class Mark:
    """Where a value stands: line and column from 1, and the scalar's text as written (None for a block)."""

    line: int
    column: int
    raw: str | None = None
    quoted: bool = False


@dataclass(frozen=True)
class Document:
    """A YAML file as plain Python.

    Args:
        file: as it was named.
        tree: the top-level mapping.
        marks: path of keys and list indices -> where it stands. Values that came through an alias have no own mark.
    """

    file: str
    tree: dict[str, Any]
    marks: dict[Path_, Mark]


def mark_of(marks: dict[Path_, Mark] | None, path: Path_) -> Mark | None:
    """The mark of `path` or of its nearest marked ancestor; only an exact one keeps `raw`."""
    for end in range(len(path), 0, -1):
        found = (marks or {}).get(path[:end])
        if found is not None:
            return found if end == len(path) else Mark(found.line, found.column)
    return None


def dotted(path: Path_, tree: Any = None) -> str:
    """`stages.sft.optim.lr`: path as text; stages are called by name where the tree has one, else by index."""
    parts = [str(part) for part in path]
    if len(path) > 1 and path[0] == "stages" and isinstance(path[1], int) and isinstance(tree, dict):
        stages = tree.get("stages")
        stage = stages[path[1]] if isinstance(stages, list) and path[1] < len(stages) else None
        if isinstance(stage, dict) and isinstance(stage.get("name"), str) and stage["name"]:
            parts[1] = stage["name"]
    return ".".join(parts)


def scalar(text: str) -> Any:
    """Value of an unquoted scalar; see the module docstring.

    Raises:
        ValueError: `.inf` or `.nan`.
    """
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if len(text) <= 400 and _INT.fullmatch(text):
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if len(text) <= 400 and _FLOAT.fullmatch(text):
        number = float(text)
        return number if math.isfinite(number) else text
    if _NON_FINITE.fullmatch(text):
        raise ValueError(f"`{text}` is not a finite number; quote it if text is meant")
    return text


@dataclass
class _Open:
    """A mapping or sequence under construction."""

    event: Any
    path: Path_
    depth: int
    value: Any
    anchor: str | None
    start: int
    key: str | None = None
    merged: list[dict[str, Any]] = field(default_factory=list)
    lines: dict[str, int] = field(default_factory=dict)

    @property
    def is_map(self) -> bool:
        """True for a mapping."""
        return isinstance(self.value, dict)


class _Builder:
    """Turns parser events into plain Python and marks; `file` is only used in messages."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.marks: dict[Path_, Mark] = {}
        self.twice: list[tuple[Path_, int, int]] = []
        self.anchors: dict[str, tuple[Any, int]] = {}
        self.stack: list[_Open] = []
        self.root: Any = None
        self.first = (1, 1)
        self.nodes = 0
        self.documents = 0

    def error(self, event: Any, message: str, fix: str = "") -> ConfigError:
        mark = event.start_mark
        return ConfigError(message, where=f"{self.file}:{mark.line + 1}:{mark.column + 1}", fix=fix)

    def feed(self, event: Any) -> None:
        """Takes the next event."""
        if isinstance(event, yaml.DocumentStartEvent):
            self.documents += 1
            if self.documents > 1:
                raise self.error(
                    event, "a second document starts here; a config is one document", "remove `---` or `...`, or split the file"
                )
        elif isinstance(event, yaml.ScalarEvent):
            self._scalar(event)
        elif isinstance(event, yaml.AliasEvent):
            self._alias(event)
        elif isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            self._open(event)
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            self._close()

    def _count(self, event: Any, nodes: int = 1) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            raise self.error(
                event, f"more than {MAX_NODES} values, counting what aliases expand to", "write the config without nested aliases"
            )

    def _check_tag(self, event: Any) -> bool:
        """True if the tag asks for text."""
        if event.tag in (None, "!"):
            return bool(event.tag == "!")
        if event.tag == "tag:yaml.org,2002:str" and isinstance(event, yaml.ScalarEvent):
            return True
        name = event.tag.replace("tag:yaml.org,2002:", "!!")
        raise self.error(event, f"tag `{name}` is not allowed; a config holds plain values only", "remove the tag")

    def _path(self) -> Path_:
        if not self.stack:
            return ()
        top = self.stack[-1]
        return (*top.path, top.key or "" if top.is_map else len(top.value))

    def _scalar(self, event: Any) -> None:
        self._count(event)
        text = self._check_tag(event)
        if any("\ud800" <= c <= "\udfff" for c in event.value):
            raise self.error(event, "half of a surrogate pair in a text", "write the whole character")
        quoted = text or bool(event.style) or not event.implicit[0]
        if self.stack and self.stack[-1].is_map and self.stack[-1].key is None:
            self._key(event, quoted)
            return
        try:
            value = event.value if quoted else scalar(event.value)
        except ValueError as error:
            raise self.error(event, str(error)) from None
        self._mark(event, Mark(event.start_mark.line + 1, event.start_mark.column + 1, event.value, quoted))
        if event.anchor:
            self.anchors[event.anchor] = (value, 1)
        self._add(event, value)

    def _mark(self, event: Any, mark: Mark) -> None:
        path = self._path()
        if not path:
            self.first = (mark.line, mark.column)
        elif path not in self.marks:
            self.marks[path] = mark

    def _key(self, event: Any, quoted: bool) -> None:
        top, key, line = self.stack[-1], event.value, event.start_mark.line + 1
        if not key:
            raise self.error(event, "a key is missing before `:`", "write `key: value`")
        if key == "<<" and not quoted:
            top.key = "<<"
            return
        if key in top.lines:
            self.twice.append(((*top.path, key), top.lines[key], line))
        top.lines.setdefault(key, line)
        top.key = key

    def _alias(self, event: Any) -> None:
        if event.anchor not in self.anchors:
            inside = any(o.anchor == event.anchor for o in self.stack)
            what = "refers to the block it stands in" if inside else "has no anchor before it"
            raise self.error(event, f"alias `*{event.anchor}` {what}", f"define `&{event.anchor}` earlier")
        value, nodes = self.anchors[event.anchor]
        self._count(event, nodes)
        if self.stack and self.stack[-1].is_map and self.stack[-1].key is None:
            raise self.error(event, "an alias cannot be a key", "write the key out")
        self._mark(event, Mark(event.start_mark.line + 1, event.start_mark.column + 1))
        self._add(event, copy.deepcopy(value))

    def _open(self, event: Any) -> None:
        self._count(event)
        self._check_tag(event)
        if self.stack and self.stack[-1].is_map and self.stack[-1].key is None:
            raise self.error(
                event, "a block cannot be a key", "write `key: value` with a plain key; quote text that starts with `{` or `[`"
            )
        if len(self.stack) >= MAX_DEPTH:
            raise self.error(event, f"nested deeper than {MAX_DEPTH} levels", "write a flatter config")
        self._mark(event, Mark(event.start_mark.line + 1, event.start_mark.column + 1))
        value: Any = {} if isinstance(event, yaml.MappingStartEvent) else []
        self.stack.append(_Open(event, self._path(), len(self.stack), value, event.anchor, self.nodes))

    def _close(self) -> None:
        top = self.stack.pop()
        for merged in top.merged:
            for key, value in merged.items():
                top.value.setdefault(key, value)
        if top.anchor:
            self.anchors[top.anchor] = (top.value, self.nodes - top.start + 1)
        self._add(top.event, top.value)

    def _add(self, event: Any, value: Any) -> None:
        if not self.stack:
            self.root = value
            return
        top = self.stack[-1]
        if not top.is_map:
            top.value.append(value)
            return
        if top.key == "<<":
            self._merge(event, top, value)
        elif top.key not in top.value:
            top.value[top.key] = value
        top.key = None

    def _merge(self, event: Any, top: _Open, value: Any) -> None:
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, dict) for item in items):
            raise self.error(
                event, "`<<` merges a block (or a list of blocks) into this one, and this is none", "refer to an anchor: `<<: *name`"
            )
        top.merged.extend(items)


def _syntax_error(file: str, text: str, error: yaml.MarkedYAMLError) -> ConfigError:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    lines = text.splitlines() or [""]
    source = lines[min(line, len(lines)) - 1]
    where = f"{file}:{line}:{column}"
    if "\t" in source[: len(source) - len(source.lstrip())]:
        return ConfigError(f"line {line} is indented with a tab", where=where, fix="indent with spaces")
    problem = (error.problem or "cannot be read").replace("\n", " ")
    if "document start" in problem:
        fix = "a config is one document: remove `...` or `---` and what follows it, or unindent the line"
    elif source[column - 1 : column] in ("@", "`", "%"):
        fix = "quote a text that starts with a special character"
    elif "mapping values are not allowed" in problem:
        fix = "quote a text that holds `: `, and check the indentation"
    elif "block" in problem or "block" in (error.context or ""):
        fix = "check the indentation of this line and of the lines above"
    else:
        fix = "check quotes and brackets on this line and above"
    return ConfigError(f"not valid YAML: {problem}", where=where, fix=fix)


def _build(text: str, file: str) -> _Builder:
    builder = _Builder(file)
    loader_class = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        for event in yaml.parse(text, Loader=loader_class):
            builder.feed(event)
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(file, text, error) from None
    except yaml.YAMLError as error:
        raise ConfigError(
            f"not valid YAML: {getattr(error, 'reason', None) or 'unreadable character'}",
            where=file,
            fix="save the file as plain UTF-8 text",
        ) from None
    if builder.twice:
        text = "the key `{}` stands twice in one block, on line {} and on line {}"
        problems = [Problem(dotted(p, builder.root), text.format(p[-1], a, b), "keep one") for p, a, b in builder.twice]
        raise ConfigError(problems=problems, where=file)
    return builder


_ALLOWED_CONTROL = {"\t", "\n", "\r", "\x85"}


def _decode(data: bytes, file: str) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or (len(data) > 3 and b"\0" in data[:4]):
        raise ConfigError("the file is UTF-16 or UTF-32, expected UTF-8", where=f"{file}:1:1", fix="save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - (data.rfind(b"\n", 0, error.start) + 1) + 1
        raise ConfigError(f"byte 0x{data[error.start]:02x} is not UTF-8", where=f"{file}:{line}:{column}", fix="save it as UTF-8") from None
    for index, char in enumerate(text):
        if ((char < " " or "\x7f" <= char < "\xa0") and char not in _ALLOWED_CONTROL) or char in "\ufffe\uffff":
            line, column = text.count("\n", 0, index) + 1, index - text.rfind("\n", 0, index)
            raise ConfigError(
                f"control character {char!r}", where=f"{file}:{line}:{column}", fix="remove it, or write it as an escape in double quotes"
            )
    return text.replace("\ufeff", "")


def parse_yaml(text: str, file: str = "<text>") -> Document:
    """Parses the text of a config.

    Raises:
        ConfigError: anything but one mapping of plain values; `where` is `file:line:column`.
    """
    builder = _build(text, file)
    if builder.root is None:
        raise ConfigError("the file is empty", where=f"{file}:1:1", fix="start from `posttrain new` or a file in configs/")
    if not isinstance(builder.root, dict):
        what = "a list" if isinstance(builder.root, list) else f"the single value `{str(builder.root)[:40]}`"
        raise ConfigError(
            f"expected `key: value` lines at the top, got {what}",
            where=f"{file}:{builder.first[0]}:{builder.first[1]}",
            fix="remove the leading `- `, or put it under a key",
        )
    return Document(file, builder.root, builder.marks)


def parse_value(text: str, where: str = "<value>") -> Any:
    """A YAML value written on the command line: `1e-5`, `true`, `[a, b]`, `{a: 1}`, text. Empty is null."""
    return _build(_decode(text.encode("utf-8", "surrogatepass"), where), where).root


def load_yaml(path: str | Path) -> Document:
    """Reads a config file of at most 1 MiB.

    Raises:
        ConfigError: no such file, not a regular file, unreadable, too large, not UTF-8, or as in `parse_yaml`.
    """
    file = str(path)
    try:
        if not Path(path).is_file():
            state = "is a folder" if Path(path).is_dir() else "does not exist" if not Path(path).exists() else "is not a regular file"
            raise ConfigError(f"expected a YAML file, but it {state}", where=file, fix="check the path")
        with open(path, "rb") as handle:
            data = handle.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"cannot be read: {getattr(error, 'strerror', None) or error}", where=file, fix="check path and permissions"
        ) from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"larger than {MAX_BYTES >> 20} MiB; a config is small", where=file, fix="keep data in files of its own")
    return parse_yaml(_decode(data, file), file)

"""How paths and model ids in a config are expanded: one rule, and only in fields that hold a path or a model id.

The rule: a leading `~` is the home folder, `${VAR}` an environment variable, `${VAR:-default}` the same with a fallback
for an unset or empty one. `$VAR` without braces is refused, since half of the world's tools expand it and half do not.
A relative path is relative to the YAML file (on the command line: to the current folder). Regexes, templates and all
other text are never expanded. A variable whose name speaks of a secret is refused: resolved files must not hold any.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from posttrain.config.redact import is_secret_name

_BRACED = re.compile(r"\$\{([^{}]*)\}")
_VARIABLE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.DOTALL)
_BARE = re.compile(r"\$([A-Za-z_][A-Za-z0-9_]*)")
_HUB = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_PACKAGE = re.compile(r"package:[A-Za-z_][A-Za-z0-9_.-]*(/[^/]+)+")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def _substitute(match: re.Match[str]) -> str:
    parsed = _VARIABLE.fullmatch(match[1])
    if parsed is None:
        raise ValueError(f"`{match[0]}` is not a variable; write ${{VAR}} or ${{VAR:-default}}")
    name, default = parsed[1], parsed[2]
    if is_secret_name(name):
        raise ValueError(f"environment variable `{name}` may hold a secret and must not enter a path; use another variable")
    value = os.environ.get(name) or default
    if not value:
        state = "empty" if name in os.environ else "not set"
        raise ValueError(f"environment variable `{name}` is {state}; set it, or write ${{{name}:-default}}")
    return value


def _expand_variables(value: str) -> str:
    rest = _BRACED.sub("", value)
    bare = _BARE.search(rest)
    if bare:
        raise ValueError(f"`${bare[1]}` is not expanded; write `${{{bare[1]}}}`")
    if "${" in rest:
        raise ValueError("`${` without a closing brace; write ${VAR} or ${VAR:-default}")
    return _BRACED.sub(_substitute, value)


def _expand_home(value: str) -> str:
    if not value.startswith("~"):
        return value
    if value != "~" and not value.startswith("~/"):
        raise ValueError(f"`{value.split('/')[0]}` is not expanded; only `~` and `~/...` (your own home folder) are")
    return os.path.expanduser(value)


def expand_path(value: str, base: Path | None) -> str:
    """The path a config means; see the module docstring for the rule.

    Args:
        value: path as written; a glob stays a glob.
        base: folder that a relative path is relative to; None: the value comes from a resolved config, so an absolute
            path is taken as it is, and a relative one stays relative.

    Returns:
        An absolute path without `.` and `..` when `base` is given.

    Raises:
        ValueError: unset variable (named), `$VAR` without braces, `~user`, a URL, a Windows path on another system.
    """
    if "\0" in value:
        raise ValueError("a path cannot hold a NUL character")
    if base is None and os.path.isabs(value):
        return value
    if _SCHEME.match(value):
        raise ValueError(f"`{value.split('://')[0]}://` is not a local path; download the files first, or name a hub dataset or model")
    if os.name != "nt" and _WINDOWS.match(value):
        raise ValueError("this is a Windows path, but the system is not Windows; write the path it has here")
    expanded = _expand_home(_expand_variables(value))
    if not expanded.strip():
        raise ValueError("the path is empty")
    return expanded if base is None else os.path.abspath(os.path.join(base, expanded))


def is_local(value: str) -> bool:
    """True for a model id that is a path: it starts with `./`, `../`, `~`, `/` or `${`, or is `.` or `..`."""
    return value in (".", "..") or value.startswith(("./", "../", "~", "/", "$")) or os.path.isabs(value)


def is_hub_id(value: str) -> bool:
    """True for `owner/name`."""
    return not is_local(value) and _HUB.fullmatch(value) is not None and not value.endswith(".gguf")


def expand_model_id(value: str, base: Path | None) -> str:
    """A model id as `ModelId` documents it: paths expanded, hub ids and `package:NAME/FILE` kept.

    Raises:
        ValueError: neither of the three forms, or as in `expand_path`.
    """
    if is_local(value) or _WINDOWS.match(value) or _SCHEME.match(value):
        return expand_path(value, base)
    if value.startswith("package:"):
        if not _PACKAGE.fullmatch(value) or ".." in value.split("/"):
            raise ValueError("expected `package:NAME/FILE`, a file inside an installed Python package")
        return value
    if is_hub_id(value):
        return value
    raise ValueError(f"expected a hub id `owner/name` or a path; if `{value}` is a folder or file, write `./{value}`")

"""Dotted overrides from the command line: `stages.sft.optim.lr=1e-5`, `model.id=./x`, `sources.raw.path=[a, b]`.

Stages are addressed by name (or index), other lists by index. The value is read as YAML. A block that is missing in the
file is made; whether its keys exist is checked with everything else.
"""

from __future__ import annotations

from typing import Any

from posttrain.config.fields import nearest
from posttrain.config.load import Path_, dotted, parse_value
from posttrain.errors import ConfigError


def _index(items: list[Any], part: str, so_far: str) -> int:
    names = [i.get("name") for i in items if isinstance(i, dict)]
    if part in names:
        return next(n for n, i in enumerate(items) if isinstance(i, dict) and i.get("name") == part)
    if part.isascii() and part.isdigit() and int(part[:9]) < len(items):
        return int(part[:9])
    known = [n for n in names if isinstance(n, str)]
    near = nearest(part, known)
    what = "stage" if so_far == "stages" else "item"
    fix = f"did you mean `{near}`?" if near else f"known: {', '.join(known)}" if known else f"it has {len(items)} items, counted from 0"
    raise ConfigError(f"no {what} `{part}` in `{so_far}`", where=f"{so_far}.{part}", fix=fix)


def locate(tree: dict[str, Any], item: str) -> tuple[Path_, Any]:
    """Path into the tree and value of one override.

    Raises:
        ConfigError: no `=`, a bad value, an unknown stage (with the nearest name), a path through a plain value.
    """
    key, equals, text = item.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"expected KEY=VALUE, got `{item[:80]}`", where="override", fix="write e.g. stages.sft.optim.lr=1e-5")
    path: list[str | int] = []
    value: Any = tree
    for part in key.split("."):
        so_far = dotted(tuple(path), tree)
        if not part:
            raise ConfigError(f"`{key}` has an empty part", where="override", fix="write e.g. stages.sft.optim.lr=1e-5")
        if isinstance(value, list):
            step: str | int = _index(value, part, so_far)
            value = value[int(step)]
        elif isinstance(value, dict) or value is None:
            step, value = part, (value or {}).get(part)
        else:
            raise ConfigError(f"`{so_far}` is a plain value and has no `{part}`", where=key, fix=f"write {so_far}=...")
        path.append(step)
    return tuple(path), parse_value(text, key)


def put(tree: dict[str, Any], path: Path_, value: Any) -> None:
    """Sets a value in place, making missing blocks."""
    at: Any = tree
    for part in path[:-1]:
        if isinstance(at, dict) and at.get(part) is None:
            at[part] = {}
        at = at[part]
    at[path[-1]] = value

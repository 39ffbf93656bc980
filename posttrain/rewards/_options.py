"""Options of a reward: its keyword-only parameters, set under `options` in YAML.

A keyword-only parameter that is no column of the reward is an option; its annotation is its type, its default the default,
and one without a default must be given. A parameter annotated `Path` takes a path by the rule of all paths in a config.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.config.fields import alternatives, nearest
from posttrain.config.paths import expand_path
from posttrain.errors import ConfigError


def declared_options(function: Callable[..., Any], columns: Sequence[str]) -> dict[str, Any]:
    """Option -> default (`inspect.Parameter.empty` where it must be given)."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in columns}


def check_options(name: str, declared: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises ConfigError for an option that the reward `name` does not have (with the nearest), and for one that it needs."""
    for key in given:
        if key not in declared:
            near = nearest(key, declared)
            known = f"known options: {', '.join(declared)}" if declared else "it takes no options"
            raise ConfigError(f"reward `{name}` has no option `{key}`", fix=f"did you mean `{near}`?" if near else known)
    lacking = [key for key, default in declared.items() if default is inspect.Parameter.empty and key not in given]
    if lacking:
        raise ConfigError(f"reward `{name}` needs the option `{lacking[0]}`", fix=f"set `options: {{{lacking[0]}: ...}}`")


def typed_options(name: str, function: Callable[..., Any], given: Mapping[str, Any], base: Path | None = None) -> dict[str, Any]:
    """`given` with paths expanded and values checked against the annotations of `function`.

    Args:
        name: the reward.
        function: its function.
        given: names that it has -> values from YAML.
        base: folder that relative paths are relative to; None is the current one.

    Raises:
        ConfigError: a value of the wrong type.
    """
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError):
        hints = {}
    return {key: _typed(f"option `{key}` of reward `{name}`", hints.get(key, Any), value, base) for key, value in given.items()}


def _typed(what: str, hint: Any, value: Any, base: Path | None) -> Any:
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    if Path in alternatives(hint) and isinstance(value, str | Path):
        try:
            return Path(expand_path(str(value), base))
        except ValueError as error:
            raise ConfigError(f"{what}: {error}") from None
    try:
        return TypeAdapter(hint, config=ConfigDict(strict=True, arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{what}: got {str(value)[:80]!r}", fix=first["msg"]) from None

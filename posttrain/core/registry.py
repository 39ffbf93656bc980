"""Methods found by file name: no table to edit.

A method is a function `run(cfg, ctx) -> None` with a strict Config, declared by `@stage(...)` in one file of
`posttrain/trainers`, `posttrain/stages`, `posttrain/quant`, of a package registered under the entry-point group
`posttrain.methods` (as `data_pipelines` is), or of a plugin package named on the command line with `--plugin`.
Only files that contain `@stage(` and whose name has no leading underscore are imported, so module tops must stay
light: torch, transformers and trl are imported inside functions.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from posttrain.config.common import StageConfig
from posttrain.config.fields import nearest
from posttrain.errors import ConfigError

GROUP = "posttrain.methods"
BUILTIN = ("posttrain.stages", "posttrain.trainers", "posttrain.quant")

MODEL_KINDS = ("model", "adapter", "quantized")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Port:
    """What an input port accepts.

    Args:
        kinds: artifact kinds (`dataset`, `model`, `adapter`, `quantized`, `scores`, `rollouts`, ...).
        rows: accepted row types of a dataset port.
        optional: the port may stay empty.
        many: the port takes a mixture of several datasets.
        train: rows feed selection, training or calibration, so held-out rows are kept out of them.
    """

    kinds: tuple[str, ...]
    rows: tuple[str, ...] = ()
    optional: bool = False
    many: bool = False
    train: bool = False


def model_port(*, optional: bool = False, kinds: tuple[str, ...] = MODEL_KINDS) -> Port:
    """The usual `model` port: filled by the newest model before the stage, else by the pipeline's `model`."""
    return Port(kinds, optional=optional)


def data_port(*rows: str, optional: bool = False, many: bool = True, train: bool = True) -> Port:
    """A dataset port for these row types."""
    return Port(("dataset",), rows=rows, optional=optional, many=many, train=train)


@dataclass(frozen=True)
class Method:
    """A registered method; `run` is called with (Config, StageContext)."""

    name: str
    config: type[StageConfig]
    run: Callable[[Any, Any], None]
    inputs: dict[str, Port]
    output: str
    version: int
    rows: str | Callable[[Any, dict[str, str]], str] | None
    evals: bool
    module: str
    doc: str
    estimate: Callable[[Any], dict[str, float]] | None = field(default=None, compare=False)
    check: Callable[[Any, Path], None] | None = field(default=None, compare=False)


_METHODS: dict[str, Method] = {}


def stage(
    name: str,
    *,
    config: type[StageConfig],
    inputs: dict[str, Port] | None = None,
    output: str,
    version: int = 1,
    rows: str | Callable[[Any, dict[str, str]], str] | None = None,
    evals: bool = False,
    estimate: Callable[[Any], dict[str, float]] | None = None,
    check: Callable[[Any, Path], None] | None = None,
) -> Callable[[Callable[[Any, Any], None]], Callable[[Any, Any], None]]:
    """Declares a method.

    Args:
        name: `family.method` or plain name.
        config: its Config, a StageConfig.
        inputs: port name -> Port.
        output: kind of the artifact it commits.
        version: bump when the committed bytes change for an unchanged config.
        rows: row type of an output dataset, or a function (cfg, {port: row type}) -> row type.
        evals: the stage makes or changes a model and evaluates it (before/after).
        estimate: cfg -> {"tokens", "seconds", "disk_bytes", "saved_at_accept_rate_A"}, shown by `plan`; every key optional.
        check: (cfg, folder of the model that the stage's input goes back to) -> None; raises a ConfigError or QuantError, its
            `where` below the stage, for what would fail on such a model. `plan` calls it where that folder is there, so it must
            not import torch.
    """

    def register(run: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        doc = (importlib.import_module(run.__module__).__doc__ or run.__doc__ or "").strip()
        if name in _METHODS and _METHODS[name].module != run.__module__:
            raise ConfigError(
                f"method `{name}` is declared twice, in {_METHODS[name].module} and {run.__module__}",
                fix="rename one of them",
            )
        _METHODS[name] = Method(name, config, run, dict(inputs or {}), output, version, rows, evals, run.__module__, doc, estimate, check)
        return run

    return register


def _package_files(package: str) -> list[tuple[str, Path]]:
    spec = importlib.util.find_spec(package)
    roots = list(spec.submodule_search_locations or []) if spec else []
    return [(f"{package}.{file.stem}", file) for root in roots for file in sorted(Path(root).glob("*.py")) if not file.name.startswith("_")]


def scan_package(package: str, marker: str = "@stage(") -> None:
    """Imports the modules of `package` whose text contains `marker` (`@stage(` declares a method)."""
    for module, file in _package_files(package):
        if marker in file.read_text(encoding="utf-8"):
            importlib.import_module(module)


@functools.cache
def _scan_all(plugins: tuple[str, ...]) -> None:
    for package in BUILTIN:
        scan_package(package)
    for point in entry_points(group=GROUP):
        scan_package(point.value)
    for plugin in plugins:
        if importlib.util.find_spec(plugin) is None:
            raise ConfigError(
                f"plugin `{plugin}` is not an importable package", where="--plugin", fix="pip install it, or correct the name"
            )
        importlib.import_module(plugin)
        scan_package(plugin)


_PLUGINS: tuple[str, ...] = ()


def use_plugins(plugins: list[str] | tuple[str, ...]) -> None:
    """Adds packages named by `--plugin` on the command line; a YAML file cannot name any."""
    global _PLUGINS
    _PLUGINS = tuple(dict.fromkeys([*_PLUGINS, *plugins]))


def plugins() -> tuple[str, ...]:
    """Plugins in use; the launcher hands them on to the children."""
    return _PLUGINS


def methods() -> dict[str, Method]:
    """All methods by name, sorted."""
    _scan_all(_PLUGINS)
    return dict(sorted(_METHODS.items()))


def method(name: str) -> Method:
    """One method; raises ConfigError with the nearest name."""
    return look_up(name, methods(), "method")


def look_up(name: str, known: Mapping[str, Found], what: str) -> Found:
    """`known[name]`; raises ConfigError with the nearest name."""
    if name not in known:
        near = nearest(name, known, 0.5)
        hint = f"did you mean `{near}`?" if near else f"known {what}s: {', '.join(known)}"
        raise ConfigError(f"unknown {what} `{name}`", fix=hint)
    return known[name]

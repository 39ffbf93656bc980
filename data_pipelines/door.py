"""The Python door of selectors: local files in, a folder of picked rows out, no YAML and no run directory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from posttrain.core.artifact import InputRef
from posttrain.core.context import StageContext
from posttrain.core.durable import disk_errors, fsync_tree
from posttrain.core.events import Events
from posttrain.errors import ConfigError, Problem

Paths = str | Path | Iterable[str | Path]
Inputs = Paths | Mapping[str, Paths]
"""Files of one input, or of several by name (separate targets, quotas by source)."""


def source_ref(port: str, paths: Paths, kind: str | None, columns: dict[str, str], on_bad: str, name: str = "") -> InputRef:
    """A reference to local files as a stage would get it; called after its port, or `name`."""
    from posttrain.data.sources import row_type_of, source_digest

    listed = [os.path.abspath(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
    kind = kind or row_type_of(listed)
    spec: dict[str, Any] = {"kind": kind, "path": listed, "columns": columns, "on_bad": on_bad}
    return InputRef(port, name or port, "source", "dataset", key=source_digest(spec), rows=kind, spec=spec)


def source_refs(port: str, inputs: Inputs | None, kind: str | None, columns: dict[str, str], on_bad: str) -> list[InputRef]:
    """References to all inputs of a port; none for None."""
    if inputs is None:
        return []
    named = inputs if isinstance(inputs, Mapping) else {"": inputs}
    return [source_ref(port, paths, kind, columns, on_bad, name) for name, paths in named.items()]


def model_ref(model: str | Path, port: str = "model") -> InputRef:
    """A reference to a model: a folder, a hub id, or `package:NAME/FILE`."""
    from posttrain.config.common import ModelConfig
    from posttrain.models.digest import model_digest

    spec = ModelConfig(id=str(model)).dump()
    return InputRef(port, str(model), "model", "model", key=model_digest(spec), spec=spec)


def model_refs(port: str, models: str | Path | Iterable[str | Path] | None) -> list[InputRef]:
    """References to the models of a port; none for None."""
    return [model_ref(model, port) for model in ([] if models is None else [models] if isinstance(models, str | Path) else models)]


def make_config(method: str, options: dict[str, Any]) -> Any:
    """The method's Config; fields of its `budget` and `filters` may be given directly.

    Raises:
        ConfigError: every unknown or wrong option.
    """
    from pydantic import ValidationError

    from posttrain.config.fields import short_form
    from posttrain.core import registry

    config = registry.method(method).config
    fields = {name: value for name, value in options.items() if short_form(config, name) == name}
    for name, value in options.items():
        block, dot, field = short_form(config, name).partition(".")
        if dot and value is not None:
            fields[block] = {**fields.get(block, {}), field: value}
    try:
        return config.model_validate({**fields, "name": "select", "method": method})
    except ValidationError as error:
        problems = [Problem(".".join(map(str, e["loc"])), e["msg"]) for e in error.errors()]
        raise ConfigError(problems=problems, where=method) from None


def _check_models(method: str, models: dict[str, list[InputRef]]) -> None:
    """Refuses a model where the method has no port for it, and several where it takes one."""
    from posttrain.core import registry

    ports = registry.method(method).inputs
    for port, refs in models.items():
        if refs and port not in ports:
            raise ConfigError(f"{method} has no port `{port}`", where=port, fix=f"ports: {', '.join(ports)}")
        if len(refs) > 1 and not ports[port].many:
            raise ConfigError(f"{method} takes one model, got {len(refs)}", where=port, fix="name one")


def select_files(
    method: str,
    raw: Inputs,
    target: Inputs | None,
    out: str | Path,
    *,
    seed: int = 0,
    kind: str | None = None,
    target_kind: str | None = None,
    columns: dict[str, str] | None = None,
    on_bad: str = "stop",
    events: Events | None = None,
    model: str | Path | Iterable[str | Path] | None = None,
    embedder: str | Path | None = None,
    scores: Mapping[str, Paths] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Runs a selector over local files; see `dsir.select` for the arguments.

    `raw` and `target` may also be a dict of name -> files; `target` is None for selectors without one, `model` a model's
    folder for selectors that need one, or those of several checkpoints where gradients are averaged, `embedder` the folder of a
    sentence encoder, `scores` the folders of other selections by name (`select.combine`).
    The result appears under `out` at once and whole; `OUT.work` holds what a killed call had done and is removed at the end.
    """
    from posttrain.core import registry

    out = Path(os.path.abspath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError("the output folder is not empty", where=str(out), fix="name a new folder, or delete it")
    cfg = make_config(method, options)
    models = {"model": model_refs("model", model), "embedder": model_refs("embedder", embedder)}
    _check_models(method, models)
    work = out.with_name(f"{out.name}.work")
    new = work / "out"
    shutil.rmtree(new, ignore_errors=True)
    inputs = {
        "raw": source_refs("raw", raw, kind, columns or {}, on_bad),
        "target": source_refs("target", target, target_kind, columns or {}, on_bad),
        **models,
        "scores": source_refs("scores", scores, None, {}, on_bad),
    }
    with disk_errors(out):
        new.mkdir(parents=True)
        ctx = StageContext("select", method, seed, {port: refs for port, refs in inputs.items() if refs}, new, work, events or Events(None))
        registry.method(method).run(cfg, ctx)
        fsync_tree(new)
        if out.exists():
            out.rmdir()
        os.replace(new, out)
    shutil.rmtree(work, ignore_errors=True)
    return ctx.summary

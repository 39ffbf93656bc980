"""A pipeline file as one checked object.

Each stage is read by the Config of its `method`. All problems are collected, first those of single fields, then those
of the chain (`config/wiring.py`, `config/checks.py`), and raised as one ConfigError with dotted paths.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, SerializeAsAny, ValidationError
from pydantic.fields import FieldInfo

from posttrain.config.base import Name, ReportOnly, Strict, _expand_model_id, _expand_path
from posttrain.config.checks import check_secrets
from posttrain.config.common import EvalConfig, LimitsConfig, ModelConfig, SourceConfig, StageConfig, TrackingConfig, TrainConfig, steering
from posttrain.config.fields import field_at, fields_of, nearest
from posttrain.config.load import Mark, Path_, dotted, load_yaml, mark_of
from posttrain.config.messages import describe, translate
from posttrain.config.overrides import locate, put
from posttrain.config.paths import expand_model_id, expand_path
from posttrain.config.wiring import WiredStage, check_chain, data_ref, output_kind, wire
from posttrain.core.registry import method, methods
from posttrain.errors import ConfigError, Problem

__all__ = ["Pipeline", "WiredStage", "data_ref", "load_pipeline", "output_kind", "override_tree", "parse_pipeline", "semantic", "wire"]


class _Head(Strict):
    version: Literal[1]
    """Version of the grammar."""
    name: Annotated[str, Field(min_length=1, max_length=200)]
    """Name of the run; any text, its folder is named by a slug of it."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of everything random."""
    model: ModelConfig | None = None
    """Model the chain starts from; absent where a stage makes one."""
    sources: dict[Name, SourceConfig] = {}
    """Rows that exist before the run, by name."""
    eval: EvalConfig = EvalConfig()
    """What is measured around stages."""
    tracking: TrackingConfig = TrackingConfig()
    """Where metrics go."""
    limits: LimitsConfig = LimitsConfig()
    """Bounds on disk and time."""


class Pipeline(_Head):
    """A whole chain; make it with `load_pipeline` or `parse_pipeline`."""

    stages: list[SerializeAsAny[StageConfig]]
    """Stages in order; each sees the sources and the stages before it."""


def _stage_class(stage: dict[str, Any], at: Path_, document: Any) -> type[StageConfig] | Problem:
    path = dotted((*at, "method"), document)
    name = stage.get("method")
    if name is None:
        return Problem(path, "is required", f"one of {', '.join(methods())}")
    if not isinstance(name, str):
        return Problem(path, f"expected text, got {describe(name)}", f"one of {', '.join(methods())}")
    try:
        return method(name).config
    except ConfigError as error:
        return Problem(path, error.message, error.fix)


def _guess_words(value: Any, path: Path_, marks: dict[Path_, Mark] | None, document: Any) -> list[Problem]:
    """YAML 1.1 words in a pass-through block, where no type would catch them."""
    if isinstance(value, dict):
        return [p for k, v in value.items() for p in _guess_words(v, (*path, k), marks, document)]
    if not isinstance(value, str) or str(path[-1]).endswith("_strategy"):
        return []
    word = value.lower()
    fix = "write true" if word in ("true", "yes", "on") else "write false" if word in ("false", "no", "off") else ""
    digits = value.replace("_", "").lstrip("0")
    if not fix and value[:1].isdigit() and digits.isdigit() and value != digits:
        fix = f"write {digits}"
    mark = mark_of(marks, path)
    line = f" (line {mark.line})" if mark else ""
    return [Problem(dotted(path, document), f"the text {value!r} would not be read as what it looks like{line}", fix)] if fix else []


def _parse_stage(
    stage: Any, at: Path_, document: Any, marks: dict[Path_, Mark] | None, context: dict[str, Any]
) -> StageConfig | list[Problem]:
    if not isinstance(stage, dict):
        return [
            Problem(
                dotted(at, document),
                f"expected a block with `name` and `method`, got {describe(stage)}",
                "write `- name: ...` and `method: ...`",
            )
        ]
    found = _stage_class(stage, at, document)
    if isinstance(found, Problem):
        return [found]
    words = _guess_words(stage.get("trl"), (*at, "trl"), marks, document)
    try:
        config = found.model_validate(stage, context=context)
        return words or config
    except ValidationError as error:
        return words + translate(error.errors(include_url=False), found, stage, at, document, marks, Pipeline.model_fields)


def _parse_stages(
    tree: dict[str, Any], marks: dict[Path_, Mark] | None, context: dict[str, Any]
) -> tuple[list[StageConfig], list[Problem]]:
    stages = tree.get("stages")
    if not isinstance(stages, list) or not stages:
        got = describe(stages) if "stages" in tree else "none"
        fix = "write a list: each stage starts with `- name:`"
        near = nearest("stages", [k for k in tree if k != "stages"], 0.8)
        return [], [Problem("stages", f"expected a list of at least one stage, got {got}", f"rename `{near}` to `stages`" if near else fix)]
    parsed, problems = [], []
    for index, stage in enumerate(stages):
        found = _parse_stage(stage, ("stages", index), tree, marks, context)
        if isinstance(found, list):
            problems += found
        else:
            parsed.append(found)
    return parsed, problems


def parse_pipeline(tree: dict[str, Any], base: Path | None, marks: dict[Path_, Mark] | None = None, where: str = "pipeline") -> Pipeline:
    """Checks a tree of plain values.

    Args:
        tree: as from `load_yaml(...).tree`.
        base: folder of relative paths; None for a resolved tree.
        marks: where values stand, for line numbers.
        where: file name for the message.

    Raises:
        ConfigError: holds every problem found.
    """
    secrets = check_secrets(tree)
    if secrets:
        raise ConfigError(problems=[_with_line(p, tree, marks) for p in secrets], where=where)
    context = {"base": base}
    head = {k: v for k, v in tree.items() if k != "stages"}
    stages, problems = _parse_stages(tree, marks, context)
    try:
        _Head.model_validate(head, context=context)
    except ValidationError as error:
        problems = translate(error.errors(include_url=False), Pipeline, tree, (), tree, marks, fields_of(TrainConfig)) + problems
    if problems:
        raise ConfigError(problems=problems, where=where)
    pipeline = Pipeline.model_validate({**head, "stages": stages}, context=context)
    found = [_with_line(p, tree, marks) for p in check_chain(pipeline)]
    if found:
        raise ConfigError(problems=found, where=where)
    return pipeline


def _with_line(problem: Problem, tree: dict[str, Any], marks: dict[Path_, Mark] | None) -> Problem:
    parts: list[str | int] = [int(p) if p.isdigit() else p for p in problem.path.split(".")]
    if parts[0] == "stages" and len(parts) > 1 and isinstance(parts[1], str):
        names = [s.get("name") if isinstance(s, dict) else None for s in tree["stages"]] if isinstance(tree["stages"], list) else []
        parts[1] = names.index(parts[1]) if parts[1] in names else parts[1]
    mark = mark_of(marks, tuple(parts))
    return Problem(problem.path, f"{problem.message} (line {mark.line})", problem.fix) if mark else problem


def _anchor(root: type[BaseModel], at: Path_, value: Any) -> Any:
    """An override's paths made absolute: on the command line, relative means relative to the current folder."""
    if isinstance(value, dict):
        return {k: _anchor(root, (*at, k), v) for k, v in value.items()}
    field = field_at(root, at)
    if isinstance(value, list):
        inner = [_anchor(root, (*at, n), v) for n, v in enumerate(value)]
        return [_absolute(field, v) for v in inner]
    return _absolute(field, value)


def _absolute(field: FieldInfo | None, value: Any) -> Any:
    if field is None or not isinstance(value, str) or not value:
        return value
    try:
        if _has_validator(field.annotation, field.metadata, _expand_path):
            return expand_path(value, Path.cwd())
        if _has_validator(field.annotation, field.metadata, _expand_model_id):
            return expand_model_id(value, Path.cwd())
    except ValueError:
        return value
    return value


def _override(tree: dict[str, Any], item: str) -> Path_:
    """Sets one override in `tree`; returns its path."""
    at, value = locate(tree, item)
    root: type[BaseModel] = Pipeline
    inner = at
    if at[0] == "stages" and len(at) > 1:
        stage = tree["stages"][at[1]] if isinstance(at[1], int) else None
        found = _stage_class(stage, at[:2], tree) if isinstance(stage, dict) else None
        root, inner = found if isinstance(found, type) else StageConfig, at[2:]
    put(tree, at, _anchor(root, inner, value) if inner else value)
    return at


def load_pipeline(path: str | Path, overrides: Iterable[str] = (), base: Path | None = None) -> Pipeline:
    """Reads and checks a pipeline file.

    Args:
        path: YAML file.
        overrides: dotted, as `stages.sft.optim.lr=1e-5`; relative paths in them are relative to the current folder.
        base: folder of relative paths in the file; default: the folder the file is in.

    Raises:
        ConfigError: holds every problem found.
    """
    document = load_yaml(path)
    tree, marks = document.tree, dict(document.marks)
    for item in overrides:
        at = _override(tree, item)
        marks = {p: m for p, m in marks.items() if p[: len(at)] != at}
    folder = base if base is not None else Path(os.path.realpath(os.path.dirname(os.path.abspath(path))))
    return parse_pipeline(tree, folder, marks, str(path))


def override_tree(tree: dict[str, Any], overrides: Iterable[str]) -> Pipeline:
    """A pipeline out of a tree made in memory and dotted overrides; relative paths are relative to the current folder.

    Raises:
        ConfigError: holds every problem found.
    """
    for item in overrides:
        _override(tree, item)
    return parse_pipeline(tree, Path.cwd(), where="command line")


def _report_only(annotation: Any, metadata: Iterable[Any] = ()) -> bool:
    if any(isinstance(m, ReportOnly) for m in metadata):
        return True
    args = getattr(annotation, "__args__", ())
    return any(_report_only(a, getattr(a, "__metadata__", ())) for a in args if a is not type(None))


def _has_validator(annotation: Any, metadata: Iterable[Any], function: Any) -> bool:
    if any(isinstance(m, AfterValidator) and m.func is function for m in metadata):
        return True
    return any(_has_validator(a, getattr(a, "__metadata__", ()), function) for a in getattr(annotation, "__args__", ()))


def _content(value: Any) -> Any:
    """A path by the content of its file, so that moving it changes nothing and editing it does."""
    if isinstance(value, list):
        return [_content(v) for v in value]
    if isinstance(value, str) and os.path.isfile(value):
        return "sha256:" + hashlib.sha256(Path(value).read_bytes()).hexdigest()
    return value


def _reduce(value: Any) -> Any:
    if isinstance(value, BaseModel):
        out = {}
        for name, field in type(value).model_fields.items():
            if not _report_only(field.annotation, field.metadata):
                item = getattr(value, name)
                out[field.alias or name] = (
                    _content(item) if _has_validator(field.annotation, field.metadata, _expand_path) else _reduce(item)
                )
        return out
    if isinstance(value, dict):
        return {k: _reduce(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_reduce(v) for v in value]
    return value


def semantic(config: StageConfig) -> dict[str, Any]:
    """The part of a stage's config that can change committed bytes, JSON-ready.

    Left out: fields marked REPORT_ONLY; `name`, `method`, `seed` and `in`, which enter the stage key on their own; and
    `eval`, unless a validation metric steers the stage or its output is an evaluation. A field that holds the
    path of a file enters by the file's content.
    """
    out: dict[str, Any] = _reduce(config)
    for key in ("name", "method", "seed", "in"):
        out.pop(key, None)
    if not steering(config) and method(config.method).output != "eval":
        out.pop("eval", None)
    return out

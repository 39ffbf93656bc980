"""Checks over the whole pipeline that no single field can make: names, evaluation sets, the model's revision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from posttrain.config.common import EvalSet, StageConfig, steering
from posttrain.config.fields import nearest
from posttrain.config.paths import is_hub_id
from posttrain.config.redact import redact
from posttrain.errors import ConfigError, Problem

if TYPE_CHECKING:
    from posttrain.config.pipeline import Pipeline
    from posttrain.config.wiring import _Wirer

_VERIFIED = ("accuracy", "pass@k")


def check_names(pipeline: Pipeline) -> list[Problem]:
    """Names used twice, the reserved name, seeds out of range, a hub model without a revision."""
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    for index, stage in enumerate(pipeline.stages):
        if stage.name in seen:
            problems.append(
                Problem(f"stages.{index}.name", f"stage {seen[stage.name]} (from 0) is also called `{stage.name}`", "rename one of them")
            )
        elif stage.name in pipeline.sources:
            problems.append(Problem(f"stages.{stage.name}.name", "a source has the same name", "rename one of them"))
        seen.setdefault(stage.name, index)
        if stage.seed is not None and not 0 <= stage.seed < 2**32:
            problems.append(Problem(f"stages.{stage.name}.seed", f"expected a number from 0 to {2**32 - 1}, got {str(stage.seed)[:40]}"))
    for name, where in [*((s, "stages") for s in seen), *((s, "sources") for s in pipeline.sources)]:
        if name == "model":
            problems.append(Problem(f"{where}.model", "`model` is the name of the pipeline's own model", "choose another name"))
    return problems + _check_model(pipeline)


def check_secrets(tree: Any, path: str = "") -> list[Problem]:
    """Keys, passwords and logins in a config: refused, so that no file of a run can hold one.

    The value itself is never repeated in the message.
    """
    if isinstance(tree, dict):
        return [p for k, v in tree.items() for p in _check_pair(str(k), v, f"{path}.{k}" if path else str(k))]
    if isinstance(tree, list):
        return [p for i, v in enumerate(tree) for p in check_secrets(v, f"{path}.{i}")]
    return [_secret(path)] if isinstance(tree, str) and redact(tree) != tree else []


def _check_pair(key: str, value: Any, path: str) -> list[Problem]:
    hidden = isinstance(value, str) and redact({key: value}) != {key: value}
    return [_secret(path)] if hidden else check_secrets(value, path)


def _secret(path: str) -> Problem:
    fix = "take it out of the file and export it, e.g. HF_TOKEN or WANDB_API_KEY; the environment is handed on and never written"
    return Problem(path, "holds what looks like a key, a password or a login", fix)


def _check_model(pipeline: Pipeline) -> list[Problem]:
    model = pipeline.model
    if model is None or not is_hub_id(model.id) or model.revision:
        return []
    fix = f"give the full commit that you want; if a local folder is meant, write `./{model.id}`"
    return [Problem("model.revision", f"`{model.id}` is a hub id and needs a revision, since a branch can change", fix)]


def check_eval(wirer: _Wirer) -> list[Problem]:
    """Evaluation sets, what stages say about them, and rewards."""
    pipeline, before = wirer.pipeline, len(wirer.problems)
    for name, item in pipeline.eval.sets.items():
        _check_set(wirer, f"eval.sets.{name}", item)
    for stage in pipeline.stages:
        _check_stage_eval(wirer, stage)
        for place, item in enumerate(getattr(stage, "rewards", None) or []):
            _check_reward(wirer, f"stages.{stage.name}.rewards.{place}", item.use, item.options)
    return wirer.problems[before:]


def _check_set(wirer: _Wirer, path: str, item: EvalSet) -> None:
    ref = wirer.ref(item.from_, "eval", f"{path}.from")
    if ref is None:
        return
    if ref.kind != "dataset":
        wirer.add(f"{path}.from", f"`{ref.name}` is a {ref.kind}, expected rows", "name a source or a stage that makes a dataset")
        return
    if ref.split not in ("validation", "test"):
        wirer.add(
            f"{path}.from",
            f"`{item.from_}` is not held out; what is measured must not be trained on",
            f"write `{ref.name}:validation` or `{ref.name}:test`",
        )
    verified = [m for m in item.metrics if m in _VERIFIED]
    if verified and ref.rows and ref.rows != "verifiable":
        wirer.add(
            f"{path}.metrics",
            f"`{verified[0]}` needs verifiable rows, but `{ref.name}` holds {ref.rows} rows",
            "use `loss` or `perplexity`, or another source",
        )
    if verified:
        _check_reward(wirer, f"{path}.reward", item.reward, item.reward_options)
    if not item.metrics:
        wirer.add(f"{path}.metrics", "nothing to measure", "write [loss]")


def _check_reward(wirer: _Wirer, path: str, name: str, options: dict[str, Any]) -> None:
    from posttrain.rewards.registry import checked_options

    try:
        checked_options(name, options)
    except ConfigError as error:
        wirer.add(path, error.message, error.fix)


def _check_stage_eval(wirer: _Wirer, stage: StageConfig) -> None:
    pipeline, name = wirer.pipeline, stage.name
    own = getattr(stage, "eval", None)
    chosen = getattr(own, "sets", None)
    for place, item in enumerate(chosen or []):
        if item not in pipeline.eval.sets:
            near = nearest(item, pipeline.eval.sets)
            known = ", ".join(pipeline.eval.sets) or "none"
            wirer.add(
                f"stages.{name}.eval.sets.{place}",
                f"no eval set is called `{item}`",
                f"did you mean `{near}`?" if near else f"known sets: {known}",
            )
    for field, item in steering(stage).items():
        _check_steering(wirer, f"stages.{name}.{field}.metric", item.metric, chosen)


def _check_steering(wirer: _Wirer, path: str, metric: str, chosen: list[str] | None) -> None:
    sets = wirer.pipeline.eval.sets
    set_name, _, what = metric.partition(".")
    validation = [n for n, s in sets.items() if s.from_.endswith(":validation")]
    if not what or set_name not in sets:
        near = nearest(set_name, validation)
        fix = (
            f"did you mean `{near}.{what or 'loss'}`?"
            if near
            else f"validation sets: {', '.join(validation) or 'none; add one under eval.sets'}"
        )
        wirer.add(path, f"expected SET.METRIC of a set under `eval.sets`, got `{metric}`", fix)
        return
    if set_name not in validation:
        wirer.add(
            path,
            f"`{set_name}` is not a validation set; test rows are only reported and must not steer a run",
            f"validation sets: {', '.join(validation) or 'none'}",
        )
    if not any(
        what == m or what.startswith((m + "_", m + ".")) or (m == "pass@k" and what.startswith("pass@")) for m in sets[set_name].metrics
    ):
        wirer.add(
            path,
            f"`{set_name}` does not measure `{what}`; it measures {', '.join(sets[set_name].metrics)}",
            f"add it to eval.sets.{set_name}.metrics",
        )
    if chosen is not None and set_name not in chosen:
        wirer.add(path, f"`{set_name}` is left out by this stage's `eval.sets`", "add it there")

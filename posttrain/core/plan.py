"""What would run, under which key, and why.

The key of a stage is sha256 over its method and version, its semantic config, its seed, and the keys of its inputs:
the producer's key for another stage's output, a content digest for rows and local models, `hub:ID@REVISION` for the
hub. So a plan is complete before anything has run. Manifests also record the content digests of the inputs; a
committed stage whose recorded digest differs from what lies there now is run again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from posttrain.config.pipeline import Pipeline, WiredStage, semantic, wire
from posttrain.core.artifact import OUT, InputRef
from posttrain.core.hashing import digest_of
from posttrain.core.registry import Method
from posttrain.core.rundir import RunDir, is_committed, read_json
from posttrain.errors import ConfigError, Problem

HELD_OUT = ("validation", "test")
_HOLDING = ("dtype", "attn", "gradient_checkpointing")


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a plan.

    Args:
        key: stage key; `material` is what it was computed from.
        folder: where it is or will be.
        action: `reuse`, `run`, `resume`, or `skip` (left out by --only, --from, --until).
        why: the reason, naming the field or input that changed.
    """

    index: int
    name: str
    config: Any
    method: Method
    inputs: dict[str, list[InputRef]]
    heldout: list[InputRef]
    eval: dict[str, Any]
    seed: int
    key: str
    material: dict[str, Any] = field(repr=False)
    folder: Path
    action: str
    why: str

    @property
    def todo(self) -> bool:
        """True if it has to be run."""
        return self.action in ("run", "resume")

    @property
    def processes(self) -> int:
        """World size."""
        return self.config.launch.processes


@dataclass(frozen=True)
class Selection:
    """Which stages a command asks for."""

    only: tuple[str, ...] = ()
    from_: str | None = None
    until: str | None = None
    force: tuple[str, ...] = ()

    def check(self, names: list[str]) -> None:
        """Raises ConfigError for a name that is not a stage."""
        for flag, given in (("--only", self.only), ("--from", (self.from_,)), ("--until", (self.until,)), ("--force", self.force)):
            for name in given:
                if name and name not in names and name != "all":
                    raise ConfigError(f"no stage `{name}`", where=flag, fix=f"stages: {', '.join(names)}")

    def wants(self, name: str, names: list[str]) -> bool:
        """True if the stage may run."""
        place = names.index(name)
        first = names.index(self.from_) if self.from_ else 0
        last = names.index(self.until) if self.until else len(names)
        return first <= place <= last and (not self.only or name in self.only)


def _model_key(spec: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    from posttrain.models.digest import model_digest

    return model_digest(spec), spec


def _fill(ref: InputRef, done: dict[str, PlannedStage], holding: dict[str, Any]) -> InputRef:
    """A wired reference with key, path and digest."""
    if ref.origin == "stage":
        producer = done[ref.name]
        manifest = read_json(producer.folder / "manifest.json") or {}
        spec = holding if ref.kind != "dataset" else {}
        return replace(ref, key=producer.key, path=str(producer.folder / OUT), digest=manifest.get("digest", ""), spec=spec)
    if ref.origin == "source":
        from posttrain.data.dataset import source_digest

        key = source_digest(ref.spec)
        return replace(ref, key=key, digest=key)
    key, spec = _model_key(ref.spec)
    return replace(ref, key=key, digest=key, spec=spec)


def _ref_material(ref: InputRef) -> dict[str, Any]:
    """What of a reference can change committed bytes: no absolute path, no folder name."""
    spec = {k: v for k, v in ref.spec.items() if k not in ("path", "id", "offline", "hub", "revision")}
    keep = {"origin": ref.origin, "key": ref.key, "split": ref.split, "share": ref.share, "repeat": ref.repeat, "spec": spec}
    return {k: v for k, v in keep.items() if v not in (None, {}, "")}


def _eval_for(stage: WiredStage, pipeline: Pipeline, known: set[str]) -> dict[str, Any]:
    """The eval sets this stage measures: those it names (all by default) whose rows exist before it."""
    if not stage.method.evals:
        return {}
    own = getattr(stage.config, "eval", None)
    wanted = own.sets if own is not None and own.sets is not None else list(pipeline.eval.sets)
    sets = {name: pipeline.eval.sets[name] for name in wanted if pipeline.eval.sets[name].from_.split(":")[0] in known}
    when = own.when if own is not None and own.when is not None else pipeline.eval.when
    return {"sets": sets, "when": list(when), "batch": pipeline.eval.batch, "every": getattr(own, "every", None)}


def _eval_refs(stage: WiredStage, pipeline: Pipeline, done: dict[str, PlannedStage]) -> dict[str, InputRef]:
    """References of all eval sets whose rows exist before the stage."""
    from posttrain.config.pipeline import data_ref

    found = {}
    for name, item in pipeline.eval.sets.items():
        base = item.from_.split(":")[0]
        if base in pipeline.sources or base in done:
            found[name] = _fill(data_ref(item.from_, pipeline, port=f"eval.{name}"), done, {})
    return found


def _material(stage: WiredStage, seed: int, inputs: dict[str, list[InputRef]], heldout: list[InputRef]) -> dict[str, Any]:
    material: dict[str, Any] = {
        "method": stage.method.name,
        "version": stage.method.version,
        "seed": seed,
        "config": {k: v for k, v in semantic(stage.config).items() if k not in ("name", "method", "in", "seed", "launch")},
        "inputs": {port: [_ref_material(r) for r in refs] for port, refs in inputs.items()},
    }
    if any(port.train for port in stage.method.inputs.values()):
        material["heldout"] = sorted({digest_of(_ref_material(r)) for r in heldout})
    return material


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Dotted paths whose values differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [line for k in keys for line in _differences(old.get(k), new.get(k), f"{path}.{k}" if path else k)]
    if old == new:
        return []
    short = lambda v: "none" if v is None else json.dumps(v)[:40]  # noqa: E731
    if path.startswith("inputs."):
        return [f"input `{path.split('.')[1]}` changed"]
    return [f"{path.removeprefix('config.')} changed from {short(old)} to {short(new)}"]


def _why_new(run: RunDir, name: str, material: dict[str, Any]) -> str:
    for folder in run.siblings(name):
        old = (read_json(folder / "config.json") or {}).get("material")
        if old:
            lines = list(dict.fromkeys(_differences(old, material)))
            return "; ".join(lines[:4]) + (f"; and {len(lines) - 4} more" if len(lines) > 4 else "") or "new"
    return "not made yet"


def _stale_input(folder: Path, inputs: dict[str, list[InputRef]]) -> str | None:
    """Name of an input whose content is not what the committed stage was made from."""
    recorded = {(i["port"], i["name"], i["split"]): i["digest"] for i in (read_json(folder / "manifest.json") or {}).get("inputs", [])}
    for port, refs in inputs.items():
        for ref in refs:
            if ref.digest and recorded.get((port, ref.name, ref.split), ref.digest) != ref.digest:
                return ref.name
    return None


def _action(run: RunDir, folder: Path, name: str, material: dict[str, Any], inputs: dict[str, list[InputRef]],
            done: dict[str, PlannedStage], forced: bool) -> tuple[str, str]:  # fmt: skip
    if forced:
        return "run", "--force"
    if is_committed(folder):
        stale = _stale_input(folder, inputs)
        if stale:
            return "run", f"input `{stale}` was made again and differs"
        upstream = [r.name for refs in inputs.values() for r in refs if r.origin == "stage" and done[r.name].todo]
        return ("reuse", "committed; its inputs are checked again when they are made") if upstream else ("reuse", "committed")
    if (folder / "config.json").is_file():
        return "resume", "unfinished"
    return "run", _why_new(run, name, material)


def make_plan(pipeline: Pipeline, run: RunDir, selection: Selection = Selection(), trusted: bool = False) -> list[PlannedStage]:
    """Plans every stage of the pipeline.

    Raises:
        ConfigError: a stage left out by the selection is not committed although a wanted stage needs it.
    """
    wired = wire(pipeline)
    names = [w.config.name for w in wired]
    selection.check(names)
    holding = {k: v for k, v in (pipeline.model.dump() if pipeline.model else {}).items() if k in _HOLDING}
    done: dict[str, PlannedStage] = {}
    problems: list[Problem] = []
    for stage in wired:
        planned = _plan_stage(stage, pipeline, run, selection, names, holding, done)
        for refs in planned.inputs.values():
            for ref in refs:
                if planned.todo and ref.origin == "stage" and done[ref.name].action == "skip":
                    problems.append(Problem(f"stages.{planned.name}", f"needs `{ref.name}`, which is left out and not committed",
                                            f"include `{ref.name}`"))  # fmt: skip
        done[planned.name] = planned
    if problems:
        raise ConfigError(problems=problems, where="plan")
    return list(done.values())


def _plan_stage(stage: WiredStage, pipeline: Pipeline, run: RunDir, selection: Selection, names: list[str],
                holding: dict[str, Any], done: dict[str, PlannedStage]) -> PlannedStage:  # fmt: skip
    config, name = stage.config, stage.config.name
    inputs = {port: [_fill(r, done, holding) for r in refs] for port, refs in stage.inputs.items()}
    eval_refs = _eval_refs(stage, pipeline, done)
    heldout = list({digest_of(_ref_material(r)): r for r in eval_refs.values() if r.split in HELD_OUT}.values())
    seed = config.seed if config.seed is not None else pipeline.seed
    material = _material(stage, seed, inputs, heldout)
    evaluation = _eval_for(stage, pipeline, set(pipeline.sources) | set(done))
    if evaluation:
        evaluation["sets"] = {n: {**s.dump(), "ref": eval_refs[n].to_json()} for n, s in evaluation["sets"].items()}
        if getattr(getattr(config, "commit", None), "best", None):
            material["eval"] = {n: [s["ref"]["key"], {k: v for k, v in s.items() if k != "ref"}] for n, s in evaluation["sets"].items()}
    key = digest_of(material)
    folder = run.find(name, key) or run.stage_dir(stage.index, name, key)
    wanted = selection.wants(name, names)
    forced = wanted and (name in selection.force or "all" in selection.force)
    action, why = _action(run, folder, name, material, inputs, done, forced)
    if not wanted and action != "reuse":
        action, why = "skip", "left out by the command"
    return PlannedStage(stage.index, name, config, stage.method, inputs, heldout, evaluation, seed, key, material, folder, action, why)

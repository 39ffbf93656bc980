"""What would run, under which key, and why.

The key of a stage is sha256 over its method and version, its semantic config, its seed, and the keys of its inputs:
the producer's key for another stage's output, a content digest for rows and local models, `hub:ID@REVISION` for the
hub. So a plan is complete before anything has run. Manifests also record the content digests of the inputs; a
committed stage whose recorded digest differs from what lies there now is run again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from posttrain.config.common import steering
from posttrain.config.fields import nearest
from posttrain.config.pipeline import Pipeline, WiredStage, data_ref, semantic, wire
from posttrain.core.artifact import OUT, InputRef
from posttrain.core.events import dumps
from posttrain.core.hashing import digest_of
from posttrain.core.registry import Method
from posttrain.core.rundir import RunDir, changed_input, is_committed, read_json, read_manifest
from posttrain.errors import ConfigError, Problem, QuantError

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
        again: what lies there is to be forgotten first (forced, or made from other content).
        tracking: trackers of the stage; not part of the key.
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
    again: bool = False
    tracking: dict[str, Any] = field(default_factory=dict)

    @property
    def todo(self) -> bool:
        """True if it has to be run."""
        return self.action in ("run", "resume")

    @property
    def processes(self) -> int:
        """World size."""
        return int(self.config.launch.processes)

    @property
    def refs(self) -> list[InputRef]:
        """All inputs, and the held-out rows that are kept out of them."""
        return [r for refs in self.inputs.values() for r in refs] + self.heldout


@dataclass(frozen=True)
class Selection:
    """Which stages a command asks for."""

    only: tuple[str, ...] = ()
    from_: str | None = None
    until: str | None = None
    force: tuple[str, ...] = ()

    def check(self, names: list[str]) -> None:
        """Raises ConfigError for a name that is not a stage, or a range that is empty."""
        for flag, given in (("--only", self.only), ("--from", (self.from_,)), ("--until", (self.until,)), ("--force", self.force)):
            for name in given:
                if name and name not in names and not (name == "all" and flag == "--force"):
                    near = nearest(name, names)
                    fix = f"did you mean `{near}`?" if near else f"stages: {', '.join(names)}"
                    raise ConfigError(f"no stage `{name}`", where=flag, fix=fix)
        if self.from_ and self.until and names.index(self.from_) > names.index(self.until):
            raise ConfigError(f"`{self.until}` comes before `{self.from_}`", where="--until", fix="swap --from and --until")

    def wants(self, name: str, names: list[str]) -> bool:
        """True if the stage may run."""
        place = names.index(name)
        first = names.index(self.from_) if self.from_ else 0
        last = names.index(self.until) if self.until else len(names)
        return first <= place <= last and (not self.only or name in self.only)


def _fill(ref: InputRef, done: dict[str, PlannedStage], holding: dict[str, Any]) -> InputRef:
    """A wired reference with key, path and digest."""
    if ref.origin == "stage":
        producer = done[ref.name]
        spec = holding if ref.kind != "dataset" else {}
        return replace(
            ref, key=producer.key, path=str(producer.folder / OUT), digest=read_manifest(producer.folder).get("digest", ""), spec=spec
        )
    if ref.origin == "source":
        from posttrain.data.dataset import source_digest

        key = source_digest(ref.spec)
        return replace(ref, key=key, digest=key)
    from posttrain.models.digest import model_digest

    key = model_digest(ref.spec)
    return replace(ref, key=key, digest=key)


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
    found = {}
    for name, item in pipeline.eval.sets.items():
        base = item.from_.split(":")[0]
        if base in pipeline.sources or base in done:
            found[name] = _fill(data_ref(item.from_, pipeline, port=f"eval.{name}"), done, {})
    return found


def _eval_material(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Sets of an evaluation with their rows by content."""
    bare = {name: {k: v for k, v in item.items() if k not in ("from", "ref")} for name, item in evaluation.get("sets", {}).items()}
    return {name: {**item, "rows_of": _ref_material(InputRef(**evaluation["sets"][name]["ref"]))} for name, item in bare.items()}


def _steers(stage: WiredStage) -> bool:
    """True if the evaluation can change the committed bytes."""
    return stage.method.output == "eval" or bool(steering(stage.config))


def _material(
    stage: WiredStage, seed: int, inputs: dict[str, list[InputRef]], heldout: list[InputRef], evaluation: dict[str, Any]
) -> dict[str, Any]:
    material: dict[str, Any] = {
        "method": stage.method.name,
        "version": stage.method.version,
        "seed": seed,
        "config": {k: v for k, v in semantic(stage.config).items() if k != "launch"},
        "inputs": {port: [_ref_material(r) for r in refs] for port, refs in inputs.items()},
    }
    if any(port.train for port in stage.method.inputs.values()):
        material["heldout"] = sorted({digest_of(_ref_material(r)) for r in heldout})
    if evaluation and _steers(stage):
        material["eval"] = _eval_material(evaluation)
    return material


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Dotted paths whose values differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [line for k in keys for line in _differences(old.get(k), new.get(k), f"{path}.{k}" if path else k)]
    if old == new:
        return []
    head, _, rest = path.partition(".")
    if head == "inputs":
        return [f"input `{rest}` changed"]
    if head in ("heldout", "eval"):
        return [
            "the held-out rows changed" if head == "heldout" else f"the evaluation changed ({rest})" if rest else "the evaluation changed"
        ]
    name = {"version": "the method's version"}.get(path, path.removeprefix("config."))
    return [f"{name} changed from {_short(old)} to {_short(new)}"]


def _short(value: Any, limit: int = 60) -> str:
    text = "none" if value is None else dumps(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _why_new(run: RunDir, name: str, material: dict[str, Any]) -> str:
    for folder in run.siblings(name):
        old = (read_json(folder / "config.json") or {}).get("material")
        if old:
            lines = list(dict.fromkeys(_differences(old, material)))
            return "; ".join(lines[:4]) + (f"; and {len(lines) - 4} more" if len(lines) > 4 else "") or "new"
    return "not made yet"


def _measured_otherwise(folder: Path, evaluation: dict[str, Any]) -> bool:
    """True if the figures of a committed stage come from other evaluation sets than the present ones."""
    old = (read_json(folder / "config.json") or {}).get("eval") or {}
    if _eval_material(old) != _eval_material(evaluation):
        return True
    return bool(evaluation.get("sets")) and sorted(old.get("when", [])) != sorted(evaluation["when"])


def _started(folder: Path) -> bool:
    return any((folder / "attempts").glob("*/events.jsonl"))


def _action(run: RunDir, stage: PlannedStage, done: dict[str, PlannedStage], forced: bool) -> PlannedStage:
    """The stage with its action and the reason."""
    if forced:
        return replace(stage, why="--force", again=True)
    changed = changed_input(stage.folder, stage.refs)
    if changed:
        return replace(stage, why=f"input `{changed}` was made again and differs", again=True)
    if is_committed(stage.folder):
        why = "committed"
        if any(r.origin == "stage" and done[r.name].todo for r in stage.refs):
            why += "; its inputs are checked again when they are made"
        if _measured_otherwise(stage.folder, stage.eval):
            why += f"; its evaluation sets have changed since (--force {stage.name} to measure again)"
        return replace(stage, action="reuse", why=why)
    if _started(stage.folder):
        return replace(stage, action="resume", why="unfinished")
    return replace(stage, why=_why_new(run, stage.name, stage.material))


def make_plan(pipeline: Pipeline, run: RunDir, selection: Selection = Selection()) -> list[PlannedStage]:
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
        problems += [*_missing(planned, done), *_unfit(planned, done)]
        done[planned.name] = planned
    if problems:
        raise ConfigError(problems=problems, where="plan")
    return list(done.values())


def _missing(stage: PlannedStage, done: dict[str, PlannedStage]) -> list[Problem]:
    """Stages that a stage to run needs and that are left out."""
    measured = [InputRef(**item["ref"]) for item in stage.eval.get("sets", {}).values()]
    needed = [r.name for r in [*stage.refs, *measured] if r.origin == "stage"] if stage.todo else []
    return [
        Problem(f"stages.{stage.name}", f"needs `{name}`, which is left out and not committed", f"include `{name}`")
        for name in dict.fromkeys(needed)
        if done[name].action == "skip"
    ]


def _unfit(stage: PlannedStage, done: dict[str, PlannedStage]) -> list[Problem]:
    """What the method's own check finds on the model that the stage will get."""
    folder = _model_folder(stage, done) if stage.todo and stage.method.check else None
    if folder is None or stage.method.check is None:
        return []
    try:
        stage.method.check(stage.config, folder)
    except (ConfigError, QuantError) as error:
        return [Problem(f"stages.{stage.name}.{error.where}", error.message, error.fix)]
    return []


def _model_folder(stage: PlannedStage, done: dict[str, PlannedStage]) -> Path | None:
    """Local folder that the stage's model goes back to, with the same layers; None where it is not there (yet)."""
    from posttrain.models.source import resolve_model

    ref = next(iter(stage.inputs.get("model", [])), None)
    while ref is not None and ref.origin == "stage":
        producer = done[ref.name]
        if "model" not in producer.inputs:
            return producer.folder / OUT if producer.action == "reuse" else None
        ref = next(iter(producer.inputs["model"]), None)
    source = resolve_model(ref) if ref is not None else None
    return source.path if source is not None and source.form == "folder" else None


def _plan_stage(stage: WiredStage, pipeline: Pipeline, run: RunDir, selection: Selection, names: list[str],
                holding: dict[str, Any], done: dict[str, PlannedStage]) -> PlannedStage:  # fmt: skip
    config, name = stage.config, stage.config.name
    inputs = {port: [_fill(r, done, holding) for r in refs] for port, refs in stage.inputs.items()}
    eval_refs = _eval_refs(stage, pipeline, done)
    trains = any(port.train for port in stage.method.inputs.values())
    heldout = list({digest_of(_ref_material(r)): r for r in eval_refs.values() if trains and r.split in HELD_OUT}.values())
    seed = config.seed if config.seed is not None else pipeline.seed
    evaluation = _eval_for(stage, pipeline, set(pipeline.sources) | set(done))
    if evaluation:
        evaluation["sets"] = {n: {**s.dump(), "ref": eval_refs[n].to_json()} for n, s in evaluation["sets"].items()}
    material = _material(stage, seed, inputs, heldout, evaluation)
    key = digest_of(material)
    folder = run.find(name, key) or run.stage_dir(stage.index, name, key)
    wanted = selection.wants(name, names)
    forced = wanted and (name in selection.force or "all" in selection.force)
    tracking = {**pipeline.tracking.dump(), "name": f"{run.path.name}/{name}"}
    planned = _action(
        run,
        PlannedStage(
            stage.index, name, config, stage.method, inputs, heldout, evaluation, seed, key, material, folder, "run", "", False, tracking
        ),
        done,
        forced,
    )
    if not wanted and planned.action != "reuse":
        return replace(planned, action="skip", why="left out by the command", again=False)
    return planned

"""`posttrain run`: plan, skip what is committed, launch the rest, show the result.

Running the same command again is how anything is resumed.
"""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posttrain.config.pipeline import Pipeline
from posttrain.core import launch
from posttrain.core.display import Display
from posttrain.core.durable import free_bytes, write_json, write_text
from posttrain.core.plan import PlannedStage, Selection, make_plan
from posttrain.core.rundir import RunDir, lock, runs_root, slug
from posttrain.errors import ArtifactError, Preempted


@dataclass(frozen=True)
class RunOptions:
    """What the command line says about a run.

    Args:
        runs: folder of all runs; default $POSTTRAIN_RUNS or ./runs.
        isolate: one process a stage.
        trust_remote_code: hand transformers' `trust_remote_code=True` to the loaders.
        quiet: no progress.
    """

    runs: str | None = None
    selection: Selection = Selection()
    isolate: bool = False
    trust_remote_code: bool = False
    quiet: bool = False


def run_dir(pipeline: Pipeline, runs: str | None = None) -> RunDir:
    """The folder of this pipeline's run."""
    return RunDir(runs_root(runs) / slug(pipeline.name))


def _ready(plan: list[PlannedStage]) -> list[PlannedStage]:
    """The leading stages that can run now: up to a committed one whose input is about to change."""
    found: list[PlannedStage] = []
    for stage in plan:
        if stage.todo:
            found.append(stage)
        elif stage.action == "reuse" and found and any(r.name == s.name for refs in stage.inputs.values() for r in refs for s in found):
            break
    return found


def _check_limits(pipeline: Pipeline, run: RunDir, started: float) -> None:
    limits = pipeline.limits
    if limits.wall_hours and time.time() - started > limits.wall_hours * 3600:
        raise Preempted(f"limits.wall_hours: {limits.wall_hours:g} is over", fix="run the same command again to go on")
    if limits.disk_gb and free_bytes(run.path) < 1e9 * 0.05:
        raise ArtifactError("less than 50 MB free", where=str(run.path), fix="free space, then run the same command again")


class _Signals:
    """Turns SIGTERM, SIGINT and SIGHUP into `stop()` of the current child; a second signal kills it."""

    def __init__(self) -> None:
        self.child: launch.Child | None = None
        self.seen: int | None = None

    def __enter__(self) -> _Signals:
        self._old = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)

    def _handle(self, number: int, _frame: object) -> None:
        self.seen = number
        if self.child is not None:
            self.child.stop()


def _run_group(group: list[PlannedStage], run: RunDir, fd: int, options: RunOptions, signals: _Signals, deadline: float | None) -> None:
    child = launch.Child(group, run, fd, options.trust_remote_code)
    signals.child = child
    display = Display([a / "events.jsonl" for a in child.attempts])

    def tick() -> None:
        if not options.quiet:
            display.tick()
        if deadline is not None and time.time() > deadline and signals.seen is None:
            signals.seen = signal.SIGALRM
            child.stop()

    try:
        code = child.wait(tick)
    finally:
        signals.child = None
        if child.process.poll() is None:
            child.kill()
    if signals.seen is not None and any(not (s.folder / "manifest.json").is_file() for s in group):
        name = signal.Signals(signals.seen).name if signals.seen != signal.SIGALRM else "limits.wall_hours"
        raise Preempted(f"stopped by {name}", where=f"run {run.path}", fix="run the same command again; it goes on where it was")
    launch.check(child, code)


def execute(pipeline: Pipeline, source: str, options: RunOptions) -> tuple[RunDir, list[PlannedStage]]:
    """Runs a pipeline to its end; returns the run folder and the final plan (all reused or skipped).

    Raises:
        PosttrainError: with the exit code of whatever went wrong.
    """
    run = run_dir(pipeline, options.runs)
    started = time.time()
    deadline = started + pipeline.limits.wall_hours * 3600 if pipeline.limits.wall_hours else None
    with lock(run) as fd, _Signals() as signals:
        _record(pipeline, source, run)
        selection, made = options.selection, set[str]()
        while True:
            plan = make_plan(pipeline, run, replace(selection, force=tuple(n for n in _forced(selection, pipeline) if n not in made)))
            write_json(run.path / "plan.json", [s.folder.name for s in plan])
            ready = _ready(plan)
            if not ready:
                return run, plan
            _check_limits(pipeline, run, started)
            group = launch.groups(ready, options.isolate)[0]
            _run_group(group, run, fd, options, signals, deadline)
            made |= {stage.name for stage in group}
            if signals.seen is not None:
                raise Preempted("stopped between stages", where=f"run {run.path}", fix="run the same command again to go on")


def _forced(selection: Selection, pipeline: Pipeline) -> list[str]:
    return [s.name for s in pipeline.stages] if "all" in selection.force else list(selection.force)


def _record(pipeline: Pipeline, source: str, run: RunDir) -> None:
    from posttrain.config.redact import redact

    write_text(run.path / "pipeline.yaml", redact(source))
    write_json(run.path / "pipeline.resolved.json", redact(pipeline.dump()))


def manifests(plan: list[PlannedStage]) -> list[dict[str, Any]]:
    """Manifests of the committed stages of a plan, in order."""
    from posttrain.core.artifact import open_artifact

    return [open_artifact(s.folder).manifest for s in plan if (s.folder / "manifest.json").is_file()]


def finish(run: RunDir, plan: list[PlannedStage], argv: list[str] | None = None) -> None:
    """Writes the report, prints the table, and says where everything is."""
    from posttrain.core.report import write_report
    from posttrain.core.table import run_table

    found = manifests(plan)
    report = write_report(run)
    print(run_table(found))
    last = next((s for s in reversed(plan) if (s.folder / "manifest.json").is_file()), None)
    if last is not None:
        print(f"\nartifact  {_short(last.folder / 'out')}")
    print(f"report    {_short(report)}")
    print(f"next      {next_command(plan)}", file=sys.stdout)


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def next_command(plan: list[PlannedStage]) -> str:
    """What a person would do next with the newest model."""
    from posttrain.core.registry import MODEL_KINDS

    model = next((s for s in reversed(plan) if s.method.output in MODEL_KINDS and (s.folder / "manifest.json").is_file()), None)
    if model is None:
        return "posttrain report " + (_short(plan[0].folder.parent.parent) if plan else "")
    return f"posttrain generate model={_short(model.folder / 'out')} prompt='...'"

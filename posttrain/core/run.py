"""`posttrain run`: plan, skip what is committed, launch the rest, show the result.

Running the same command again is how anything is resumed.
"""

from __future__ import annotations

import shlex
import signal
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from posttrain.config.pipeline import Pipeline
from posttrain.core import launch
from posttrain.core.artifact import open_artifact
from posttrain.core.display import Display
from posttrain.core.durable import free_bytes, write_json, write_text
from posttrain.core.plan import PlannedStage, Selection, make_plan
from posttrain.core.registry import MODEL_KINDS
from posttrain.core.rundir import RunDir, is_committed, lock, runs_root, slug
from posttrain.errors import ArtifactError, Preempted

GB = 1e9


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
    selection: Selection = field(default_factory=Selection)
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


def _check_disk(group: list[PlannedStage], pipeline: Pipeline, run: RunDir) -> None:
    """Refuses a stage whose estimate exceeds `limits.disk_gb`; warns where it exceeds the free space."""
    from posttrain.core.estimate import estimate

    limit, free = pipeline.limits.disk_gb, free_bytes(run.path)
    for stage in group:
        need = estimate(stage).get("disk_bytes", 0.0)
        if limit is not None and need > limit * GB:
            raise ArtifactError(
                f"stage {stage.name} needs about {need / GB:.3g} GB, and limits.disk_gb is {limit:g}",
                where=str(stage.folder),
                fix="raise limits.disk_gb, or lower checkpoint.keep",
            )
        if need > free:
            print(
                f"warning: stage {stage.name} needs up to {need / GB:.3g} GB and {free / GB:.3g} GB are free in {run.path}", file=sys.stderr
            )


class _Signals:
    """Turns SIGTERM, SIGINT and SIGHUP into `stop()` of the current child; a second signal kills it.

    Between children the first signal only leaves a mark that `check` reads, and the second ends the run at once. A
    signal that was ignored when the run was started (nohup) stays ignored.
    """

    def __init__(self) -> None:
        self.child: launch.Child | None = None
        self.seen: str | None = None

    def __enter__(self) -> _Signals:
        wanted = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
        heard = [s for s in wanted if signal.getsignal(s) != signal.SIG_IGN]
        self._old = {s: signal.signal(s, self._handle) for s in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)

    def _handle(self, number: int, _frame: object) -> None:
        again, self.seen = self.seen is not None, signal.Signals(number).name
        if self.child is not None:
            self.child.stop()
        elif again:
            raise KeyboardInterrupt

    def watch(self, child: launch.Child | None) -> None:
        """The child to stop from now on; a signal that came just before counts."""
        self.child = child
        if child is not None and self.seen is not None:
            child.stop()

    def check(self, run: RunDir, detail: str = "") -> None:
        """Raises Preempted if a signal came; `detail` is what the child said."""
        if self.seen is not None:
            raise Preempted(
                f"stopped by {self.seen}{f' ({detail})' if detail else ''}",
                where=f"run {run.path}",
                fix="run the same command again; it goes on where it was",
            )


def _run_group(group: list[PlannedStage], run: RunDir, fd: int, options: RunOptions, signals: _Signals, deadline: float | None) -> None:
    child = launch.Child(group, run, fd, options.trust_remote_code)
    signals.watch(child)
    display = Display([a / "events.jsonl" for a in child.attempts])

    def tick() -> None:
        if not options.quiet:
            display.tick()
        if deadline is not None and time.time() > deadline and signals.seen is None:
            signals.seen = "limits.wall_hours"
            child.stop()

    try:
        code = child.wait(tick)
    finally:
        signals.watch(None)
        display.close()
        if child.process.poll() is None:
            child.kill()
    if not all(is_committed(s.folder) for s in group):
        signals.check(run, launch.last_words(child))
    launch.check(child, code)


def execute(pipeline: Pipeline, source: str, options: RunOptions) -> tuple[RunDir, list[PlannedStage]]:
    """Runs a pipeline to its end; returns the run folder and the final plan (all reused or skipped).

    Raises:
        PosttrainError: with the exit code of whatever went wrong.
    """
    run = run_dir(pipeline, options.runs)
    deadline = time.time() + pipeline.limits.wall_hours * 3600 if pipeline.limits.wall_hours else None
    isolate = options.isolate or pipeline.limits.disk_gb is not None
    with lock(run) as fd, _Signals() as signals:
        record(pipeline, source, run)
        selection, made = options.selection, set[str]()
        while True:
            plan = make_plan(pipeline, run, replace(selection, force=tuple(n for n in _forced(selection, pipeline) if n not in made)))
            write_json(run.path / "plan.json", [s.folder.name for s in plan])
            signals.check(run)
            ready = _ready(plan)
            if not ready:
                return run, plan
            if deadline is not None and time.time() > deadline:
                raise Preempted(f"limits.wall_hours: {pipeline.limits.wall_hours:g} is over", fix="run the same command again to go on")
            group = launch.groups(ready, isolate)[0]
            _check_disk(group, pipeline, run)
            _run_group(group, run, fd, options, signals, deadline)
            made |= {stage.name for stage in group}


def _forced(selection: Selection, pipeline: Pipeline) -> list[str]:
    return [s.name for s in pipeline.stages] if "all" in selection.force else list(selection.force)


def record(pipeline: Pipeline, source: str, run: RunDir) -> None:
    """Writes the pipeline as it was written and as it was understood, without secrets."""
    from posttrain.config.redact import redact

    write_text(run.path / "pipeline.yaml", redact(source))
    write_json(run.path / "pipeline.resolved.json", redact(pipeline.dump()))


def manifests(plan: list[PlannedStage]) -> list[dict[str, Any]]:
    """Manifests of the committed stages of a plan, in order."""
    return [open_artifact(s.folder).manifest for s in plan if is_committed(s.folder)]


def finish(run: RunDir, plan: list[PlannedStage]) -> None:
    """Writes the report, prints the table, and says where everything is."""
    from posttrain.core.report import write_report
    from posttrain.core.table import run_table

    found = manifests(plan)
    report = write_report(run)
    print(run_table(found))
    last = next((s for s in reversed(plan) if is_committed(s.folder)), None)
    if last is not None:
        print(f"\nartifact  {_short(last.folder / 'out')}")
    print(f"report    {_short(report)}")
    print(f"next      {next_command(run, plan)}")


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def next_command(run: RunDir, plan: list[PlannedStage]) -> str:
    """What a person would do next with the newest model."""
    model = next((s for s in reversed(plan) if s.method.output in MODEL_KINDS and is_committed(s.folder)), None)
    if model is None:
        return f"posttrain show {shlex.quote(_short(run.path))}"
    folder = _short(model.folder / "out")
    return f"posttrain generate {shlex.quote(f'model={folder}')} prompt='...'"

"""A stage started by hand under torchrun or accelerate launch: `... -m posttrain train STAGE.yaml`.

Only rank 0 plans, locks the run and writes config.json; the others wait for its word, with a time limit. From there
the code is the worker's.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from posttrain.config.pipeline import Pipeline
from posttrain.core import process
from posttrain.core.display import Display
from posttrain.core.durable import write_json
from posttrain.core.events import dumps
from posttrain.core.launch import prepare
from posttrain.core.plan import Selection, make_plan
from posttrain.core.run import finish, record, run_dir
from posttrain.core.rundir import RunDir, is_committed, lock, read_json
from posttrain.core.worker import check_world, guarded, world
from posttrain.errors import ArtifactError

POLL_S = 0.1
ERROR_WAIT_S = 10.0


def launch_id() -> str:
    """Names this launch alike on all ranks: the launcher's run id, or the parent process with its start time."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if run_id in ("none", ""):
        parent = os.getppid()
        run_id = f"{parent}-{process.start_time(parent)}"
    parts = (
        run_id,
        os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
        os.environ.get("SLURM_RESTART_COUNT", "0"),
        os.environ.get("MASTER_PORT", ""),
    )
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:16]


def _mark(ticket: Path, rank: int) -> Path:
    return ticket.with_name(f"{ticket.name}.{rank}")


def _wait_for_rank0(ticket: Path, rank: int, timeout_s: float) -> dict[str, Any]:
    """Rank 0's word; leaves a mark that it was read."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        word: dict[str, Any] | None = read_json(ticket)
        if word:
            _mark(ticket, rank).touch()
            return word
        time.sleep(POLL_S)
    raise ArtifactError(
        f"rank 0 did not plan within {timeout_s:g} s",
        where=str(ticket),
        fix="see rank 0's output; raise launch.timeout_s if planning is slow",
    )


def _tell(ticket: Path, size: int, timeout_s: float, word: dict[str, Any]) -> None:
    """Writes rank 0's word, waits until all ranks have read it, and takes it away, so that no later launch can read it."""
    write_json(ticket, word)
    marks = [_mark(ticket, rank) for rank in range(1, size)]
    deadline = time.monotonic() + timeout_s
    while not all(m.exists() for m in marks) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    for path in (ticket, *marks):
        path.unlink(missing_ok=True)


def run_under_launcher(pipeline: Pipeline, args: argparse.Namespace) -> int:
    """Runs the file's one stage on all ranks; returns this rank's exit code."""
    rank, run, launch = world(), run_dir(pipeline, args.runs), pipeline.stages[-1].launch
    check_world(launch.processes, rank)
    ticket = run.path / f".launch-{launch_id()}.json"
    if rank.main:
        return _lead(pipeline, run, ticket, rank.size, args)
    word = _wait_for_rank0(ticket, rank.rank, launch.timeout_s)
    if word.get("error"):
        return int(word["code"])
    return 0 if word["committed"] else guarded(Path(word["folder"]))


@contextmanager
def _shown(events: Path, quiet: bool) -> Iterator[None]:
    """Draws rank 0's events, which elsewhere the parent process does."""
    display, ended = Display([events]), threading.Event()

    def draw() -> None:
        while not ended.wait(POLL_S):
            display.tick()

    thread = threading.Thread(target=draw, daemon=True)
    if not quiet:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if thread.ident is not None:
            thread.join()
            display.tick()
        display.close()


def _lead(pipeline: Pipeline, run: RunDir, ticket: Path, size: int, args: argparse.Namespace) -> int:
    """Rank 0: plans, locks, prepares, tells the others, and does its part of the work."""
    with ExitStack() as stack:
        try:
            stack.enter_context(lock(run))
            stage = make_plan(pipeline, run, Selection(force=tuple(args.force)))[-1]
            if stage.todo:
                record(pipeline, dumps(pipeline.dump(), indent=1), run)
                write_json(run.path / "plan.json", [stage.folder.name])
                attempt = prepare(stage, run, args.trust_remote_code)
                stack.enter_context(_shown(attempt / "events.jsonl", args.quiet))
        except Exception as error:
            _tell(ticket, size, ERROR_WAIT_S, {"error": str(error), "code": getattr(error, "exit_code", 1)})
            raise
        _tell(ticket, size, pipeline.stages[-1].launch.timeout_s, {"folder": str(stage.folder), "committed": not stage.todo})
        code = guarded(stage.folder) if stage.todo else 0
    if code == 0 and is_committed(stage.folder):
        finish(run, make_plan(pipeline, run))
    return code

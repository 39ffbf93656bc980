"""A stage started by hand under torchrun or accelerate launch: `... -m posttrain train STAGE.yaml`.

Only rank 0 plans, locks the run and writes config.json; the others wait for its word, with a time limit. From there
the code is the worker's.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from posttrain.config.pipeline import Pipeline
from posttrain.core import process
from posttrain.core.durable import write_json
from posttrain.core.launch import prepare
from posttrain.core.plan import PlannedStage, Selection, make_plan
from posttrain.core.run import finish, run_dir
from posttrain.core.rundir import RunDir, is_committed, lock, read_json
from posttrain.core.worker import check_world, guarded, world
from posttrain.errors import ArtifactError


def launch_id() -> str:
    """Names this launch alike on all ranks: the launcher's run id, or the parent process with its start time."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if run_id in ("none", ""):
        parent = os.getppid()
        run_id = f"{parent}-{process.start_time(parent)}"
    parts = (run_id, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ.get("SLURM_RESTART_COUNT", "0"), os.environ.get("MASTER_PORT", ""))
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:16]


def _plan(pipeline: Pipeline, run: RunDir, args: argparse.Namespace) -> PlannedStage:
    return make_plan(pipeline, run, Selection(force=tuple(args.force)))[-1]


def _wait_for_rank0(ticket: Path, timeout_s: float) -> dict:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        word = read_json(ticket)
        if word:
            return word
        time.sleep(0.1)
    raise ArtifactError(f"rank 0 did not plan within {timeout_s:g} s", where=str(ticket), fix="see rank 0's output; raise launch.timeout_s if planning is slow")


def run_under_launcher(pipeline: Pipeline, args: argparse.Namespace) -> int:
    """Runs the file's one stage on all ranks; returns this rank's exit code."""
    rank, run = world(), run_dir(pipeline, args.runs)
    ticket = run.path / f".launch-{launch_id()}.json"
    if not rank.main:
        word = _wait_for_rank0(ticket, pipeline.stages[-1].launch.timeout_s)
        if word.get("error"):
            return int(word["code"])
        return 0 if word["committed"] else guarded(Path(word["folder"]))
    with ExitStack() as stack:
        stack.callback(ticket.unlink, missing_ok=True)
        try:
            check_world(pipeline.stages[-1].launch.processes, rank)
            stack.enter_context(lock(run))
            stage = _plan(pipeline, run, args)
            if stage.todo:
                prepare(stage, run, args.trust_remote_code)
        except Exception as error:
            write_json(ticket, {"error": str(error), "code": getattr(error, "exit_code", 1)})
            time.sleep(1.0)
            raise
        write_json(ticket, {"folder": str(stage.folder), "committed": not stage.todo})
        code = guarded(stage.folder) if stage.todo else 0
        if code == 0 and is_committed(stage.folder):
            finish(run, make_plan(pipeline, run))
        sys.stdout.flush()
        return code

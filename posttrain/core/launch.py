"""From a planned stage to a running child: command line, environment, supervision, signals, exit code.

Consecutive stages without a launcher share one warm worker, since imports cost about ten seconds a process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from posttrain.core import process, registry
from posttrain.core.durable import disk_errors, write_json
from posttrain.core.plan import PlannedStage
from posttrain.core.rundir import RunDir, is_committed, read_json, record_processes, retire, settle_work
from posttrain.errors import EXIT_OK, EXIT_PREEMPTED, PosttrainError

WORKER = "posttrain.core.worker"
SEVERITY = (3, 5, 4, 2, 1, EXIT_PREEMPTED, 0)
STOP_GRACE_S = 120.0

_OOM_HINT = "; the kernel kills a process that runs out of memory this way"
_ENV_DEFAULTS = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "PYTHONUNBUFFERED": "1",
}


class ChildFailed(PosttrainError):
    """A stage ended without an artifact; carries the child's own exit code."""

    def __init__(self, message: str, exit_code: int, **kwargs: Any) -> None:
        super().__init__(message, **kwargs)
        self.exit_code = exit_code


def command(stage: PlannedStage, folders: list[Path] | None = None) -> list[str]:
    """The child's command line, as a list; never a shell string."""
    launch, dirs = stage.config.launch, [str(f) for f in folders or [stage.folder]]
    module = ["-m", WORKER, *dirs]
    if launch.with_ == "none":
        return [sys.executable, *module]
    if launch.with_ == "torchrun":
        rendezvous = ["--standalone", "--nnodes=1", f"--nproc_per_node={launch.processes}"]
        return [sys.executable, "-m", "torch.distributed.run", *rendezvous, *module]
    config = ["--config_file", launch.config] if launch.config else []
    return [sys.executable, "-m", "accelerate.commands.launch", *config, "--num_processes", str(launch.processes), *module]


def groups(stages: list[PlannedStage], isolate: bool) -> list[list[PlannedStage]]:
    """Stages to run, split into groups that share a process."""
    found: list[list[PlannedStage]] = []
    for stage in stages:
        warm = not isolate and stage.config.launch.with_ == "none"
        if warm and found and found[-1][-1].config.launch.with_ == "none":
            found[-1].append(stage)
        else:
            found.append([stage])
    return found


def config_json(stage: PlannedStage, run: RunDir, attempt: int, trust_remote_code: bool) -> dict[str, Any]:
    """What the worker reads: everything, resolved."""
    return {
        "schema": 1, "name": stage.name, "method": stage.method.name, "method_version": stage.method.version, "key": stage.key,
        "seed": stage.seed, "config": stage.config.dump(), "material": stage.material,
        "inputs": {port: [r.to_json() for r in refs] for port, refs in stage.inputs.items()},
        "heldout": [r.to_json() for r in stage.heldout], "eval": stage.eval, "processes": stage.processes, "tracking": stage.tracking,
        "attempt": attempt, "plugins": list(registry.plugins()), "trust_remote_code": trust_remote_code, "run": str(run.path),
    }  # fmt: skip


def next_attempt(folder: Path) -> int:
    """Number of the attempt about to start: one that was prepared but never started is used again."""
    made = [int(p.name) for p in (folder / "attempts").glob("[0-9]*") if p.name.isdigit() and any(p.iterdir())]
    return max(made, default=0) + 1


def prepare(stage: PlannedStage, run: RunDir, trust_remote_code: bool) -> Path:
    """Writes config.json and makes the attempt's folder; returns it."""
    from posttrain.core.environment import environment

    if stage.again:
        retire(stage.folder)
    attempt = next_attempt(stage.folder)
    folder = stage.folder / "attempts" / str(attempt)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if stage.processes > 1:
        settle_work(stage.folder, stage.refs)
    write_json(stage.folder / "config.json", config_json(stage, run, attempt, trust_remote_code))
    write_json(stage.folder / "env.json", environment())
    return folder


def outcome(attempt: Path, code: int, processes: int = 1) -> tuple[int, str]:
    """(exit code, message) of a stage.

    The most severe of its ranks' exit files counts. Where a rank left none, it was killed: then a peer's "preempted" is
    only the launcher's way of ending the others. Without any file the process's own end has to say it.
    """
    exits = [e for e in (read_json(p) for p in sorted(attempt.glob("exit-*.json"))) if e]
    worst = min(exits, key=lambda e: SEVERITY.index(e["code"]) if e["code"] in SEVERITY else 4, default=None)
    if worst and not (worst["code"] in (EXIT_OK, EXIT_PREEMPTED) and len(exits) < processes):
        return int(worst["code"]), str(worst.get("error", ""))
    if code < 0:
        return 1, f"the stage's process was ended by {signal.Signals(-code).name}{_OOM_HINT if -code == signal.SIGKILL else ''}"
    if worst or processes > 1:
        return 1, f"{processes - len(exits)} of {processes} processes ended without a word{_OOM_HINT}"
    known = code if code in SEVERITY else 1
    return (known, f"the stage's process exited with code {code} before it could say why") if code else (0, "")


def child_environment() -> dict[str, str]:
    """Our defaults, then the present environment; a child finds no module in the current folder unless this process does."""
    safe = {} if {"", os.getcwd()} & set(sys.path) else {"PYTHONSAFEPATH": "1"}
    return {**_ENV_DEFAULTS, **safe, **os.environ}


class Child:
    """A running group of stages."""

    def __init__(self, group: list[PlannedStage], run: RunDir, lock_fd: int, trust_remote_code: bool) -> None:
        self.group, self.run = group, run
        self.attempts = [prepare(stage, run, trust_remote_code) for stage in group]
        with disk_errors(self.attempts[0]), open(self.attempts[0] / "stdout.log", "ab") as log:
            self.process = subprocess.Popen(
                command(group[0], [s.folder for s in group]),
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, pass_fds=[lock_fd],
                start_new_session=True, preexec_fn=partial(process.die_with_parent, os.getpid()), env=child_environment(),
            )  # fmt: skip
        record_processes(run, [self.process.pid])
        self._stop_at: float | None = None

    def stop(self) -> None:
        """Asks the child to save and leave; a second call, or the end of the grace time, kills it."""
        if self._stop_at is not None:
            return self.kill()
        self._stop_at = time.monotonic() + STOP_GRACE_S
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kills the child and its descendants."""
        process.end([(self.process.pid, process.start_time(self.process.pid))])

    def wait(self, tick: Callable[[], None], every_s: float = 0.1) -> int:
        """Waits for the end, calling `tick` all the while; returns the process's code."""
        while self.process.poll() is None:
            tick()
            if self._stop_at is not None and time.monotonic() > self._stop_at:
                self.kill()
            time.sleep(every_s)
        tick()
        return self.process.returncode


def last_words(child: Child) -> str:
    """What the stage that was running said when it was stopped, e.g. after which step; without its own advice."""
    for stage, attempt in zip(child.group, child.attempts, strict=True):
        if not is_committed(stage.folder):
            code, message = outcome(attempt, 0, stage.processes)
            return f"{stage.name}: {message.partition(chr(10))[0].rpartition(': ')[2]}" if code == EXIT_PREEMPTED else stage.name
    return ""


def check(child: Child, code: int) -> None:
    """Raises ChildFailed if a stage of the group is not committed."""
    for stage, attempt in zip(child.group, child.attempts, strict=True):
        if is_committed(stage.folder):
            continue
        exit_code, message = outcome(attempt, code, stage.processes)
        where = "" if message.startswith(f"stages.{stage.name}") else f"stage {stage.name}"
        log = f"log: {attempt / 'stdout.log'}"
        if exit_code == EXIT_OK:
            raise ChildFailed(f"the stage ended without committing\n  {log}", 1, where=where)
        text, _, fix = message.partition("\n  fix: ")
        if exit_code == EXIT_PREEMPTED:
            fix = fix or "run the same command again; it goes on from the last complete checkpoint"
        raise ChildFailed(text if fix else f"{text}\n  {log}", exit_code, where=where, fix=f"{fix}\n  {log}" if fix else "")

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
from pathlib import Path
from typing import Any

from posttrain.core import process, registry
from posttrain.core.durable import write_json
from posttrain.core.plan import PlannedStage
from posttrain.core.rundir import RunDir, read_json, record_processes
from posttrain.errors import EXIT_OK, EXIT_PREEMPTED, PosttrainError

WORKER = "posttrain.core.worker"
SEVERITY = (3, 5, 4, 2, 1, EXIT_PREEMPTED, 0)
STOP_GRACE_S = 120.0

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
        "heldout": [r.to_json() for r in stage.heldout], "eval": stage.eval, "processes": stage.processes,
        "attempt": attempt, "plugins": list(registry.plugins()), "trust_remote_code": trust_remote_code, "run": str(run.path),
    }  # fmt: skip


def next_attempt(folder: Path) -> int:
    """Number of the attempt about to start."""
    made = [int(p.name) for p in (folder / "attempts").glob("[0-9]*") if p.name.isdigit()]
    return max(made, default=0) + 1


def prepare(stage: PlannedStage, run: RunDir, trust_remote_code: bool) -> Path:
    """Writes config.json and makes the attempt's folder; returns it."""
    from posttrain.core.environment import environment

    if stage.why == "--force" or stage.why.startswith("input `"):
        retire(stage.folder)
    attempt = next_attempt(stage.folder)
    folder = stage.folder / "attempts" / str(attempt)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(stage.folder / "config.json", config_json(stage, run, attempt, trust_remote_code))
    write_json(stage.folder / "env.json", environment())
    return folder


def retire(folder: Path) -> None:
    """Forgets a committed result and its work: manifest first, so that no reader sees half of it."""
    import shutil

    for name in ("manifest.json", "out", "out.tmp", "work"):
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def outcome(attempt: Path, code: int) -> tuple[int, str]:
    """(exit code, message) of a stage: the most severe of its ranks' exit files, else what the process's end says."""
    exits = [e for e in (read_json(p) for p in sorted(attempt.glob("exit-*.json"))) if e]
    if exits:
        worst = min(exits, key=lambda e: SEVERITY.index(e["code"]) if e["code"] in SEVERITY else 4)
        return int(worst["code"]), str(worst.get("error", ""))
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; the kernel kills a process that runs out of memory this way" if name == "SIGKILL" else ""
        return 1, f"the stage's process was ended by {name}{hint}"
    return (1, f"the stage's process exited with code {code} before it could say why") if code else (0, "")


class Child:
    """A running group of stages."""

    def __init__(self, group: list[PlannedStage], run: RunDir, lock_fd: int, trust_remote_code: bool) -> None:
        self.group, self.run = group, run
        self.attempts = [prepare(stage, run, trust_remote_code) for stage in group]
        log = open(self.attempts[0] / "stdout.log", "ab")  # noqa: SIM115
        try:
            self.process = subprocess.Popen(
                command(group[0], [s.folder for s in group]),
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, pass_fds=[lock_fd],
                start_new_session=True, preexec_fn=process.die_with_parent, env={**_ENV_DEFAULTS, **os.environ},
            )  # fmt: skip
        finally:
            log.close()
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


def check(child: Child, code: int) -> None:
    """Raises ChildFailed if a stage of the group is not committed."""
    from posttrain.core.rundir import is_committed

    for stage, attempt in zip(child.group, child.attempts, strict=True):
        if is_committed(stage.folder):
            continue
        exit_code, message = outcome(attempt, code)
        log = attempt / "stdout.log"
        where = f"stage {stage.name}"
        if exit_code == EXIT_OK:
            raise ChildFailed("the stage ended without committing", 1, where=where, fix=f"read {log}")
        fix = "run the same command again; it goes on from the last complete checkpoint" if exit_code in (1, EXIT_PREEMPTED) else f"log: {log}"
        raise ChildFailed(message or f"exit code {exit_code}", exit_code, where=where, fix=fix)



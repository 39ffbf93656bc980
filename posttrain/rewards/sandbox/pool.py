"""The parent's side of the sandbox: a pool of warm workers, usable from any thread.

A batch is spread over the workers; each task is killed at its own limit, and what is left when the batch's time is up is
not run. A first round gives every task a short time only, so that a few that hang cannot starve the others of a batch.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import selectors
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from posttrain.errors import RewardError
from posttrain.rewards.sandbox.jail import Limits

START_S = 120.0
GRACE_S = 0.8
QUICK_SHARE, QUICK_S = 0.1, 0.5
MOST_WORKERS = 8
LOGGER = logging.getLogger("posttrain.rewards")
_HERE = Path(__file__).resolve().parent
_BOOT = """
import sys, types
for name, folder in zip(("posttrain", "posttrain.rewards", "posttrain.rewards.sandbox"), sys.argv[1:4]):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from posttrain.rewards.sandbox.worker import main
main(sys.argv[4], sys.argv[5] == "bare", sys.argv[6:])
"""


@dataclass(frozen=True)
class Task:
    """A list of items that one jail, as long as it lives, evaluates one after the other.

    Args:
        argument: JSON for the task's module; untrusted code may see it.
        items: JSON values, for the trusted part only; none where untrusted code runs alone, which counts as one item.
        stdin: standard input of untrusted code.
        apart: an item whose jail is killed says nothing about the next ones; otherwise these share its fate.
    """

    argument: Any = None
    items: Sequence[Any] = ()
    stdin: str = ""
    apart: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of an item.

    Args:
        status: `done`; `timeout`, `output`, `disk`, `processes` for limits reached; `died` for no result; `late` where the
            batch's time was up.
        value: what the trusted part gave for it.
        output: standard output and error of untrusted code that ran alone.
        code: exit code of that code, negative where a signal killed it.
    """

    status: str
    value: Any = None
    output: str = ""
    code: int = 0


@dataclass(frozen=True)
class _Part:
    """Items `first` to `last` (exclusive) of a task, in the round `turn`."""

    task: int
    first: int
    last: int
    turn: int = 0


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    ready: bool = False
    buffer: bytes = b""
    part: _Part | None = None
    deadline: float = 0.0

    @property
    def out(self) -> int:
        assert self.process.stdout
        return self.process.stdout.fileno()

    def send(self, task: Task, items: Sequence[Any], limits: Limits) -> None:
        """Hands a task over; where the worker is gone, reading its answer will tell."""
        body = json.dumps({"argument": task.argument, "limits": asdict(limits), "stdin": task.stdin}).encode()
        hidden = memoryview(json.dumps(list(items)).encode())
        assert self.process.stdin
        parts = (memoryview(b"%010d %010d\n" % (len(body), len(hidden))), memoryview(body), hidden)
        with contextlib.suppress(OSError):
            for part in parts:
                while part:
                    part = part[self.process.stdin.write(part) :]

    def line(self) -> dict[str, Any] | None:
        """The next message if it is there; raises EOFError where the worker is gone."""
        part = os.read(self.out, 1 << 20)
        if not part:
            raise EOFError
        self.buffer += part
        if b"\n" not in self.buffer:
            return None
        line, self.buffer = self.buffer.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self, wait_s: float = 3.0) -> None:
        """Ends it and its jails; kills it where it does not listen."""
        for stream in (self.process.stdin, self.process.stdout):
            if stream:
                with contextlib.suppress(OSError):
                    stream.close()
        try:
            self.process.wait(wait_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass
class Pool:
    """Workers for one kind of task, started when first needed.

    Args:
        kind: `math` or `code`; see `worker`.
        workers: most of them; default is one a processor of this process's share, from 2 to 8.
        bare: only what every Linux allows: limits, and killing.

    Attributes:
        shield: what protects, as a worker told; empty before the first start.
    """

    kind: str
    workers: int = 0
    bare: bool = False
    shield: dict[str, Any] = field(default_factory=dict)
    _idle: list[_Worker] = field(default_factory=list)
    _made: int = 0
    _owner: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def run(self, tasks: Sequence[Task], limits: Limits, batch_s: float = 60.0) -> list[list[Outcome]]:
        """Outcomes of each task's items, in order.

        Args:
            tasks: any number.
            limits: `wall_s` is for one item, the others are for a jail.
            batch_s: seconds for all of them, a worker's start apart; the rest is `late`.

        Raises:
            RewardError: a worker does not start.
        """
        return _Batch(self, tasks, limits, batch_s).run()

    def take(self, wait: bool) -> _Worker | None:
        """An idle worker, or a new one; None where all are busy and `wait` is False."""
        with self._changed:
            if self._owner != os.getpid():
                self._owner, self._made, self._idle = os.getpid(), 0, []
            while True:
                while self._idle:
                    worker = self._idle.pop()
                    if worker.process.poll() is None:
                        return worker
                    self._made -= 1
                    worker.close()
                if self._made < (self.workers or default_workers()):
                    self._made += 1
                    return self._start()
                if not wait:
                    return None
                self._changed.wait()

    def give(self, worker: _Worker, sound: bool = True) -> None:
        """Returns a worker; an unsound one is ended."""
        if not sound:
            worker.close(GRACE_S / 4)
        with self._changed:
            if sound:
                self._idle.append(worker)
            else:
                self._made -= 1
            self._changed.notify_all()

    def _start(self) -> _Worker:
        folders = [str(_HERE.parents[1]), str(_HERE.parent), str(_HERE)]
        extra = [path for path in sys.path if path] if self.kind == "math" else []
        environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        command = [sys.executable, "-I", "-c", _BOOT, *folders, self.kind, "bare" if self.bare else "", *extra]
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, bufsize=0
            )
        except OSError as error:
            self._made -= 1
            raise RewardError(f"a process for evaluation cannot be started: {error}") from error
        return _Worker(process)

    def greet(self, message: dict[str, Any]) -> None:
        """Keeps what protects the jails, and logs once what does not."""
        first, self.shield = not self.shield, message
        if first and message["missing"] and not self.bare:
            LOGGER.warning("the sandbox of rewards works without: %s", "; ".join(message["missing"]))

    def pids(self) -> list[int]:
        """Process ids of idle workers."""
        with self._changed:
            return [worker.process.pid for worker in self._idle] if self._owner == os.getpid() else []

    def close(self) -> None:
        """Ends the idle workers."""
        with self._changed:
            workers, self._idle = self._idle, []
            if self._owner != os.getpid():
                return
            self._made -= len(workers)
        for worker in workers:
            worker.close()


class _Batch:
    """One call of `Pool.run`: an event loop over the workers it could get."""

    def __init__(self, pool: Pool, tasks: Sequence[Task], limits: Limits, batch_s: float) -> None:
        self.pool, self.tasks, self.limits, self.batch_s = pool, tasks, limits, batch_s
        self.rounds = (min(QUICK_S, limits.wall_s * QUICK_SHARE), limits.wall_s)
        counts = [max(1, len(task.items)) for task in tasks]
        self.todo = deque(_Part(i, 0, count) for i, count in enumerate(counts))
        self.found = [[Outcome("late")] * count for count in counts]
        self.held: list[_Worker] = []
        self.selector = selectors.DefaultSelector()
        self.end = float("inf")

    def run(self) -> list[list[Outcome]]:
        """The loop."""
        try:
            while self.todo or any(worker.part for worker in self.held):
                self._hand_out()
                self._wait()
        finally:
            for worker in self.held:
                self.pool.give(worker, sound=worker.part is None and worker.ready)
            self.selector.close()
        return self.found

    def _take(self) -> None:
        worker = self.pool.take(wait=not self.held)
        if worker is not None:
            worker.deadline = time.monotonic() + START_S
            self.held.append(worker)
            self.selector.register(worker.out, selectors.EVENT_READ, worker)

    def _hand_out(self) -> None:
        now = time.monotonic()
        if now > self.end:
            self.todo.clear()
        if len(self.todo) > sum(worker.part is None for worker in self.held):
            self._take()
        for worker in self.held:
            if worker.ready and worker.part is None and self.todo:
                self.end = min(self.end, now + self.batch_s)
                part = worker.part = self.todo.popleft()
                task = self.tasks[part.task]
                wall, left = self.rounds[part.turn], max(0.01, self.end - now)
                worker.deadline = now + min(left, wall * (part.last - part.first)) + GRACE_S
                worker.send(task, task.items[part.first : part.last], replace(self.limits, wall_s=wall, task_s=left))

    def _wait(self) -> None:
        busy = [worker.deadline for worker in self.held if worker.part or not worker.ready]
        if not busy:
            return
        for key, _ in self.selector.select(max(0.0, min(busy) - time.monotonic())):
            self._hear(key.data)
        for worker in [w for w in self.held if (w.part or not w.ready) and time.monotonic() > w.deadline]:
            self._drop(worker, "timeout")

    def _hear(self, worker: _Worker) -> None:
        try:
            message = worker.line()
        except (EOFError, OSError, ValueError):
            self._drop(worker, "died")
            return
        if message is None:
            return
        if not worker.ready:
            worker.ready = True
            self.pool.greet(message)
            return
        part, worker.part = worker.part, None
        assert part is not None
        self._settle(part, **message)

    def _settle(self, part: _Part, status: str, values: Sequence[Any], output: str = "", code: int = 0, seconds: float = 0.0) -> None:
        task, found = self.tasks[part.task], self.found[part.task]
        if not task.items and status == "done":
            found[0] = Outcome(status, None, output, code)
            return
        stop = min(part.first + len(values), part.last)
        for place, value in zip(range(part.first, stop), values, strict=False):
            found[place] = Outcome("done", value)
        if stop == part.last or status == "late":
            return
        if status == "timeout" and part.turn == 0:
            self.todo.append(_Part(part.task, stop, stop + 1 if task.apart else part.last, 1))
            failed = stop
        else:
            failed = stop + 1 if task.apart else part.last
            found[stop:failed] = [Outcome("died" if status == "done" else status, None, output, code)] * (failed - stop)
        if task.apart and stop + 1 < part.last:
            self.todo.append(_Part(part.task, stop + 1, part.last, part.turn))

    def _drop(self, worker: _Worker, status: str) -> None:
        self.held.remove(worker)
        self.selector.unregister(worker.out)
        part, worker.part = worker.part, None
        self.pool.give(worker, sound=False)
        if not worker.ready:
            raise RewardError(
                f"the process that evaluates `{self.pool.kind}` rewards did not start",
                fix="try `python -c 'import math_verify'`" if self.pool.kind == "math" else "see `posttrain env`",
            )
        if part:
            self._settle(replace(part, turn=1), status, ())


def default_workers() -> int:
    """Processors of this process over the processes on this machine, from 2 to 8."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    share = len(os.sched_getaffinity(0)) // max(1, int(ranks) if ranks.isdigit() else 1)
    return max(2, min(MOST_WORKERS, share))


def protection() -> tuple[list[str], list[str]]:
    """What protects jails on this machine, and what is missing, in words.

    Raises:
        RewardError: no worker can be started.
    """
    CODE.run([Task({"alone": True, "program": ""})], Limits(), START_S)
    shield = CODE.shield
    there = {
        "network": shield["network"],
        "processes": shield["pids"],
        "user": shield["user"] != "same",
        f"files (Landlock {shield['files']})": shield["files"],
        "system calls": shield["calls"],
    }
    return [name for name, has in there.items() if has], list(shield["missing"])


MATH = Pool("math")
CODE = Pool("code")
for _pool in (MATH, CODE):
    atexit.register(_pool.close)

"""The parent's side of `_math_child`: one warm child a process, a wall clock on every comparison, any thread."""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import select
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

from posttrain.errors import RewardError

START_S = 120.0


@dataclass
class MathProcess:
    """A killable math-verify child, started when first needed.

    Fields:
        restarts: children killed for taking too long.
    """

    restarts: int = 0
    _child: subprocess.Popen[bytes] | None = None
    _owner: int = 0
    _buffer: bytes = b""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def pid(self) -> int | None:
        """Process id of the live child."""
        return self._child.pid if self._child and self._child.poll() is None else None

    def compare(self, gold: str, answer: str, timeout_s: float) -> bool | str:
        """True or False; `gold` or `answer` for a side that cannot be parsed; `timeout`; `error: ...`.

        Args:
            gold, answer: LaTeX without the box.
            timeout_s: wall-clock seconds for this pair, a child's start apart.

        Raises:
            RewardError: math-verify is not installed or its child does not start.
        """
        with self._lock:
            self._start()
            assert self._child and self._child.stdin
            try:
                self._child.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
                self._child.stdin.flush()
                line = self._read_line(timeout_s)
            except OSError:
                line = b""
            if line is None:
                self.restarts += 1
                self._kill()
                return "timeout"
            if not line:
                self._kill()
                return "error: the child died"
            verdict: bool | str = json.loads(line)
            return verdict

    def _start(self) -> None:
        if self._owner == os.getpid() and self.pid is not None:
            return
        require_math_verify()
        command = [sys.executable, "-m", "posttrain.rewards._math_child"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, bufsize=0
        )
        self._owner, self._buffer = os.getpid(), b""
        if self._read_line(START_S) != b"ready":
            self._kill()
            raise RewardError("the math-verify child process did not start", fix="try `python -c 'import math_verify'`")

    def _read_line(self, timeout_s: float) -> bytes | None:
        assert self._child and self._child.stdout
        stream, deadline = self._child.stdout.fileno(), time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([stream], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return None
            chunk = os.read(stream, 65536)
            if not chunk:
                return b""
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line

    def _kill(self) -> None:
        if self._child and self._owner == os.getpid():
            self._child.kill()
            self._child.wait()
            for stream in (self._child.stdin, self._child.stdout):
                if stream:
                    stream.close()
        self._child = None

    def close(self) -> None:
        """Ends the child."""
        with self._lock:
            self._kill()


def require_math_verify() -> None:
    """Raises RewardError where math-verify is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise RewardError("the reward `math_exact` needs the package math-verify", fix="pip install math-verify, or use the reward `exact`")


SHARED = MathProcess()
atexit.register(SHARED.close)

"""A worker of the sandbox: runs one task at a time in fresh jails, and never runs anything untrusted itself.

Standard library only, and started without posttrain's packages being imported, so that a jail is a small copy of a small
process. A *kind* of task is a module `<kind>_task` with `warm()`, called once, and `parts(argument) -> (host, guest)`:

- `host(argument, items, link) -> results` is trusted code on untrusted data: it yields one JSON value an item, and each
  starts the clock anew;
- `guest(argument, link) -> exit code` is untrusted code; its standard output is kept.

Either may be None. Both run in jails that cannot touch each other, joined by a socket pair, `link`. The items go from the
parent's pipe straight to the host's jail: neither this process nor any guest ever holds them.

Protocol: on descriptor 0 a task is `"%010d %010d\n"` (sizes), its JSON `{"argument", "limits", "stdin"}`, its items as JSON;
on descriptor 1 one JSON line: first what protects, then an outcome a task. The end of 0 ends the worker with all its jails.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from posttrain.rewards.sandbox import kernel
from posttrain.rewards.sandbox.jail import Limits, Shield, bare_shield, descendants, end_all, jail_user, raise_shield, reap, spawn

HEAD_BYTES = 22
RESULT_BYTES = 1 << 20
LOOK_S = 0.05
FOLDER_EVERY = 5


class _Gone(Exception):
    """The parent has closed its pipe."""


def read_exactly(descriptor: int, size: int) -> bytes:
    """`size` bytes; raises EOFError at the end of the input."""
    parts = []
    while size:
        part = os.read(descriptor, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _say(message: Any, descriptor: int = 1) -> None:
    line = json.dumps(message).encode() + b"\n"
    while line:
        line = line[os.write(descriptor, line) :]


@dataclass
class _Run:
    """State of one task: its pipes, what came out of them, and why it was stopped."""

    shield: Shield
    limits: Limits
    folder: Path
    parent: int
    result: bytes = b""
    output: bytes = b""
    status: str = ""
    codes: dict[int, int] = field(default_factory=dict)
    pipes: dict[int, str] = field(default_factory=dict)

    def watch(self, main: int) -> None:
        """Until the process `main` and its pipes have ended, or a limit is reached."""
        started = time.monotonic()
        deadline, end, lines, round_number = started + self.limits.wall_s, started + self.limits.task_s, 0, 0
        while not self.status:
            if self.result.count(b"\n") > lines:
                deadline, lines = time.monotonic() + self.limits.wall_s, self.result.count(b"\n")
            left = min(deadline, end) - time.monotonic()
            if left <= 0:
                self.status = "late" if end < deadline else "timeout"
            ready, _, _ = select.select([*self.pipes, 0], [], [], max(0.0, min(LOOK_S, left)))
            if 0 in ready or os.getppid() != self.parent:
                raise _Gone
            self._read([pipe for pipe in ready if pipe in self.pipes])
            alive = reap(self.codes)
            if main in self.codes and (not alive or not self.pipes or "result" not in self.pipes.values()):
                return
            round_number += 1
            if not self.shield.counts() and len(descendants()) > self.limits.processes + 4:
                self.status = "processes"
            if round_number % FOLDER_EVERY == 0 and _folder_bytes(self.folder) > self.limits.file_mb << 20:
                self.status = "disk"

    def _read(self, ready: list[int]) -> None:
        for pipe in ready:
            part = os.read(pipe, 1 << 16)
            if not part:
                os.close(pipe)
                del self.pipes[pipe]
            elif self.pipes[pipe] == "result":
                self.result += part
            else:
                self.output += part
        if len(self.result) > RESULT_BYTES or len(self.output) > self.limits.output_bytes:
            self.status = "output"

    def finish(self) -> None:
        """Ends every process, then takes what is left in the pipes."""
        self.codes |= end_all(self.shield)
        for pipe in list(self.pipes):
            os.set_blocking(pipe, False)
            with contextlib.suppress(BlockingIOError):
                while pipe in self.pipes and not self.status:
                    self._read([pipe])
            if pipe in self.pipes:
                os.close(pipe)
        self.pipes.clear()


def _folder_bytes(folder: Path) -> int:
    total = 0
    with contextlib.suppress(OSError):
        for root, _, names in os.walk(folder):
            for name in names:
                with contextlib.suppress(OSError):
                    total += os.lstat(os.path.join(root, name)).st_blocks * 512
    return total


def _remove(folder: Path) -> None:
    def again(function: Callable[..., Any], path: str, _: Any) -> None:
        with contextlib.suppress(OSError):
            os.chmod(os.path.dirname(path), 0o700)
            os.chmod(path, 0o700)
            function(path)

    shutil.rmtree(folder, onerror=again)
    shutil.rmtree(folder, ignore_errors=True)


def _folder(shield: Shield, role: int) -> Path:
    path = Path(tempfile.mkdtemp(prefix="posttrain-jail-"))
    if shield.user == "own":
        os.chown(path, jail_user(role), jail_user(role))
    return path


def _input(text: str) -> int:
    descriptor = os.memfd_create("stdin")
    data = text.encode("utf-8", "surrogatepass")
    while data:
        data = data[os.write(descriptor, data) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def run_task(module: Any, shield: Shield, header: dict[str, Any], item_bytes: int, parent: int) -> dict[str, Any]:
    """One task in its jails, from start to the last process's end.

    Returns:
        `{"status", "values", "output", "code", "seconds"}`. Status: `done` (the host, or a lone guest, ended by itself),
        `timeout`, `late` (an item's and the task's time), `output`, `disk`, `processes` (other limits that were reached). Values are those
        that the host gave before the end.
    """
    started = time.monotonic()
    argument, limits = header["argument"], Limits(**header["limits"])
    host, guest = module.parts(argument)
    folders = [_folder(shield, role) for role in (0, 1)]
    run = _Run(shield, limits, folders[1], parent)
    try:
        main = _start(run, argument, host, guest, folders, item_bytes, header.get("stdin") or "")
        run.watch(main)
    finally:
        run.finish()
        for folder in folders:
            _remove(folder)
    values = []
    with contextlib.suppress(ValueError):
        for line in run.result.split(b"\n")[:-1]:
            values.append(json.loads(line))
    output = run.output[: limits.output_bytes].decode("utf-8", "replace")
    took, code = round(time.monotonic() - started, 4), run.codes.get(main, 70)
    return {"status": run.status or "done", "values": values, "output": output, "code": code, "seconds": took}


def _start(run: _Run, argument: Any, host: Any, guest: Any, folders: list[Path], item_bytes: int, stdin: str) -> int:
    """Starts the jails; returns the keeper whose end is the task's end."""
    null = os.open(os.devnull, os.O_RDWR)
    ours: list[int] = [null]
    links: list[socket.socket | None] = list(socket.socketpair()) if host and guest else [None, None]
    main = 0
    if not host:
        read_exactly(0, item_bytes)
    else:
        main = _start_host(run, argument, host, folders[0], item_bytes, null, links[0])
    if guest:
        output_in, output_out = os.pipe()
        ours.append(output_out)
        run.pipes[output_in] = "output"
        given = {0: null, 1: output_out, 2: output_out}
        if stdin:
            given[0] = _input(stdin)
            ours.append(given[0])
        if links[1]:
            given[3] = links[1].fileno()
        link = 3 if links[1] else None
        pid = spawn(run.shield, run.limits, folders[1], 1, given, lambda: int(guest(argument, link)))
        main = main or pid
    for descriptor in ours:
        os.close(descriptor)
    for end in links:
        if end:
            end.close()
    return main


def _start_host(run: _Run, argument: Any, host: Any, folder: Path, item_bytes: int, null: int, link: socket.socket | None) -> int:
    result_in, result_out = os.pipe()
    read_in, read_out = os.pipe()
    run.pipes[result_in] = "result"
    given = {0: null, 1: null, 2: null, 3: result_out} | ({4: link.fileno()} if link else {})
    items = [b""]

    def first() -> None:
        items[0] = read_exactly(0, item_bytes)
        os.write(read_out, b".")

    def target() -> int:
        for found in host(argument, json.loads(items[0]), 4 if link else None):
            _say(found, 3)
        return 0

    pid = spawn(run.shield, run.limits, folder, 0, given, target, first)
    os.close(result_out)
    os.close(read_out)
    received = os.read(read_in, 1)
    os.close(read_in)
    if not received:
        raise _Gone
    return pid


def main(kind: str, bare: bool, paths: list[str]) -> None:
    """Serves tasks of one kind until its input ends.

    Args:
        kind: `math` or `code`.
        bare: limits alone, without what the kernel may allow beyond them.
        paths: added to `sys.path`, for kinds that need installed packages.
    """
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.path += [path for path in paths if path not in sys.path]
    module = importlib.import_module(f"posttrain.rewards.sandbox.{kind}_task")
    module.warm()
    shield = bare_shield() if bare else raise_shield()
    gc.collect()
    gc.freeze()
    _say({**asdict(shield), "missing": shield.missing()})
    with contextlib.suppress(EOFError, _Gone, BrokenPipeError):
        while True:
            while not select.select([0], [], [], 1.0)[0]:
                if os.getppid() != parent:
                    return
            head = read_exactly(0, HEAD_BYTES)
            size, item_bytes = int(head[:10]), int(head[11:21])
            header = json.loads(read_exactly(0, size))
            _say(run_task(module, shield, header, item_bytes, parent))
    kernel.hide_memory()

"""Process identity on Linux: who is alive, who dies with whom, who still holds a lock."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PROC = Path("/proc")


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on; None if the process is gone."""
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except (OSError, ValueError):
        return None
    return text[text.rindex(")") + 2 :].split()


def _pids() -> list[int]:
    return [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit()] if _PROC.is_dir() else []


def start_time(pid: int) -> str | None:
    """Kernel start time of a process (with the pid it is unique until reboot); None if it is gone or a zombie."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in "ZX" else fields[19]


def alive(pid: int, started: str | None) -> bool:
    """True if that very process still runs."""
    now = start_time(pid)
    return now is not None and (started is None or now == started)


def die_with_parent(parent: int | None = None) -> None:
    """Asks the kernel to kill this process when its parent dies (Linux; elsewhere a no-op).

    Args:
        parent: pid the parent had; if it is gone already, this process ends at once.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def descendants(pid: int) -> list[int]:
    """All live processes below `pid`, parents before their children."""
    children: dict[int, list[int]] = {}
    for found in _pids():
        fields = _stat(found)
        if fields is not None:
            children.setdefault(int(fields[1]), []).append(found)
    below, todo = [], [pid]
    while todo:
        todo = [child for parent in todo for child in children.get(parent, [])]
        below += todo
    return below


def lock_holders(path: Path) -> list[int]:
    """Processes that hold an flock on `path` through an inherited descriptor; waiting ones are not among them."""
    try:
        wanted = os.stat(path)
    except OSError:
        return []
    return [pid for pid in _pids() if _holds(pid, (wanted.st_dev, wanted.st_ino))]


def _holds(pid: int, wanted: tuple[int, int]) -> bool:
    try:
        for fd in os.listdir(_PROC / str(pid) / "fd"):
            found = os.stat(_PROC / str(pid) / "fd" / fd)
            if (found.st_dev, found.st_ino) == wanted and "FLOCK" in (_PROC / str(pid) / "fdinfo" / fd).read_text():
                return True
    except OSError:
        return False
    return False


def end(processes: list[tuple[int, str | None]], grace_s: float = 5.0) -> None:
    """Kills processes and their descendants, and waits until they are gone."""
    targets = [(p, s) for p, s in processes if alive(p, s)]
    family = targets + [(child, start_time(child)) for pid, _ in targets for child in descendants(pid)]
    for pid, started in family:
        if alive(pid, started):
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue
    deadline = time.monotonic() + grace_s
    while any(alive(*p) for p in family) and time.monotonic() < deadline:
        time.sleep(0.02)

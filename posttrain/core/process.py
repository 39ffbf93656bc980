"""Process identity on Linux: who is alive, who dies with whom."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def start_time(pid: int) -> str | None:
    """Kernel start time of a process (with the pid it is unique until reboot); None if it is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else fields[19]


def alive(pid: int, started: str | None) -> bool:
    """True if that very process still runs."""
    now = start_time(pid)
    return now is not None and (started is None or now == started)


def die_with_parent() -> None:
    """Asks the kernel to kill this process when its parent dies (Linux; elsewhere a no-op)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def descendants(pid: int) -> list[int]:
    """All live processes below `pid`, children first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "stat").read_text()
            except OSError:
                continue
            children.setdefault(int(text[text.rindex(")") + 2 :].split()[1]), []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        todo = [child for parent in todo for child in children.get(parent, [])]
        found += todo
    return found


def end(processes: list[tuple[int, str | None]], grace_s: float = 5.0) -> None:
    """Kills processes and their descendants, and waits until they are gone."""
    targets = [(p, s) for p, s in processes if alive(p, s)]
    family = targets + [(child, start_time(child)) for pid, _ in targets for child in descendants(pid)]
    for pid, started in family:
        if alive(pid, started):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    deadline = time.monotonic() + grace_s
    while any(alive(*p) for p in family) and time.monotonic() < deadline:
        time.sleep(0.02)

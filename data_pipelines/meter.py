"""How far a step is: rows and text done in every shard, in memory that the workers share, drawn by the first process.

Only a worker writes the two numbers of its shard, so there is nothing to lock. Where workers share no memory with this
process (a cluster), progress is told by whole shards.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator
from typing import Any

from data_pipelines.shards import Shard
from posttrain.core.events import Events

MB = 1e6
EVERY_ROWS = 64
EVERY_S = 0.2
"""Seconds between two looks."""
COMPRESSED = 0.3
"""File bytes a byte of text in compressed files, until a finished shard tells better."""

_counters: Any = None
_tell: Callable[[], None] | None = None


def new_counters(shards: int) -> Any:
    """Shared memory for the rows and text bytes of so many shards."""
    return multiprocessing.get_context("spawn").RawArray("q", 2 * max(1, shards))


def use(counters: Any) -> None:
    """This process counts there from now on."""
    global _counters
    _counters = counters


class Count:
    """Counts one shard's rows in the running step."""

    def __init__(self, shard: Shard) -> None:
        self._at = 2 * shard.index
        self._rows = self._size = 0
        if _counters is not None:
            _counters[self._at] = _counters[self._at + 1] = 0

    def add(self, size: int) -> None:
        """One more row with so many characters."""
        self._rows += 1
        self._size += size
        if self._rows % EVERY_ROWS == 0 and _counters is not None:
            _counters[self._at], _counters[self._at + 1] = self._rows, self._size
            if _tell is not None:
                _tell()

    def close(self) -> None:
        """The last figures."""
        if _counters is not None:
            _counters[self._at], _counters[self._at + 1] = self._rows, self._size


class Watch:
    """Tells the events how far a step is, by file size: whole shards exactly, those in hand by the text they have read."""

    def __init__(self, events: Events, step: str, shards: list[Shard], before: list[Shard]) -> None:
        self._events, self._step, self._shards = events, step, shards
        self._done = {shard.index for shard in before}
        self._total = sum(shard.size for shard in shards)
        self._start = sum(shard.size for shard in before) / MB
        self._last = 0.0

    def look(self, shard: Shard | None = None) -> None:
        """Counts a finished shard, if any, and tells the figures."""
        if shard is not None:
            self._done.add(shard.index)
        finished = len(self._done) == len(self._shards)
        if not finished and time.monotonic() - self._last < EVERY_S:
            return
        self._last = time.monotonic()
        rows = sum(_counters[0::2]) if _counters is not None else None
        more = {"rows": rows} if rows else {}
        if not self._total:
            self._events.progress(self._step, len(self._done), len(self._shards), "shards", EVERY_S, **more)
            return
        done = self._total if finished else self._read()
        self._events.progress(self._step, round(done / MB, 6), round(self._total / MB, 6), "MB", EVERY_S, start=self._start, **more)

    def _read(self) -> float:
        whole = [shard for shard in self._shards if shard.index in self._done]
        done = float(sum(shard.size for shard in whole))
        if _counters is None:
            return done
        text = [_counters[2 * shard.index + 1] for shard in whole]
        counted = [(shard.size, size) for shard, size in zip(whole, text, strict=True) if size]
        ratio = sum(s for s, _ in counted) / sum(t for _, t in counted) if counted else None
        for shard in self._shards:
            if shard.index not in self._done and (size := _counters[2 * shard.index + 1]):
                known = ratio or (1.0 if shard.path.endswith(("jsonl", "ndjson", "txt")) else COMPRESSED)
                done += min(0.99 * shard.size, known * size)
        return done


@contextlib.contextmanager
def watching(events: Events, step: str, shards: list[Shard], before: list[Shard]) -> Iterator[Watch]:
    """A Watch for one step; in one process it also looks while a shard is read."""
    global _tell
    if _counters is not None:
        for at in range(len(_counters)):
            _counters[at] = 0
    watch = Watch(events, step, shards, before)
    _tell = watch.look
    try:
        yield watch
    finally:
        _tell = None

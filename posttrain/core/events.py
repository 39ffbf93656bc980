"""Events of a running stage: strict JSON lines that the parent draws and the report reads.

Kinds: `log`, `metrics`, `progress`, `checkpoint`, `commit`. Non-finite numbers are written as the strings "NaN",
"Infinity", "-Infinity", so every line parses with a strict reader and no NaN is ever shown as 0.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any, TextIO


def jsonable(value: Any) -> Any:
    """`value` with non-finite floats as strings, numpy scalars as numbers, lone surrogates replaced."""
    if isinstance(value, bool) or value is None or isinstance(value, int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {jsonable(str(k)): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(v) for v in value]
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        return jsonable(value.item())
    return jsonable(str(value))


_LINE_ENDS = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"}


def dumps(value: Any, **kwargs: Any) -> str:
    """Strict JSON text of `jsonable(value)`; Unicode's other line ends are escaped, so a line stays one for every reader."""
    return json.dumps(jsonable(value), ensure_ascii=False, allow_nan=False, **kwargs).translate(_LINE_ENDS)


class Events:
    """Appends events to a JSON-lines file; ranks other than 0 write nothing.

    Args:
        path: file to append to; None writes nowhere.
        stage: name of the stage, stamped on every event.
        main: False silences this instance.
    """

    def __init__(self, path: Path | None, stage: str = "", *, main: bool = True) -> None:
        self.stage, self.main = stage, main
        self._file: TextIO | None = None
        if path is not None and main:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        self._bars: dict[str, tuple[float, float, float]] = {}
        self.sinks: list[Any] = []

    def emit(self, kind: str, **fields: Any) -> None:
        """Writes one event."""
        if not self.main:
            return
        event = {"t": round(time.time(), 3), "stage": self.stage, "kind": kind, **fields}
        if self._file is not None:
            self._file.write(dumps(event) + "\n")
            self._file.flush()
        for sink in self.sinks:
            sink(event)

    def log(self, message: str, level: str = "info", **fields: Any) -> None:
        """A line for a person."""
        self.emit("log", level=level, message=message, **fields)

    def warn(self, message: str, **fields: Any) -> None:
        """A warning for a person."""
        self.log(message, level="warning", **fields)

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Numbers at an optimizer step (or block, or shard)."""
        self.emit("metrics", step=step, values=values)

    def progress(self, what: str, done: float, total: float | None, unit: str = "it", every_s: float = 0.2, **fields: Any) -> None:
        """How far a piece of work is; at most one event each `every_s` seconds and piece, the first and last always.

        Counting from a lower figure than before is a new piece of work of that name, with its own clock.
        """
        now = time.monotonic()
        start, last, before = self._bars.get(what, (now, 0.0, done))
        if done < before:
            start, last = now, 0.0
        if now - last < every_s and not (total is not None and done >= total):
            return
        self._bars[what] = (start, now, done)
        self.emit("progress", what=what, done=done, total=total, unit=unit, seconds=round(now - start, 3), **fields)

    def flush(self) -> None:
        """To the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; a full disk at this point loses the last line and nothing else."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()

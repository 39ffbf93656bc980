"""Draws a child's events: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any, TextIO

PLAIN_EVERY_S = 10.0
SHOWN_METRICS = ("loss", "reward", "reward_std", "entropy", "grad_norm", "lr", "tokens_per_s")


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    seconds = int(seconds)
    hours, rest = divmod(seconds, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def quantity(value: float) -> str:
    """12.3k, 4.5M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (limit if unit != 'k' else 1e3):.1f}{unit}"
    return f"{value:.4g}"


def progress_text(event: dict[str, Any], metrics: dict[str, Any]) -> str:
    """`sft  120/500 steps  3.1 steps/s  ETA 2:02  loss 1.23`."""
    done, total, seconds = event["done"], event.get("total"), event.get("seconds") or 0.0
    start = event.get("start", 0)
    rate = (done - start) / seconds if seconds > 0 else 0.0
    parts = [f"{event['stage']}: {event['what']} {quantity(done)}" + (f"/{quantity(total)}" if total else "") + f" {event['unit']}"]
    if rate > 0:
        parts.append(f"{quantity(rate)} {event['unit']}/s")
        if total and done < total:
            parts.append(f"ETA {clock((total - done) / rate)}")
    if event.get("rows") and seconds > 0:
        parts.append(f"{quantity(event['rows'] / seconds)} rows/s")
    parts += [f"{k} {quantity(metrics[k])}" for k in SHOWN_METRICS if isinstance(metrics.get(k), int | float)]
    return "  ".join(parts)


class Tail:
    """Reads the complete lines that were added to a file since the last look."""

    def __init__(self, path: Path) -> None:
        self.path, self._at = path, 0

    def read(self) -> list[dict[str, Any]]:
        """New events; a line still being written waits for the next look."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self._at)
                data = file.read()
        except OSError:
            return []
        end = data.rfind(b"\n") + 1
        self._at += end
        return [event for line in data[:end].split(b"\n") if (event := _parsed(line)) is not None]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and {"kind", "stage"} <= found.keys() else None


class Display:
    """Shows the events of a group of stages.

    Args:
        files: events files to follow.
        stream: where to write; a live line is drawn only on a terminal.
    """

    def __init__(self, files: list[Path], stream: TextIO | None = None) -> None:
        self._tails = [Tail(f) for f in files]
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._last: dict[str, float] = {}
        self._metrics: dict[str, dict[str, Any]] = {}
        self._drawn = False

    def tick(self) -> None:
        """Reads and shows what is new."""
        for tail in self._tails:
            for event in tail.read():
                self._show(event)

    def _show(self, event: dict[str, Any]) -> None:
        kind, stage = event["kind"], event["stage"]
        if kind == "metrics":
            self._metrics[stage] = {**self._metrics.get(stage, {}), **event["values"]}
        elif kind == "progress":
            self._progress(event)
        elif kind == "log":
            mark = "warning: " if event["level"] == "warning" else ""
            self._line(f"{stage}: {mark}{event['message']}")
        elif kind == "commit" and event["state"] == "end":
            self._line(f"{stage}: committed in {clock(event['seconds'])}")

    def _progress(self, event: dict[str, Any]) -> None:
        text = progress_text(event, self._metrics.get(event["stage"], {}) if event["what"] == "train" else {})
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write("\r\x1b[2K" + text[:width])
            self._stream.flush()
            self._drawn = True
            return
        now, piece = time.monotonic(), f"{event['stage']}/{event['what']}"
        finished = event.get("total") and event["done"] >= event["total"]
        if finished or now - self._last.get(piece, now - PLAIN_EVERY_S) >= PLAIN_EVERY_S:
            self._last[piece] = now
            self._line(text)

    def _line(self, text: str) -> None:
        self.close()
        self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Takes the live line away, so that what is printed next stands alone."""
        if self._drawn:
            self._stream.write("\r\x1b[2K")
            self._stream.flush()
            self._drawn = False

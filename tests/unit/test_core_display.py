"""What a person sees of the events, on a terminal and elsewhere."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from posttrain.core import display
from posttrain.core.display import Display, Tail, clock, progress_text, quantity


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def line(kind: str, **fields: object) -> str:
    return json.dumps({"t": 1.0, "stage": "sft", "kind": kind, **fields}) + "\n"


def progress(done: int, total: int | None = 100, seconds: float = 10.0, **more: object) -> str:
    return line("progress", what="steps", done=done, total=total, unit="steps", seconds=seconds, **more)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (62.9, "1:02"), (3661, "1:01:01")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.1236, "0.1236"), (9999, "9999"), (12_300, "12.3k"), (4.5e6, "4.5M"), (2e9, "2.0G"), (-5e6, "-5.0M")]
)
def test_quantity(value: float, text: str) -> None:
    assert quantity(value) == text


def test_progress_text() -> None:
    event = json.loads(progress(20, start=10))
    assert progress_text(event, {"loss": 1.5, "other": 2, "reward": "NaN"}) == "sft: steps 20/100 steps  1 steps/s  ETA 1:20  loss 1.5"
    assert progress_text(json.loads(progress(20, None, 0.0)), {}) == "sft: steps 20 steps"
    assert progress_text(json.loads(progress(20, 40, rows=5000)), {}) == "sft: steps 20/40 steps  2 steps/s  ETA 0:10  500 rows/s"


def test_tail_waits_for_the_end_of_a_line_and_skips_what_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    whole = line("log", level="info", message="a\u2028b").replace("\\u2028", "\u2028")
    path.write_text(whole[:10])
    assert tail.read() == []
    path.write_text(whole + "\0\0garbage\n[1]\n" + '{"half": 1}\n' + whole)
    assert [e["message"] for e in tail.read()] == ["a\u2028b"] * 2
    assert tail.read() == []


def test_plain_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, stream = tmp_path / "e.jsonl", io.StringIO()
    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    shown = Display([path], stream)
    path.write_text(line("log", level="warning", message="careful") + progress(1) + progress(2))
    shown.tick()
    now[0] += 11
    with path.open("a") as file:
        file.write(progress(3) + progress(4) + progress(100) + line("commit", state="begin") + line("commit", state="end", seconds=61))
    shown.tick()
    shown.close()
    text = stream.getvalue()
    assert [part.split("  ")[0] for part in text.splitlines()] == [
        "sft: warning: careful",
        "sft: steps 1/100 steps",
        "sft: steps 3/100 steps",
        "sft: steps 100/100 steps",
        "sft: committed in 1:01",
    ]
    assert "\r" not in text and "\x1b" not in text


def test_live_line_is_cut_to_the_width_and_taken_away_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, stream = tmp_path / "e.jsonl", Terminal()
    monkeypatch.setenv("COLUMNS", "20")
    shown = Display([path], stream)
    path.write_text(progress(1) + line("metrics", step=1, values={"loss": 2.0}) + progress(2))
    shown.tick()
    drawn = stream.getvalue().split("\r\x1b[2K")[1:]
    assert [len(d) for d in drawn] == [19, 19]
    shown.close()
    assert stream.getvalue().endswith("\r\x1b[2K")

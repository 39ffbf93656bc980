"""Events are strict JSON lines; progress is thinned; sinks see everything; a full disk at the end hurts nobody."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from posttrain.core.events import Events, dumps, jsonable


def strict(text: str) -> object:
    return json.loads(text, parse_constant=lambda c: pytest.fail(f"not strict: {c}"))


def read(path: Path) -> list[dict]:
    return [strict(line) for line in path.read_text(encoding="utf-8").splitlines()]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (float("nan"), "NaN"),
        (float("-inf"), "-Infinity"),
        (np.float32("inf"), "Infinity"),
        (np.int64(3), 3),
        (np.array([1.5]), 1.5),
        (True, True),
        ({1: {2.0: None}}, {"1": {"2.0": None}}),
        ((1, [2, (3,)]), [1, [2, [3]]]),
        ("a\ud800b", "a?b"),
        (Path("/x"), "/x"),
    ],
)
def test_jsonable(value: object, expected: object) -> None:
    assert jsonable(value) == expected
    strict(dumps(value))


def test_lines_and_sinks(tmp_path: Path) -> None:
    path, seen = tmp_path / "deep" / "events.jsonl", []
    events = Events(path, "sft")
    events.sinks.append(seen.append)
    events.log("naïve ✓")
    events.warn("careful", count=2)
    events.metrics(3, {"loss": float("nan"), "text": "line\u2028break"})
    events.close()
    events.close()
    found = read(path)
    assert [e["kind"] for e in found] == ["log", "log", "metrics"] and {e["stage"] for e in found} == {"sft"}
    assert found[2]["values"]["loss"] == "NaN" and found[1]["level"] == "warning"
    assert len(seen) == 3 and path.read_bytes().count(b"\n") == 3
    Events(path, "sft").log("appended")
    assert len(read(path)) == 4


def test_progress_is_thinned_but_the_ends_are_kept(tmp_path: Path) -> None:
    events = Events(tmp_path / "e.jsonl", "s")
    for done in range(1, 101):
        events.progress("rows", done, 100, "rows", every_s=60)
        events.progress("other", done, None, every_s=60)
    events.flush()
    found = read(tmp_path / "e.jsonl")
    assert [(e["what"], e["done"]) for e in found] == [("rows", 1), ("other", 1), ("rows", 100)]


def test_only_rank_0_writes(tmp_path: Path) -> None:
    events = Events(tmp_path / "e.jsonl", "s", main=False)
    events.log("x")
    events.flush()
    events.close()
    assert not (tmp_path / "e.jsonl").exists()


def test_close_on_a_full_disk() -> None:
    events = Events(None, "s")
    events._file = open("/dev/full", "w")  # noqa: SIM115
    events._file.write("x" * 10)
    events.close()
    assert events._file is None


def test_a_second_piece_of_work_of_the_same_name_has_its_own_clock(tmp_path, monkeypatch) -> None:
    from posttrain.core import events as module

    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    found = []
    events = module.Events(None)
    events.sinks.append(found.append)
    for at, done in ((100.0, 1), (110.0, 4), (200.0, 1), (205.0, 4)):
        now[0] = at
        events.progress("eval", done, 4)
    assert [e["seconds"] for e in found] == [0.0, 10.0, 0.0, 5.0]

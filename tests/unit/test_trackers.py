"""Trackers: what is sent, what happens when one is missing or fails."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from posttrain.core import trackers
from posttrain.core.events import Events
from posttrain.errors import ConfigError


def _read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_gets_numbers_by_step(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    events = Events(tmp_path / "events.jsonl", "sft")
    trackers.attach(events, ["jsonl", "tensorboard"], "demo", "demo/sft", tmp_path / "board")
    events.metrics(1, {"loss": 2.0, "note": "text", "flag": True})
    events.metrics(2, {"loss": float("nan")})
    events.log("a prompt that stays here")
    events.emit("commit", state="end", digest="d", seconds=1.0, summary={"eval": {"after": {"loss": 1.5}}, "tokens": 10})
    events.close()
    found = _read(tmp_path / "board")
    assert set(found) == {"loss", "eval/after/loss", "tokens"}
    assert found["loss"][0] == (1, 2.0) and math.isnan(found["loss"][1][1]) and found["tokens"] == [(2, 10.0)]


def test_a_missing_package_is_a_config_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    for name in ("wandb", "trackio", "tensorboard"):
        with pytest.raises(ConfigError, match=f"`{name}` is not installed"):
            trackers.attach(Events(None), [name], None, "x", tmp_path)


def test_a_tracker_that_refuses_or_fails_never_ends_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise RuntimeError("not logged in")

    monkeypatch.setattr(trackers, "find_spec", lambda name: True)
    monkeypatch.setitem(trackers._OPEN, "wandb", ("wandb", refuse))
    with pytest.raises(ConfigError, match="not logged in"):
        trackers.attach(Events(None), ["wandb"], None, "x", tmp_path)
    calls: list[int] = []

    def broken(values: dict[str, float], step: int) -> None:
        calls.append(step)
        raise OSError("no route")

    monkeypatch.setitem(trackers._OPEN, "wandb", ("wandb", lambda *args: broken))
    events = Events(tmp_path / "events.jsonl", "sft")
    trackers.attach(events, ["wandb"], None, "x", tmp_path)
    events.metrics(1, {"loss": 1.0})
    events.metrics(2, {"loss": 1.0})
    events.close()
    text = (tmp_path / "events.jsonl").read_text()
    assert calls == [1] and "left out from here on" in text and text.count('"metrics"') == 2


def test_other_ranks_send_nothing(tmp_path: Path) -> None:
    events = Events(None, main=False)
    trackers.attach(events, ["tensorboard", "wandb"], None, "x", tmp_path)
    assert events.sinks == [] and not list(tmp_path.iterdir())

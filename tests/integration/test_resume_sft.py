"""SFT stages: a run that was stopped and run again commits the same bytes as one that was not."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from trainer_kit import CHATS, TASKS, Interrupted, at_step, digest, interrupt, run_stage

pytest.importorskip("torch")

BASE = {"steps": 6, "batch": {"rows": 8, "per_device": 4}, "checkpoint": {"every": 2}, "data": {"max_length": 64}}


@pytest.fixture(scope="module")
def straight(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of BASE."""
    root = tmp_path_factory.mktemp("straight")
    run_stage(root, "sft", CHATS, "messages", tiny_model_dir, **BASE)
    return root


def stopped(root: Path, model: Path, step: int, **fields: Any) -> None:
    """Runs a stage until the metrics of `step`, then breaks off as a kill would."""
    with pytest.raises(Interrupted):
        run_stage(root, "sft", CHATS, "messages", model, sinks=[at_step(step, interrupt)], **{**BASE, **fields})


def messages(ctx: Any) -> str:
    """Log lines of a run."""
    return "\n".join(event["message"] for event in ctx.seen if event["kind"] == "log")


def test_stopped_and_resumed_equals_straight(tiny_model_dir: Path, tmp_path: Path, straight: Path) -> None:
    stopped(tmp_path, tiny_model_dir, 5)
    ctx = run_stage(tmp_path, "sft", CHATS, "messages", tiny_model_dir, **BASE)
    assert "resuming from checkpoint-4" in messages(ctx)
    assert [event["step"] for event in ctx.seen if event["kind"] == "metrics" and "loss" in event["values"]] == [5, 6]
    assert digest(tmp_path / "out") == digest(straight / "out")


@pytest.mark.parametrize("damage", ["no state", "half the weights"])
def test_broken_newest_checkpoint(tiny_model_dir: Path, tmp_path: Path, straight: Path, damage: str) -> None:
    """C23: the newest checkpoint lost a file, or half of one: said so, the one before is used, same result."""
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "work" / "checkpoint-6"
    if damage == "no state":
        (newest / "trainer_state.json").unlink()
    else:
        weights = newest / "model.safetensors"
        os.truncate(weights, weights.stat().st_size // 2)
    ctx = run_stage(tmp_path, "sft", CHATS, "messages", tiny_model_dir, **BASE)
    text = messages(ctx)
    assert "checkpoint ignored" in text
    assert "checkpoint-6" in text
    assert "resuming from checkpoint-4" in text
    assert digest(tmp_path / "out") == digest(straight / "out")


def test_killed_inside_a_save(tiny_model_dir: Path, tmp_path: Path, straight: Path) -> None:
    def sink(event: dict[str, Any]) -> None:
        if event["kind"] == "checkpoint" and event["state"] == "begin" and event["step"] == 4:
            half = tmp_path / "work" / "checkpoint-4"
            half.mkdir()
            (half / "model.safetensors").write_bytes(b"x" * 100)
            raise Interrupted

    with pytest.raises(Interrupted):
        run_stage(tmp_path, "sft", CHATS, "messages", tiny_model_dir, sinks=[sink], **BASE)
    ctx = run_stage(tmp_path, "sft", CHATS, "messages", tiny_model_dir, **BASE)
    assert "resuming from checkpoint-2" in messages(ctx)
    assert digest(tmp_path / "out") == digest(straight / "out")


def test_sigterm_saves_and_raises_preempted(tiny_model_dir: Path, tmp_path: Path, straight: Path) -> None:
    from posttrain.errors import Preempted

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="SIGTERM after step 4 of 6"):
        run_stage(
            tmp_path, "sft", CHATS, "messages", tiny_model_dir, sinks=[at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))], **BASE
        )
    assert signal.getsignal(signal.SIGTERM) is before
    ctx = run_stage(tmp_path, "sft", CHATS, "messages", tiny_model_dir, **BASE)
    assert "resuming from checkpoint-4" in messages(ctx)
    assert digest(tmp_path / "out") == digest(straight / "out")


def test_stopped_after_the_last_step_trains_no_further(tiny_model_dir: Path, tmp_path: Path, straight: Path) -> None:
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    ctx = run_stage(tmp_path, "sft", CHATS, "messages", tiny_model_dir, **BASE)
    assert not [event for event in ctx.seen if event["kind"] == "metrics"]
    assert digest(tmp_path / "out") == digest(straight / "out")


def test_rows_that_do_not_fill_the_last_step(tiny_model_dir: Path, tmp_path: Path) -> None:
    """C25: 10 rows, one a pass, 4 accumulated, 2 epochs, broken off in the middle of an accumulation."""
    fields = {"steps": None, "epochs": 2.0, "batch": {"rows": 4, "per_device": 1}, "checkpoint": {"every": 1}, "data": {"max_length": 64}}
    whole = run_stage(tmp_path / "a", "sft", CHATS[:10], "messages", tiny_model_dir, **fields)
    assert whole.summary["steps"] == 5
    assert whole.summary["epochs"] == pytest.approx(2.0)
    passes = iter(range(100))

    def sixth_pass(event: dict[str, Any]) -> None:
        if event["kind"] == "pass" and next(passes) == 5:
            raise Interrupted

    from posttrain.trainers import _sft

    original = _sft.SFTTrainer.training_step
    ctx_sinks = [sixth_pass]

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.events.emit("pass")
        return original(self, *args, **kwargs)

    _sft.SFTTrainer.training_step = counted
    try:
        with pytest.raises(Interrupted):
            run_stage(tmp_path / "b", "sft", CHATS[:10], "messages", tiny_model_dir, sinks=ctx_sinks, **fields)
    finally:
        _sft.SFTTrainer.training_step = original
    resumed = run_stage(tmp_path / "b", "sft", CHATS[:10], "messages", tiny_model_dir, **fields)
    assert "resuming from checkpoint-1" in messages(resumed)
    assert resumed.summary["steps"] == 5
    assert digest(tmp_path / "b" / "out") == digest(tmp_path / "a" / "out")


@pytest.mark.parametrize(
    ("rows", "kind", "fields"),
    [
        (TASKS, "verifiable", {"lora": {"r": 4, "dropout": 0.1}}),
        (
            [{"text": row["prompt"] * 4, "weight": 1 + i % 3} for i, row in enumerate(TASKS)],
            "text",
            {"data": {"max_length": 64, "weights": "loss"}},
        ),
        (CHATS, "messages", {"data": {"max_length": 64, "packing": True}, "batch": {"tokens": 256, "per_device": 2}, "steps": 4}),
    ],
    ids=["lora-dropout", "row-weights", "packing"],
)
def test_other_forms_resume_bitwise(tiny_model_dir: Path, tmp_path: Path, rows: Any, kind: str, fields: dict[str, Any]) -> None:
    fields = {**BASE, "steps": 4, **fields}
    run_stage(tmp_path / "a", "sft", rows, kind, tiny_model_dir, **fields)
    with pytest.raises(Interrupted):
        run_stage(tmp_path / "b", "sft", rows, kind, tiny_model_dir, sinks=[at_step(3, interrupt)], **fields)
    ctx = run_stage(tmp_path / "b", "sft", rows, kind, tiny_model_dir, **fields)
    assert "resuming from checkpoint-2" in messages(ctx)
    assert digest(tmp_path / "b" / "out") == digest(tmp_path / "a" / "out")
    assert ctx.meta["kind"] == ("adapter" if "lora" in fields else "model")


def test_rotation_keeps_what_was_asked(straight: Path) -> None:
    assert sorted(p.name for p in (straight / "work").iterdir()) == ["checkpoint-4", "checkpoint-6"]
    assert not list((straight / "work").glob("*/training_args.bin"))
    assert not list((straight / "work").glob("README.md"))

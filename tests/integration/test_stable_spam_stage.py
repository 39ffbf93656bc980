"""Stable-SPAM in trainer stages: resumed it gives the same bytes, off it is AdamW, and every trainer takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trainer_kit import CHATS, TASKS, Interrupted, at_step, digest, interrupt, run_stage

pytest.importorskip("torch")

SPAM = {"name": "stable_spam", "lr": 1e-3, "stable_spam": {"reset_every": 3, "decay_to": 0.5}}
STABILIZER = {"name": "stable_spam", "lr": 1e-3, "stable_spam": {"preset": "gradient_stabilizer"}}
BASE = {"steps": 5, "batch": {"rows": 8, "per_device": 4}, "checkpoint": {"every": 2}, "data": {"max_length": 64}, "optim": SPAM}


def sft(root: Path, model: Path, sinks: Any = (), **fields: Any) -> Any:
    return run_stage(root, "sft", CHATS, "messages", model, sinks=sinks, **{**BASE, **fields})


def messages(ctx: Any) -> str:
    return "\n".join(event["message"] for event in ctx.seen if event["kind"] == "log")


def metrics(ctx: Any, name: str) -> list[float]:
    return [event["values"][name] for event in ctx.seen if event["kind"] == "metrics" and name in event["values"]]


@pytest.mark.parametrize("fields", [{}, {"lora": {"r": 4}, "optim": STABILIZER}], ids=["full", "lora, gradient_stabilizer"])
def test_stopped_and_resumed_equals_straight(tiny_model_dir: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    straight = sft(tmp_path / "a", tiny_model_dir, **fields)
    with pytest.raises(Interrupted):
        sft(tmp_path / "b", tiny_model_dir, [at_step(3, interrupt)], **fields)
    resumed = sft(tmp_path / "b", tiny_model_dir, **fields)
    assert "resuming from checkpoint-2" in messages(resumed)
    assert digest(tmp_path / "b" / "out") == digest(tmp_path / "a" / "out")
    assert len(metrics(straight, "optim/norm")) == 5
    assert all(0 < value < 13 for value in metrics(straight, "optim/norm"))
    if not fields:
        assert metrics(straight, "optim/resets") == [0, 0, 1, 1, 1]
        assert metrics(resumed, "optim/resets") == [1, 1, 1]
        assert metrics(straight, "optim/spike")[0] == pytest.approx(1.0)


def test_all_off_commits_the_bytes_of_adamw(tiny_model_dir: Path, tmp_path: Path) -> None:
    off = {"clip_decay": None, "norm_decays": None, "reset_every": 0}
    common = {"lr": 1e-3, "weight_decay": 0.1, "max_grad_norm": 1.0}
    sft(tmp_path / "a", tiny_model_dir, optim=common)
    sft(tmp_path / "b", tiny_model_dir, optim={**common, "name": "stable_spam", "stable_spam": off})
    assert digest(tmp_path / "a" / "out") == digest(tmp_path / "b" / "out")
    sft(tmp_path / "c", tiny_model_dir)
    assert digest(tmp_path / "c" / "out") != digest(tmp_path / "a" / "out")


def test_accumulation_does_not_change_the_steps(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Statistics are of the gradient of a step, not of its passes."""
    runs = [sft(tmp_path / str(n), tiny_model_dir, steps=3, batch={"rows": 8, "per_device": n}) for n in (8, 1)]
    losses = [metrics(run, "loss") for run in runs]
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)
    assert metrics(runs[0], "optim/spike") == pytest.approx(metrics(runs[1], "optim/spike"), rel=1e-3)


def test_a_reset_that_never_comes_is_said(tiny_model_dir: Path, tmp_path: Path) -> None:
    ctx = sft(tmp_path, tiny_model_dir, steps=1, optim={"name": "stable_spam", "lr": 1e-3})
    assert "reset_every: 1000 is not reached in 1 steps" in messages(ctx)


def test_grpo_takes_it(tiny_model_dir: Path, tmp_path: Path) -> None:
    fields = {
        "steps": 2, "group": 4, "batch": {"rows": 8, "per_device": 8}, "data": {"max_length": 64}, "rollout": {"max_tokens": 4},
        "rewards": [{"use": "length"}], "optim": SPAM,
    }  # fmt: skip
    ctx = run_stage(tmp_path, "grpo", TASKS, "verifiable", tiny_model_dir, **fields)
    assert len(metrics(ctx, "optim/norm")) == 2


@pytest.mark.slow
def test_tiny_pipeline(tmp_path: Path) -> None:
    from posttrain.cli import main
    from posttrain.core.records import read_stages
    from posttrain.core.rundir import RunDir

    tiny = Path(__file__).resolve().parents[2] / "configs" / "tiny" / "stable_spam.yaml"
    assert main(["run", str(tiny), "--runs", str(tmp_path), "--quiet"]) == 0
    assert {stage.name for stage in read_stages(RunDir(tmp_path / "tiny-stable-spam"))} == {"tasks", "base", "full", "adapter"}


def test_a_gradient_that_is_not_finite_is_named_without_a_global_clip(tiny_model_dir: Path, tmp_path: Path) -> None:
    from posttrain.errors import NumericsError
    from posttrain.trainers._sft import SFTTrainer

    original = SFTTrainer.training_step

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        next(p for n, p in self.model.named_parameters() if n.endswith("layers.0.mlp.up_proj.weight")).grad.view(-1)[5] = float("nan")
        return loss

    SFTTrainer.training_step = poisoned
    try:
        with pytest.raises(NumericsError, match=r"layers\.0\.mlp\.up_proj\.weight"):
            sft(tmp_path, tiny_model_dir, steps=1)
    finally:
        SFTTrainer.training_step = original

"""GRPO: a run that was stopped and run again gives the same weights, in the middle of a generation window and in later epochs too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trainer_kit import TASKS, Interrupted, at_step, curve, digest, grpo_trainer, interrupt, lora, run_stage, same, weights

pytest.importorskip("torch")

BASE = {
    "steps": 6,
    "group": 4,
    "batch": {"rows": 8, "per_device": 4},
    "checkpoint": {"every": 1},
    "data": {"max_length": 64},
    "rollout": {"max_tokens": 6},
    "rewards": [{"use": "length", "weight": 1.0}],
}
"""6 steps of 2 prompts."""


@pytest.mark.parametrize(
    ("adapter", "args", "step"),
    [(False, {}, 8), (True, {"beta": 0.1}, 3), (False, {"num_iterations": 2}, 5), (False, {"steps_per_generation": 4}, 5)],
    ids=["second-epoch", "lora-kl", "mid-window-iterations", "mid-window-steps"],
)
def test_trainer_alone_resumes_bitwise(tiny_model_dir: Path, tmp_path: Path, adapter: bool, args: dict[str, Any], step: int) -> None:
    """TRL's own sampling; 12 rows are 6 steps an epoch."""
    from posttrain.trainers.grpo import GRPOTrainer

    made = grpo_trainer(GRPOTrainer, tiny_model_dir, tmp_path, peft=lora() if adapter else None, save_steps=step, **args)
    made.train()
    expected, losses = weights(made), curve(made)
    again = grpo_trainer(GRPOTrainer, tiny_model_dir, tmp_path, peft=lora() if adapter else None, save_steps=100, **args)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert curve(again)[step:] == losses[step:]
    assert same(weights(again), expected)


@pytest.mark.parametrize("fields", [{}, {"lora": {"r": 4}, "num_iterations": 2, "beta": 0.05}], ids=["full", "lora-kl-iterations"])
def test_stage_resumes_to_the_same_bytes(tiny_model_dir: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    """The hf engine; C83: sampled and recomputed log-probabilities agree after the resume too, and the version is logged."""
    fields = {**BASE, **fields}
    whole = run_stage(tmp_path / "a", "grpo", TASKS[:7], "verifiable", tiny_model_dir, **fields)
    with pytest.raises(Interrupted):
        run_stage(tmp_path / "b", "grpo", TASKS[:7], "verifiable", tiny_model_dir, sinks=[at_step(4, interrupt)], **fields)
    ctx = run_stage(tmp_path / "b", "grpo", TASKS[:7], "verifiable", tiny_model_dir, **fields)
    assert digest(tmp_path / "b" / "out") == digest(tmp_path / "a" / "out")
    assert ctx.summary["tokens"] == whole.summary["tokens"]
    assert ctx.summary["samples"] == whole.summary["samples"]
    assert {"prompt", "completion", "length", "advantage"} <= set(ctx.summary["samples"][0])
    logged = [event["values"] for event in ctx.seen if event["kind"] == "metrics"]
    versions = [int(values["rollout/version"]) for values in logged if "rollout/version" in values]
    assert versions == ([3, 4, 5] if "lora" not in fields else [4])
    assert any(values.get("grad_norm", 0) > 0 for values in logged)
    for values in logged:
        assert values.get("rollout/logp_gap_max", 0) < 1e-4


def test_long_prompts_are_found_before_step_one(tiny_model_dir: Path, tmp_path: Path) -> None:
    """C75: one row of thousands of tokens among short ones, dropped and counted, or refused with tokens and limit."""
    from posttrain.errors import DataError

    rows = [*TASKS[:17], {"prompt": "1 + " * 3000, "answer": "3000"}, *TASKS[17:20]]
    with pytest.raises(DataError) as error:
        run_stage(tmp_path / "a", "grpo", rows, "verifiable", tiny_model_dir, **BASE)
    assert "18" in str(error.value)
    assert "58" in str(error.value)
    fields = {**BASE, "steps": 1, "data": {"max_length": 64, "on_bad": "skip"}}
    ctx = run_stage(tmp_path / "b", "grpo", rows, "verifiable", tiny_model_dir, **fields)
    assert ctx.summary["prompts"]["rows"] == 20
    assert sum(ctx.summary["prompts"]["left_out"].values()) == 1


def test_completion_that_leaves_no_room_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    from posttrain.errors import ConfigError

    fields = {**BASE, "rollout": {"max_tokens": 600}, "data": {"max_length": 1000}}
    with pytest.raises(ConfigError, match="512 positions"):
        run_stage(tmp_path, "grpo", TASKS[:4], "verifiable", tiny_model_dir, **fields)

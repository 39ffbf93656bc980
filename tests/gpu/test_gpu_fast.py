"""`fast: on` against `fast: off` on a GPU, in float32 and bfloat16. Skipped where there is no GPU."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from fast_kit import make_model, make_tape, make_trainer, step_of
from trainer_kit import TASKS, run_stage

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu


def gradients(folder: Path, out: Path, name: str, dtype: Any, checkpointing: bool) -> dict[bool, tuple[float, Any]]:
    """Loss and gradient on one tape, with `fast` off and on."""
    from transformers import PreTrainedTokenizerFast

    tokenizer, found = PreTrainedTokenizerFast.from_pretrained(folder), {}
    for fast in (False, True):
        model = make_model(name, tokenizer, dtype)
        args = {"use_cpu": False, "bf16": dtype == torch.bfloat16, "gradient_checkpointing": checkpointing, "loss_type": "grpo"}
        trainer = make_trainer(model, tokenizer, out / f"{dtype}-{fast}", fast=fast, **args)
        tape = {key: value.cuda() for key, value in make_tape(len(tokenizer)).items()}
        loss, gradient, _ = step_of(trainer, tape)
        found[fast] = loss, gradient.double()
    return found


def gap(left: Any, right: Any) -> float:
    """Relative difference of two vectors."""
    return ((left - right).norm() / left.norm()).item()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2"])
def test_the_same_gradient(tiny_model_dir: Path, tmp_path: Path, name: str, checkpointing: bool) -> None:
    """1e-4 in float32 (sums in another order, by other kernels); in bfloat16 no farther from float32 than 1.5 times TRL's is."""
    single = gradients(tiny_model_dir, tmp_path, name, torch.float32, checkpointing)
    assert single[True][0] == pytest.approx(single[False][0], rel=1e-4, abs=1e-6)
    assert gap(single[False][1], single[True][1]) < 1e-4
    half = gradients(tiny_model_dir, tmp_path, name, torch.bfloat16, checkpointing)
    theirs, ours = (gap(single[False][1], half[fast][1]) for fast in (False, True))
    assert theirs < 0.2
    assert ours < 1.5 * theirs + 1e-3
    assert half[True][0] == pytest.approx(half[False][0], abs=2e-2)


@pytest.mark.parametrize("fields", [{}, {"lora": {"r": 4}, "beta": 0.05, "num_iterations": 2}], ids=["full", "lora-kl"])
def test_a_stage_runs(tiny_model_dir: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    """Sampled and recomputed log-probabilities agree, which the stage checks itself."""
    stage = {
        "steps": 4, "group": 4, "batch": {"rows": 16, "per_device": 8}, "rewards": [{"use": "length"}], "rollout": {"max_tokens": 6},
        "data": {"max_length": 64}, "fast": "on",
    }  # fmt: skip
    ctx = run_stage(tmp_path / "a", "grpo", TASKS, "verifiable", tiny_model_dir, **stage, **fields)
    losses = [event["values"]["loss"] for event in ctx.seen if event["kind"] == "metrics" and "loss" in event["values"]]
    assert len(losses) == 4 and all(map(math.isfinite, losses))

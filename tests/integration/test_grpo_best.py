"""Validation in the middle of reinforcement: it draws completions of its own, changes nothing, and decides what is committed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trainer_kit import TASKS, Interrupted, at_step, digest, interrupt, run_stage, same

torch = pytest.importorskip("torch")

FIELDS: dict[str, Any] = {
    "steps": 5,
    "group": 4,
    "batch": {"rows": 8, "per_device": 4},
    "data": {"max_length": 64},
    "rollout": {"max_tokens": 6, "temperature": 1.5},
    "rewards": [{"use": "length"}],
    "dynamic": {"round": 3},
    "checkpoint": {"every": 1, "keep": 9},
    "optim": {"lr": 0.03, "schedule": "constant", "warmup": 0},
}
BEST: dict[str, Any] = {**FIELDS, "commit": {"best": {"metric": "val.loss", "every": 2}}, "eval": {"every": 1}}


def validation(root: Path) -> dict[str, Any]:
    """A set measured by loss, and by completions drawn greedily and at random."""
    from posttrain.core.artifact import InputRef

    root.mkdir(parents=True, exist_ok=True)
    (root / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TASKS[10:16]))
    spec = {"kind": "verifiable", "path": str(root / "val.jsonl")}
    ref = InputRef("eval", "val", "source", "dataset", split="all", spec=spec, rows="verifiable")
    measured = {"metrics": ["loss", "accuracy", "pass@k"], "samples": 2, "max_tokens": 4}
    return {"sets": {"val": {"from": "val:validation", "ref": ref, **measured}}, "when": ["after"], "batch": 4}


def test_best_weights_by_validation(tiny_model_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run_stage(tmp_path / "plain", "grpo", TASKS[:7], "verifiable", tiny_model_dir, **FIELDS)
    ctx = run_stage(tmp_path / "a", "grpo", TASKS[:7], "verifiable", tiny_model_dir, evaluation=validation(tmp_path), **BEST)
    for step in range(1, 6):
        left, right = (load_file(tmp_path / name / "work" / f"checkpoint-{step}" / "model.safetensors") for name in ("plain", "a"))
        assert same(left, right), step
    seen = {event["step"]: event["values"] for event in ctx.seen if "eval/val/loss" in event.get("values", {})}
    assert sorted(seen) == [1, 2, 3, 4, 5]
    assert all({"eval/val/accuracy", "eval/val/accuracy_sampled", "eval/val/pass@2"} <= set(values) for values in seen.values())
    step = min((2, 4), key=lambda n: seen[n]["eval/val/loss"])
    assert ctx.summary["best"] == {"step": step, "value": pytest.approx(seen[step]["eval/val/loss"])}
    kept = load_file(tmp_path / "a" / "out" / "model.safetensors")
    assert same(kept, load_file(tmp_path / "a" / "work" / f"checkpoint-{step}" / "model.safetensors"))
    assert not same(kept, load_file(tmp_path / "a" / "work" / "checkpoint-5" / "model.safetensors"))
    stop = [at_step(3, interrupt)]
    with pytest.raises(Interrupted):
        run_stage(tmp_path / "b", "grpo", TASKS[:7], "verifiable", tiny_model_dir, sinks=stop, evaluation=validation(tmp_path), **BEST)
    again = run_stage(tmp_path / "b", "grpo", TASKS[:7], "verifiable", tiny_model_dir, evaluation=validation(tmp_path), **BEST)
    assert again.summary["best"] == ctx.summary["best"]
    assert digest(tmp_path / "b" / "out") == digest(tmp_path / "a" / "out")

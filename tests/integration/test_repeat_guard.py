"""Many epochs: what is told, what is warned of, dropout on modules, and the stop where held-out loss rises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trainer_kit import CHATS, Interrupted, at_step, digest, interrupt, run_stage, same

torch = pytest.importorskip("torch")

from pydantic import ValidationError  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

FIELDS: dict[str, Any] = {
    "batch": {"rows": 4, "per_device": 4},
    "data": {"max_length": 64},
    "optim": {"lr": 1e-2, "schedule": "constant"},
    "checkpoint": {"every": 1, "keep": 99},
}
TRAINED = CHATS[:4]


def validation(root: Path) -> dict[str, Any]:
    """Other chats, on which a model that repeats a few gets worse."""
    from posttrain.core.artifact import InputRef

    root.mkdir(parents=True, exist_ok=True)
    rows = [
        {"messages": [{"role": "user", "content": f"Name {i}."}, {"role": "assistant", "content": f"Some {chr(97 + i)} thing."}]}
        for i in range(6)
    ]
    (root / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = {"kind": "messages", "path": str(root / "val.jsonl")}
    ref = InputRef("eval", "val", "source", "dataset", split="all", spec=spec, rows="messages")
    return {"sets": {"val": {"from": "val:validation", "ref": ref, "metrics": ["loss"]}}, "when": [], "batch": 4}


def said(ctx: Any) -> str:
    return "\n".join(str(event.get("message", "")) for event in ctx.seen)


def test_epochs_are_told_and_many_are_warned_of(tiny_model_dir, tmp_path):
    few = run_stage(tmp_path / "few", "sft", TRAINED, "messages", tiny_model_dir, steps=4, **FIELDS)
    many = run_stage(tmp_path / "many", "sft", TRAINED, "messages", tiny_model_dir, steps=5, **FIELDS)
    for ctx, epochs in ((few, 4), (many, 5)):
        facts = ctx.summary
        assert facts["epochs"] == epochs and facts["tokens"] == epochs * facts["tokens_unique"] > 0
        assert f"seen in {epochs} epochs" in said(ctx)
    assert "more than 4" not in said(few)
    assert "5 epochs over the same data, more than 4" in said(many) and "`dropout`" in said(many)


def test_the_guard_stops_where_held_out_loss_rises_and_commits_the_best(tiny_model_dir, tmp_path):
    fields = {**FIELDS, "steps": 60, "guard": {"metric": "val.loss", "every": 2, "rise": 0.05}}
    ctx = run_stage(tmp_path / "a", "sft", TRAINED, "messages", tiny_model_dir, evaluation=validation(tmp_path / "v"), **fields)
    seen = {e["step"]: e["values"]["eval/val/loss"] for e in ctx.seen if "eval/val/loss" in e.get("values", {})}
    best = min(seen, key=seen.get)
    last = max(seen)
    assert best < last < 60 and seen[last] > 1.05 * seen[best]
    assert all(seen[step] <= 1.05 * min(v for s, v in seen.items() if s <= step) for step in seen if step != last)
    assert ctx.summary["best"]["step"] == best and ctx.summary["stop"]["step"] == last == ctx.summary["steps"]
    kept = load_file(ctx.out / "model.safetensors")
    assert same(kept, load_file(ctx.work / f"checkpoint-{best}" / "model.safetensors"))
    assert "training stops, the best weights are committed" in said(ctx) and "more than 4" not in said(ctx)
    with pytest.raises(Interrupted):
        run_stage(
            tmp_path / "b", "sft", TRAINED, "messages", tiny_model_dir, sinks=[at_step(last - 1, interrupt)],
            evaluation=validation(tmp_path / "v"), **fields,
        )  # fmt: skip
    again = run_stage(tmp_path / "b", "sft", TRAINED, "messages", tiny_model_dir, evaluation=validation(tmp_path / "v"), **fields)
    assert digest(again.out) == digest(ctx.out) and again.summary["steps"] == last
    after = run_stage(tmp_path / "b", "sft", TRAINED, "messages", tiny_model_dir, evaluation=validation(tmp_path / "v"), **fields)
    assert digest(after.out) == digest(ctx.out)


def test_dropout_changes_training_and_zero_is_sft_bitwise(tiny_model_dir, tmp_path):
    found = [
        load_file(
            run_stage(tmp_path / str(rate), "sft", TRAINED, "messages", tiny_model_dir, steps=3, dropout=rate, **FIELDS).out
            / "model.safetensors"
        )
        for rate in (None, 0.0, 0.3)
    ]
    assert same(found[0], found[1]) and not same(found[0], found[2])


def test_adapters_on_the_last_layers_only(tiny_model_dir, tmp_path):
    ctx = run_stage(tmp_path, "sft", TRAINED, "messages", tiny_model_dir, steps=1, lora={"r": 2, "last_layers": 1}, **FIELDS)
    names = list(load_file(ctx.out / "adapter_model.safetensors"))
    assert names and all(".layers.1." in name for name in names)


def test_configs_are_checked():
    from posttrain.trainers.sft import SFTStage

    guard = {"metric": "v.loss", "every": 1}
    with pytest.raises(ValidationError, match="remove commit.best"):
        SFTStage(name="t", steps=1, guard=guard, commit={"best": guard})
    with pytest.raises(ValidationError, match="less than 1"):
        SFTStage(name="t", steps=1, dropout=1.0)

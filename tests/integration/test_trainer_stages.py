"""Trainer stages around their trainer: evaluation, best weights, adapters from stage to stage, schedule, refused settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trainer_kit import CHATS, TASKS, Interrupted, at_step, digest, interrupt, run_stage, same

torch = pytest.importorskip("torch")

BASE = {"steps": 6, "batch": {"rows": 8, "per_device": 4}, "checkpoint": {"every": 2, "keep": 9}, "data": {"max_length": 64}}


def evaluation(root: Path) -> dict[str, Any]:
    """One validation set of six chats, measured by loss."""
    from posttrain.core.artifact import InputRef

    root.mkdir(parents=True, exist_ok=True)
    (root / "val.jsonl").write_text("\n".join(json.dumps(row) for row in CHATS[:6]) + "\n")
    ref = InputRef(
        "eval", "val", "source", "dataset", split="all", spec={"kind": "messages", "path": str(root / "val.jsonl")}, rows="messages"
    )
    return {
        "sets": {"val": {"from": "val:validation", "metrics": ["loss"], "ref": ref}},
        "when": ["before", "after"],
        "batch": 8,
        "every": None,
    }


def tensors(folder: Path, name: str = "model.safetensors") -> dict[str, Any]:
    """Weights of a folder."""
    from safetensors.torch import load_file

    return load_file(folder / name)


def test_best_weights_are_committed_and_evaluation_changes_nothing(tiny_model_dir: Path, tmp_path: Path) -> None:
    fields = {**BASE, "optim": {"lr": 0.05, "schedule": "constant", "warmup": 0}}
    plain = tmp_path / "plain"
    run_stage(plain, "sft", CHATS, "messages", tiny_model_dir, **fields)
    best = {"commit": {"best": {"metric": "val.loss", "every": 2}}, "eval": {"every": 3}}
    ctx = run_stage(tmp_path / "best", "sft", CHATS, "messages", tiny_model_dir, evaluation=evaluation(tmp_path), **fields, **best)
    assert same(tensors(plain / "work" / "checkpoint-6"), tensors(tmp_path / "best" / "work" / "checkpoint-6"))
    measured = {e["step"]: e["values"]["eval/val/loss"] for e in ctx.seen if e["kind"] == "metrics" and "eval/val/loss" in e["values"]}
    assert sorted(measured) == [2, 3, 4, 6]
    step = min((2, 4, 6), key=lambda n: measured[n])
    assert ctx.summary["best"] == {"step": step, "value": pytest.approx(measured[step])}
    assert same(tensors(tmp_path / "best" / "out"), tensors(plain / "work" / f"checkpoint-{step}"))
    assert ctx.summary["eval"]["after"]["val"]["loss"]["value"] == pytest.approx(measured[step], rel=1e-5)
    assert ctx.summary["eval"]["before"]["val"]["loss"]["n"] == 6


def test_best_survives_a_stop(tiny_model_dir: Path, tmp_path: Path) -> None:
    fields = {**BASE, "optim": {"lr": 0.05, "schedule": "constant", "warmup": 0}, "commit": {"best": {"metric": "val.loss", "every": 2}}}
    run_stage(tmp_path / "a", "sft", CHATS, "messages", tiny_model_dir, evaluation=evaluation(tmp_path), **fields)
    with pytest.raises(Interrupted):
        run_stage(
            tmp_path / "b",
            "sft",
            CHATS,
            "messages",
            tiny_model_dir,
            sinks=[at_step(5, interrupt)],
            evaluation=evaluation(tmp_path),
            **fields,
        )
    ctx = run_stage(tmp_path / "b", "sft", CHATS, "messages", tiny_model_dir, evaluation=evaluation(tmp_path), **fields)
    assert digest(tmp_path / "b" / "out") == digest(tmp_path / "a" / "out")
    assert ctx.summary["eval"]["before"]["val"]["loss"]["n"] == 6


STOP = {**BASE, "steps": 40, "optim": {"lr": 0.01, "schedule": "constant", "warmup": 0}}


def test_training_stops_at_a_level_and_a_kill_after_the_stop_changes_nothing(tiny_model_dir: Path, tmp_path: Path) -> None:
    plain = run_stage(tmp_path / "plain", "sft", CHATS, "messages", tiny_model_dir, evaluation=evaluation(tmp_path), **{**STOP, "steps": 4})
    level = plain.summary["eval"]["after"]["val"]["loss"]["value"]
    fields = {**STOP, "stop": {"metric": "val.loss", "at": level + 1e-4, "every": 2}}
    ctx = run_stage(tmp_path / "a", "sft", CHATS, "messages", tiny_model_dir, evaluation=evaluation(tmp_path), **fields)
    assert ctx.summary["steps"] == ctx.summary["stop"]["step"] <= 4
    if ctx.summary["steps"] == 4:
        assert same(tensors(tmp_path / "a" / "out"), tensors(tmp_path / "plain" / "out"))
        assert ctx.summary["tokens"] == plain.summary["tokens"]
    first = digest(tmp_path / "a" / "out")
    again = run_stage(tmp_path / "a", "sft", CHATS, "messages", tiny_model_dir, evaluation=evaluation(tmp_path), **fields)
    assert digest(tmp_path / "a" / "out") == first
    assert again.summary["steps"] == ctx.summary["steps"] and again.summary["tokens"] == ctx.summary["tokens"]


def test_best_by_an_unknown_set_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    from posttrain.errors import ConfigError

    fields = {**BASE, "commit": {"best": {"metric": "other.loss", "every": 2}}}
    with pytest.raises(ConfigError, match="names no validation set"):
        run_stage(tmp_path, "sft", CHATS, "messages", tiny_model_dir, evaluation=evaluation(tmp_path), **fields)


def test_adapters_from_stage_to_stage(tiny_model_dir: Path, tmp_path: Path) -> None:
    """`continue` trains the same adapter on its own base; `merge` starts a new one on the merged model; no lora gives a model."""
    from posttrain.models.load import load_model

    first = run_stage(tmp_path / "a", "sft", TASKS, "verifiable", tiny_model_dir, **{**BASE, "lora": {"r": 4}})
    given = tmp_path / "a" / "out"
    small = {**BASE, "steps": 1, "optim": {"lr": 1e-7}}
    kept = run_stage(tmp_path / "b", "sft", TASKS, "verifiable", given, **{**small, "lora": {"r": 4, "on_input": "continue"}})
    assert kept.meta["base_digest"] == first.meta["base_digest"]
    start, end = (tensors(folder, "adapter_model.safetensors") for folder in (given, tmp_path / "b" / "out"))
    assert max((start[name] - end[name]).abs().max().item() for name in start) < 1e-6
    merged = run_stage(tmp_path / "c", "sft", TASKS, "verifiable", given, **{**small, "lora": {"r": 2}})
    assert merged.meta["base_digest"] != first.meta["base_digest"]
    full = run_stage(tmp_path / "d", "sft", TASKS, "verifiable", given, **small)
    assert [ctx.meta["kind"] for ctx in (first, kept, merged, full)] == ["adapter", "adapter", "adapter", "model"]
    ids = torch.tensor([[5, 6, 7, 8]])
    outputs = [
        load_model(folder).model(ids).logits for folder in (given, tmp_path / "b" / "out", tmp_path / "c" / "out", tmp_path / "d" / "out")
    ]
    for other in outputs[1:]:
        assert torch.allclose(outputs[0], other, atol=1e-4)
    assert not torch.allclose(outputs[0], load_model(tiny_model_dir).model(ids).logits, atol=1e-4)


def test_kl_reference_of_a_continued_adapter_is_the_stages_input(tiny_model_dir: Path, tmp_path: Path) -> None:
    run_stage(tmp_path / "a", "sft", TASKS, "verifiable", tiny_model_dir, **{**BASE, "steps": 2, "lora": {"r": 4}})
    fields = {
        "group": 4,
        "rewards": [{"use": "length"}],
        "rollout": {"max_tokens": 4},
        "beta": 0.1,
        "lora": {"r": 4, "on_input": "continue"},
    }
    ctx = run_stage(tmp_path / "b", "grpo", TASKS, "verifiable", tmp_path / "a" / "out", **{**BASE, "steps": 1, **fields})
    (values,) = [e["values"] for e in ctx.seen if e["kind"] == "metrics" and "kl" in e["values"]]
    assert abs(values["kl"]) < 1e-6
    assert "ref" not in {path.name for path in (tmp_path / "b" / "out").iterdir()}


def test_kl_reference_of_a_merged_adapter_is_written_out(tiny_model_dir: Path, tmp_path: Path) -> None:
    run_stage(tmp_path / "a", "sft", TASKS, "verifiable", tiny_model_dir, **{**BASE, "steps": 2, "lora": {"r": 4}})
    fields = {"group": 4, "rewards": [{"use": "length"}], "rollout": {"max_tokens": 4}, "beta": 0.1}
    ctx = run_stage(tmp_path / "b", "grpo", TASKS, "verifiable", tmp_path / "a" / "out", **{**BASE, "steps": 1, **fields})
    (values,) = [e["values"] for e in ctx.seen if e["kind"] == "metrics" and "kl" in e["values"]]
    assert abs(values["kl"]) < 1e-6
    assert (tmp_path / "b" / "work" / "reference" / "model.safetensors").is_file()


def test_fsdp_without_a_gpu_is_refused(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate would silently run something else."""
    from posttrain.errors import ConfigError

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="asked for FSDP"):
        run_stage(tmp_path, "sft", CHATS, "messages", tiny_model_dir, **BASE)


def test_gathered_weights_make_a_whole_model(tiny_model_dir: Path) -> None:
    from types import SimpleNamespace

    from trainer_kit import load

    from posttrain.trainers._train import whole_model

    model, _ = load(tiny_model_dir)
    accelerator = SimpleNamespace(unwrap_model=lambda m: m, get_state_dict=lambda m: m.state_dict(), is_main_process=True)
    trainer = SimpleNamespace(model=model, model_wrapped=model, accelerator=accelerator)
    whole = whole_model(trainer, sharded=True)
    assert whole is not model
    assert same(dict(whole.state_dict()), dict(model.state_dict()))
    accelerator.is_main_process = False
    assert whole_model(trainer, sharded=True) is None


def test_schedule() -> None:
    from posttrain.errors import ConfigError
    from posttrain.trainers._train import epoch_order, make_schedule
    from posttrain.trainers.sft import SFTStage

    def plan(world: int = 1, **fields: Any) -> Any:
        return make_schedule(SFTStage.model_validate({"name": "s", **fields}), 2.5, world, "stages.s")

    assert (plan(epochs=2.0, batch={"rows": 32, "per_device": 8}).steps, plan(epochs=0.1).steps) == (5, 1)
    cut = [plan(world, steps=100, batch={"rows": 24, "per_device": 8}) for world in (1, 2, 3, 4)]
    assert [(p.per_device, p.accumulation) for p in cut] == [(8, 3), (6, 2), (8, 1), (6, 1)]
    assert (plan(steps=100, optim={"warmup": 0.03}).warmup, plan(steps=100, optim={"warmup": 7}).warmup) == (3, 7)
    assert [plan(steps=n).warmup for n in (1, 2, 40)] == [0, 1, 2], "a share leaves a step at the peak"
    assert plan(steps=9, optim={"schedule": "constant"}).warmup == 0
    with pytest.raises(ConfigError, match="5 warm-up steps of 5"):
        plan(epochs=2.0, optim={"warmup": 5})
    with pytest.raises(ConfigError, match="shared equally"):
        plan(5, steps=1, batch={"rows": 24})
    order = epoch_order(10, 25, 3)
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10] != order[10:20]
    assert epoch_order(10, 25, 3) == order != epoch_order(10, 25, 4)


def test_pass_through_block(tiny_model_dir: Path, tmp_path: Path) -> None:
    from posttrain.errors import ConfigError

    with pytest.raises(ConfigError) as error:
        run_stage(tmp_path, "sft", CHATS, "messages", tiny_model_dir, **{**BASE, "trl": {"learning_rate": 1.0, "neftune_noise": 3}})
    assert "use optim.lr" in str(error.value)
    assert "neftune_noise_alpha" in str(error.value)
    ctx = run_stage(tmp_path, "sft", CHATS, "messages", tiny_model_dir, **{**BASE, "steps": 1, "trl": {"neftune_noise_alpha": 5.0}})
    assert ctx.summary["steps"] == 1


@pytest.mark.parametrize(
    ("method", "fields", "words"),
    [
        ("sft", {"data": {"packing": True, "weights": "loss"}}, "packing"),
        ("sft", {"batch": {"tokens": 64}}, "batch.tokens"),
        ("sft", {"epochs": 1.0}, "exactly one"),
        ("grpo", {"group": 1}, "group"),
        ("grpo", {"group": 3, "batch": {"rows": 8}}, "multiple of group"),
        ("grpo", {"rollout": {"max_tokens": 2000}}, "no room"),
        ("grpo", {"rollout": {"engine": "trl", "correction": "token_truncate"}}, "engine: hf"),
        ("grpo", {"rewards": [{"use": "exact"}, {"use": "exact"}]}, "twice"),
        ("grpo", {"rewards": []}, "rewards"),
    ],
)
def test_settings_that_cannot_work_are_refused(method: str, fields: dict[str, Any], words: str) -> None:
    from pydantic import ValidationError

    from posttrain.core import registry

    with pytest.raises(ValidationError, match=words):
        registry.method(method).config.model_validate({"name": "s", "method": method, "steps": 1, **fields})

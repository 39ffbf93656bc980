"""Hyperfitting: SFT's own numbers, the recipe verified, metrics as published, stops, the best weights, and resuming."""

from __future__ import annotations

import math
from typing import Any

import pytest
from trainer_kit import Interrupted, at_step, digest, interrupt, load, run_stage, same

torch = pytest.importorskip("torch")

from pydantic import ValidationError  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from posttrain.errors import ConfigError, DataError  # noqa: E402
from posttrain.trainers.hyperfit import HyperfitStage  # noqa: E402

WORDS = ["river", "stone", "bridge", "light", "water", "house", "garden", "winter", "letter", "music"]
TEXTS = [{"text": " ".join(WORDS[(i * 7 + j * (i % 3 + 1)) % 10] for j in range(40)) + f" {i}"} for i in range(20)] + [{"text": "short"}]
FIELDS: dict[str, Any] = {
    "samples": 8,
    "sequence_length": 32,
    "validation": 6,
    "contexts": 4,
    "context_tokens": 8,
    "window": 16,
    "batch": {"rows": 4, "per_device": 4},
    "optim": {"lr": 3e-3, "schedule": "constant"},
    "checkpoint": {"every": 1, "keep": 99},
    "target_loss": None,
}


def history(ctx: Any) -> list[dict[str, Any]]:
    return ctx.summary["hyperfit"]


def test_it_fits_and_tells_what_became_of_the_texts(tiny_model_dir, tmp_path):
    ctx = run_stage(tmp_path, "hyperfit", TEXTS, "text", tiny_model_dir, epochs=12, **FIELDS)
    assert (ctx.summary["blocks"], ctx.summary["held_out_blocks"], ctx.summary["steps"], ctx.summary["epochs"]) == (8, 6, 24, 12)
    steps = [item["step"] for item in history(ctx)]
    assert steps == [0, *range(2, 25, 2)]
    first, last = history(ctx)[0], history(ctx)[-1]
    assert last["train_loss"] < 0.7 * history(ctx)[1]["train_loss"] and last["entropy"] < first["entropy"]
    assert first["overlap"] == 1.0 and last["overlap"] < 1.0
    events = {e["step"]: e["values"] for e in ctx.seen if "hyperfit/ttr" in e.get("values", {})}
    assert sorted(events) == steps and events[24]["hyperfit/ttr"] == last["ttr"]


def test_metrics_are_those_of_a_plain_loop(tiny_model_dir, tmp_path):
    ctx = run_stage(tmp_path, "hyperfit", TEXTS, "text", tiny_model_dir, steps=2, **FIELDS)
    from posttrain.trainers._hyperfit import blocks

    cfg = HyperfitStage.model_validate({"name": "t", "steps": 2, **FIELDS})
    model, tokenizer = load(tiny_model_dir)
    model.eval()
    train, held = blocks(cfg, ctx, tokenizer)
    assert len(train) == 8 and len(held) == 6 and not {tuple(x) for x in train} & {tuple(x) for x in held}
    losses, entropies, ratios, firsts = [], [], [], []
    for number, ids in enumerate(held):
        with torch.no_grad():
            p = model(input_ids=torch.tensor([ids])).logits[0, :-1].double().softmax(-1)
        losses += (-p.gather(1, torch.tensor(ids[1:])[:, None]).log())[:, 0].tolist()
        entropies += (-(p * (p + 1e-9).log()).sum(-1)).tolist()
        if number < 4:
            text = list(ids[:8])
            while len(text) < 32:
                with torch.no_grad():
                    text.append(int(model(input_ids=torch.tensor([text])).logits[0, -1].argmax()))
                if text[-1] == tokenizer.eos_token_id:
                    text.pop()
                    break
            made = text[8:]
            ratios.append(len(set(made[-16:])) / len(made[-16:]))
            firsts.append(len(set(made[:16])) / len(made[:16]))
    before = history(ctx)[0]
    assert before["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert before["entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-4)
    assert before["ttr"] == pytest.approx(sum(ratios) / 4) and before["ttr_first"] == pytest.approx(sum(firsts) / 4)


def test_its_training_is_sft_bitwise(tiny_model_dir, tmp_path):
    """The same blocks through SFT's trainer, without callbacks, give the same weights; measuring touches no generator."""
    from trainer_kit import make_context

    from posttrain.trainers._hyperfit import _rows, blocks
    from posttrain.trainers._sft import SFTTrainer, build
    from posttrain.trainers._train import load_for_training

    ours = run_stage(tmp_path / "a", "hyperfit", TEXTS, "text", tiny_model_dir, epochs=3, **FIELDS)
    cfg = HyperfitStage.model_validate({"name": "train", "epochs": 3, "log_every": 1, **FIELDS})
    (tmp_path / "b").mkdir()
    ctx = make_context(tmp_path / "a", "hyperfit", "text", tiny_model_dir)
    ctx.work = tmp_path / "b"
    loaded = load_for_training(cfg, ctx)
    train, _ = blocks(cfg, ctx, loaded.tokenizer)
    trainer, _ = build(cfg, ctx, loaded, _rows(train), SFTTrainer)
    trainer.train()
    state = trainer.model.state_dict()
    saved = load_file(ours.out / "model.safetensors")
    assert all(torch.equal(saved[name], state[name]) for name in saved)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "late-lora"])
def test_a_resumed_run_equals_a_straight_one(tiny_model_dir, tmp_path, adapter):
    fields = {**FIELDS, "epochs": 3, **({"lora": {"r": 4, "last_layers": 1}} if adapter else {})}
    straight = run_stage(tmp_path / "a", "hyperfit", TEXTS, "text", tiny_model_dir, **fields)
    with pytest.raises(Interrupted):
        run_stage(tmp_path / "b", "hyperfit", TEXTS, "text", tiny_model_dir, sinks=[at_step(3, interrupt)], **fields)
    resumed = run_stage(tmp_path / "b", "hyperfit", TEXTS, "text", tiny_model_dir, **fields)
    assert digest(straight.out) == digest(resumed.out)
    assert history(straight) == history(resumed)


def test_it_stops_at_a_target_and_a_run_after_that_trains_no_more(tiny_model_dir, tmp_path):
    fields = {**FIELDS, "epochs": 40, "target_loss": 3.0}
    ctx = run_stage(tmp_path, "hyperfit", TEXTS, "text", tiny_model_dir, **fields)
    losses = [item["train_loss"] for item in history(ctx)[1:]]
    assert losses[-1] < 3.0 <= min(losses[:-1]) and ctx.summary["steps"] == 2 * len(losses) < 80
    again = run_stage(tmp_path, "hyperfit", TEXTS, "text", tiny_model_dir, **fields)
    assert digest(again.out) == digest(ctx.out) and history(again) == history(ctx)
    by_entropy = run_stage(tmp_path / "e", "hyperfit", TEXTS, "text", tiny_model_dir, **{**FIELDS, "epochs": 40, "target_entropy": 5.0})
    assert history(by_entropy)[-1]["entropy"] < 5.0 < history(by_entropy)[-2]["entropy"]


def test_the_best_weights_by_type_token_ratio_under_a_cap(tiny_model_dir, tmp_path):
    for name, cap in (("free", None), ("capped", 1.0001)):
        fields = {**FIELDS, "epochs": 8, "keep": "ttr", **({"max_loss_ratio": cap} if cap else {})}
        ctx = run_stage(tmp_path / name, "hyperfit", TEXTS, "text", tiny_model_dir, **fields)
        rows = history(ctx)
        allowed = [r for r in rows[1:] if cap is None or r["loss"] <= cap * rows[0]["loss"]]
        want = max(allowed, key=lambda r: (r["ttr"], -r["step"]))
        assert ctx.summary["best"] == {"step": want["step"], "value": pytest.approx(want["ttr"])}
        kept = load_file(ctx.work / f"checkpoint-{want['step']}" / "model.safetensors")
        assert same(load_file(ctx.out / "model.safetensors"), kept)


def test_dropout_is_off_on_modules_whatever_the_config_says(tiny_model_dir, tmp_path):
    import json
    import shutil

    shutil.copytree(tiny_model_dir, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    ends = [
        load_file(run_stage(tmp_path / str(i), "hyperfit", TEXTS, "text", folder, steps=2, **FIELDS).out / "model.safetensors")
        for i, folder in enumerate((tiny_model_dir, tmp_path / "m"))
    ]
    assert same(*ends)


def test_what_cannot_be_is_said(tiny_model_dir, tmp_path):
    with pytest.raises(DataError, match=r"0 of 21 rows have 300 tokens, needed are at least 5"):
        run_stage(tmp_path / "a", "hyperfit", TEXTS, "text", tiny_model_dir, **{**FIELDS, "sequence_length": 300})
    model, tokenizer = load(tiny_model_dir)
    model.bfloat16().save_pretrained(tmp_path / "half"), tokenizer.save_pretrained(tmp_path / "half")
    from trainer_kit import make_context, make_folders

    make_folders(tmp_path / "b", TEXTS)
    ctx = make_context(tmp_path / "b", "hyperfit", "text", tmp_path / "half")
    ctx.inputs["model"][0].spec["dtype"] = "bfloat16"
    from posttrain.core import registry

    with pytest.raises(ConfigError, match="weights of bfloat16 round steps"):
        registry.method("hyperfit").run(HyperfitStage.model_validate({"name": "train", **FIELDS}), ctx)


@pytest.mark.parametrize(("fields", "words"), [
    ({"dropout": 0.1}, "no dropout"), ({"lora": {"dropout": 0.1}}, "no dropout"), ({"trl": {"neftune_noise_alpha": 5}}, "no noise"),
    ({"sequence_length": 64}, "exceed sequence_length"), ({"max_loss_ratio": 2.0}, "goes with keep: ttr"),
    ({"data": {"packing": True}}, "do nothing"),
])  # fmt: skip
def test_configs_are_checked(fields, words):
    with pytest.raises(ValidationError, match=words):
        HyperfitStage(name="t", **fields)


def test_the_defaults_are_the_papers():
    cfg = HyperfitStage(name="t")
    assert (cfg.samples, cfg.sequence_length, cfg.epochs, cfg.batch.rows, cfg.optim.lr) == (2000, 256, 20.0, 8, 1e-6)
    assert (cfg.optim.schedule, cfg.optim.weight_decay, cfg.contexts, cfg.context_tokens, cfg.window) == ("constant", 0.0, 32, 32, 96)
    assert HyperfitStage(name="t", steps=5).epochs is None and math.isclose(cfg.target_loss, 0.1)


def test_the_tiny_chain(tmp_path, run_cli):
    from pathlib import Path

    done = run_cli("run", str(Path(__file__).parents[2] / "configs" / "tiny" / "hyperfit.yaml"), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fitted" in done.stdout

"""QLoRA and packing under flash attention, which need a GPU. Skipped where there is none, or no package for it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from trainer_kit import CHATS, run_stage

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

BASE = {"steps": 8, "batch": {"rows": 8, "per_device": 4}, "data": {"max_length": 64}}


def losses(ctx: Any) -> list[float]:
    """Logged losses, step by step."""
    return [e["values"]["loss"] for e in ctx.seen if e["kind"] == "metrics" and "loss" in e["values"]]


def test_qlora_learns_and_its_adapter_merges_into_the_float_base(tiny_model_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from posttrain.models.load import load_model

    optim = {"lr": 0.01, "schedule": "constant", "warmup": 0}
    found = {}
    for name, lora in (("float", {"r": 4}), ("nf4", {"r": 4, "load_in_4bit": True})):
        found[name] = losses(run_stage(tmp_path / name, "sft", CHATS, "messages", tiny_model_dir, **BASE, optim=optim, lora=lora))
    assert all(map(math.isfinite, found["nf4"])) and found["nf4"][-1] < found["nf4"][0]
    assert found["nf4"][0] == pytest.approx(found["float"][0], rel=0.05) and found["nf4"] != found["float"]
    loaded = load_model(tmp_path / "nf4" / "out")
    assert loaded.merge["merge_difference"] <= loaded.merge["merge_limit"]
    assert "quantization_config" not in (tmp_path / "nf4" / "out" / "config.json").read_text()


def test_packing_under_flash_attention(tiny_model_dir: Path) -> None:
    pytest.importorskip("flash_attn")
    from transformers import AutoModelForCausalLM
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from posttrain.trainers._packing import COARSE, leak

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16, attn_implementation="flash_attention_2").cuda()
    documents = [list(range(5, 17)), list(range(30, 41)), list(range(100, 107))]
    move = lambda batch: {k: v.cuda() if hasattr(v, "cuda") else v for k, v in batch.items()}  # noqa: E731
    assert leak(model, DataCollatorForLanguageModeling(0, padding_free=True), documents, move) <= COARSE

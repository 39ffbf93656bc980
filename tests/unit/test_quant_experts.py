"""Mixtures of experts: every expert fitted to its own tokens, starved ones by borrowed tokens, and exported so that it loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quant_kit import run_stage, texts

from posttrain.errors import QuantError
from posttrain.models.load import load_model
from posttrain.models.reload import probe_logits
from posttrain.models.save import save_model
from posttrain.quant.experts import banks, check_formula, expert_layers

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "num_key_value_heads": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
}


def saved(name: str, tiny_model_dir: Path, folder: Path) -> Path:
    """A mixture with the tiny model's tokenizer."""
    import transformers

    tokenizer = load_model(tiny_model_dir).tokenizer
    config, more = FAMILIES[name]
    torch.manual_seed(0)
    made = getattr(transformers, config)(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, **SMALL, **more)
    model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 3
    save_model(model, tokenizer, folder)
    return folder


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.parametrize("method", ["quantize.gptq", "quantize.apiq"])
def test_every_expert_is_fitted(name: str, method: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = saved(name, tiny_model_dir, tmp_path / "model")
    data = texts(tmp_path / "t.jsonl")
    fields: dict[str, Any] = {"rank": 0} if method == "quantize.apiq" else {}
    fields["calibration"] = {"tokens": 1024, "held_out": 64, "length": 64}
    ctx = run_stage(method, folder, tmp_path / "o" / "out", data, bits=4, export={"format": "dequantized"}, **fields)
    rows = {row["name"]: row for row in ctx.summary["layers"]}
    experts = {key: row for key, row in rows.items() if ".experts." in key}
    assert len(experts) == 2 * 2 * 4 and len(rows) == len(experts) + 2 * 4
    assert all(row["error_held"] < 0.3 and row["tokens"] >= 0 for row in experts.values())
    assert any(row.get("borrowed") for row in experts.values())
    assert ctx.summary["reload_max_diff"] < 1e-4
    wanted, found = (probe_logits(load_model(path).model) for path in (folder, tmp_path / "o" / "out"))
    assert float((wanted - found).square().mean()) < 0.2 * float(wanted.var())


def test_packed_formats_leave_experts_dense(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Refused with both ways out; with the experts ignored the rest is packed and loads."""
    folder = saved("mixtral", tiny_model_dir, tmp_path / "model")
    data = texts(tmp_path / "t.jsonl")
    with pytest.raises(QuantError, match="packed form"):
        run_stage("quantize.gptq", folder, tmp_path / "a" / "out", data)
    ctx = run_stage("quantize.gptq", folder, tmp_path / "b" / "out", data, ignore=["re:.*experts.*"])
    assert len(ctx.summary["layers"]) == 8 and ctx.summary["reload_max_diff"] <= ctx.summary["reload_limit"]
    with pytest.raises(QuantError, match="does not choose for stacked experts"):
        run_stage("quantize.auto", folder, tmp_path / "c" / "out", data, bits_per_weight=5, export={"format": "dequantized"})


def test_experts_that_are_stacked_otherwise() -> None:
    """Biases, another product: refused, never fitted by the wrong formula."""
    import transformers

    oss = transformers.GptOssConfig(vocab_size=64, **SMALL, head_dim=16, num_local_experts=4)
    with pytest.raises(QuantError, match="not known here"):
        banks(transformers.AutoModelForCausalLM.from_config(oss).model.layers[0])
    model = transformers.AutoModelForCausalLM.from_config(transformers.MixtralConfig(vocab_size=64, **SMALL, num_local_experts=4))
    block = model.model.layers[0]
    assert len(expert_layers(block, "x")) == 8 and expert_layers(block, "x")[1].name == "x.mlp.experts.down_proj.0"
    bank = next(iter(banks(block).values()))
    hidden = torch.randn(5, 64)
    check_formula(bank, hidden)
    real = type(bank).forward
    bank.forward = lambda *args: real(bank, *args) * 2
    with pytest.raises(QuantError, match="another product"):
        check_formula(bank, hidden)

"""The peers of the quantization benchmarks do the work that ours do, and its figures are those of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmark_kit import load

for _name in ("_harness", "_corpus", "_quant_authors"):
    load(_name)


def test_both_loops_end_with_the_same_loss(tmp_path: Path) -> None:
    """Block-wise and layer-wise, from the same start, step for step."""
    quant_fit = load("quant_fit")
    block = quant_fit.block_wise(2, 2, 1, tmp_path)
    assert block["steps"] == 4 and block["loss"]["ours"] == pytest.approx(block["loss"]["peer"], rel=1e-3)
    layer = quant_fit.layer_wise(512, 20, 1)
    assert layer["loss"]["ours"] == pytest.approx(layer["loss"]["peer"], rel=0.02)
    assert block["ratio"] > 0 and layer["control"]["value"] > 0


def test_kl_is_that_of_the_logits() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    load("repeat_effect"), load("noisefit_real")
    _quant_real = load("_quant_real")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1}
    one, two = (LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape)).eval() for _ in range(2))
    two.lm_head.weight.data.copy_(one.lm_head.weight.data)
    windows = {"a": torch.randint(0, 50, (3, 8)), "b": torch.randint(0, 50, (1, 8))}
    wanted = {name: _quant_real._final(one, ids) for name, ids in windows.items()}
    found = _quant_real.compare(two, windows, wanted)
    with torch.no_grad():
        p, q = (model(windows["a"]).logits[:, :-1].log_softmax(-1) for model in (one, two))
    assert found["a"]["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found["a"]["loss"] == pytest.approx(float(-q.gather(-1, windows["a"][:, 1:, None]).mean()), rel=1e-4)
    assert found["all"]["kl"] == pytest.approx((3 * found["a"]["kl"] + found["b"]["kl"]) / 4, rel=1e-4)
    same = _quant_real.compare(one, windows, wanted)
    assert same["all"]["kl"] == pytest.approx(0, abs=1e-6) and same["all"]["top1"] == 1

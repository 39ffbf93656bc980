"""Blocks of model families: running them one by one is running the model, and every linear layer is quantized and read back."""

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
from posttrain.quant.blocks import Blocks, block_list
from posttrain.quant.layers import input_groups, linear_layers

GQA = {"num_key_value_heads": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("LlamaConfig", GQA, 7),
    "mistral": ("MistralConfig", {**GQA, "sliding_window": 8}, 7),
    "qwen2": ("Qwen2Config", GQA, 7),
    "qwen3": ("Qwen3Config", {**GQA, "head_dim": 16}, 7),
    "gemma2": ("Gemma2Config", {**GQA, "head_dim": 16, "sliding_window": 8}, 7),
    "gemma3": ("Gemma3TextConfig", {**GQA, "head_dim": 16, "sliding_window": 8}, 7),
    "phi": ("PhiConfig", {}, 6),
    "phi3": ("Phi3Config", {**GQA, "pad_token_id": 0}, 4),
    "gpt_neox": ("GPTNeoXConfig", {}, 4),
    "opt": ("OPTConfig", {"ffn_dim": 128, "word_embed_proj_dim": 64}, 6),
    "olmo2": ("Olmo2Config", {}, 7),
    "starcoder2": ("Starcoder2Config", GQA, 6),
    "granite": ("GraniteConfig", {}, 7),
    "cohere": ("CohereConfig", {}, 7),
    "smollm3": ("SmolLM3Config", {**GQA, "pad_token_id": 0}, 7),
    "falcon": ("FalconConfig", {}, 4),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}, 4),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4}, 4),
}
QUANTIZED = ("llama", "qwen3", "gemma3", "mistral", "phi3", "opt", "gpt_neox", "olmo2", "granite", "starcoder2", "gpt2", "falcon")


def build(name: str, vocabulary: int = 128) -> Any:
    import transformers

    config, more, _ = FAMILIES[name]
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    special = {"bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    made = getattr(transformers, config)(**{"vocab_size": vocabulary, **shape, **special, **more})
    return transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", list(FAMILIES))
def test_blocks_one_by_one_are_the_model(name: str) -> None:
    """Masks of sliding windows, rotary tables, blocks that give tuples: all as the model's own forward pass has them."""
    model = build(name)
    blocks = Blocks(model)
    ids = torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(1))
    hidden = blocks.embed(ids)
    with torch.no_grad():
        for index in range(len(blocks)):
            with blocks.open(index) as block:
                hidden = blocks.run(index, block, hidden)
        assert torch.equal(blocks.head(hidden), model(ids, use_cache=False).logits)
    layers = linear_layers(blocks.modules[0], blocks.name(0))
    assert len(layers) == FAMILIES[name][2]
    states = blocks.embed(ids)
    groups = input_groups(layers, lambda: blocks.run(0, blocks.modules[0], states))
    assert sorted(layer.name for group in groups for layer in group) == sorted(layer.name for layer in layers)
    for group in groups:
        assert len({layer.shape[1] for layer in group}) == 1


@pytest.mark.parametrize("name", QUANTIZED)
def test_families_end_to_end(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Fitted, exported, loaded again by transformers with the logits of the model in memory; an adapter over it where it is packed."""
    tokenizer = load_model(tiny_model_dir).tokenizer
    model = build(name, len(tokenizer))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data *= 3
    save_model(model, tokenizer, tmp_path / "model")
    packed = name not in ("gpt2", "falcon")
    export = {} if packed else {"export": {"format": "dequantized"}}
    data = texts(tmp_path / "t.jsonl", 120)
    if not packed:
        with pytest.raises(QuantError, match="plain linear layers only"):
            run_stage("quantize.apiq", tmp_path / "model", tmp_path / "no" / "out", data, bits=4, rank=2, epochs=0)
    ctx = run_stage("quantize.apiq", tmp_path / "model", tmp_path / "o" / "out", data, bits=4, rank=2 if packed else 0, epochs=0, **export)
    assert len(ctx.summary["layers"]) == 2 * FAMILIES[name][2]
    assert ctx.summary["reload_max_diff"] <= 1e-3 and all(row["error_held"] < 0.2 for row in ctx.summary["layers"])
    wanted, found = (probe_logits(load_model(folder).model) for folder in (tmp_path / "model", tmp_path / "o" / "out"))
    assert float((wanted - found).square().mean()) < 0.1 * float(wanted.var())


def test_what_is_no_decoder_of_this_kind() -> None:
    """Refused with a way out: no list of blocks, blocks with inputs of their own for every token, changes between blocks."""
    model = build("llama")

    class Strange(type(model.model)):  # type: ignore[misc]
        def forward(self, input_ids: Any, **kwargs: Any) -> Any:
            hidden = self.embed_tokens(input_ids)
            tables = self.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
            for layer in self.layers:
                extra = {"position_ids": input_ids} if self.strange == "tokens" else {}
                hidden = layer(hidden, position_embeddings=tables, **extra)
                hidden = hidden * 2 if self.strange == "between" else hidden
            from transformers.modeling_outputs import BaseModelOutputWithPast

            return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

    model.model.__class__ = Strange
    model.model.strange = "tokens"
    with pytest.raises(QuantError, match="depend on the tokens"):
        Blocks(model).calls(1, 4)
    model.model.strange = "between"
    with pytest.raises(QuantError, match="between its blocks"):
        Blocks(model).calls(1, 4)
    model.config.num_hidden_layers = 5
    with pytest.raises(QuantError, match="no list of 5 decoder blocks"):
        block_list(model)

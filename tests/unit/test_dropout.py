"""Dropout is set on modules: it acts, it can be switched off, and where an architecture has no place for it the field says so."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from posttrain.errors import ConfigError  # noqa: E402
from posttrain.trainers._dropout import set_dropout  # noqa: E402


def made(kind: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2} if kind == "gpt2" else sizes
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=64, **sizes))


def differs(model) -> bool:
    """Whether two passes in training mode differ."""
    model.train()
    ids = torch.arange(24)[None] % 60
    with torch.no_grad():
        return not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "mistral", "gemma2"])
def test_it_acts_on_modules_and_can_be_switched_off(kind):
    model = made(kind)
    assert set_dropout(model, 0.3, "stages.t.dropout") >= 2
    assert differs(model)
    set_dropout(model, 0.0, "stages.t.dropout")
    assert not differs(model)
    model.eval()


def test_an_architecture_without_a_place_is_refused():
    class Bare(torch.nn.Module):
        config = type("C", (), {"model_type": "bare"})()

    assert set_dropout(Bare(), 0.0, "x") == 0
    with pytest.raises(ConfigError, match="`bare` has no place for dropout, so 0.1 would do nothing"):
        set_dropout(Bare(), 0.1, "stages.t.dropout")


def test_adapters_are_left_alone(tiny_model_dir):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir), LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj"])
    )
    set_dropout(model, 0.0, "x")
    assert any(isinstance(m, torch.nn.Dropout) and m.p == 0.2 for m in model.modules())

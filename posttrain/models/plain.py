"""A dequantized model as an ordinary one."""

from __future__ import annotations

from typing import Any


def plain_model(model: Any) -> Any:
    """A model of the same class with the same weights and no trace of quantization, so that it can be saved and trained.

    Args:
        model: transformers model whose weights were dequantized on loading.
    """
    from transformers import AutoModelForCausalLM

    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    config = type(model.config)(**settings)
    config._attn_implementation = model.config._attn_implementation
    made = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    state = model.state_dict()
    made.load_state_dict({name: state[name] for name in made.state_dict()})
    made.generation_config = model.generation_config
    made.tie_weights()
    return made

"""A stage's `lora` block as peft's config, and what of it is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from posttrain.config.common import LoraConfig
from posttrain.errors import ConfigError
from posttrain.models.tokens import token_rows


def attached(model: Any) -> bool:
    """True for a PeftModel; a merged model may still carry peft's attributes."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def peft_config(lora: LoraConfig | None, model: Any, token_ids: Sequence[int] = (), where: str = "stage") -> Any:
    """peft's config of a new adapter that also trains the rows `token_ids`; None for full fine-tuning or an attached adapter.

    Raises:
        ConfigError: the output layer, or one of two tied tables, would get an adapter, or there are fewer layers than
            `last_layers`; `where` is the stage's dotted path.
    """
    if lora is None or attached(model):
        return None
    from peft import LoraConfig as PeftLora

    rows = token_rows(model, token_ids) if token_ids else None
    targets, layers = lora.targets, None
    if lora.last_layers is not None:
        count = model.config.get_text_config().num_hidden_layers
        if lora.last_layers > count:
            raise ConfigError(f"the model has {count} layers, got {lora.last_layers}", where=f"{where}.lora.last_layers", fix="lower it")
        layers = list(range(count - lora.last_layers, count))
        targets = _linear_names(model) if targets == "all-linear" else targets
    config = PeftLora(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=targets,
        layers_to_transform=layers,
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
        use_rslora=lora.rslora,
        trainable_token_indices=rows,
        task_type="CAUSAL_LM",
    )
    _check_tables(config, model, where)
    return config


def _linear_names(model: Any) -> list[str]:
    """Last parts of the names of linear modules, the output head left out."""
    head = model.get_output_embeddings()
    return sorted(
        {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head}
    )


def _check_tables(config: Any, model: Any, where: str) -> None:
    """Refuses a low-rank update of one of two tied tables, and of the output layer."""
    from peft.tuners.tuners_utils import check_target_module_exists

    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    everything = config.target_modules == "all-linear"
    hit = {id(module): name for name, module in model.named_modules() if not everything and check_target_module_exists(config, name)}
    tied = outputs is not None and inputs.weight is outputs.weight
    found = [hit[id(module)] for module in (inputs, outputs) if id(module) in hit]
    if found and tied:
        raise ConfigError(
            f"{' and '.join(found)} would get an adapter, but embedding and output layer are one tied table, of which the update "
            "would reach one side only",
            where=f"{where}.lora.targets",
            fix=f"leave out {' and '.join(found)}; data.add_tokens trains rows of the table",
        )
    if id(outputs) in hit:
        raise ConfigError(
            f"{hit[id(outputs)]} would get an adapter that would never be trained: the losses read the output layer's weight alone",
            where=f"{where}.lora.targets",
            fix=f"leave out {hit[id(outputs)]}",
        )

"""Dropout set on modules and verified there: many architectures ignore the field of their config, or have none."""

from __future__ import annotations

from typing import Any

import torch

from posttrain.errors import ConfigError

RATES = ("attention_dropout", "dropout", "activation_dropout", "hidden_dropout", "resid_pdrop", "attn_pdrop")
"""Names under which modules hold a rate that they hand to a function, as a number."""


def set_dropout(model: Any, rate: float, where: str) -> int:
    """Gives every place of dropout in the model this rate, adapters left out; returns how many there are.

    Args:
        model: changed in place; its config is kept in step.
        rate: 0 switches all off.
        where: dotted path of the field, for errors.

    Raises:
        ConfigError: a rate above 0 where the architecture has no place for it, or a place that keeps another rate.
    """
    places = _places(model)
    for module, name in places:
        setattr(module, name, rate)
    kept = sorted({type(module).__name__ for module, name in _places(model) if getattr(module, name) != rate})
    if kept:
        raise ConfigError(f"{', '.join(kept)} keep a dropout of their own", where=where, fix="set it in the model's config.json")
    if rate and not places:
        kind = getattr(model.config, "model_type", type(model).__name__)
        raise ConfigError(
            f"the architecture `{kind}` has no place for dropout, so {rate:g} would do nothing",
            where=where,
            fix="remove it, use lora.dropout, or fewer epochs",
        )
    for name in RATES:
        if isinstance(getattr(model.config, name, None), float):
            setattr(model.config, name, rate)
    return len(places)


def _places(model: Any) -> list[tuple[Any, str]]:
    found: list[tuple[Any, str]] = []
    for path, module in model.named_modules():
        if "lora_" in path:
            continue
        if isinstance(module, torch.nn.Dropout):
            found.append((module, "p"))
            continue
        found += [(module, name) for name in RATES if isinstance(vars(module).get(name), float)]
    return found

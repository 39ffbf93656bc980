"""The `lora` block: low-rank adapters by peft, their variants, and a base held in four bits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from posttrain.config.base import Positive, Strict


class LoraConfig(Strict):
    """Low-rank adapters (peft)."""

    r: Positive = 16
    """Rank."""
    alpha: Positive = 32
    """Scale numerator; the update is scaled by alpha / r."""
    targets: str | list[str] = "all-linear"
    """Module names, or `all-linear`."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    dora: bool = False
    """DoRA (arXiv 2402.09353): the norm of each row of W + (alpha / r) B A is trained apart from its direction."""
    rslora: bool = False
    """Rank-stabilised LoRA (arXiv 2312.03732): the update is scaled by alpha / sqrt(r)."""
    last_layers: Positive | None = None
    """Only the last so many decoder layers get adapters; none = all."""
    load_in_4bit: bool = False
    """QLoRA (arXiv 2305.14314): during training the base is held in NF4 with double quantization. Needs a GPU and bitsandbytes. The
    committed adapter belongs to the base as it was given, unquantized."""
    on_input: Literal["merge", "continue"] = "merge"
    """Given an adapter: merge it in float32 and start a new one, or train the same one on."""

    @model_validator(mode="after")
    def _new_adapter(self) -> LoraConfig:
        if self.on_input == "continue" and (self.dora or self.rslora or self.last_layers):
            raise ValueError("dora, rslora, last_layers shape a new adapter, on_input: continue trains the given one; remove one of them")
        return self

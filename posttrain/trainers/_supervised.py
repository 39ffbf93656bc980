"""What the configs of all supervised stages share; no torch here."""

from __future__ import annotations

from typing import ClassVar

from pydantic import model_validator

from posttrain.config.common import TrainConfig


class SupervisedConfig(TrainConfig):
    """A stage that trains on rows of tokens: `sft` and its variants."""

    takes_four_bit: ClassVar[bool] = True

    @model_validator(mode="after")
    def _consistent(self) -> SupervisedConfig:
        if self.data.weights == "loss" and self.data.packing:
            raise ValueError("data.weights: loss needs one row a sequence; set data.packing: false")
        if self.batch.tokens is not None and not self.data.packing:
            raise ValueError("batch.tokens needs data.packing: true (sequences of equal length); else give batch.rows")
        return self


def estimate(cfg: SupervisedConfig) -> dict[str, float]:
    """Upper bound of the tokens of a run given by `steps`."""
    if cfg.steps is None:
        return {}
    rows = cfg.batch.rows or cfg.batch.per_device
    return {"tokens": cfg.steps * (cfg.batch.tokens or rows * cfg.data.max_length)}

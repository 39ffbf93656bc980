"""Supervised fine-tuning: next-token loss on text, on the assistant's turns of a chat, or on the answers of tasks.

TRL's SFTTrainer, fed with token sequences; full weights or LoRA. Rows of type `text` carry loss everywhere, `messages`
and `verifiable` rows only on the assistant's turn and its end token (`data.loss_on`).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from posttrain.config.common import TrainConfig
from posttrain.core.context import StageContext
from posttrain.core.registry import data_port, model_port, stage


class SFTStage(TrainConfig):
    """Fields of `method: sft`."""

    method: Literal["sft"] = "sft"
    """Supervised fine-tuning."""

    @model_validator(mode="after")
    def _consistent(self) -> SFTStage:
        if self.data.weights == "loss" and self.data.packing:
            raise ValueError("data.weights: loss needs one row a sequence; set data.packing: false")
        if self.batch.tokens is not None and not self.data.packing:
            raise ValueError("batch.tokens needs data.packing: true (sequences of equal length); else give batch.rows")
        return self


def estimate(cfg: SFTStage) -> dict[str, float]:
    """Upper bound of the tokens of a run given by `steps`."""
    if cfg.steps is None:
        return {}
    rows = cfg.batch.rows or cfg.batch.per_device
    return {"tokens": cfg.steps * (cfg.batch.tokens or rows * cfg.data.max_length)}


@stage(
    "sft",
    config=SFTStage,
    inputs={"model": model_port(), "data": data_port("text", "messages", "verifiable")},
    output="model",
    evals=True,
    estimate=estimate,
)
def run(cfg: SFTStage, ctx: StageContext) -> None:
    """Trains `ctx.inputs["model"]` on the mixture `ctx.inputs["data"]`."""
    from posttrain.trainers._sft import run_sft

    run_sft(cfg, ctx)


def __getattr__(name: str) -> Any:
    if name == "SFTTrainer":
        from posttrain.trainers._sft import SFTTrainer

        return SFTTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

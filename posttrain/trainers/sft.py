"""Supervised fine-tuning: next-token loss on text, on the assistant's turns of a chat, or on the answers of tasks.

TRL's SFTTrainer, fed with token sequences; full weights or LoRA. Rows of type `text` carry loss everywhere, `messages`
and `verifiable` rows only on the assistant's turn and its end token (`data.loss_on`).
"""

from __future__ import annotations

from typing import Any, Literal

from posttrain.core.context import StageContext
from posttrain.core.registry import data_port, model_port, stage
from posttrain.trainers._supervised import SupervisedConfig, estimate


class SFTStage(SupervisedConfig):
    """Fields of `method: sft`."""

    method: Literal["sft"] = "sft"
    """Supervised fine-tuning."""


@stage(
    "sft",
    version=2,
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

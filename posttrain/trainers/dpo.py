"""Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290), TRL's DPOTrainer on our token ids.

    L = -log sigma( beta [log pi(y_w|x) - log r(y_w|x)] - beta [log pi(y_l|x) - log r(y_l|x)] ),    r the stage's input model

Rows are `preference`. The prompt has the very ids that a rollout engine is given, both answers end in a trained stop token, and
nothing is cut from a prompt. The reference's log-probabilities are worked out once, so no second model stays in memory.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from posttrain.config.common import TrainConfig
from posttrain.core.context import StageContext
from posttrain.core.registry import data_port, model_port, stage


class DPOStage(TrainConfig):
    """Fields of `method: dpo`."""

    method: Literal["dpo"] = "dpo"
    """Direct preference optimization."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Strength of the pull to the reference."""
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust", "sigmoid_norm"] = "sigmoid"
    """TRL's `loss_type`."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability that a preference is the wrong way round."""

    @model_validator(mode="after")
    def _pairs(self) -> DPOStage:
        if self.data.packing or self.data.group_by_length or self.data.weights != "ignore" or self.data.add_tokens:
            raise ValueError("data.packing, group_by_length, weights and add_tokens do nothing here; remove them")
        if self.batch.tokens is not None:
            raise ValueError("batch.tokens does nothing here; give batch.rows, the pairs of a step")
        return self


@stage(
    "dpo",
    config=DPOStage,
    inputs={"model": model_port(), "data": data_port("preference")},
    output="model",
    evals=True,
)
def run(cfg: DPOStage, ctx: StageContext) -> None:
    """Trains `ctx.inputs["model"]` on the pairs of `ctx.inputs["data"]`."""
    from posttrain.trainers._dpo import run_dpo

    run_dpo(cfg, ctx)


def __getattr__(name: str) -> Any:
    if name == "DPOTrainer":
        from posttrain.trainers._dpo import DPOTrainer

        return DPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

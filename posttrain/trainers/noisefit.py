"""Fine-tuning with noise on hidden states: NoiseFiT (2504.03302).

SFT with two noisy passes beside the clean one. Gaussian noise, scaled to each token's spread, goes on the outputs of a few
decoder layers; the noisy passes learn the clean one's distribution (soft cross-entropy), and to agree (consistency):

    L = a CE + (1 - a) soft + lambda consistency,     all three over the supervised tokens of the global batch

The layers are chosen on a few training rows before the first step; the choice travels in the checkpoints and lies as
`noise_policy.json` in the artifact. Layers before the first noisy one run once for all passes.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from posttrain.core.context import StageContext
from posttrain.core.registry import data_port, model_port, stage
from posttrain.trainers._noisefit_config import NoiseConfig, check_trl_block
from posttrain.trainers._supervised import SupervisedConfig, estimate


class NoiseFiTStage(SupervisedConfig):
    """Fields of `method: noisefit`."""

    method: Literal["noisefit"] = "noisefit"
    """Supervised fine-tuning with noisy hidden states."""
    noise: NoiseConfig = NoiseConfig()
    """Noise and loss."""

    @model_validator(mode="after")
    def _own_loss(self) -> NoiseFiTStage:
        if not self.noise.neutral:
            check_trl_block(self.trl)
        if self.noise.compat != "none" and self.data.weights == "loss":
            raise ValueError("data.weights: loss does not go with noise.compat; the scripts know no row weights")
        return self


@stage(
    "noisefit",
    config=NoiseFiTStage,
    inputs={"model": model_port(), "data": data_port("text", "messages", "verifiable")},
    output="model",
    evals=True,
    estimate=estimate,
)
def run(cfg: NoiseFiTStage, ctx: StageContext) -> None:
    """Trains `ctx.inputs["model"]` on the mixture `ctx.inputs["data"]`."""
    from posttrain.trainers._noisefit import run_noisefit

    run_noisefit(cfg, ctx)


def __getattr__(name: str) -> Any:
    if name == "NoiseFiTTrainer":
        from posttrain.trainers._noisefit import NoiseFiTTrainer

        return NoiseFiTTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

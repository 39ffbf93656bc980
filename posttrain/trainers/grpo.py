"""Reinforcement on verifiable rows: groups of completions, scored by rewards, by group-relative policy optimization.

TRL's GRPOTrainer. Completions are drawn by our `hf` engine on the live model (each with its own seed, so a result does
not depend on batching or on the number of processes), by vLLM beside the trainer, or with `rollout.engine: trl` by TRL itself.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from posttrain.config.base import Positive
from posttrain.config.common import RewardUse, TrainConfig
from posttrain.core.context import StageContext
from posttrain.core.registry import data_port, model_port, stage
from posttrain.trainers._grpo_config import DynamicConfig, EntropyConfig, HardnessConfig, RolloutConfig, check_terms
from posttrain.trainers._grpo_saving import expected_saving

ACCEPT_RATES = (0.15, 0.3, 0.5, 0.7)
"""Shares of groups that carry information, for which `plan` tells what sample recovery saves."""


class GRPOStage(TrainConfig):
    """Fields of `method: grpo`."""

    method: Literal["grpo"] = "grpo"
    """Group-relative policy optimization."""
    group: Annotated[int, Field(ge=2)] = 8
    """Completions of each row that are compared with one another."""
    rewards: Annotated[list[RewardUse], Field(min_length=1)] = [RewardUse(use="exact")]
    """Rewards, summed by weight; None from a reward means that it does not apply to the row."""
    gate_value: float = -1.0
    """Takes the place of the sum of rewards where a gate's reward is below its `at_least`."""
    rollout: RolloutConfig = RolloutConfig()
    """Sampling."""
    beta: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL divergence to the stage's input model."""
    epsilon: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Clip range of the probability ratio, below 1 (and above, unless `epsilon_high` is given)."""
    epsilon_high: Annotated[float, Field(gt=0)] | None = None
    """Clip range above 1."""
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sum"] = "dapo"
    """Normalisation of the token losses; TRL's names, and `sum`, the plain sum over completions and tokens, divided by the
    number of completions of the step. `dapo` divides by the unmasked tokens of the step."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Standard deviation that advantages are divided by."""
    mask_truncated: bool = False
    """Leave completions that reached the token limit out of the loss; a step in which all did changes nothing."""
    num_iterations: Positive = 1
    """Updates on each batch of completions."""
    entropy: EntropyConfig | None = None
    """Hold the policy's entropy at a target."""
    hardness: HardnessConfig | None = None
    """Weight groups by how hard they are for the policy."""
    dynamic: DynamicConfig | None = None
    """Sample until the step is full of groups that carry information."""
    fast: Literal["off", "on"] = "off"
    """`on`: our own forward pass (sorted, trimmed, prompts shared in a group) in place of TRL's, with the same loss."""

    @model_validator(mode="after")
    def _whole_groups(self) -> GRPOStage:
        rows = self.batch.rows or self.batch.per_device
        if self.batch.tokens is not None:
            raise ValueError("batch.tokens is for packed sequences; give batch.rows, the completions of one step")
        if rows % self.group:
            raise ValueError(f"batch.rows ({rows}) must be a multiple of group ({self.group})")
        if self.data.packing or self.data.weights == "loss":
            raise ValueError("data.packing and data.weights: loss are for supervised training")
        if self.data.add_tokens:
            raise ValueError("data.add_tokens is for supervised training; a model that never saw a token does not sample it")
        if self.rollout.max_tokens >= self.data.max_length:
            raise ValueError(
                f"rollout.max_tokens ({self.rollout.max_tokens}) leaves no room for a prompt in data.max_length ({self.data.max_length})"
            )
        check_terms(self)
        return self


def estimate(cfg: GRPOStage) -> dict[str, float]:
    """Upper bound of the completion tokens of a run given by `steps`, and what `dynamic.recover` saves at some accept rates."""
    rows, dynamic = cfg.batch.rows or cfg.batch.per_device, cfg.dynamic
    if dynamic is None:
        return {"tokens": cfg.steps * rows * cfg.rollout.max_tokens} if cfg.steps else {}
    wanted = rows // cfg.group
    size = dynamic.round or wanted
    found: dict[str, float] = {"tokens": cfg.steps * dynamic.max_rounds * size * cfg.group * cfg.rollout.max_tokens} if cfg.steps else {}
    if not dynamic.recover:
        return found
    return found | {f"saved_at_accept_rate_{a}": expected_saving(wanted, size, a) for a in ACCEPT_RATES}


@stage(
    "grpo",
    version=2,
    config=GRPOStage,
    inputs={"model": model_port(), "data": data_port("verifiable", "prompt")},
    output="model",
    evals=True,
    estimate=estimate,
)
def run(cfg: GRPOStage, ctx: StageContext) -> None:
    """Reinforces `ctx.inputs["model"]` on the tasks of `ctx.inputs["data"]`."""
    from posttrain.trainers._trl import spare_vllm

    spare_vllm()
    from posttrain.trainers._grpo_run import run_grpo

    run_grpo(cfg, ctx)


def __getattr__(name: str) -> Any:
    if name == "GRPOTrainer":
        from posttrain.trainers._grpo import GRPOTrainer

        return GRPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

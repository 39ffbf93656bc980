"""Blocks of `method: grpo`: sampling, entropy, hardness, dynamic sampling; and what they refuse together.

Light: no torch, since `validate` and `schema` read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from posttrain.config.base import Positive, Strict
from posttrain.config.constraint import ConstraintConfig, SamplerConfig
from posttrain.config.engine import VllmConfig

if TYPE_CHECKING:
    from posttrain.trainers.grpo import GRPOStage


class RolloutConfig(Strict):
    """How completions are drawn."""

    engine: Literal["hf", "vllm", "trl"] = "hf"
    """`hf`: our batched engine on the live model; `vllm`: vLLM beside the trainer in one process, given the weights after every
    update; `trl`: TRL's own generation (the neutral setting)."""
    vllm: VllmConfig = VllmConfig()
    """Options of `engine: vllm`."""
    max_tokens: Positive = 256
    """Completion limit in tokens."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature; the policy's probabilities are taken at the same one."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus truncation; 1 is off."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Keep the k likeliest tokens; 0 is off."""
    batch: Positive = 64
    """Most completions drawn at once (engines `hf` and `vllm`)."""
    correction: Literal["none", "token_truncate", "sequence_mask"] = "none"
    """Correction where sampled and recomputed probabilities differ; see `correction_cap`."""
    correction_cap: Annotated[float, Field(gt=0)] = 2.0
    """Cap of the ratio: truncated to it (token), or the sequence is masked above it."""
    constraint: ConstraintConfig | None = None
    """What completions must satisfy, all but `free_share` of them."""
    sampler: SamplerConfig = SamplerConfig()
    """How constrained completions are drawn; with one particle, since resampling makes a group's completions depend on one another."""
    weighting: Literal["none", "sequence"] = "none"
    """Objective. `none`: constrained completions count as drawn, from the policy masked token by token, beside the free ones of
    their group: biased, and what teaches a format. `sequence`: weighted back, so that the gradient is that of the policy's
    mean reward given the constraint, consistent in the size of the group; it does not push the policy towards the constraint."""
    weight_clip: Annotated[float, Field(ge=1)] = 10.0
    """Largest weight of a completion, in units of its group's mean (`weighting: sequence`)."""
    free_share: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Share of each group drawn without the constraint, whose rewards see what the policy writes by itself: constrained completions alone
    give no gradient against what the constraint forbids."""

    @model_validator(mode="after")
    def _constrainable(self) -> RolloutConfig:
        if self.constraint is None:
            given = [name for name in ("sampler", "weighting", "weight_clip", "free_share") if name in self.model_fields_set]
            changed = [name for name in given if getattr(self, name) != type(self).model_fields[name].default]
            if changed:
                raise ValueError(f"`{changed[0]}` goes with `constraint`")
            return self
        if self.engine == "trl":
            raise ValueError("a constraint needs engine: hf or vllm")
        if self.sampler.particles > 1:
            raise ValueError("sampler.particles: more than 1 are resampled, which makes the completions of a group depend on one another")
        if self.top_k or self.top_p < 1:
            raise ValueError("a constraint does not go with top_p or top_k: its weights are those of the whole distribution")
        if self.weighting == "sequence" and self.sampler.method == "local":
            raise ValueError("weighting: sequence needs weights, sampler.method: local has none; use awrs or mask")
        return self

    @model_validator(mode="after")
    def _ours_only(self) -> RolloutConfig:
        if self.engine == "trl" and self.correction != "none":
            raise ValueError("correction needs engine: hf or vllm; with engine: trl TRL's own sampler and loss agree by construction")
        if self.engine != "vllm" and self.vllm != VllmConfig():
            raise ValueError("`vllm` goes with `engine: vllm`")
        return self


class EntropyConfig(Strict):
    """Targeted entropy: coeff * |H - target| is added to the loss, which pushes the entropy H to its target from both sides.

    The push has constant size: it holds a level only where `coeff` is above the drift of the policy loss, whose size
    depends on `loss_type`. The paper gives 0.55 and 0.001 for a loss whose normaliser it does not give.
    """

    preset: Literal["confucius3"] | None = None
    """`confucius3`: target 0.55, coeff 0.001, level micro (the likeliest reading of the paper); a field that is
    written out wins. Measured, 0.001 moves nothing."""
    target: Annotated[float, Field(ge=0)]
    """Entropy of the next token to hold, nats, at the sampling temperature."""
    coeff: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the distance in the loss. Of those tried 1 was the least that held the level against a strong drift
    (`benchmarks/entropy_target.py`); 0.1 is enough against a weak one, and 2 and more cost accuracy."""
    level: Literal["micro", "batch", "lagged"] = "batch"
    """What H is a mean over. `batch`: all tokens of the step, on all processes (one more forward pass where gradients are
    accumulated); `lagged`: the same, with the side of the target taken from the step before (no more passes; step 1 has no
    term); `micro`: the tokens of one pass of one device, so the result depends on `batch.per_device`."""
    aggregate: Literal["token_mean"] = "token_mean"
    """Every completion token counts the same."""

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, values: Any) -> Any:
        published = isinstance(values, dict) and values.get("preset") == "confucius3"
        return {"target": 0.55, "coeff": 0.001, "level": "micro", **values} if published else values


class HardnessConfig(Strict):
    """Advantages times D = alpha * mu + 1 - alpha; mu in [-1, 1] is the mean over a group of +1 (right) and -1 (wrong)."""

    alpha: Annotated[float, Field(lt=0.5)] = -0.256
    """Below 0: groups with fewer right completions count more, up to 1 - 2 alpha times."""
    reward: str | None = None
    """Reward whose `at_least` says what is right; by default the first that is no gate."""
    normalise: bool = False
    """Divide D by its mean over the step, so that only the weighting and not the size of the loss changes."""


class DynamicConfig(Strict):
    """Dynamic sampling: groups whose rewards do not differ are left out, and more rows are asked until the step is full."""

    round: Positive | None = None
    """Groups sampled at once, a multiple of the processes; by default those of one step. Finer rounds waste less and keep
    groups for a shorter time; larger ones keep a batching engine busy. `plan` shows what `recover` saves."""
    max_rounds: Positive = 20
    """Most rounds for one step; see `on_short`. No round is sampled while a whole step is held."""
    recover: bool = True
    """Groups that no longer fit into a step go into the next one, first; off: they are discarded."""
    max_age: Annotated[int, Field(ge=0)] = 2
    """Batches of rollouts that a kept group may wait; older ones are discarded and counted."""
    old_logps: Literal["none", "recompute"] = "none"
    """Old log-probabilities of a step: none (probability ratio 1, as published; for one update a batch of rollouts), or those of
    the policy before the update, for new and kept groups alike."""
    tolerance: Annotated[float, Field(ge=0)] = 1e-6
    """A group is left out where its largest and smallest reward differ by no more than this."""
    on_short: Literal["stop", "smaller"] = "stop"
    """After `max_rounds` without a full step: stop the run, or train on the groups there are, as many as can be shared equally."""


def check_terms(cfg: GRPOStage) -> None:
    """Refuses rewards and terms that do not go together.

    Raises:
        ValueError: what and where, for pydantic.
    """
    names = [item.use for item in cfg.rewards]
    if len(set(names)) < len(names):
        raise ValueError("a reward is named twice")
    added = [item.use for item in cfg.rewards if item.role == "add"]
    if not added:
        raise ValueError("every reward is a gate; give one with role: add")
    if cfg.hardness and cfg.hardness.reward is not None and cfg.hardness.reward not in added:
        raise ValueError(f"hardness.reward: `{cfg.hardness.reward}` is no reward with role: add; there are: {', '.join(added)}")
    _check_trl(cfg, cfg.trl)
    _check_share(cfg)
    problem = dynamic_problem(cfg.dynamic, cfg.num_iterations, cfg.scale_rewards, cfg.trl) if cfg.dynamic else None
    if problem:
        raise ValueError(f"dynamic: {problem}")
    problem = fast_problem(cfg.trl) if cfg.fast == "on" else None
    if problem:
        raise ValueError(f"fast: {problem}")


def _check_share(cfg: GRPOStage) -> None:
    rollout = cfg.rollout
    if rollout.constraint is None:
        return
    free = round(rollout.free_share * cfg.group)
    if rollout.free_share and not free:
        raise ValueError(f"rollout.free_share: {rollout.free_share} of a group of {cfg.group} is none; raise it, or set 0")
    if free == 1 and rollout.weighting == "sequence":
        raise ValueError(
            "rollout.free_share leaves 1 free completion in a group; with weighting: sequence at least 2 are compared, or none"
        )
    bound = cfg.group - free
    if bound < 2:
        raise ValueError(f"rollout.free_share: {rollout.free_share} leaves {bound} constrained of {cfg.group}; at least 2 are compared")
    if cfg.trl.get("multi_objective_aggregation", "sum_then_normalize") != "sum_then_normalize":
        raise ValueError("rollout.constraint needs the sum of rewards; remove trl.multi_objective_aggregation")


def dynamic_problem(dynamic: DynamicConfig, num_iterations: int, scale_rewards: str, block: Mapping[str, Any]) -> str | None:
    """What dynamic sampling cannot be combined with: what it excludes, and what to do instead; None where all is well.

    Args:
        dynamic: the block.
        num_iterations, scale_rewards: of the trainer.
        block: other TRL fields, those that are set.
    """
    if scale_rewards == "batch":
        return "scale_rewards: batch takes a standard deviation over groups that are then left out; use group or none"
    if block.get("multi_objective_aggregation", "sum_then_normalize") != "sum_then_normalize":
        return "multi_objective_aggregation: normalize_then_sum normalises over groups that are then left out; use sum_then_normalize"
    if dynamic.old_logps == "none" and num_iterations > 1:
        return "old_logps: none needs num_iterations: 1, since later updates have no probability to compare with; use recompute"
    if dynamic.recover and block.get("sync_ref_model"):
        return "sync_ref_model changes the reference of groups that wait; set recover: false or leave it out"
    return None


FAST_LACKS: dict[str, Any] = {
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "cast_lm_head_to_fp32": False,
    "tools": None,
}
"""Fields of TRL's config that `fast: on` does not read -> their neutral values."""


def fast_problem(block: Mapping[str, Any]) -> str | None:
    """What `fast: on` cannot be combined with, and what to do instead; None where all is well.

    Args:
        block: TRL fields, those that are set.
    """
    lacking = next((name for name, neutral in FAST_LACKS.items() if block.get(name, neutral) != neutral), None)
    if lacking:
        instead = "use our `entropy`" if lacking in ("entropy_coef", "use_adaptive_entropy") else "remove it"
        return f"trl.{lacking} is not supported; {instead}, or set fast: off"
    if (block.get("gradient_checkpointing_kwargs") or {}).get("use_reentrant"):
        return "trl.gradient_checkpointing_kwargs: use_reentrant: true loses the gradient of shared prompts; use false"
    return None


def _check_trl(cfg: GRPOStage, block: dict[str, Any]) -> None:
    bonus = next((key for key in ("entropy_coef", "use_adaptive_entropy") if block.get(key)), None)
    if cfg.entropy and bonus:
        raise ValueError(f"entropy and trl.{bonus} both steer the entropy; keep one of them")
    rewritten = "hardness" if cfg.hardness else "a reward with role: gate" if any(r.role == "gate" for r in cfg.rewards) else ""
    if rewritten and block.get("multi_objective_aggregation", "sum_then_normalize") != "sum_then_normalize":
        raise ValueError(f"{rewritten} needs the sum of rewards; remove trl.multi_objective_aggregation")

"""Terms of ours around TRL's GRPO: gates, hardness weighting, the plain sum, targeted entropy.

Nothing of TRL's is copied. Rewards are kept as `_calculate_rewards` gathers them, and where gates or hardness are on, the
advantages that TRL computed are written anew from them. The policy's loss is TRL's; the entropy term is added to it, from
the entropies that TRL computed for the same tokens. With all terms off every number is TRL's.

The entropy of a step (`batch`, `lagged`) is that of the tokens of its micro-batches on all processes, so that neither
accumulation nor the number of processes changes its gradient. `batch` needs its side of the target before the first
backward pass: from the pass itself where a step is one micro-batch, else from one more pass without gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from posttrain.errors import ConfigError
from posttrain.losses.advantages import advantages, failed_gates, spread
from posttrain.losses.entropy import side_of, targeted_entropy
from posttrain.losses.hardness import correctness, hardness_weight
from posttrain.trainers._grpo_config import EntropyConfig, HardnessConfig
from posttrain.trainers._grpo_metrics import group_metrics, loss_mask
from posttrain.trainers._trl import policy_entropies

if TYPE_CHECKING:
    from posttrain.trainers.grpo import GRPOStage

_Trainer: Any = object


@dataclass(frozen=True)
class Terms:
    """What is added to TRL's GRPO.

    Args:
        entropy, hardness: see the config.
        correct: column of the reward that says what is right.
        at_least: value from which it does.
        gates: column of a gate -> its level.
        gate_value: reward of a completion that fails a gate.
        plain_sum: with loss_type dr_grpo, leave the division by the completion limit out.
    """

    entropy: EntropyConfig | None = None
    hardness: HardnessConfig | None = None
    correct: int = 0
    at_least: float = 1.0
    gates: Mapping[int, float] = field(default_factory=dict)
    gate_value: float = -1.0
    plain_sum: bool = False


def terms_of(cfg: GRPOStage) -> Terms:
    """The terms that a stage asks for."""
    named = cfg.hardness.reward if cfg.hardness else None
    correct = next(i for i, item in enumerate(cfg.rewards) if item.role == "add" and named in (None, item.use))
    gates = {i: item.at_least for i, item in enumerate(cfg.rewards) if item.role == "gate"}
    return Terms(cfg.entropy, cfg.hardness, correct, cfg.rewards[correct].at_least, gates, cfg.gate_value, cfg.loss_type == "sum")


class WithTerms(_Trainer):
    """Adds `terms` to a GRPOTrainer.

    Args:
        terms: None is Terms(), all off.
    """

    assembles = False
    """Whether steps are put together from several batches of rollouts; `finish_step` must then be called on what is trained on."""
    max_completion_length: int

    def __init__(self, *args: Any, terms: Terms | None = None, **kwargs: Any) -> None:
        self.terms = terms or Terms()
        self.reward_matrix: torch.Tensor | None = None
        self.entropy_before: float | None = None
        self._window = _Window()
        super().__init__(*args, **kwargs)
        self._check_windows()

    def _check_windows(self) -> None:
        entropy, each, passes = self.terms.entropy, self.args.steps_per_generation, self.args.gradient_accumulation_steps
        if entropy and entropy.level != "micro" and each % passes:
            raise ConfigError(
                f"entropy.level: {entropy.level} needs every step inside one batch of rollouts, but {each} passes a batch of rollouts"
                f" are no multiple of the {passes} of a step",
                where="trl.steps_per_generation",
                fix="remove it, or set entropy.level: micro",
            )

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        self.reward_matrix = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self.reward_matrix

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        self._score(output)
        return output

    def _score(self, output: dict[str, Any]) -> None:
        """Measures a batch of rollouts, and writes its advantages anew where gates or hardness are on."""
        terms, rewards = self.terms, self.reward_matrix
        assert rewards is not None
        group = self.num_generations if self.model.training else self.num_generations_eval
        failed = failed_gates(rewards, terms.gates)
        right = correctness(rewards[:, terms.correct], terms.at_least, failed)
        for name, value in group_metrics(right, group).items():
            self.measure(name, value)
        for column, level in terms.gates.items():
            self.measure(f"gate/{self.reward_func_names[column]}", failed_gates(rewards, {column: level}).float().mean().item())
        weight = self._hardness(right, group, output)
        if terms.gates or weight is not None:
            self._rewrite(output, rewards, group, weight)
        own = self.accelerator.gather(output["advantages"])
        for name, value in (("min", own.min()), ("mean", own.mean()), ("max", own.max())):
            self.measure(f"advantage/{name}", value.item())

    def _hardness(self, right: torch.Tensor, group: int, output: dict[str, Any]) -> torch.Tensor | None:
        """D of all completions; normalised here unless the step is assembled later."""
        hardness = self.terms.hardness
        if hardness is None:
            return None
        weight = hardness_weight(right, group, hardness.alpha)
        self.measure("hardness/mean", weight.mean().item())
        if hardness.normalise and self.assembles:
            output["hardness"] = self._local(weight, output)
        return weight / weight.mean() if hardness.normalise and not self.assembles else weight

    def _local(self, values: torch.Tensor, output: dict[str, Any]) -> torch.Tensor:
        rows = output["completion_ids"].size(0)
        first = self.accelerator.process_index * rows
        return values[first : first + rows]

    def _rewrite(self, output: dict[str, Any], rewards: torch.Tensor, group: int, weight: torch.Tensor | None) -> None:
        """Advantages from the rewards, and what TRL has logged of them."""
        mode = "train" if self.model.training else "eval"
        found, facts = advantages(
            rewards, self.reward_weights.to(rewards.device), group, self.scale_rewards,
            gates=self.terms.gates, gate_value=self.terms.gate_value, hardness=weight,
        )  # fmt: skip
        output["advantages"] = self._local(found, output)
        logged, metrics, std = self._logs["advantages"], self._metrics[mode], facts["std"]
        for _ in range(min(len(found), len(logged))):
            logged.pop()
        logged.extend(found.tolist())
        metrics["reward"][-1], metrics["reward_std"][-1] = facts["total"].nanmean().item(), spread(facts["total"]).item()
        metrics["frac_reward_zero_std"][-1] = torch.isclose(std, torch.zeros_like(std)).float().mean().item()

    def finish_step(self, output: dict[str, Any]) -> None:
        """Normalises hardness over a step that was assembled from several batches of rollouts; called on all processes.

        Args:
            output: this process's part of the step; its `hardness` (B,) is taken out.
        """
        weight = output.pop("hardness", None)
        if weight is not None:
            total = self.accelerator.reduce(torch.stack([weight.sum(), torch.ones_like(weight).sum()]), reduction="sum")
            output["advantages"] = output["advantages"] * (total[1] / total[0])

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        entropy = self.terms.entropy if self.model.training else None
        if entropy is not None and not self._window.left:
            self.open_window(inputs, entropy)
        loss = self._policy_loss(model, inputs)
        return loss if entropy is None else loss + self.entropy_term(entropy, self._kept[1], loss_mask(inputs))

    def _policy_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """TRL's loss. For the plain sum, dr_grpo's divisor of completions * limit has a limit of 1 meanwhile."""
        if not self.terms.plain_sum:
            return super()._compute_loss(model, inputs)
        limit, self.max_completion_length = self.max_completion_length, 1
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self.max_completion_length = limit

    def open_window(self, inputs: dict[str, Any], cfg: EntropyConfig) -> None:
        """Before the first micro-batch of a step: its tokens, and its side of the target where that is known by now."""
        parts = self.current_gradient_accumulation_steps
        window = self._window = _Window(parts, parts)
        if cfg.level == "micro":
            return
        each = self.args.steps_per_generation
        if parts > 1 and self._step % each + parts > each:
            raise ConfigError(
                f"a step of {parts} passes begins at pass {self._step % each} of a batch of rollouts of {each}",
                where="entropy.level",
                fix="give whole steps an epoch (steps, not epochs, of a multiple of the batch), or set level: micro",
            )
        batches = [inputs] if parts == 1 else [self._buffered_inputs[(self._step + i) % each] for i in range(parts)]
        tokens = torch.stack([loss_mask(batch).sum() for batch in batches]).sum().double()
        window.tokens = self.accelerator.reduce(tokens, reduction="sum") / self.accelerator.num_processes
        if cfg.level == "lagged":
            window.side = 0.0 if self.entropy_before is None else side_of(self.entropy_before, cfg.target)
        elif parts > 1:
            sums = torch.stack([entropy_sums(policy_entropies(self, batch), loss_mask(batch)) for batch in batches]).sum(dim=0)
            window.side = side_of(self._mean_of(sums), cfg.target)

    def _mean_of(self, sums: torch.Tensor) -> float:
        """Token mean over all processes of (sum, tokens)."""
        total = self.accelerator.reduce(sums, reduction="sum")
        return float((total[0] / total[1].clamp(min=1)).item())

    def entropy_term(self, cfg: EntropyConfig, entropies: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """What this micro-batch adds to the loss, after `open_window` at the first of a step.

        Args:
            cfg: the target.
            entropies: (B, T) with gradient.
            mask: (B, T), 1 on the tokens that carry loss.
        """
        window = self._window
        sums = entropy_sums(entropies.detach(), mask)
        window.sums = sums if window.sums is None else window.sums + sums
        window.left -= 1
        mean = self._mean_of(window.sums) if not window.left else None
        if cfg.level == "batch" and mean is not None and window.side is None:
            window.side = side_of(mean, cfg.target)
        term = targeted_entropy(entropies, mask, cfg.target, cfg.coeff, side=window.side, tokens=window.tokens, parts=window.parts)
        if mean is not None:
            self._close_window(mean, cfg)
        return term

    def _close_window(self, mean: float, cfg: EntropyConfig) -> None:
        self.entropy_before = mean
        side = side_of(mean, cfg.target) if self._window.side is None else self._window.side
        for name, value in (("mean", mean), ("gap", abs(mean - cfg.target)), ("push", cfg.coeff * side)):
            self.measure(f"entropy/{name}", value)

    def own_state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Entropy of the last step, which decides the side of the next one (level lagged)."""
        values, tensors = super().own_state()
        return values | ({"entropy_before": self.entropy_before} if self.terms.entropy else {}), tensors

    def restore_own_state(self, values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Takes back the entropy of the last step."""
        super().restore_own_state(values, tensors)
        self.entropy_before = values.get("entropy_before")


@dataclass
class _Window:
    """One optimizer step's entropy: micro-batches, those still to come, and what is known of the whole."""

    parts: int = 1
    left: int = 0
    side: float | None = None
    tokens: torch.Tensor | None = None
    sums: torch.Tensor | None = None


def entropy_sums(entropies: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(2,): sum of entropies, tokens."""
    return torch.stack([(entropies * mask).sum(), mask.sum()]).double()

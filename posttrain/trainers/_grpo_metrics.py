"""What a GRPO run measures about itself, each under one stable name. Means are over the optimizer steps since the last log.

TRL's own: `reward`, `reward_std`, `rewards/NAME/{mean,std}`, `frac_reward_zero_std`, `completions/{mean,min,max}_length`,
`completions/clipped_ratio` (share cut at the limit), `completions/{mean,min,max}_terminated_length`, `entropy`, `kl` (to
the reference, with `beta`), `clip_ratio/*`, `grad_norm` (before clipping), `learning_rate`, `num_tokens`, `step_time`.

Ours, of every batch of rollouts:

    group/pass_rate                 share of right completions among those that could be judged: the first reward that is no
                                    gate (or `hardness.reward`) reaches its `at_least`, and no gate failed
    group/all_correct, all_wrong    share of groups with only right, only wrong completions; a group in which nothing could
                                    be judged is neither
    group/mostly_correct, mostly_wrong   share of groups with both, and with at least half, less than half of them right
    gate/NAME                       share of completions that the gate failed
    hardness/mean                   D before normalisation, mean over groups
    advantage/{min,mean,max}        of a completion, before a correction by token
    completions/p50_length, p95_length
    rewards/unscored                completions without any reward, where there are some
    correction/mean, correction/std, correction/ess   of the weights of `rollout.correction` on tokens: mean, standard deviation,
                                    and effective sample size over the tokens, 1 where all weights are equal
    correction/capped               share of tokens whose ratio was above the cap; for sequence_mask these are masked

Of every optimizer step:

    entropy/mean, entropy/gap       H of the step's tokens, |H - target|                          with `entropy`
    entropy/sequence_min, sequence_max   mean entropy of the completion with the lowest, the highest
    entropy/push                    coeff * side of the target: above 0 the loss lowers H         with `entropy`
    ratio/{mean,max}, ratio/kl      probability ratio to the policy before the update, and an estimate of the divergence;
                                    only where they differ: num_iterations > 1, or several steps a batch of rollouts
    mismatch/{mean,max}             |log p_train - log p_rollout| of sampled tokens (before an update, where there are old
                                    log-probabilities); without top-p and top-k, with an engine that gives its own, and of
                                    rows sampled for this step only
    mismatch/kl                     estimate of the divergence of the sampler from the policy
    seconds/generate                drawing completions, advantages included
    seconds/reward                  rewards
    seconds/logprobs                log-probabilities and entropies without gradient
    seconds/forward_backward        the rest of the step's passes
    seconds/optimizer               the update
    useful_tokens_per_s             completion tokens of completions whose advantage is not 0, over the seconds of all phases
    steps_skipped                   1 where every completion was masked
    fast/positions                  positions forwarded in training over those of the padded batch       with `fast: on`

On a GPU, work that is still queued is charged to the phase that waits for it.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

PHASES = ("generate", "reward", "logprobs", "forward_backward", "optimizer")
SUMS = ("ratio_tokens", "ratio", "ratio_kl", "gap_tokens", "gap", "gap_kl", "useful")
LARGEST = ("ratio_max", "gap_max", "entropy_max", "entropy_min")
"""What is kept as a maximum over micro-batches and processes; `entropy_min` with its sign turned."""
_Trainer: Any = object


class PhaseClock:
    """Seconds by phase; a phase inside another is taken out of it."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def start(self, name: str) -> None:
        """A phase begins."""
        self._charge()
        self._open.append(name)

    def stop(self) -> None:
        """The innermost phase ends."""
        self._charge()
        self._open.pop()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charges the block to a phase."""
        self.start(name)
        try:
            yield
        finally:
            self.stop()

    def take(self) -> dict[str, float]:
        """Seconds since the last call."""
        found: dict[str, float] = dict(self.seconds)
        self.seconds.clear()
        return found


def group_metrics(right: torch.Tensor, group: int) -> dict[str, float]:
    """Pass rate, and how the pass rates of groups are spread: without a wrong, with more and with less right than wrong, without a right.

    Args:
        right: (R,) +1, -1, or NaN where not known.
        group: completions of one row.
    """
    known = ~right.isnan()
    if not known.any():
        return {}
    up, down = (right > 0).view(-1, group).sum(dim=1), (right < 0).view(-1, group).sum(dim=1)
    mixed = (up > 0) & (down > 0)
    shares = {
        "all_correct": (up > 0) & (down == 0),
        "mostly_correct": mixed & (up >= down),
        "mostly_wrong": mixed & (up < down),
        "all_wrong": (up == 0) & (down > 0),
    }
    rate = (right > 0).sum().item() / known.sum().item()
    return {"group/pass_rate": rate, **{f"group/{name}": where.float().mean().item() for name, where in shares.items()}}


def token_sums(
    logps: torch.Tensor, entropies: torch.Tensor, batch: dict[str, torch.Tensor], mask: torch.Tensor, comparable: bool
) -> torch.Tensor:
    """(11,): SUMS over the tokens of a micro-batch, then LARGEST.

    Args:
        logps, entropies: (B, T) of the policy in training, no gradient.
        batch: the micro-batch.
        mask: (B, T).
        comparable: whether the sampling distribution is the policy's own.
    """
    old, sampled = batch.get("old_per_token_logps"), batch.get("sampling_per_token_logps")
    out = dict.fromkeys((*SUMS, *LARGEST), logps.new_zeros(()))
    lengths = mask.sum(dim=1)
    means = (entropies * mask).sum(dim=1)[lengths > 0] / lengths[lengths > 0]
    empty = logps.new_full((1,), -torch.inf)
    out |= {"entropy_max": torch.cat([means, empty]).max(), "entropy_min": torch.cat([-means, empty]).max()}
    if old is not None:
        change = (logps - old) * mask
        ratio = change.exp()
        out |= {"ratio_tokens": mask.sum(), "ratio": (ratio * mask).sum(), "ratio_kl": (ratio - 1 - change).sum()}
        out["ratio_max"] = (ratio * mask).max()
    if sampled is not None and comparable:
        known = mask * ~sampled.isnan()
        gap = ((logps if old is None else old) - sampled).nan_to_num(nan=0.0) * known
        out |= {"gap_tokens": known.sum(), "gap": gap.abs().sum(), "gap_kl": (gap.exp() - 1 - gap).sum(), "gap_max": gap.abs().max()}
    moving = batch["advantages"] != 0
    moving = moving.any(dim=1) if moving.dim() > 1 else moving
    out["useful"] = (mask * moving.unsqueeze(1)).sum()
    return torch.stack([value.double() for value in out.values()])


class Measured(_Trainer):
    """Adds the metrics of the module to a GRPOTrainer; changes no number of the training itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.clock = PhaseClock()
        self._sums: torch.Tensor | None = None
        self._kept: tuple[Any, ...] = ()
        super().__init__(*args, **kwargs)
        self.add_callback(_StepMetrics(self))

    def measure(self, name: str, value: float) -> None:
        """Adds a value to the metrics of the present mode."""
        self._metrics["train" if self.model.training else "eval"][name].append(value)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The step; its seconds are kept."""
        with self.clock.phase("forward_backward"):
            return super().training_step(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        with self.clock.phase("generate"):
            return super()._generate_and_score_completions(inputs)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        lengths = torch.tensor([len(ids) for ids in completion_ids_list], dtype=torch.float32, device=self.accelerator.device)
        middle, high = self.accelerator.gather(lengths).quantile(torch.tensor([0.5, 0.95], device=lengths.device)).tolist()
        self.measure("completions/p50_length", middle)
        self.measure("completions/p95_length", high)
        with self.clock.phase("reward"):
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            self._kept = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            return self._kept
        with self.clock.phase("logprobs"):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        loss = super()._compute_loss(model, inputs)
        if self.model.training and self._kept:
            with torch.no_grad():
                logps, entropies = (kept.detach() for kept in self._kept[:2])
                sums = token_sums(logps, entropies, inputs, loss_mask(inputs), self.top_p >= 1 and not self.top_k)
            self._sums = sums if self._sums is None else add_sums(self._sums, sums)
        self._kept = ()
        return loss

    def end_of_step(self) -> None:
        """Turns what was kept since the last step into metrics; called on all processes."""
        seconds, kept = self.clock.take(), self._sums
        for name, value in seconds.items():
            self.measure(f"seconds/{name}", value)
        if kept is None:
            return
        self._sums = None
        first, *others = self.accelerator.gather(kept.unsqueeze(0)).unbind()
        for other in others:
            first = add_sums(first, other)
        found = dict(zip((*SUMS, *LARGEST), first.tolist(), strict=True))
        for name, value in (("min", -found["entropy_min"]), ("max", found["entropy_max"])):
            if math.isfinite(value):
                self.measure(f"entropy/sequence_{name}", value)
        for kind, label in (("ratio", "ratio"), ("gap", "mismatch")):
            tokens = found[f"{kind}_tokens"]
            if tokens:
                self.measure(f"{label}/mean", found[kind] / tokens)
                self.measure(f"{label}/kl", found[f"{kind}_kl"] / tokens)
                self.measure(f"{label}/max", found[f"{kind}_max"])
        self.measure("useful_tokens_per_s", found["useful"] / max(sum(seconds.values()), 1e-9))


def weight_metrics(sums: torch.Tensor) -> dict[str, float]:
    """Metrics of correction weights.

    Args:
        sums: (4,) tokens, sum of their weights, of the squares, tokens above the cap; over all processes.
    """
    tokens, total, squares, capped = sums.tolist()
    if not tokens:
        return {}
    mean, square = total / tokens, squares / tokens
    return {
        "correction/mean": mean,
        "correction/std": max(square - mean * mean, 0.0) ** 0.5,
        "correction/ess": mean * mean / square if square else 0.0,
        "correction/capped": capped / tokens,
    }


def add_sums(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Two results of `token_sums` together."""
    return torch.cat([left[: len(SUMS)] + right[: len(SUMS)], torch.maximum(left[len(SUMS) :], right[len(SUMS) :])])


def loss_mask(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, T), 1 on the tokens that carry loss."""
    mask = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask


class _StepMetrics(TrainerCallback):
    """Times the update, and closes the step."""

    def __init__(self, trainer: Measured) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.clock.start("optimizer")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.clock.stop()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.end_of_step()

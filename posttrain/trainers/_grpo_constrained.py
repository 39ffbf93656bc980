"""Constrained rollouts in GRPO: who is drawn how, which completions carry loss, and the weights of their advantages.

Two kinds of log-probability never meet. `logprobs` are those of the policy without the constraint: they are compared with recomputed ones
and stand in ratios. `log_weight` is log W of the sampler; it only ever multiplies advantages (`posttrain.losses.constrained`).

Of each group a share is drawn without the constraint (`free_share`, the last ones), and its rewards see what the policy writes by
itself. With `weighting: none` all completions of a group are compared with one another, so that a valid one counts more than what
the policy wrote by itself and missed; with `sequence` the free ones are compared among themselves, and the objective is
(1 - share) E_pi[r | constraint] + share E_pi[r].

A completion that the constraint left nowhere to go (`dead_end`), or whose checker failed, is judged by no reward, is in no mean and
carries no loss; with `weighting: sequence` so is one that was cut before it satisfied the constraint, since its weight is 0.

    constrained/{calls,accepted,masked}   tokens asked about per drawn token; share whose first draw was allowed; share drawn by a mask
    constrained/log_weight                mean log W: minus the policy's distance from the constraint, in nats a completion
    constrained/log_z                     log of a group's mean W, mean over groups                             with weighting: sequence
    constrained/ess, clipped              effective sample size of a group's weights; share of weights cut      with weighting: sequence
    constrained/dead, incomplete          share that met a dead end or a failing checker; that was cut before it was whole
    free/valid                            share of free completions that satisfy the constraint
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from posttrain.config.constraint import SamplerConfig
from posttrain.errors import RolloutError
from posttrain.losses.constrained import weighted_advantages
from posttrain.rollout.base import Completion, Request
from posttrain.rollout.constraints import Constraint, complete

_Trainer: Any = object
DEAD = ("dead_end", "checker_error")


@dataclass(frozen=True)
class Constrained:
    """What rollouts must satisfy, and what becomes of their weights.

    Args:
        constraint: of the completions that are not free.
        sampler: with one particle.
        weighting: `none` or `sequence`.
        clip: largest weight of a completion in its group.
        free_share: share of each group that is drawn without the constraint.
    """

    constraint: Constraint
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    weighting: str = "none"
    clip: float = 10.0
    free_share: float = 0.25

    def is_free(self, index: int, group: int) -> bool:
        """Whether the completion with this number in its group is drawn without the constraint; the last ones are."""
        return index >= group - round(self.free_share * group)


class WithConstraint(_Trainer):
    """Draws under a constraint, where asked; stands below `WithTerms`, whose rewards it completes.

    Args:
        constrained: see Constrained; None changes nothing.
    """

    def __init__(self, *args: Any, constrained: Constrained | None = None, **kwargs: Any) -> None:
        self.constrained = constrained
        self._drawn: tuple[Sequence[Request], Sequence[Completion]] = ((), ())
        super().__init__(*args, **kwargs)

    def constrain(self, requests: Sequence[Request]) -> list[Request]:
        """The requests with the constraint on those that are not free; this process's, in order."""
        own, group = self.constrained, self._group()
        if own is None:
            return list(requests)
        first = self.accelerator.process_index * len(requests)
        return [
            request if own.is_free((first + i) % group, group) else replace(request, constraint=own.constraint, sampler=own.sampler)
            for i, request in enumerate(requests)
        ]

    def keep(self, requests: Sequence[Request], done: Sequence[Completion]) -> dict[str, Any]:
        """Remembers a batch of rollouts, and gives TRL what rewards see of it beside the text."""
        if self.constrained is None:
            return {}
        self._drawn = requests, done
        return {"finish_reason": [completion.finish_reason for completion in done]}

    def _group(self) -> int:
        return int(self.num_generations if self.model.training else self.num_generations_eval)

    def _everywhere(self, values: Sequence[float | bool]) -> torch.Tensor:
        """(R,) of all processes."""
        found: torch.Tensor = self.accelerator.gather(torch.tensor(values, dtype=torch.float64, device=self.accelerator.device))
        return found

    def _out(self) -> list[bool]:
        """Which of this process's completions carry no loss."""
        own, (requests, done) = self.constrained, self._drawn
        assert own is not None
        cut = own.weighting == "sequence"
        return [
            request.constraint is not None and (c.finish_reason in DEAD or (cut and not c.extra["complete"]))
            for request, c in zip(requests, done, strict=True)
        ]

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        rewards: torch.Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.constrained is None:
            return rewards
        out = self._everywhere(self._out()).bool()
        return rewards.masked_fill(out[:, None], torch.nan)

    def weigh(self, output: dict[str, Any]) -> None:
        """Takes completions out of the loss, weights the advantages of the others, and measures."""
        own, (requests, done) = self.constrained, self._drawn
        if own is None:
            return
        out, bound = self._out(), [request.constraint is not None for request in requests]
        mask = output["completion_mask"] * ~torch.tensor(out, device=output["completion_mask"].device)[:, None]
        output["completion_mask"] = mask
        loss = mask * output["tool_mask"] if "tool_mask" in output else mask
        output["num_items_in_batch"] = self.accelerator.gather(loss.sum()).sum()
        self._measure_constrained(requests, done)
        if own.weighting == "none":
            return
        logs = self._everywhere([c.extra["log_weight"] if ok else 0.0 for c, ok in zip(done, bound, strict=True)])
        weighted = self._everywhere([ok and not gone for ok, gone in zip(bound, out, strict=True)]).bool()
        advantages = self.accelerator.gather(output["advantages"])
        free = ~self._everywhere(bound).bool()
        found, facts = weighted_advantages(advantages, logs, weighted, self._group(), own.clip)
        found, _ = weighted_advantages(found, torch.zeros_like(logs), free, self._group(), own.clip)
        first = self.accelerator.process_index * len(done)
        output["advantages"] = found[first : first + len(done)]
        for name, value in (("log_z", facts["log_mean"]), ("ess", facts["ess"])):
            if not bool(value.isnan().all()):
                self.measure(f"constrained/{name}", value.nanmean().item())
        if bool(weighted.any()):
            self.measure("constrained/clipped", (facts["clipped"].sum() / weighted.sum()).item())

    def _measure_constrained(self, requests: Sequence[Request], done: Sequence[Completion]) -> None:
        own = self.constrained
        assert own is not None
        rows: dict[str, list[float]] = {name: [] for name in ("calls", "accepted", "masked", "log_weight", "dead", "incomplete")}
        valid: list[float] = []
        for request, completion in zip(requests, done, strict=True):
            if request.constraint is None:
                valid.append(float(completion.finish_reason == "stop" and _satisfies(own.constraint, completion.text)))
                continue
            dead = completion.finish_reason in DEAD
            for name in ("calls", "accepted", "masked"):
                rows[name].append(completion.extra[name])
            rows["dead"].append(float(dead))
            rows["incomplete"].append(float(not dead and not completion.extra["complete"]))
            if math.isfinite(completion.extra["log_weight"]):
                rows["log_weight"].append(completion.extra["log_weight"])
        sums = [value for values in (*rows.values(), valid) for value in (sum(values), len(values))]
        totals = self._everywhere(sums).view(-1, len(rows) + 1, 2).sum(dim=0).tolist()
        for name, (total, count) in zip([*(f"constrained/{name}" for name in rows), "free/valid"], totals, strict=True):
            if count:
                self.measure(name, total / count)


def _satisfies(constraint: Constraint, text: str) -> bool:
    try:
        return complete(constraint, text.encode("utf-8"))
    except RolloutError:
        return False

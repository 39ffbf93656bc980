"""Group-relative advantages.

For completion i of a group with rewards r_if, weights w_f and the group's completions j:

    r_i = sum_f w_f r_if                    over rewards with role add that apply (are not NaN)
    r_i = gate_value                        where a gate's reward is below its level
    A_i = (r_i - mean_j r_j) / (s + 1e-4) * D

with s the standard deviation of the group (`group`), of the batch (`batch`), or no division (`none`: Liu et al., Dr. GRPO,
2503.20783), and D the group's hardness weight (`hardness.py`). A completion without any reward is left out of mean and s
and has A = 0, as in TRL. Without gates and D the result is TRL's, bit by bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

Scale = Literal["group", "batch", "none"]
EPS = 1e-4


def failed_gates(rewards: torch.Tensor, gates: Mapping[int, float]) -> torch.Tensor:
    """(R,) True where a gate's reward is below its level; a gate that does not apply (NaN) is passed.

    Args:
        rewards: (R, F), NaN = does not apply.
        gates: column -> level.
    """
    failed = torch.zeros(rewards.size(0), dtype=torch.bool, device=rewards.device)
    for column, level in gates.items():
        failed |= rewards[:, column] < level
    return failed


def totals(
    rewards: torch.Tensor, weights: torch.Tensor, gates: Mapping[int, float] | None = None, gate_value: float = -1.0
) -> torch.Tensor:
    """(R,) reward of each completion, NaN where none applies and no gate failed; see the module.

    Args:
        rewards: (R, F), NaN = does not apply.
        weights: (F,); those of gates are not used.
        gates: column -> level; None is no gate.
        gate_value: reward of a completion that fails a gate.
    """
    gates = gates or {}
    added = torch.tensor([column not in gates for column in range(rewards.size(1))], device=rewards.device)
    total = (rewards * weights.unsqueeze(0) * added).nansum(dim=1)
    total[rewards[:, added].isnan().all(dim=1)] = torch.nan
    return torch.where(failed_gates(rewards, gates), torch.full_like(total, gate_value), total) if gates else total


def spread(values: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Standard deviation with Bessel's correction over what is not NaN; NaN for fewer than two values. The dimension is kept."""
    mean = values.nanmean(dim=dim, keepdim=True)
    variance = ((values - mean) ** 2).nanmean(dim=dim, keepdim=True)
    count = (~values.isnan()).sum(dim=dim, keepdim=True).to(values.dtype)
    correction = torch.where(count > 1, count / (count - 1), torch.full_like(variance, torch.nan))
    return (variance * correction).sqrt()


def advantages(
    rewards: torch.Tensor,
    weights: torch.Tensor,
    group: int,
    scale: Scale = "group",
    *,
    gates: Mapping[int, float] | None = None,
    gate_value: float = -1.0,
    hardness: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Advantages of all completions of a batch; see the module.

    Args:
        rewards: (R, F) of the whole batch over all processes, NaN = does not apply.
        weights: (F,).
        group: completions of one row.
        scale: what the difference to the mean is divided by.
        gates: column -> level; None is no gate.
        gate_value: reward of a completion that fails a gate.
        hardness: (R,) D; None is 1.

    Returns:
        (R,) advantages, and {"total": (R,) rewards, "std": (R,) the standard deviation that TRL compares with 0}.

    Raises:
        ValueError: R is no multiple of `group`.
    """
    if rewards.size(0) % group:
        raise ValueError(f"{rewards.size(0)} completions are no whole number of groups of {group}")
    total = totals(rewards, weights, gates, gate_value)
    grouped = total.view(-1, group)
    mean = grouped.nanmean(dim=1).repeat_interleave(group)
    if scale == "batch":
        std = spread(total).expand_as(total)
    else:
        std = spread(grouped, dim=1).squeeze(1).repeat_interleave(group) if group > 1 else torch.zeros_like(total)
    result = total - mean
    if scale != "none":
        result = result / (std + EPS)
    if hardness is not None:
        result = result * hardness
    return result.nan_to_num(nan=0.0), {"total": total, "std": std}

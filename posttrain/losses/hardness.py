"""Policy-specific hardness weighting (Confucius3-Math, 2506.18330, Eq. 2-3).

For a group with correctness c_i in {+1, -1} and mu = mean c_i, the group's advantages are multiplied by

    D = alpha * mu + (1 - alpha)            alpha = -0.256: D(-1) = 1.512, D(0) = 1.256, D(1) = 1

The paper writes 1.256 for 1 - alpha. mu is always that of the raw correctness, never of a shaped reward.
"""

from __future__ import annotations

import torch


def correctness(values: torch.Tensor, at_least: float = 1.0, failed: torch.Tensor | None = None) -> torch.Tensor:
    """(R,) +1 where a completion is right, -1 where it is wrong, NaN where that is not known.

    Args:
        values: (R,) a verifying reward, NaN = could not judge.
        at_least: value from which it is right.
        failed: (R,) True where a gate failed; such a completion is wrong, whatever its answer.
    """
    signs = torch.where(values >= at_least, 1.0, -1.0).to(values.dtype)
    signs = torch.where(values.isnan(), torch.full_like(signs, torch.nan), signs)
    return signs if failed is None else torch.where(failed, torch.full_like(signs, -1.0), signs)


def hardness_weight(correct: torch.Tensor, group: int, alpha: float = -0.256, normalise: bool = False) -> torch.Tensor:
    """(R,) D of each completion's group.

    Args:
        correct: (R,) +1, -1 or NaN, in groups that follow one another; NaN is left out of mu.
        group: completions of one row.
        alpha: slope; D is 1 - 2 alpha for a group without a right completion, 1 for one without a wrong one.
        normalise: divide by the mean over the batch.

    Returns:
        D, and 1 for a group in which nothing is known (before the division).
    """
    mu = correct.view(-1, group).nanmean(dim=1)
    weight = torch.where(mu.isnan(), torch.ones_like(mu), alpha * mu + (1 - alpha))
    return (weight / weight.mean() if normalise else weight).repeat_interleave(group)

r"""Advantages of completions that were drawn under a constraint, weighted back to the policy.

Let pi be the policy, c(y) in {0, 1} the constraint, and a the law of a completion that takes each token exactly from what the constraint
allows (adaptive weighted rejection sampling, or a mask): a(y) = prod_t pi(y_t) c_t(y_t) / Z_t. Its weight W has the mean
E[W | y] = prod_t Z_t (`posttrain.rollout.awrs`), so for any f

    E_a[W f(y)] = E_pi[c(y) f(y)]                                                        without bias
    E_a[W (r - b) grad log pi(y)] / E_a[W] = grad E_pi[r | c],   b = E_a[W r] / E_a[W]

The second is the gradient of the mean reward of the policy *given* the constraint. In a group it is estimated with weights of mean
1 over the group's constrained completions, w_i = W_i / mean W, cut at `clip`, and the mean reward taken with the same weights:

    A_i = w_i (A_i - sum_j w_j A_j / sum_j w_j)

which is consistent in the size of the group. Without weights (`weighting: none`) the completions stand for a, which is no policy's law:
E_a[(r - E_a r) grad log pi(y)] is the gradient of nothing, and differs from the above where prod Z_t differs among completions.
"""

from __future__ import annotations

import torch


def weighted_advantages(
    advantages: torch.Tensor, log_weights: torch.Tensor, weighted: torch.Tensor, group: int, clip: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Advantages times the weights of their group; see the module.

    Args:
        advantages: (R,) relative to any number that is the same in a group.
        log_weights: (R,) log W; read where `weighted`.
        weighted: (R,) True for the completions that are weighted; the others keep their advantage.
        group: completions of one row; R is a multiple.
        clip: largest weight.

    Returns:
        (R,) advantages, and {"ess": (R / group,) effective sample size over their number, "log_mean": (R / group,) log of the mean W,
        both NaN where a group has none; "clipped": (R,) whose weight was cut}.
    """
    shape = (-1, group)
    own, chosen = advantages.double().view(shape), weighted.view(shape)
    logs = log_weights.double().view(shape).masked_fill(~chosen, -torch.inf)
    count = chosen.sum(dim=1, keepdim=True)
    log_mean = torch.logsumexp(logs, dim=1, keepdim=True) - count.double().log()
    some = count > 0
    weights = torch.where(chosen, (logs - torch.where(some, log_mean, 0.0)).exp(), 0.0)
    cut = weights > clip
    weights = weights.clamp(max=clip)
    total = weights.sum(dim=1, keepdim=True)
    centre = (weights * own).sum(dim=1, keepdim=True) / total.clamp(min=torch.finfo(torch.float64).tiny)
    found = torch.where(chosen, weights * (own - centre), own)
    ess = (total.square() / weights.square().sum(dim=1, keepdim=True) / count).squeeze(1)
    nothing = torch.full_like(ess, torch.nan)
    facts = {
        "ess": torch.where(some.squeeze(1), ess, nothing),
        "log_mean": torch.where(some.squeeze(1), log_mean.squeeze(1), nothing),
        "clipped": cut.view(-1),
    }
    return found.view(-1).to(advantages.dtype), facts

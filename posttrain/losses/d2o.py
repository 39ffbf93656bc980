r"""Distributional dispreference optimization, D2O (Duan et al., "Negating Negatives", EMNLP Findings 2024, arXiv 2403.03419).

Of a prompt x with an unwanted answer y_l and K answers y_i that a reference model wrote itself:

    m = beta / K * sum_i [log pi(y_i|x) - log pi_r-(y_i|x)]  -  alpha * [log pi(y_l|x) - log pi_r+(y_l|x)]
    L = -log sigma(m)

Log-probabilities are sums over an answer's tokens. pi_r- and pi_r+ may be two references (a more harmful one for the own
answers, a more helpful one for the unwanted); the published runs have one for both, K = 11, alpha = beta = 0.1. The mean
over the own answers is *inside* the sigmoid: by Jensen L is at most the mean of K DPO losses, and with K = 1 it is DPO's.

Unlikelihood (Welleck et al. 2020, arXiv 1908.04319), for comparison: the mean over an unwanted answer's tokens of -log(1 - p).
"""

from __future__ import annotations

import torch

FLOOR = 1e-6
"""1 - p is not taken below it, as in the published unlikelihood code."""


def d2o_margin(
    self_logps: torch.Tensor,
    self_refs: torch.Tensor,
    negative_logps: torch.Tensor,
    negative_refs: torch.Tensor,
    alpha: float = 0.1,
    beta: float = 0.1,
) -> torch.Tensor:
    """(B,) m; see the module.

    Args:
        self_logps, self_refs: (B, K) of the own answers under the policy and their reference; NaN where a prompt has fewer.
        negative_logps, negative_refs: (B,) of the unwanted answers.
        alpha, beta: weights of the two sides.
    """
    gains = (self_logps - self_refs).masked_fill(self_refs.isnan(), 0.0)
    count = (~self_refs.isnan()).sum(dim=1)
    return beta * gains.sum(dim=1) / count - alpha * (negative_logps - negative_refs)


def d2o_loss(margin: torch.Tensor) -> torch.Tensor:
    """(B,) -log sigma(m)."""
    return -torch.nn.functional.logsigmoid(margin)


def jeffrey_divergence(self_logps: torch.Tensor, self_refs: torch.Tensor) -> torch.Tensor:
    """(B,) estimate of KL(pi||r) + KL(r||pi) = E_r[(pi/r - 1) log(pi/r)] over answers, from those the reference wrote."""
    gains = self_logps - self_refs
    return (gains.expm1() * gains).nanmean(dim=1)


def unlikelihood(token_logps: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens (T,) of -log(1 - p)."""
    return -torch.log((-token_logps.expm1()).clamp(min=FLOOR)).mean()

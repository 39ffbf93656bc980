"""The clipped policy losses of the GRPO family.

With ratio r = exp(logp - old logp), advantage A, mask m, and clip range 1 - e .. 1 + h (h > e: clip-higher, DAPO 2503.14476):

    l_it = -min(r A, clip(r, 1 - e, 1 + h) A)                        all but cispo
    l_it = -sg(min(r, h)) A logp                                     cispo (2506.13585); h is the cap itself, as in TRL
    l_it += beta * w * (exp(ref - logp) - (ref - logp) - 1)          with a reference; w = r gives the unbiased gradient of
                                                                     the divergence (2512.02556), as in TRL, else 1

and the sum over completions i and tokens t, divided by

    grpo      rows, each completion by its own tokens first          (2402.03300)
    bnpo      tokens of the micro-batch
    dapo      tokens of the step                                     cispo likewise
    dr_grpo   rows * max_tokens                                      (2503.20783)
    sum       rows: the plain double sum of Confucius3-Math (2506.18330, Eq. 1), whose constant is not published;
              N * G, the completions of the step, is ours
"""

from __future__ import annotations

from typing import Literal

import torch

LossType = Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sum"]


def policy_loss(
    logps: torch.Tensor,
    old_logps: torch.Tensor | None,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    loss_type: LossType,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    ref_logps: torch.Tensor | None = None,
    beta: float = 0.0,
    unbiased_kl: bool = True,
    rows: float | torch.Tensor | None = None,
    tokens: float | torch.Tensor | None = None,
    max_tokens: int | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of one micro-batch; those of a step are summed, and averaged over processes.

    Args:
        logps: (B, T) with gradient.
        old_logps: (B, T) of the policy that the ratio is taken against; None is `logps` without gradient (ratio 1).
        advantages: (B,) or (B, T).
        mask: (B, T), 1 on completion tokens.
        loss_type: what the sum is divided by; see the module.
        epsilon, epsilon_high: clip range below and above 1; above = below where None.
        ref_logps: (B, T) of the reference, for `beta`.
        beta: weight of the divergence to the reference.
        unbiased_kl: weight its estimate by the ratio (TRL's `use_bias_correction_kl`).
        rows: completions of the step on one process (grpo, dr_grpo, sum); None is B.
        tokens: completion tokens of the step on one process, the mean over processes (dapo, cispo; for bnpo those of the
            micro-batch times the micro-batches); None is the mask's.
        max_tokens: completion limit (dr_grpo).

    Returns:
        The scalar loss, and sums over tokens without gradient: `tokens`, `ratio`, `clip_low`, `clip_high`, `kl_old` (an
        estimate of the divergence of the old policy from the new one), `kl` (to the reference), and `ratio_max`.
    """
    old = logps.detach() if old_logps is None else old_logps
    weight = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
    high = epsilon if epsilon_high is None else epsilon_high
    ratio = (logps - old).exp()
    if loss_type == "cispo":
        loss = -ratio.clamp(max=high).detach() * weight * logps
        low_clipped, high_clipped = torch.zeros_like(mask, dtype=torch.bool), (ratio > high) & (weight > 0)
    else:
        loss = -torch.minimum(ratio * weight, ratio.clamp(1 - epsilon, 1 + high) * weight)
        low_clipped, high_clipped = (ratio < 1 - epsilon) & (weight < 0), (ratio > 1 + high) & (weight > 0)
    kl = None
    if ref_logps is not None and beta:
        gap = ref_logps - logps
        kl = (gap.exp() - gap - 1) * (ratio if unbiased_kl else 1)
        loss = loss + beta * kl
    with torch.no_grad():
        shares = {"ratio": ratio, "clip_low": low_clipped, "clip_high": high_clipped, "kl_old": ratio - 1 - (logps - old)}
        shares |= {"kl": kl} if kl is not None else {}
        sums = {name: (value * mask).sum() for name, value in shares.items()}
        sums |= {"tokens": mask.sum(), "ratio_max": (ratio * mask).max() if mask.numel() else ratio.new_zeros(())}
    return _aggregate(loss, mask, loss_type, rows, tokens, max_tokens), sums


def _aggregate(
    loss: torch.Tensor,
    mask: torch.Tensor,
    loss_type: LossType,
    rows: float | torch.Tensor | None,
    tokens: float | torch.Tensor | None,
    max_tokens: int | None,
) -> torch.Tensor:
    """The sum of token losses (B, T) divided as the module says."""
    summed, lengths = (loss * mask).sum(dim=1), mask.sum(dim=1)
    rows = loss.size(0) if rows is None else rows
    if loss_type == "grpo":
        return (summed / lengths.clamp(min=1)).sum() / rows
    if loss_type in ("dapo", "cispo", "bnpo"):
        given = lengths.sum() if tokens is None else torch.as_tensor(tokens, dtype=loss.dtype, device=loss.device)
        return summed.sum() / given.clamp(min=1)
    if loss_type == "sum":
        return summed.sum() / rows
    if max_tokens is None:
        raise ValueError("dr_grpo divides by the completion limit; give max_tokens")
    return summed.sum() / (rows * max_tokens)

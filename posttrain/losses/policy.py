"""The clipped policy losses of the GRPO family.

With ratio r = exp(logp - old logp), advantage A, mask m, and clip range 1 - e .. 1 + h (h > e: clip-higher, DAPO 2503.14476):

    l_it = -min(r A, clip(r, 1 - e, 1 + h) A)                        all but cispo; the first r at most delta, where given
                                                                     (two-sided clip, INTELLECT-2, 2505.07291)
    l_it = -sg(min(r, h)) A logp                                     cispo (2506.13585); h is the cap itself, as in TRL
    l_it += beta * w * (exp(ref - logp) - (ref - logp) - 1)          with a reference; w = r gives the unbiased gradient of
                                                                     the divergence (2512.02556), as in TRL, else 1

At level `sequence` the ratio of a token is that of its completion, exp(mean_t m (logp - old logp)) (GSPO, 2507.18071).

The loss is the sum over completions i and tokens t, divided by

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
Level = Literal["token", "sequence"]


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
    level: Level = "token",
    delta: float | None = None,
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
        level: what a ratio belongs to; see the module.
        delta: upper bound of the ratio that is not clipped; None is none.
        rows: completions of the step on one process (grpo, dr_grpo, sum); None is B.
        tokens: above 0, completion tokens of the step on one process, the mean over processes (dapo, cispo; for bnpo those of the
            micro-batch times the micro-batches); None is the mask's.
        max_tokens: completion limit (dr_grpo).

    Returns:
        The scalar loss, and without gradient sums over tokens: `tokens`, `ratio`, `clip_low`,
        `clip_high`, `kl_old` (an estimate of the divergence of the old policy from the new one), `kl` (to the reference);
        at level sequence those over completions, but for `kl`. `count` is what they are sums over. Also `ratio_max`, and
        (B,) `low_by_row`, `high_by_row`, the clipped share of each completion.
    """
    old = logps.detach() if old_logps is None else old_logps
    weight = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
    high = epsilon if epsilon_high is None else epsilon_high
    change = logps - old
    if level == "sequence":
        change = (change * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    ratio = change.exp()
    if loss_type == "cispo":
        loss = -ratio.clamp(max=high).detach() * weight * logps
        clipped = torch.zeros_like(ratio * weight, dtype=torch.bool), (ratio > high) & (weight > 0)
    else:
        free = ratio if delta is None else ratio.clamp(max=delta)
        loss = -torch.minimum(free * weight, ratio.clamp(1 - epsilon, 1 + high) * weight)
        clipped = (free < 1 - epsilon) & (weight < 0), (free > 1 + high) & (weight > 0)
    kl = None
    if ref_logps is not None and beta:
        gap = ref_logps - logps
        kl = (gap.exp() - gap - 1) * (ratio if unbiased_kl else 1)
        loss = loss + beta * kl
    with torch.no_grad():
        sums = _shares(change, clipped, kl, mask)
    return _aggregate(loss, mask, loss_type, rows, tokens, max_tokens), sums


def _shares(
    change: torch.Tensor, clipped: tuple[torch.Tensor, torch.Tensor], kl: torch.Tensor | None, mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What `policy_loss` returns beside the loss.

    Args:
        change: log ratios, (B, T) or (B, 1).
        clipped: below and above, (B, T) or (B, 1).
        kl: (B, T) or None.
        mask: (B, T).
    """
    sums = {"tokens": mask.sum(), "count": mask.sum() if change.size(1) == mask.size(1) else mask.new_tensor(mask.size(0))}
    sums |= {"kl": (kl * mask).sum()} if kl is not None else {}
    values = {"ratio": change.exp(), "kl_old": change.exp() - 1 - change, "clip_low": clipped[0], "clip_high": clipped[1]}
    for name, value in values.items():
        weight = mask if value.size(1) == mask.size(1) else torch.ones_like(value, dtype=change.dtype)
        sums[name] = (value * weight).sum()
        if name.startswith("clip"):
            sums[f"{name[5:]}_by_row"] = (value * weight).sum(dim=1) / weight.sum(dim=1)
    sums["ratio_max"] = (change.exp() * mask).max() if mask.numel() else change.new_zeros(())
    return sums


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
        return summed.sum() / (lengths.sum().clamp(min=1) if tokens is None else tokens)
    if loss_type == "sum":
        return summed.sum() / rows
    if max_tokens is None:
        raise ValueError("dr_grpo divides by the completion limit; give max_tokens")
    return summed.sum() / (rows * max_tokens)

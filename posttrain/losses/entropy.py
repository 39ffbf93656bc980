"""Targeted entropy regularization (Confucius3-Math, 2506.18330, section on TER).

    loss += coeff * |H - H*|,   H = sum_it m_it h_it / sum_it m_it

h_it is the entropy of the policy's distribution at token t of completion i. The gradient is coeff * sign(H - H*) * dH: of
constant size, from both sides. The paper does not say what H is a mean over; with a step that is cut into micro-batches
on several processes it matters, since |.| is not linear:

    micro           each micro-batch has its own H and its own side of the target
    batch, lagged   one H for the whole step. With its side s = sign(H - H*) known beforehand the distance is linear in
                    the tokens, s * (H - H*), so that each micro-batch adds its part and the sum is exact.
"""

from __future__ import annotations

import torch


def side_of(entropy: float, target: float) -> float:
    """+1 above the target, -1 below it, 0 on it."""
    return float((entropy > target) - (entropy < target))


def targeted_entropy(
    entropies: torch.Tensor,
    mask: torch.Tensor,
    target: float,
    coeff: float,
    *,
    side: float | None = None,
    tokens: float | torch.Tensor | None = None,
    parts: int = 1,
) -> torch.Tensor:
    """What one micro-batch adds to the loss; the micro-batches of a step are summed, and averaged over processes.

    Args:
        entropies: (B, T) nats.
        mask: (B, T), 1 on completion tokens.
        target: H*, nats.
        coeff: weight.
        side: sign(H - H*) of the whole step; None takes the micro-batch's own mean (level micro).
        tokens: with `side`, the completion tokens of the whole step divided by the number of processes.
        parts: micro-batches of the step on this process.

    Returns:
        A scalar with gradient; 0 for a micro-batch without tokens.
    """
    masked = (entropies * mask).sum()
    if side is None:
        count = mask.sum()
        distance = (masked / count.clamp(min=1) - target).abs() / parts
        return coeff * torch.where(count > 0, distance, masked)
    if tokens is None:
        raise ValueError("the side of a whole step needs its number of tokens")
    return coeff * side * (masked / torch.as_tensor(tokens, dtype=masked.dtype, device=masked.device).clamp(min=1) - target / parts)

"""Log-probabilities and entropies of chosen tokens from hidden states, without keeping all logits.

    z = (W h + b) / temperature,   logp = z_y - log sum_v exp z_v,   H = -sum_v p_v log p_v

Tokens go through the vocabulary in tiles. The log-probabilities of a small batch are kept for the backward pass; above
`KEEP` numbers each tile is computed again there, so that memory grows with the tile and not with the tokens.
Statistics are float32 for narrower types, and float64 for float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

TILE = 1 << 23
"""Numbers of a tile: tokens * vocabulary."""
KEEP = 1 << 25
"""Most log-probabilities, tokens * vocabulary, that are kept for the backward pass."""


def token_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    *,
    tile: int = TILE,
    keep: int = KEEP,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target, and the entropy of the distribution that it comes from, in nats.

    Args:
        hidden: (N, H).
        weight: (V, H) of the output head.
        targets: (N,) token ids.
        bias: (V,) of the output head.
        temperature: logits are divided by it.
        tile: numbers of a tile.
        keep: see the module.

    Returns:
        (N,), (N,), both with gradient for hidden, weight and bias.
    """
    dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else hidden.dtype
    rows = max(tile // weight.size(0), 1)
    apply: Any = _TokenLogps.apply
    logps, entropies = apply(hidden, weight, bias, targets, temperature, dtype, rows, hidden.size(0) * weight.size(0) <= keep)
    return logps, entropies


def _log_probs(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, temperature: float, dtype: torch.dtype
) -> torch.Tensor:
    """(n, V) log-probabilities of a tile."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.float() if dtype != torch.float64 else logits
    return torch.log_softmax(logits if temperature == 1 else logits.div_(temperature), dim=-1)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        dtype: torch.dtype,
        rows: int,
        keep: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        wide = torch.promote_types(dtype, torch.float32)
        logps, entropies = (torch.empty(hidden.size(0), dtype=wide, device=hidden.device) for _ in range(2))
        keep = keep and any(ctx.needs_input_grad)
        kept = []
        with torch.autocast(hidden.device.type, enabled=False):
            head, shift = weight.to(dtype), None if bias is None else bias.to(dtype)
            for start in range(0, hidden.size(0), rows):
                part = slice(start, start + rows)
                found = _log_probs(hidden[part].to(dtype), head, shift, temperature, dtype)
                logps[part] = found.gather(1, targets[part, None]).squeeze(1)
                entropies[part] = -torch.linalg.vecdot(found.exp(), found)
                if keep:
                    kept.append(found)
        ctx.save_for_backward(hidden, weight, bias, targets, entropies, *kept)
        ctx.temperature, ctx.dtype, ctx.rows = temperature, dtype, rows
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: torch.Tensor | None, grad_entropies: torch.Tensor | None) -> Any:
        hidden, weight, bias, targets, entropies, *kept = ctx.saved_tensors
        wants = ctx.needs_input_grad
        wide = torch.promote_types(ctx.dtype, torch.float32)
        d_hidden = torch.zeros_like(hidden, dtype=ctx.dtype) if wants[0] else None
        d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if wants[1] else None
        d_bias = torch.zeros(weight.size(0), dtype=wide, device=weight.device) if bias is not None and wants[2] else None
        with torch.autocast(hidden.device.type, enabled=False):
            head, shift = weight.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype)
            for number, start in enumerate(range(0, hidden.size(0), ctx.rows)):
                part = slice(start, start + ctx.rows)
                inner = hidden[part].to(ctx.dtype)
                found = kept[number] if kept else _log_probs(inner, head, shift, ctx.temperature, ctx.dtype)
                grad = _d_logits(found, targets[part], entropies[part], grad_logps, grad_entropies, part)
                grad = grad.div_(ctx.temperature).to(ctx.dtype)
                if d_hidden is not None:
                    torch.mm(grad, head, out=d_hidden[part])
                if d_weight is not None:
                    d_weight.addmm_(grad.t().to(wide), inner.to(wide))
                if d_bias is not None:
                    d_bias += grad.sum(dim=0)
        found_grads = (d_hidden, hidden), (d_weight, weight), (d_bias, bias)
        return *(None if grad is None else grad.to(like.dtype) for grad, like in found_grads), None, None, None, None, None


def _d_logits(
    log_probs: torch.Tensor,
    targets: torch.Tensor,
    entropies: torch.Tensor,
    grad_logps: torch.Tensor | None,
    grad_entropies: torch.Tensor | None,
    part: slice,
) -> torch.Tensor:
    """(n, V) gradient of a tile's logits: d logp_y / d z_v = [v = y] - p_v,  d H / d z_v = -p_v (log p_v + H)."""
    grad = log_probs.exp()
    if grad_entropies is not None:
        scale = (log_probs + entropies[:, None]).mul_(grad_entropies[part, None])
        grad.mul_(scale.add_(0.0 if grad_logps is None else grad_logps[part, None]).neg_())
    elif grad_logps is not None:
        grad.mul_(-grad_logps[part, None])
    else:
        return grad.zero_()
    return grad if grad_logps is None else grad.scatter_add_(1, targets[:, None], grad_logps[part, None])

"""Log-probabilities and entropies of chosen tokens from hidden states, without keeping all logits.

    u = scale (W h + b),   z = softcap tanh(u / softcap) / temperature,   or u / temperature without a cap,
    logp = z_y - log sum_v exp z_v,   H = -sum_v p_v log p_v

Tokens go through the vocabulary in tiles. The log-probabilities of a small batch are kept for the backward pass; above
`KEEP` numbers each tile is computed again there, so that memory grows with the tile and not with the tokens.
Statistics are float32 for narrower types, and float64 for float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

TILE = {"cpu": 1 << 23}
TILE_ELSEWHERE = 1 << 27
"""Numbers of a tile: tokens * vocabulary, by type of device."""
KEEP = 1 << 25
"""Most log-probabilities, tokens * vocabulary, that are kept for the backward pass."""


def token_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    tile: int | None = None,
    keep: int = KEEP,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target, and the entropy of the distribution that it comes from, in nats.

    Args:
        hidden: (N, H).
        weight: (V, H) of the output head.
        targets: (N,) token ids.
        bias: (V,) of the output head.
        temperature: logits are divided by it.
        scale: logits are multiplied by it (Cohere's `logit_scale`, Granite's 1 / `logits_scaling`).
        softcap: bound of the logits (Gemma 2's `final_logit_softcapping`).
        tile: numbers of a tile; by type of device where None.
        keep: see the module.

    Returns:
        (N,), (N,), both with gradient for hidden, weight and bias.
    """
    dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else hidden.dtype
    tile = TILE.get(hidden.device.type, TILE_ELSEWHERE) if tile is None else tile
    rows = max(tile // weight.size(0), 1)
    keep_all = hidden.size(0) * weight.size(0) <= keep
    apply: Any = _TokenLogps.apply
    logps, entropies = apply(hidden, weight, bias, targets, _Shape(temperature, scale, softcap), dtype, rows, keep_all)
    return logps, entropies


@dataclass(frozen=True)
class _Shape:
    """From W h + b to z."""

    temperature: float
    scale: float
    softcap: float | None

    def logits(self, raw: torch.Tensor) -> torch.Tensor:
        """z, in place of `raw`."""
        raw = raw if self.scale == 1 else raw.mul_(self.scale)
        raw = raw if self.softcap is None else raw.div_(self.softcap).tanh_().mul_(self.softcap)
        return raw if self.temperature == 1 else raw.div_(self.temperature)

    def to_raw(self, grad: torch.Tensor, log_probs: torch.Tensor, log_sums: torch.Tensor) -> torch.Tensor:
        """The gradient of W h + b from that of z = log_probs + log_sums, in place."""
        if self.softcap is not None:
            bent = (log_probs + log_sums[:, None]).mul_(self.temperature / self.softcap)
            grad.mul_(bent.square_().neg_().add_(1))
        return grad.mul_(self.scale / self.temperature)


def _log_probs(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, shape: _Shape, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, V) log-probabilities of a tile, and (n,) log sum exp z."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = shape.logits(logits.float() if dtype != torch.float64 else logits)
    if shape.softcap is None:
        return torch.log_softmax(logits, dim=-1), logits.new_empty(0)
    log_sums = logits.logsumexp(dim=-1)
    return logits.sub_(log_sums[:, None]), log_sums


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, with sums in the type of `total`."""
    if left.dtype != total.dtype and left.device.type == "cuda":
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        shape: _Shape,
        dtype: torch.dtype,
        rows: int,
        keep: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        wide = torch.promote_types(dtype, torch.float32)
        logps, entropies = (torch.empty(hidden.size(0), dtype=wide, device=hidden.device) for _ in range(2))
        keep = keep and any(ctx.needs_input_grad)
        kept, sums = [], []
        with torch.autocast(hidden.device.type, enabled=False):
            head, shift = weight.to(dtype), None if bias is None else bias.to(dtype)
            for start in range(0, hidden.size(0), rows):
                part = slice(start, start + rows)
                found, log_sums = _log_probs(hidden[part].to(dtype), head, shift, shape, dtype)
                logps[part] = found.gather(1, targets[part, None]).squeeze(1)
                entropies[part] = -torch.linalg.vecdot(found.exp(), found)
                sums.append(log_sums)
                if keep:
                    kept.append(found)
        ctx.save_for_backward(hidden, weight, bias, targets, entropies, torch.cat(sums) if sums else entropies, *kept)
        ctx.shape, ctx.dtype, ctx.rows = shape, dtype, rows
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: torch.Tensor | None, grad_entropies: torch.Tensor | None) -> Any:
        hidden, weight, bias, targets, entropies, sums, *kept = ctx.saved_tensors
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
                found = kept[number] if kept else _log_probs(inner, head, shift, ctx.shape, ctx.dtype)[0]
                grad = _d_logits(found, targets[part], entropies[part], grad_logps, grad_entropies, part)
                grad = ctx.shape.to_raw(grad, found, sums[part]).to(ctx.dtype)
                if d_hidden is not None:
                    torch.mm(grad, head, out=d_hidden[part])
                if d_weight is not None:
                    _add_product(d_weight, grad.t(), inner)
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

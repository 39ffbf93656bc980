"""LoftQ's start (arXiv 2310.08659, algorithm 1): codes and adapter alternated in the space of weights, without any data.

    Q_t = round(W - B_{t-1} A_{t-1}),   B_t A_t = best rank-r approximation of W - Q_t in the Frobenius norm.

The published code rounds to NF tables; here Q is on the same integer grid as every other method's, so that it can be
exported and compared at equal bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.quant.base import dequantize, quantize_rtn
from posttrain.quant.closed_form import Fitted, Grid, low_rank


def loftq(weight: Tensor, grid: Grid, rank: int, *, rounds: int = 5, name: str = "weight") -> Fitted:
    """Codes and adapter after `rounds` alternations; the paper's T = 5.

    Args:
        weight: [out, in].
        grid: bits, groups, scales.
        rank: of the adapter; 0 rounds to nearest.
        rounds: alternations.
        name: for error messages.
    """
    w = weight.float()
    eye = torch.eye(w.shape[1], dtype=torch.float64, device=w.device)
    a = b = None
    for _ in range(rounds if rank else 1):
        target = w if a is None or b is None else w - b @ a
        q = quantize_rtn(target, grid.bits, grid.group_size, grid.symmetric, mse=grid.mse, scale_dtype=grid.scale_dtype, name=name)
        if rank:
            a, b = low_rank(w - dequantize(q), eye, rank)
    return Fitted(q, a, b)

"""GPTQ: codes chosen column by column, each rounding error carried over to the columns that are still free.

For inputs X [tokens, in] a layer's output error is tr((W - Q) H (W - Q)^T) with H = X^T X. Optimal Brain Quantization
rounds one column at a time and moves the rest to where they compensate best; GPTQ (arXiv 2210.17323, algorithm 1) does so
in the order of the columns for all rows at once, with the upper Cholesky factor U of H^-1 (H^-1 = U^T U):

    q_j = round(w_j),   e = (w_j - q_j) / U_jj,   w_k -= e U_jk  for k > j.

Departures: the range of a group is searched (`fit_grid`, weighted by 1 / U_jj^2, which is what an error in column j costs
once the rest has made up for it) when the group's turn comes, from its weights as they stand then; and damping grows
tenfold, up to the mean of the diagonal, where the factor does not exist. `sweeps` then walks over the columns again:
with all others fixed, the best code of a column is the one nearest to w_j + (R H)_j / H_jj, R the present residual
(coordinate descent, arXiv 2309.01885); no step can raise the error. `refit_scales` solves for the scales of a row given its
codes (least squares under H) and keeps them where the stored, rounded ones are better.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.errors import QuantError
from posttrain.quant.base import QTensor, dequantize, fit_grid, from_parts, grouped

DAMPS = (1.0, 10.0, 100.0)
NORMAL_ENTRIES = 1 << 25
"""Entries of the normal equations that are in memory at a time."""


def quantize_gptq(
    weight: Tensor,
    gram: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    *,
    mse: bool = True,
    damp: float = 0.01,
    weighted: bool = True,
    sweeps: int = 0,
    scale_dtype: torch.dtype = torch.float32,
    name: str = "weight",
) -> QTensor:
    """Quantizes a weight for the inputs that its Gram matrix tells of.

    Args:
        weight: [out, in].
        gram: [in, in], X^T X or a multiple of it.
        bits, group_size, symmetric, mse, scale_dtype, name: as for `quantize_rtn`.
        damp: added to the diagonal, as a share of its mean.
        weighted: weigh the search of ranges by what an error in each column costs; without, and without sweeps, this is plain GPTQ.
        sweeps: rounds of coordinate descent afterwards, with new scales between them.

    Raises:
        QuantError: non-finite weight or Gram matrix, or a group size that does not divide `in`.
    """
    w = grouped(weight, group_size, name).clone()
    if not (torch.isfinite(w).all() and torch.isfinite(gram).all()):
        raise QuantError("the weight or its inputs hold NaN or infinity", where=name, fix="quantize an earlier, finite checkpoint")
    rows, groups, size = w.shape
    factor = inverse_factor(gram, damp)
    flat = w.view(rows, -1)
    codes = torch.empty_like(w)
    scales, zeros = w.new_empty(rows, groups, 1), w.new_empty(rows, groups, 1)
    top = 2**bits - 1
    for group in range(groups):
        start, end = group * size, (group + 1) * size
        block, inner = flat[:, start:end], factor[start:end, start:end]
        importance = inner.diagonal().pow(-2) if weighted else None
        scale, zero = fit_grid(w[:, group : group + 1], bits, symmetric, mse=mse, scale_dtype=scale_dtype, importance=importance)
        scale, zero = scale[:, 0, 0], zero[:, 0, 0]
        errors = torch.empty_like(block)
        for j in range(size):
            column = block[:, j]
            code = (torch.round(column / scale) + zero).clamp_(0, top)
            errors[:, j] = (column - (code - zero) * scale) / inner[j, j]
            codes[:, group, j] = code
            if j + 1 < size:
                block[:, j + 1 :].addr_(errors[:, j], inner[j, j + 1 :], alpha=-1)
        scales[:, group, 0], zeros[:, group, 0] = scale, zero
        if end < flat.shape[1]:
            flat[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    found = from_parts(codes, scales, zeros, bits, group_size, symmetric, scale_dtype)
    for _ in range(sweeps):
        found = descend(weight, gram, refit_scales(weight, gram, found))
    return found


def inverse_factor(gram: Tensor, damp: float) -> Tensor:
    """Upper U with U^T U = (H + damp mean(diag H) I)^-1, float32; columns without any input count as independent of the rest.

    Raises:
        QuantError: no damping up to the mean of the diagonal makes H positive definite.
    """
    h = gram.double().clone()
    diagonal = h.diagonal()
    dead = diagonal <= 0
    mean = diagonal.mean().clamp(min=torch.finfo(torch.float64).tiny)
    diagonal[dead] = mean
    for factor in DAMPS:
        damped = h + torch.eye(len(h), dtype=h.dtype, device=h.device) * (mean * min(max(damp, 1e-12) * factor, 1.0))
        lower, bad = torch.linalg.cholesky_ex(damped)
        if bad == 0:
            upper, bad = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if bad == 0 and torch.isfinite(upper).all():
                return upper.to(torch.float32)
    raise QuantError("the Gram matrix of the inputs is not positive definite", where="gram", fix="give more calibration tokens")


def output_error(weight: Tensor, found: Tensor, gram: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T) in float64."""
    difference = (weight - found).double()
    return float(((difference @ gram.double()) * difference).sum())


def descend(weight: Tensor, gram: Tensor, q: QTensor) -> QTensor:
    """One round of coordinate descent over the codes at fixed scales; never raises the error tr((W - Q) H (W - Q)^T)."""
    rows, columns = q.shape
    groups = q.scales.shape[1]
    size = columns // groups
    h = gram.float()
    diagonal = h.diagonal()
    live = diagonal > 0
    scale = q.scales.float()
    zero = torch.full_like(scale, 2.0 ** (q.bits - 1)) if q.zero_points is None else q.zero_points.float()
    codes = q.codes.float()
    residual = weight.float() - dequantize(q)
    top = 2**q.bits - 1
    for group in range(groups):
        start, end = group * size, (group + 1) * size
        pull, inner = residual @ h[:, start:end], h[start:end, start:end]
        s = scale[:, group]
        moved = torch.zeros(rows, size, device=h.device)
        for j in range(size):
            column = start + j
            if not live[column]:
                continue
            wanted = codes[:, column] + pull[:, j] / (diagonal[column] * s)
            code = torch.round(wanted).clamp_(0, top)
            step = (codes[:, column] - code) * s
            codes[:, column], moved[:, j] = code, step
            pull.addr_(step, inner[j])
        residual[:, start:end] += moved
    return from_parts(
        codes.view(rows, groups, size), scale.unsqueeze(-1), zero.unsqueeze(-1), q.bits, q.group_size, q.symmetric, q.scales.dtype
    )


def refit_scales(weight: Tensor, gram: Tensor, q: QTensor) -> QTensor:
    """The scales of each row by least squares under H, given its codes; rows where the stored scales are not better keep theirs."""
    rows, columns = q.shape
    groups = q.scales.shape[1]
    most = max(NORMAL_ENTRIES // groups**2, 1)
    if rows > most:
        parts = [refit_scales(weight[low : low + most], gram, _rows(q, low, low + most)) for low in range(0, rows, most)]
        scales = torch.cat([part.scales for part in parts])
        return QTensor(q.codes, scales, q.zero_points, q.bits, q.group_size, q.symmetric)
    h = gram.double()
    zero = torch.full_like(q.scales, 2.0 ** (q.bits - 1), dtype=torch.float64) if q.zero_points is None else q.zero_points.double()
    levels = q.codes.double().view(rows, groups, -1) - zero.unsqueeze(-1)
    target = (weight.double() @ h).view(rows, groups, -1)
    right = (levels * target).sum(-1)
    blocks = h.view(groups, columns // groups, columns)
    left = torch.empty(rows, groups, groups, dtype=torch.float64, device=h.device)
    for group in range(groups):
        part = (levels[:, group] @ blocks[group]).view(rows, groups, -1)
        left[:, group] = (part * levels).sum(-1)
    ridge = left.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30) * 1e-6
    old = q.scales.double()
    left.diagonal(dim1=-2, dim2=-1).add_(ridge.unsqueeze(-1))
    new = torch.linalg.solve(left, right + ridge.unsqueeze(-1) * old)
    new = torch.where((new > 0) & torch.isfinite(new), new, old).to(q.scales.dtype)
    kept = _row_errors(weight, h, q, new) < _row_errors(weight, h, q, q.scales)
    return QTensor(q.codes, torch.where(kept.unsqueeze(-1), new, q.scales), q.zero_points, q.bits, q.group_size, q.symmetric)


def _rows(q: QTensor, low: int, high: int) -> QTensor:
    zeros = None if q.zero_points is None else q.zero_points[low:high]
    return QTensor(q.codes[low:high], q.scales[low:high], zeros, q.bits, q.group_size, q.symmetric)


def _row_errors(weight: Tensor, gram: Tensor, q: QTensor, scales: Tensor) -> Tensor:
    difference = weight.double() - dequantize(QTensor(q.codes, scales, q.zero_points, q.bits, q.group_size, q.symmetric)).double()
    return ((difference @ gram) * difference).sum(-1)

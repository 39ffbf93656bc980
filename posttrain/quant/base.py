"""Group-wise integer weights and round-to-nearest.

A weight W [out, in] is cut into groups of g consecutive columns of a row. With b bits, unsigned codes u in [0, 2^b - 1]:

    w_hat = (u - z) * s,    u = clamp(round(w / s) + z, 0, 2^b - 1)

symmetric: z = 2^(b-1), s = max|w| / (2^(b-1) - 1/2), so that the levels cover [-max, max] as evenly as an even number of
levels can. asymmetric: lo = min(w, 0), hi = max(w, 0), s = (hi - lo) / (2^b - 1), z = round(-lo / s); lo <= 0 <= hi keeps
z storable. Scales are rounded to the type they are stored in *before* the codes are computed, so no later rounding moves
a weight. `mse` shrinks (or, symmetric, widens) the range by the ratio that minimises sum (w - w_hat)^2 in each group, and
tries both whole numbers beside -lo / s as z, which decides the side of the fourth level at 2 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.errors import QuantError

RATIOS = tuple(round(1.0 - 0.05 * step, 2) for step in range(13))
WIDER = (1.5, 1.3, 1.15, 1.07)


@dataclass(frozen=True)
class QTensor:
    """A quantized weight.

    Args:
        codes: uint8 [out, in], unsigned codes in [0, 2^bits - 1].
        scales: [out, groups] in the type they are stored in.
        zero_points: uint8 [out, groups], unsigned like the codes; None means 2^(bits-1) everywhere.
        bits: width of a code.
        group_size: columns a scale; -1 is one scale a row (groups = 1).
        symmetric: True where zero_points is None.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    bits: int
    group_size: int
    symmetric: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        out, columns = self.codes.shape
        return out, columns


def quantize_rtn(
    weight: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    *,
    mse: bool = False,
    scale_dtype: torch.dtype = torch.float32,
    name: str = "weight",
) -> QTensor:
    """Rounds a weight to the nearest level of its group.

    Args:
        weight: [out, in], any float type; computed in float32.
        bits: 2 to 8.
        group_size: columns a group, dividing `in`; -1 is the whole row.
        symmetric: fixed zero point 2^(bits-1).
        mse: search the range that minimises the squared error of each group.
        scale_dtype: type that scales are stored in.
        name: for error messages.

    Raises:
        QuantError: non-finite weights, or a group size that does not divide `in`.
    """
    w = grouped(weight, group_size, name)
    if not torch.isfinite(w).all():
        raise QuantError("the weight holds NaN or infinity", where=name, fix="quantize an earlier, finite checkpoint")
    scale, zero = fit_grid(w, bits, symmetric, mse=mse, scale_dtype=scale_dtype)
    codes = (torch.round(w / scale) + zero).clamp_(0, 2**bits - 1)
    return from_parts(codes, scale, zero, bits, group_size, symmetric, scale_dtype)


def fit_grid(
    w: Tensor, bits: int, symmetric: bool, *, mse: bool = False, scale_dtype: torch.dtype = torch.float32, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group.

    Args:
        w: float32 [out, groups, g].
        bits: 2 to 8.
        symmetric: fixed zero point 2^(bits-1).
        mse: search the range that minimises sum importance (w - w_hat)^2.
        scale_dtype: type that scales are stored in.
        importance: broadcastable to w; 1 without.

    Returns:
        (scale, zero), float32 [out, groups, 1]; the scale is one that `scale_dtype` holds, the zero point a storable code.
    """
    best: tuple[Tensor, ...] = ()
    for scale, zero in _candidates(w, bits, symmetric, mse, scale_dtype):
        codes = (torch.round(w / scale) + zero).clamp_(0, 2**bits - 1)
        error = ((codes - zero) * scale - w).square_()
        if importance is not None:
            error *= importance
        found = (error.sum(-1, keepdim=True), scale, zero)
        best = _better(best, found) if best else found
    return best[1], best[2]


def from_parts(
    codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int, symmetric: bool, scale_dtype: torch.dtype
) -> QTensor:
    """QTensor of codes [out, groups, g] and their scale and zero point [out, groups, 1], all of whole or storable values."""
    out, groups = codes.shape[:2]
    return QTensor(
        codes.to(torch.uint8).reshape(out, -1),
        scale.reshape(out, groups).to(scale_dtype),
        None if symmetric else zero.to(torch.uint8).reshape(out, groups),
        bits,
        group_size,
        symmetric,
    )


def dequantize(q: QTensor) -> Tensor:
    """float32 [out, in]: (u - z) * s."""
    out = q.codes.shape[0]
    codes = q.codes.reshape(out, q.scales.shape[1], -1).float()
    zero = 2.0 ** (q.bits - 1) if q.zero_points is None else q.zero_points.float().unsqueeze(-1)
    return ((codes - zero) * q.scales.float().unsqueeze(-1)).reshape(q.codes.shape)


def grouped(weight: Tensor, group_size: int, name: str = "weight") -> Tensor:
    """float32 [out, groups, g] view of a weight [out, in].

    Raises:
        QuantError: g does not divide `in`.
    """
    out, columns = weight.shape
    size = columns if group_size == -1 else group_size
    if size < 1 or columns % size:
        raise QuantError(f"group_size {group_size} does not divide {columns} input features", where=name, fix="choose a divisor, or -1")
    return weight.detach().float().reshape(out, columns // size, size)


def _candidates(w: Tensor, bits: int, symmetric: bool, mse: bool, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    levels = 2**bits - 1
    lo, hi = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
    if symmetric:
        top = torch.maximum(hi, -lo)
        zero = torch.full_like(top, 2.0 ** (bits - 1))
        for ratio in (*RATIOS, *WIDER) if mse else (1.0,):
            yield _stored(top * ratio / (levels / 2), dtype), zero
        return
    for ratio in RATIOS if mse else (1.0,):
        scale = _stored((hi - lo) * ratio / levels, dtype)
        ideal = -lo * ratio / scale
        for zero in (ideal.floor(), ideal.ceil()) if mse else (ideal.round(),):
            yield scale, zero.clamp(0, levels)


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale as it will be read back: rounded to `dtype`; 1 for an all-zero group, never underflowing to 0."""
    kept = scale.clamp(min=torch.finfo(dtype).tiny, max=torch.finfo(dtype).max).to(dtype).float()
    return torch.where(scale > 0, kept, torch.ones_like(kept))


def _better(old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    take = new[0] < old[0]
    return tuple(torch.where(take, b, a) for a, b in zip(old, new, strict=True))

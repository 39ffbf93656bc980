"""Quantizers that gradients pass through.

ApiQ's quantizer (arXiv 2402.05147, from OmniQuant, arXiv 2308.13137) shrinks the range of a group of weights by two learned
numbers:

    hi = sigmoid(gamma) max(w, 0),   lo = sigmoid(beta) min(w, 0),   s = (hi - lo) / (2^b - 1),   z = round(-lo / s),
    u = clamp(round(w / s) + z, 0, 2^b - 1),   w_hat = (u - z) s

with gamma = beta = 4 at the start. Rounding of w / s passes gradients straight through; z takes none, so gamma and beta learn
through s alone. Departures from the authors' code: lo <= 0 <= hi always, so that z is a code that can be stored (theirs leaves
[0, 2^b - 1] where a group has one sign); symmetric ranges have the zero point 2^(b-1) that kernels expect (theirs 2^(b-1) - 1);
scales are rounded to the type they are stored in while they are learned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from posttrain.quant.base import QTensor, from_parts, grouped
from posttrain.quant.closed_form import Grid

START = 4.0


class Rounded(torch.autograd.Function):
    """w_hat = (clamp(round(w / s) + z, 0, top) - z) s with straight-through rounding.

    d w_hat / d w is 1 inside the range and 0 outside; d w_hat / d s is round(w / s) - w / s inside and u - z outside.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
        """w [out, groups, g]; scale, zero [out, groups, 1]."""
        ratio = w / scale
        level = ratio.round()
        kept = torch.clamp(level, -zero, top - zero)
        inside = level.eq_(kept)
        for_scale = torch.addcmul(kept, ratio, inside, value=-1) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(for_scale, inside.bool() if ctx.needs_input_grad[0] else None)
        return kept.mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Gradients for w and s."""
        (grad,) = grads
        for_scale, inside = ctx.saved_tensors
        for_w = None if inside is None else grad * inside
        for_s = None if for_scale is None else (grad * for_scale).sum(-1, keepdim=True)
        return for_w, for_s, None, None


class Clip(nn.Module):
    """The learned quantizer of one weight.

    Args:
        weight: float32 [out, in], rounded anew in every step.
        grid: bits, groups, scales.
        start: codes to begin with; then the first result is `start` exactly. Without, the ranges are those of the weight.

    Attributes:
        weight: [out, groups, g]; a parameter, without gradient unless asked for.
        gamma, beta: [out, groups, 1]; symmetric grids learn gamma alone.
    """

    def __init__(self, weight: Tensor, grid: Grid, start: QTensor | None = None) -> None:
        super().__init__()
        self.grid, self.top = grid, 2**grid.bits - 1
        w = grouped(weight, grid.group_size).clone()
        if start is None:
            hi, lo = w.amax(-1, keepdim=True).clamp(min=0), w.amin(-1, keepdim=True).clamp(max=0)
        else:
            scale = start.scales.float().unsqueeze(-1)
            zero = torch.full_like(scale, 2.0 ** (grid.bits - 1)) if start.zero_points is None else start.zero_points.float().unsqueeze(-1)
            levels = start.codes.float().view(w.shape) - zero
            w = torch.minimum(torch.maximum(w, (levels - 0.49) * scale), (levels + 0.49) * scale)
            whole = scale / torch.sigmoid(torch.tensor(START))
            hi, lo = (self.top - zero) * whole, -zero * whole
            if grid.symmetric:
                hi = whole * self.top / 2
                lo = -hi
        self.weight = nn.Parameter(w, requires_grad=False)
        self.register_buffer("hi", hi)
        self.register_buffer("lo", lo)
        self.gamma = nn.Parameter(torch.full_like(hi, START))
        self.beta = nn.Parameter(torch.full_like(lo, START), requires_grad=not grid.symmetric)

    def scale_zero(self) -> tuple[Tensor, Tensor]:
        """(s, z), [out, groups, 1]; s as it is stored."""
        hi: Any = self.hi
        lo: Any = self.lo
        if self.grid.symmetric:
            scale = torch.maximum(hi, -lo) * torch.sigmoid(self.gamma) / (self.top / 2)
            zero = torch.full_like(scale, 2.0 ** (self.grid.bits - 1))
            return self._stored(scale), zero
        low = lo * torch.sigmoid(self.beta)
        scale = self._stored((hi * torch.sigmoid(self.gamma) - low) / self.top)
        return scale, torch.round(-low / scale).clamp(0, self.top).detach()

    def forward(self) -> Tensor:
        """w_hat [out, in]."""
        scale, zero = self.scale_zero()
        return Rounded.apply(self.weight, scale, zero, self.top).flatten(1)

    @torch.no_grad()
    def quantized(self) -> QTensor:
        """The codes of the present state."""
        scale, zero = self.scale_zero()
        codes = (torch.round(self.weight / scale) + zero).clamp_(0, self.top)
        grid = self.grid
        return from_parts(codes, scale, zero, grid.bits, grid.group_size, grid.symmetric, grid.scale_dtype)

    def clipped(self) -> tuple[float, float]:
        """(mean, least) of sigmoid(gamma) and sigmoid(beta): how much of each range is kept."""
        kept = torch.sigmoid(self.gamma.detach() if self.grid.symmetric else torch.cat([self.gamma.detach(), self.beta.detach()]))
        return float(kept.mean()), float(kept.min())

    def _stored(self, scale: Tensor) -> Tensor:
        floor = scale.clamp(min=torch.finfo(self.grid.scale_dtype).tiny)
        kept = floor + (floor.to(self.grid.scale_dtype).float() - floor).detach()
        return torch.where(scale > 0, kept, torch.ones_like(kept))


class Scaled(nn.Module):
    """Frozen codes whose scales are learned: w_hat = (u - z) s, s = s_0 times a learned factor.

    Args:
        start: the codes.
        learn: whether the scales take gradients.
    """

    def __init__(self, start: QTensor, learn: bool) -> None:
        super().__init__()
        self.start = start
        zero = 2.0 ** (start.bits - 1) if start.zero_points is None else start.zero_points.float().unsqueeze(-1)
        self.register_buffer("levels", start.codes.float().view(*start.scales.shape, -1) - zero)
        self.register_buffer("begun", start.scales.float().unsqueeze(-1))
        self.factor = nn.Parameter(torch.ones_like(start.scales, dtype=torch.float32).unsqueeze(-1), requires_grad=learn)

    def forward(self) -> Tensor:
        """w_hat [out, in]."""
        levels: Any = self.levels
        return (levels * self._stored()).flatten(1)

    @torch.no_grad()
    def quantized(self) -> QTensor:
        """The codes with the present scales."""
        q = self.start
        return QTensor(q.codes, self._stored().squeeze(-1).to(q.scales.dtype), q.zero_points, q.bits, q.group_size, q.symmetric)

    def _stored(self) -> Tensor:
        dtype = self.start.scales.dtype
        begun: Any = self.begun
        floor = (begun * self.factor).clamp(min=torch.finfo(dtype).tiny)
        return floor + (floor.to(dtype).float() - floor).detach()

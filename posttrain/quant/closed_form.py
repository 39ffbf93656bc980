"""A low-bit weight and its adapter without gradient steps.

A layer is given inputs X in the float model and X^ in the quantized one. With G = X^^T X^ and C = X^T X^ (sums over tokens)
the squared output error of an effective weight V is

    || X W^T - X^ V^T ||^2 = tr(V G V^T) - 2 tr(V C^T W^T) + ||X W^T||^2,

minimal at V* = W (C + l I) (G + l I)^-1; the ridge l > 0 pulls V* back to W, since V* fits the noise of few tokens. Codes Q
are then GPTQ's for V* - B A under G, and B A the best rank-r matrix for V* - Q under G: with U_r the leading r eigenvectors
of (V* - Q) G (V* - Q)^T, B A = U_r U_r^T (V* - Q). The two are alternated; each candidate is judged by its error on inputs
that were not used for the fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.quant.base import QTensor, dequantize
from posttrain.quant.grams import Moments
from posttrain.quant.obq import quantize_gptq

RIDGES = (1e-2, 1e-1, 1.0)
DAMP = 0.1


@dataclass(frozen=True)
class Fitted:
    """A quantized weight with its adapter.

    Args:
        q: codes.
        a: [rank, in] or None.
        b: [out, rank] or None.
        how: what was chosen, for the report.
    """

    q: QTensor
    a: Tensor | None = None
    b: Tensor | None = None
    how: str = ""

    def effective(self) -> Tensor:
        """float32 [out, in]: Q + B A."""
        weight = dequantize(self.q)
        return weight if self.a is None or self.b is None else weight + self.b @ self.a


@dataclass(frozen=True)
class Grid:
    """How a weight is quantized: the arguments that `quantize_gptq` and `quantize_rtn` share."""

    bits: int
    group_size: int
    symmetric: bool
    mse: bool = True
    scale_dtype: torch.dtype = torch.float32


def unconstrained(weight: Tensor, moments: Moments, ridge: float) -> Tensor:
    """V* = W (C + l I)(G + l I)^-1, float32 [out, in]; l = ridge times the mean of G's diagonal.

    Args:
        weight: [out, in].
        moments: of the inputs.
        ridge: dimensionless, above 0.
    """
    g, c = moments.gram, moments.cross
    eye = torch.eye(len(g), dtype=g.dtype, device=g.device) * (ridge * g.diagonal().mean().clamp(min=1e-30))
    lower = torch.linalg.cholesky(g + eye)
    return torch.cholesky_solve((weight.double() @ (c + eye)).T, lower).T.float()


def low_rank(residual: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A [rank, in], B [out, rank]) of the best rank-r approximation of a residual [out, in] under a Gram matrix.

    The rank is cut at min(out, in) and the rest filled with zeros. A and B get equal norms, component by component.
    """
    r, g = residual.double(), gram.double()
    out, columns = r.shape
    kept = min(rank, out, columns)
    if out <= columns:
        _, vectors = torch.linalg.eigh(r @ g @ r.T)
        b = vectors[:, -kept:].flip(1)
    else:
        lower = _factor(g)
        values, vectors = torch.linalg.eigh(lower.T @ (r.T @ r) @ lower)
        b = r @ (lower @ vectors[:, -kept:].flip(1)) / values[-kept:].flip(0).clamp(min=1e-30).sqrt()
    a = b.T @ r
    size = a.norm(dim=1).clamp(min=1e-30).sqrt()
    a, b = a / size.unsqueeze(1), b * size
    if kept < rank:
        a = torch.cat([a, a.new_zeros(rank - kept, columns)])
        b = torch.cat([b, b.new_zeros(out, rank - kept)], 1)
    return a.float(), b.float()


def _factor(gram: Tensor) -> Tensor:
    """L with L L^T = G and as little added to the diagonal as a factor needs: inputs may lie in a subspace (behind a LayerNorm)."""
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * gram.diagonal().mean().clamp(min=1e-30)
    for share in (1e-10, 1e-8, 1e-6, 1e-4):
        lower, bad = torch.linalg.cholesky_ex(gram + share * eye)
        if bad == 0:
            return lower
    return torch.linalg.cholesky(gram + 1e-2 * eye)


def closed_form(
    weight: Tensor,
    train: Moments,
    held: Moments,
    grid: Grid,
    *,
    rank: int,
    rounds: int = 3,
    ridges: tuple[float, ...] = RIDGES,
    sweeps: int = 1,
    name: str = "weight",
) -> Fitted:
    """Codes and adapter of least held-out error: first the ridge is chosen, at one round, then the number of rounds.

    Args:
        weight: [out, in].
        train, held: moments of the inputs that are fitted, and of those that judge.
        grid: bits, groups, scales.
        rank: of the adapter; 0 = none, then one round.
        rounds: alternations of codes and adapter.
        ridges: tried for the unconstrained optimum.
        sweeps: of `quantize_gptq`.
        name: of the layer.
    """
    best: tuple[float, float, Fitted] | None = None
    for ridge in ridges:
        found = alternate(
            unconstrained(weight, train, ridge), train.gram, grid, rank, None, sweeps=sweeps, how=f"ridge {ridge:g}", name=name
        )
        error = held.error(name, weight, found.effective())
        if best is None or error < best[0]:
            best = (error, ridge, found)
    assert best is not None
    error, ridge, last = best
    target = unconstrained(weight, train, ridge)
    for turn in range(2, rounds + 1 if rank else 0):
        last = alternate(target, train.gram, grid, rank, last, sweeps=sweeps, how=f"ridge {ridge:g}, round {turn}", name=name)
        error = held.error(name, weight, last.effective())
        if error < best[0]:
            best = (error, ridge, last)
    return best[2]


def alternate(
    target: Tensor, gram: Tensor, grid: Grid, rank: int, last: Fitted | None, *, sweeps: int = 1, how: str = "", name: str = "weight"
) -> Fitted:
    """One round: codes for `target` less the last adapter, then the adapter for what they leave."""
    a, b = (None, None) if last is None else (last.a, last.b)
    q = gptq(target if a is None or b is None else target - b @ a, gram, grid, damp=DAMP, sweeps=sweeps, name=name)
    a, b = low_rank(target - dequantize(q), gram, rank) if rank else (None, None)
    return Fitted(q, a, b, how)


def gptq(weight: Tensor, gram: Tensor, grid: Grid, *, damp: float = 0.01, sweeps: int = 1, name: str = "weight") -> QTensor:
    """`quantize_gptq` on a Grid."""
    return quantize_gptq(
        weight,
        gram,
        grid.bits,
        grid.group_size,
        grid.symmetric,
        mse=grid.mse,
        damp=damp,
        sweeps=sweeps,
        scale_dtype=grid.scale_dtype,
        name=name,
    )

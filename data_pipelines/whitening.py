"""Whitening of feature vectors (Feng et al. 2025, arXiv 2412.00420, whitened feature distance).

Over the union of raw and target rows with mean m and covariance S = (1/n) sum (x - m)(x - m)^T,

    S + e I = L L^T,   W = L^-T,   y = (x - m) W,   so that cov(y) = I up to the ridge e,
    features z = y / |y|,   d_w(x, x') = |z - z'| = sqrt(2 - 2 z.z').

Gradients span many orders of magnitude, and whitening promotes the directions with the least variance; so sums, the
factorisation and the product are float64 and only z is rounded to float32. The ridge is relative by default, e = eps
trace(S)/d: an absolute one means something else for every model and loss.

A shard's moments are its count, sum and sum of outer products; they are added up in shard order. Rows are whitened in blocks
of a fixed shape, so z of a row does not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from scipy.linalg import cholesky, solve_triangular
from scipy.linalg.blas import dsyrk, dtrmm

BLOCK = 256
"""Rows of one matrix product; its shape never varies."""

Arrays = dict[str, np.ndarray]


def moments(blocks: Iterable[np.ndarray]) -> Arrays:
    """`n` int64[1], `sum` float64[d], `square` float64[d(d+1)/2] (upper triangle of sum x x^T, row by row) of rows [m, d] in blocks.

    Rows that are zero throughout (without a feature) are left out, and counted in `zero` int64[1].
    """
    n = zero = 0
    total = square = np.zeros(0)
    for block in _blocks(blocks):
        rows = block[block.any(axis=1)].astype(np.float64)
        n, zero = n + len(rows), zero + len(block) - len(rows)
        if not total.size:
            total, square = np.zeros(block.shape[1]), np.zeros((block.shape[1],) * 2, order="F")
        total = total + rows.sum(0)
        square = dsyrk(1.0, rows.T, beta=1.0, c=square, overwrite_c=True)
    packed = square[np.triu_indices(len(total))] if total.size else np.zeros(0)
    return {"n": np.array([n]), "zero": np.array([zero]), "sum": total, "square": packed}


def _blocks(parts: Iterable[np.ndarray], size: int = 1024) -> Iterator[np.ndarray]:
    """The rows of `parts`, `size` at a time; fewer at the end."""
    held: list[np.ndarray] = []
    count = 0
    for part in parts:
        while len(part):
            held.append(part[: size - count])
            count += len(held[-1])
            part = part[len(held[-1]) :]
            if count == size:
                yield np.concatenate(held)
                held, count = [], 0
    if held:
        yield np.concatenate(held)


def added(parts: Iterable[Arrays]) -> Arrays:
    """Moments of all parts together, summed in their order; parts without rows change nothing."""
    out: Arrays = {"n": np.zeros(1, np.int64), "zero": np.zeros(1, np.int64), "sum": np.zeros(0), "square": np.zeros(0)}
    for part in parts:
        for name in out:
            value = part[name]
            if value.size:
                out[name] = out[name] + value if out[name].size else value.copy()
    return out


def covariance(total: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """(mean float64[d], covariance float64[d, d], division by n) from moments."""
    n, mean = int(total["n"][0]), total["sum"] / int(total["n"][0])
    upper = np.triu_indices(len(mean))
    s = np.zeros((len(mean),) * 2)
    s[upper] = total["square"] / n - mean[upper[0]] * mean[upper[1]]
    s.T[upper] = s[upper]
    return mean, s


def whitener(s: np.ndarray, eps: float, relative: bool = True) -> np.ndarray:
    """W = L^-T, float64[d, d], upper triangular, with L L^T = `s` + ridge.

    Args:
        s: covariance.
        eps: the ridge: times trace(s)/d if `relative`, else as it is.

    Raises:
        numpy.linalg.LinAlgError: `s` + ridge is not positive definite.
    """
    d = len(s)
    ridge = eps * (np.trace(s) / d if relative else 1.0)
    lower = cholesky(s + ridge * np.eye(d), lower=True)
    w: np.ndarray = solve_triangular(lower, np.eye(d), lower=True).T
    return w


def whiten(features: np.ndarray, mean: np.ndarray, w: np.ndarray | None) -> np.ndarray:
    """z, float32[n, d], of unit length; a row that is zero throughout stays zero.

    Args:
        features: [n, d].
        mean: float64[d], taken off.
        w: float64[d, d], or None for centred features without whitening.
    """
    out = np.zeros(features.shape, np.float32)
    product = _product(w)
    block = np.zeros((BLOCK, features.shape[1]))
    for start in range(0, len(features), BLOCK):
        part = features[start : start + BLOCK]
        np.subtract(part, mean, out=block[: len(part)])
        block[len(part) :] = 0
        block = product(block)
        norm = np.sqrt(np.einsum("ij,ij->i", block, block))[: len(part), None]
        np.divide(block[: len(part)], np.where(norm > 0, norm, 1), out=out[start : start + len(part)], casting="same_kind")
        out[start : start + len(part)][~np.any(part, axis=1)] = 0
    return out


def _product(w: np.ndarray | None) -> Callable[[np.ndarray], np.ndarray]:
    """x -> x w, in place of x where that can be; half the work where w is triangular."""
    if w is None:
        return lambda block: block
    left = np.asfortranarray(w.T)
    for lower, zeros in ((1, np.triu(left, 1)), (0, np.tril(left, -1))):
        if not zeros.any():
            return lambda block: dtrmm(1.0, left, block.T, lower=lower, overwrite_b=True).T
    return lambda block: block @ w


def effective_rank(s: np.ndarray) -> float:
    """exp of the entropy of the eigenvalues' shares (Roy & Vetterli 2007): how many directions carry the variance."""
    values = np.linalg.eigvalsh(s)
    share = values[values > 0] / values[values > 0].sum()
    return float(np.exp(-(share * np.log(share)).sum())) if share.size else 0.0

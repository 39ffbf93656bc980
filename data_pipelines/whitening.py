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
from scipy.linalg import bandwidth
from scipy.linalg.blas import dsyrk, dtrmm
from scipy.linalg.lapack import dpotrf, dtrtri

from data_pipelines.fastexp import fast

BLOCK = 512
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
        square = dsyrk(1.0, rows.T, beta=1.0, c=square, overwrite_c=True, lower=1)
    packed = np.concatenate([square[i:, i] for i in range(len(total))]) if total.size else np.zeros(0)
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
    d, square = len(mean), total["square"] / n
    s, at = np.empty((d, d)), 0
    for i in range(d):
        s[i, i:] = square[at : at + d - i] - mean[i] * mean[i:]
        s[i:, i] = s[i, i:]
        at += d - i
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
    ridged = np.array(s, np.float64, order="F")
    ridged[np.diag_indices(d)] += eps * (np.trace(s) / d if relative else 1.0)
    lower, failed = dpotrf(ridged, lower=1, clean=1, overwrite_a=1)
    if failed:
        raise np.linalg.LinAlgError(f"the leading minor of order {failed} is not positive definite")
    w: np.ndarray = dtrtri(lower, lower=1, overwrite_c=1)[0].T
    return w


def whiten(features: np.ndarray, mean: np.ndarray, w: np.ndarray | None) -> np.ndarray:
    """z, float32[n, d], of unit length; a row that is zero throughout stays zero.

    Args:
        features: [n, d].
        mean: float64[d], taken off.
        w: float64[d, d], or None for centred features without whitening.
    """
    out = np.empty(features.shape, np.float32)
    product = _product(w)
    block = np.zeros((BLOCK, features.shape[1]))
    for start in range(0, len(features), BLOCK):
        part = features[start : start + BLOCK]
        np.subtract(part, mean, out=block[: len(part)])
        block[len(part) :] = 0
        block = product(block)
        _unit(block, part, out[start : start + len(part)])
    return out


@fast
def _unit(rows: np.ndarray, features: np.ndarray, out: np.ndarray) -> None:
    """Rows of unit length; zero where the row of `features` is zero throughout."""
    n, d = features.shape
    for i in range(n):
        total, some = 0.0, False
        for j in range(d):
            value = np.float64(rows[i, j])
            total += value * value
            some |= features[i, j] != 0
        scale = 1 / np.sqrt(total) if some and total > 0 else 0.0
        for j in range(d):
            out[i, j] = rows[i, j] * scale


def _product(w: np.ndarray | None) -> Callable[[np.ndarray], np.ndarray]:
    """x -> x w, in place of x where that can be; half the work where w is triangular."""
    if w is None:
        return lambda block: block
    left = np.asfortranarray(w.T)
    below, above = bandwidth(left)
    if below and above:
        return lambda block: block @ w
    return lambda block: dtrmm(1.0, left, block.T, lower=int(not above), overwrite_b=True).T


def effective_rank(s: np.ndarray) -> float:
    """exp of the entropy of the eigenvalues' shares (Roy & Vetterli 2007): how many directions carry the variance."""
    values = np.linalg.eigvalsh(s)
    share = values[values > 0] / values[values > 0].sum()
    return float(np.exp(-(share * np.log(share)).sum())) if share.size else 0.0

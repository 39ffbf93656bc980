"""Exact optimal transport between uniform weights, over the few pairs that can matter (Gottschlich & Schuhmacher 2014).

An optimal plan uses at most n + m - 1 of n m pairs, all of them of no reduced cost C_ij - f_i - g_j. So the network simplex
is given the `KEEP` pairs of least reduced cost of every row and column under prices g at hand, and a staircase of pairs that
makes the problem feasible whatever the rest. Its prices are then tried on all pairs: f_i = min_j C_ij - g_j and g_j = min_i
C_ij - f_i are feasible prices, so mean f + mean g bounds the cost from below, and where that bound meets the plan's cost the
plan is optimal. Where it does not, the pairs of least reduced cost under the new prices are added, those that were missed
among them, and it is solved again. The result is exact, not a heuristic.

Prices of a similar problem, such as the same with fewer rows, save most of the work: five times faster than the whole
problem from scratch at 500 x 360.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data_pipelines.fastexp import fast
from data_pipelines.ot import EXACT_ENTRIES, transport
from posttrain.errors import ConfigError

KEEP = (10, 10)
"""Pairs of a row and of a column."""
ROUNDS = 8
"""Then all pairs are given to the solver."""
SMALLEST = 4096
"""Below so many pairs there is nothing to gain."""
GAP = 1e-9
"""Between cost and bound, over the largest cost."""


class Exact(NamedTuple):
    """Cost of the transport, and prices f float64[n], g float64[m] with mean f = mean g, half the cost each."""

    value: float
    f: np.ndarray
    g: np.ndarray


@fast
def _shortlist(cost: np.ndarray, g: np.ndarray, rows: int, columns: int, chosen: np.ndarray, f: np.ndarray) -> None:
    """Marks the `rows` pairs of least reduced cost of every row and the `columns` of every column; and f_i = min_j C_ij - g_j."""
    n, m = cost.shape
    of_row, j_of = np.empty(rows), np.zeros(rows, np.int64)
    of_column, i_of = np.full((m, columns), 1e300), np.zeros((m, columns), np.int64)
    worst = np.full(m, 1e300)
    reduced = np.empty(m)
    for i in range(n):
        low = 1e300
        for j in range(m):
            reduced[j] = cost[i, j] - g[j]
            low = min(low, reduced[j])
        f[i] = low
        of_row[:] = 1e300
        for j in range(m):
            value = reduced[j]
            if value < of_row[rows - 1]:
                k = rows - 1
                while k > 0 and of_row[k - 1] > value:
                    of_row[k], j_of[k] = of_row[k - 1], j_of[k - 1]
                    k -= 1
                of_row[k], j_of[k] = value, j
        for j in range(m):
            value = reduced[j] - low
            if value < worst[j]:
                k = columns - 1
                while k > 0 and of_column[j, k - 1] > value:
                    of_column[j, k], i_of[j, k] = of_column[j, k - 1], i_of[j, k - 1]
                    k -= 1
                of_column[j, k], i_of[j, k] = value, i
                worst[j] = of_column[j, columns - 1]
        for k in range(rows):
            chosen[i, j_of[k]] = True
    for j in range(m):
        for k in range(columns):
            chosen[i_of[j, k], j] = True


@fast
def _tight(cost: np.ndarray, g: np.ndarray, f: np.ndarray, tight: np.ndarray) -> None:
    """f_i = min_j C_ij - g_j, then g_j = min_i C_ij - f_i."""
    n, m = cost.shape
    tight[:] = 1e300
    for i in range(n):
        low = 1e300
        for j in range(m):
            low = min(low, cost[i, j] - g[j])
        f[i] = low
        for j in range(m):
            tight[j] = min(tight[j], cost[i, j] - low)


def exact(cost: np.ndarray, g: np.ndarray | None = None) -> Exact:
    """The cheapest way to carry equal masses at the rows to equal masses at the columns.

    Args:
        cost: float64[n, m], finite; beyond `ot.EXACT_ENTRIES` entries see `ot.transport`, which is not exact there.
        g: float64[m] prices to begin with; any will do.

    Raises:
        ConfigError: POT is not installed.
        DataError, NumericsError: see `ot.transport`.
    """
    if not SMALLEST <= cost.size <= EXACT_ENTRIES or min(cost.shape) <= max(KEEP) or not np.isfinite(cost).all():
        return _whole(cost)
    n, m = cost.shape
    scale = float(np.abs(cost).max()) or 1.0
    g, f, tight = np.zeros(m) if g is None else g, np.empty(n), np.empty(m)
    chosen = _staircase(n, m)
    for _ in range(ROUNDS):
        _shortlist(cost, g, *KEEP, chosen, f)
        found = _solved(cost, chosen, f, g, scale)
        if found is None:
            break
        value, g = found
        _tight(cost, g, f, tight)
        if value - float(f.mean() + tight.mean()) <= GAP * scale:
            shift = (tight.mean() - f.mean()) / 2
            return Exact(value, f + shift, tight - shift)
    return _whole(cost)


def _whole(cost: np.ndarray) -> Exact:
    plan = transport(cost, form="none")
    return Exact(plan.value, plan.f, plan.g)


def _staircase(n: int, m: int) -> np.ndarray:
    """bool[n, m]: the pairs of the plan that fills rows and columns in their order."""
    chosen = np.zeros((n, m), bool)
    ends = np.unique(np.concatenate([np.arange(n) * m, np.arange(m) * n]))
    chosen[ends // m, ends // n] = True
    return chosen


def _solved(cost: np.ndarray, chosen: np.ndarray, f: np.ndarray, g: np.ndarray, scale: float) -> tuple[float, np.ndarray] | None:
    """(cost of the best plan over the chosen pairs, prices of the columns); None if the solver gave up.

    The solver is given costs less the prices at hand: the plan is the same, and pairs of little promise come last.
    """
    try:
        import ot
    except ImportError as missing:
        raise ConfigError(
            "exact transport needs POT, which is not installed", where="solver", fix="pip install 'posttrain[select]'"
        ) from missing
    from scipy.sparse import coo_matrix

    n, m = cost.shape
    at = np.flatnonzero(chosen)
    i, j = np.divmod(at, m)
    values = cost.ravel()[at]
    sparse = coo_matrix(((values - f[i] - g[j]) / scale, (i, j)), shape=(n, m))
    options = {"numItermax": 100_000_000, "log": True, "check_marginals": False, "center_dual": False}
    plan, log = ot.emd(np.full(n, 1 / n), np.full(m, 1 / m), sparse, **options)
    if log.get("warning") is not None:
        return None
    return float(plan.data @ cost[plan.row, plan.col]), g + np.asarray(log["v"], np.float64) * scale

"""Sinkhorn's algorithm (Cuturi 2013) in two forms, and the annealed variant of GeomLoss.

Everything here is dimensionless: for eta = 1/reg, C >= 0 with minimum 0, and weights a, b > 0 that sum to 1,

    log P_ij = x_i + y_j - eta C_ij,      P 1 = a,  P' 1 = b

One sweep over the cost sets x so that every row sums to a exactly, and in the same pass over memory gives P and its column
sums c; then y += log b - log c is Sinkhorn's other half-step. So a full iteration costs one exponential an entry, the
exponents never exceed 0, and the error is what the columns are off by. `log_domain` iterates that. `kernel` keeps P as the
kernel and scales it by vectors u and v, two matrix-vector products an iteration; once the scalings leave [1e-30, 1e30] they
are absorbed into y and P is made anew, so it works at any eta (stabilised as in Schmitzer 2019).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from data_pipelines.fastexp import exp, fast

ABSORB = 1e30
"""Scalings beyond this, or below its inverse, are absorbed into the potentials."""
LOOK_AHEAD = 25
"""Iterations between two looks at how fast `kernel` converges."""


class Dual(NamedTuple):
    """Where a solver stopped: x float64[n], y float64[m], `plan` float64[n, m] with exact rows, `columns` its column sums
    float64[m], `error` sum |columns - b|, `iterations`, and `newton`, how many of them were Newton steps."""

    x: np.ndarray
    y: np.ndarray
    plan: np.ndarray
    columns: np.ndarray
    error: float
    iterations: int
    newton: int = 0


@fast
def sweep(
    cost: np.ndarray, eta: float, y: np.ndarray, a: np.ndarray, log_a: np.ndarray, plan: np.ndarray, x: np.ndarray, columns: np.ndarray
) -> float:
    """x, plan and column sums from y, every row of the plan summing to a; returns a.x, the rows' part of the dual value."""
    n, m = cost.shape
    columns[:] = 0.0
    value = 0.0
    for i in range(n):
        top = -1e300
        for j in range(m):
            top = max(top, y[j] - eta * cost[i, j])
        total = 0.0
        for j in range(m):
            p = exp(y[j] - eta * cost[i, j] - top)
            plan[i, j] = p
            total += p
        x[i] = log_a[i] - top - math.log(total)
        value += a[i] * x[i]
        factor = a[i] / total
        for j in range(m):
            p = plan[i, j] * factor
            plan[i, j] = p
            columns[j] += p
    return value


class Problem:
    """A problem with its buffers: cost float64[n, m] >= 0, weights > 0 that sum to 1."""

    def __init__(self, cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
        self.cost, self.a, self.b = cost, a, b
        self.log_a, self.log_b = np.log(a), np.log(b)
        self.plan, self.x, self.columns = np.empty_like(cost), np.empty(len(a)), np.empty(len(b))
        self.sweeps = 0

    def sweep(self, eta: float, y: np.ndarray) -> float:
        """x, plan and columns from y; returns the dual value a.x + b.y, which Sinkhorn and Newton maximise."""
        self.sweeps += 1
        return float(sweep(self.cost, eta, y, self.a, self.log_a, self.plan, self.x, self.columns) + self.b @ y)

    def error(self) -> float:
        """Sum |columns - b|; the rows are exact."""
        return float(np.abs(self.columns - self.b).sum())

    def half_step(self, y: np.ndarray) -> np.ndarray:
        """Sinkhorn's y from the columns of the last sweep."""
        moved: np.ndarray = y + self.log_b - np.log(self.columns)
        return moved

    def dual(self, y: np.ndarray, newton: int = 0, iterations: int | None = None) -> Dual:
        """The state after the last sweep, which was made with y."""
        return Dual(self.x, y, self.plan, self.columns, self.error(), self.sweeps if iterations is None else iterations, newton)


def log_domain(problem: Problem, eta: float, tol: float, max_iter: int, y: np.ndarray | None = None) -> Dual:
    """Iterates sweeps until the columns are off by at most `tol`."""
    y = np.zeros(len(problem.b)) if y is None else y
    for _ in range(max(1, max_iter)):
        problem.sweep(eta, y)
        if problem.error() <= tol:
            break
        last, y = y, problem.half_step(y)
    else:
        y = last
    return problem.dual(y)


def kernel(problem: Problem, eta: float, tol: float, max_iter: int, patience: int | None = None) -> Dual:
    """Matrix scaling; the result is that of a last sweep in the log domain.

    Args:
        problem, eta, tol, max_iter: as for `log_domain`.
        patience: give up once convergence at the present rate would need more iterations than this in all.
    """
    y, iterations, watch = np.zeros(len(problem.b)), 0, (0, math.inf)
    while True:
        problem.sweep(eta, y)
        if problem.error() <= tol or iterations >= max_iter:
            break
        log_v, iterations, watch, hopeless = _scale(problem, tol / 2, iterations, max_iter, watch, patience)
        y = y + log_v
        if hopeless:
            problem.sweep(eta, y)
            break
    return problem.dual(y, iterations=iterations)


def _scale(
    problem: Problem, tol: float, iterations: int, max_iter: int, watch: tuple[int, float], patience: int | None
) -> tuple[np.ndarray, int, tuple[int, float], bool]:
    """Scalings of the plan until they converge or must be absorbed: log v, iterations, (iteration, error) last looked at, give up?"""
    plan, a, b = problem.plan, problem.a, problem.b
    u = np.ones(len(a))
    v = b / np.maximum(problem.columns, 1e-300)
    while True:
        rows = np.maximum(plan @ v, 1e-300)
        error = float(np.abs(u * rows - a).sum())
        u = a / rows
        iterations += 1
        extreme = max(v.max(), 1 / v.min(), u.max(), 1 / u.min()) > ABSORB
        if error <= tol or iterations >= max_iter or extreme:
            return np.log(v), iterations, watch, False
        if iterations - watch[0] >= LOOK_AHEAD:
            if patience is not None and _needed(watch, iterations, error, tol) > patience:
                return np.log(v), iterations, watch, True
            watch = (iterations, error)
        v = b / np.maximum(plan.T @ u, 1e-300)


def _needed(watch: tuple[int, float], iterations: int, error: float, tol: float) -> float:
    """Iterations in all, if the error goes on to fall as it has since `watch`."""
    before, error_before = watch
    if error_before == math.inf:
        return 0.0
    rate = math.log(error_before / error) / (iterations - before)
    return math.inf if rate <= 0 else iterations + math.log(error / tol) / rate


@fast
def _softmin(cost: np.ndarray, eps: float, log_weight: np.ndarray, potential: np.ndarray, out: np.ndarray) -> None:
    """out_i = -eps log sum_j exp(log_weight_j + (potential_j - cost_ij)/eps)."""
    n, m = cost.shape
    inverse = 1.0 / eps
    held = np.empty(m)
    for i in range(n):
        top = -1e300
        for j in range(m):
            held[j] = log_weight[j] + (potential[j] - cost[i, j]) * inverse
            top = max(top, held[j])
        total = 0.0
        for j in range(m):
            total += exp(held[j] - top)
        out[i] = -eps * (top + math.log(total))


def softmin(cost: np.ndarray, eps: float, weight: np.ndarray, potential: np.ndarray) -> np.ndarray:
    """Soft c-transform f_i = -eps log sum_j w_j exp((g_j - C_ij)/eps), float64[n]; w > 0."""
    out = np.empty(len(cost))
    _softmin(cost, eps, np.log(weight), potential, out)
    return out


def annealed(cost: np.ndarray, diameter: float, blur: float = 0.01, scaling: float = 0.5) -> tuple[float, np.ndarray, np.ndarray]:
    """What GeomLoss's `SamplesLoss("sinkhorn", p=2, debias=False)` returns for uniform weights (Feydy 2020, algorithm 3.5).

    One averaged step of both potentials for each eps = diameter^2, diameter^2 scaling^2, ..., blur^2, then one unaveraged
    step; there is no test of convergence, so neither value nor potentials are those of the problem at eps = blur^2.

    Args:
        cost: float64[n, m].
        diameter: of the box that holds all points.
        blur: square root of the last eps.
        scaling: factor of sqrt(eps) a step.

    Returns:
        (mean f + mean g, f float64[n], g float64[m]).
    """
    n, m = cost.shape
    turned = np.ascontiguousarray(cost.T)
    a, b = np.full(n, 1 / n), np.full(m, 1 / m)
    between = np.arange(2 * math.log(diameter), 2 * math.log(blur), 2 * math.log(scaling))
    steps = [diameter**2, *np.exp(between), blur**2]
    g, f = softmin(turned, steps[0], a, np.zeros(n)), softmin(cost, steps[0], b, np.zeros(m))
    for eps in steps:
        new_f, new_g = softmin(cost, eps, b, g), softmin(turned, eps, a, f)
        f, g = (f + new_f) / 2, (g + new_g) / 2
    f, g = softmin(cost, eps, b, g), softmin(turned, eps, a, f)
    return float(f.mean() + g.mean()), f, g

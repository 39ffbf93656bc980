"""Sinkhorn-Newton-Sparse (Tang et al. 2024, arXiv 2401.12253), with what it takes to converge on every problem.

Sinkhorn maximises the concave dual by turns in x and y. The paper ends with Newton steps on it, whose Hessian

    -H = [[diag(P 1), P], [P', diag(P' 1)]]

is nearly sparse once Sinkhorn has begun to converge: keep the largest entries of P, solve, search along the line. Taken
literally that needs hundreds of steps at weak regularisation or ends in NaN. What is done here:

* The larger side's variables x are eliminated: at every trial point they are set by a Sinkhorn sweep, so rows are exact, the
  exponents never exceed 0 and nothing can overflow. What is left is the concave function h(y) = max_x dual(x, y), with

      grad h = b - c,    -H_h = diag(c) - P' diag(1/a) P     (the Schur complement of -H),

  whose null vector, the constant, is orthogonal to every gradient.
* Only the block P is sparsified, the diagonal c is exact, so the matrix stays positive semidefinite. Entries of row i below
  t a_i are dropped, t = min(0.01, 0.001 error/m): at most a thousandth of the error in all, so the sparsity follows the
  convergence instead of being guessed. A small multiple of c min(1, error) makes it definite and bends far-off steps
  towards Sinkhorn's own, which is g/c to first order.
* The matrix is m x m: dense Cholesky factorisation where m is small, else conjugate gradients with a Jacobi preconditioner
  (a third of the time from m = 1000 on, measured); sparse LU on request.
* |step|_inf, which bounds how far the quadratic model can be off, stays within a trust radius; then Armijo.
* eta is raised in steps, each begun with a few Sinkhorn sweeps from the last two steps' potentials extrapolated in 1/eta.
* Where no ascent is found: Sinkhorn sweeps and a larger shift.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from data_pipelines.fastexp import fast
from data_pipelines.sinkhorn import Dual, Problem

Linear = Literal["auto", "dense", "sparse", "cg"]

SWEEPS = 5
"""Sinkhorn sweeps at the begin of each step of eta, and where Newton finds no ascent."""
FIRST_ETA, RAISE = 20.0, 3.0
"""eta times the range of the cost at the first step, at most, and the factor from step to step."""
MIDWAY = 0.01
"""Marginal error at which the next step of eta begins."""
RADIUS, SMALLEST_RADIUS = 5.0, 1.0
"""Bound of |step|_inf at the begin of each step of eta, and the least that a poor step leaves of it."""
GOOD, POOR = 0.9, 0.5
"""Gain over what the quadratic model foretold: above `GOOD` a bounded step doubles the radius, below `POOR` it is halved."""
SHIFT = 1e-3
"""Share of c min(1, error) that is added to the diagonal."""
DROPPED, MOST_DROPPED = 1e-3, 1e-2
"""Entries of row i below a_i min(MOST_DROPPED, DROPPED error/m) are dropped from the Hessian."""
DENSE = 768
"""Most columns for which the matrix is dense under `auto`."""
GIVE_UP = 20
"""Returns to Sinkhorn at one eta after which the solver stops."""


@fast
def _count(plan: np.ndarray, a: np.ndarray, cut: float, kept: np.ndarray) -> float:
    """How many entries of each row exceed cut a_i; returns the sum of their squares, the cost of the product."""
    n, m = plan.shape
    cost = 0.0
    for i in range(n):
        bound, k = cut * a[i], 0
        for j in range(m):
            k += plan[i, j] > bound
        kept[i] = k
        cost += float(k) * k
    return cost


@fast
def _gather(plan: np.ndarray, a: np.ndarray, cut: float, indptr: np.ndarray, indices: np.ndarray, data: np.ndarray) -> None:
    """The entries above cut a_i, in CSR form."""
    n, m = plan.shape
    for i in range(n):
        bound, at = cut * a[i], indptr[i]
        for j in range(m):
            if plan[i, j] > bound:
                indices[at], data[at] = j, plan[i, j]
                at += 1


@fast
def _gram(indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, a: np.ndarray, out: np.ndarray) -> None:
    """out -= P' diag(1/a) P for sparse P; its lower triangle."""
    for i in range(len(a)):
        for left in range(indptr[i], indptr[i + 1]):
            row, weight = indices[left], data[left] / a[i]
            for right in range(indptr[i], left + 1):
                out[row, indices[right]] -= weight * data[right]


@dataclass
class _Step:
    """State of the ascent at one eta: y, its dual value, the radius of a step and the shift of the matrix."""

    eta: float
    y: np.ndarray
    value: float
    radius: float
    shift: float


class _Newton:
    """Newton steps on h(y)."""

    def __init__(self, problem: Problem, linear: Linear) -> None:
        self.problem, self.linear, self.steps = problem, linear, 0
        self.kept = np.empty(len(problem.a), np.int64)

    def direction(self, gradient: np.ndarray, error: float, shift: float) -> np.ndarray | None:
        """Newton's step, centred; None where the matrix cannot be factorised."""
        p, m = self.problem, len(self.problem.b)
        diagonal = p.columns * (1 + 1e-13 + shift * min(1.0, error))
        cut = min(MOST_DROPPED, DROPPED * error / m)
        work = _count(p.plan, p.a, cut, self.kept)
        if self.linear == "dense" or (self.linear == "auto" and m <= DENSE):
            step = _dense(p, diagonal, gradient, None if work > p.plan.size * m / 16 else self._sparse(cut))
        else:
            step = _iterative(p, diagonal, gradient, self._sparse(cut), self.linear)
        return None if step is None or not np.isfinite(step).all() else step - (step.max() + step.min()) / 2

    def _sparse(self, cut: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        indptr = np.concatenate([[0], np.cumsum(self.kept)])
        indices, data = np.empty(indptr[-1], np.int64), np.empty(indptr[-1])
        _gather(self.problem.plan, self.problem.a, cut, indptr, indices, data)
        return indptr, indices, data

    def ascend(self, at: _Step) -> bool:
        """One step from `at`, for which the problem's last sweep was made; False leaves `at.y` as it was."""
        p = self.problem
        gradient, error = p.b - p.columns, p.error()
        step = self.direction(gradient, error, at.shift)
        self.steps += 1
        if step is None:
            return False
        slope, longest = float(gradient @ step), float(np.abs(step).max())
        if not slope > 0:
            return False
        length = min(1.0, at.radius / longest)
        bounded = length < 1
        for _ in range(8):
            y = at.y + length * step
            value = p.sweep(at.eta, y)
            gain = value - at.value
            noise = 1e-14 * max(1.0, abs(value))
            if gain >= 1e-4 * length * slope - noise and (p.error() < 0.99 * error or gain > 100 * noise):
                ratio = gain / (length * slope * (1 - length / 2))
                if bounded and ratio > GOOD:
                    at.radius *= 2
                elif ratio < POOR:
                    at.radius = max(SMALLEST_RADIUS, length * longest / 2)
                at.y, at.value = y, value
                return True
            length, bounded = length / 2, False
            at.radius = length * longest
        return False

    def climb(self, at: _Step, tol: float, max_steps: int) -> bool:
        """Steps until the columns are off by at most `tol`."""
        p, failures = self.problem, 0
        while p.error() > tol:
            if self.steps >= max_steps or failures > GIVE_UP:
                return False
            if not self.ascend(at):
                failures += 1
                at.shift, at.radius = at.shift * 10, RADIUS
                at.value = p.sweep(at.eta, at.y)
                for _ in range(SWEEPS):
                    at.y = p.half_step(at.y)
                    at.value = p.sweep(at.eta, at.y)
        return True


def _dense(problem: Problem, diagonal: np.ndarray, gradient: np.ndarray, sparse: Any) -> np.ndarray | None:
    from scipy.linalg import LinAlgError, cho_factor, cho_solve

    if sparse is None:
        scaled = problem.plan / np.sqrt(problem.a)[:, None]
        matrix = -(scaled.T @ scaled)
    else:
        matrix = np.zeros((len(diagonal),) * 2)
        indptr, indices, data = sparse
        _gram(indptr, indices, data, problem.a, matrix)
    matrix[np.diag_indices_from(matrix)] += diagonal
    try:
        factor = cho_factor(matrix.T, lower=False, overwrite_a=True, check_finite=False)
    except LinAlgError:
        return None
    step: np.ndarray = cho_solve(factor, gradient, check_finite=False)
    return step


def _iterative(problem: Problem, diagonal: np.ndarray, gradient: np.ndarray, sparse: Any, linear: Linear) -> np.ndarray | None:
    from scipy.sparse import csr_array, diags_array
    from scipy.sparse.linalg import LinearOperator, cg, splu

    indptr, indices, data = sparse
    n, m = problem.plan.shape
    rows = csr_array((data, indices, indptr), shape=(n, m))
    scaled = csr_array((data / np.repeat(problem.a, np.diff(indptr)), indices, indptr), shape=(n, m))
    columns, backwards = scaled.T.tocsr(), rows
    if linear == "sparse":
        matrix = diags_array(diagonal) - columns @ rows
        try:
            step: np.ndarray = splu(
                matrix.tocsc(), permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True}
            ).solve(gradient)
        except RuntimeError:
            return None
        return step
    exact = diagonal - np.bincount(indices, data * data / np.repeat(problem.a, np.diff(indptr)), minlength=m)
    operator = LinearOperator((m, m), matvec=lambda y: diagonal * y - columns @ (backwards @ y), dtype=float)
    jacobi = LinearOperator((m, m), matvec=lambda y: y / exact, dtype=float)
    step, _ = cg(operator, gradient, rtol=min(1e-2, problem.error()), maxiter=10 * m, M=jacobi)
    return step


def newton_sparse(problem: Problem, eta: float, tol: float, max_steps: int = 500, linear: Linear = "auto") -> Dual:
    """Solves to a marginal error of `tol`, or stops after `max_steps` Newton steps.

    Args:
        problem: with at least as many rows as columns, for speed.
        eta: 1/reg for the cost as it is in `problem`.
        tol: sum |P' 1 - b| to reach.
        max_steps: over all steps of eta.
        linear: how Newton's systems are solved; `auto` is dense up to 768 columns, else conjugate gradients.
    """
    reach = eta * float(problem.cost.max(initial=0.0))
    raises = max(0, math.ceil(math.log(max(reach / FIRST_ETA, 1.0)) / math.log(RAISE)))
    newton, y, path = _Newton(problem, linear), np.zeros(len(problem.b)), []
    for exponent in range(raises, -1, -1):
        now, wanted = eta * RAISE**-exponent, tol if exponent == 0 else MIDWAY
        at = _Step(now, y, problem.sweep(now, y), RADIUS, SHIFT)
        for _ in range(SWEEPS):
            if problem.error() <= wanted:
                break
            at.y = problem.half_step(at.y)
            at.value = problem.sweep(now, at.y)
        if not newton.climb(at, wanted, max_steps) and (newton.steps >= max_steps or exponent == 0):
            break
        path.append((1 / now, at.y / now))
        y = _extrapolated(path, now * RAISE)
    if now != eta:
        at.value, at.y = problem.sweep(eta, at.y * (eta / now)), at.y * (eta / now)
    return problem.dual(at.y, newton.steps)


def _extrapolated(path: list[tuple[float, np.ndarray]], eta: float) -> np.ndarray:
    """y at `eta` from the potentials y/eta at the last values of 1/eta."""
    (reg, g) = path[-1]
    if len(path) > 1:
        before, g_before = path[-2]
        g = g + (g - g_before) * (1 / eta - reg) / (reg - before)
    return g * eta

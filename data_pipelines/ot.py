"""Optimal transport between two weighted sets of points, one door to every solver.

    exact    min_P <C, P>                        subject to P 1 = a, P' 1 = b, P >= 0
    reg > 0  min_P <C, P> + reg KL(P | a b')     the entropic problem; eta = 1/reg in much of the literature

Both come with dual potentials f, g (the shadow prices of a and b), normalised so that a.f = b.g; with reg,
P_ij = a_i b_j exp((f_i + g_j - C_ij)/reg). A potential f_i is large where the mass at i is expensive to move.

Which solver is right was measured (`benchmarks/select_ot.py`). The network simplex of POT is the fastest of all up to a few
million entries although its answer is exact. With reg: Sinkhorn's matrix scaling while reg is not small against the range
of the costs; else Sinkhorn-Newton-Sparse, which alone reaches tight tolerances there. Everything is float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np

from data_pipelines.sinkhorn import Dual, Problem, kernel, log_domain, softmin
from data_pipelines.sinkhorn_newton import newton_sparse
from posttrain.errors import ConfigError, DataError, NumericsError

Solver = Literal["auto", "exact", "sinkhorn", "sinkhorn_log", "sns"]
Form = Literal["dense", "sparse", "none"]
SOLVERS = ("auto", "exact", "sinkhorn", "sinkhorn_log", "sns")

EXACT_ENTRIES = 4_000_000
"""`auto` without reg is exact up to this many entries: one to two seconds of one core."""
WEAKEST = 1e-3
"""`auto` without reg on larger problems: reg = this times the range of the costs."""
MOST_REACH = 1e10
"""Largest range of the costs over reg."""
PATIENCE = 400
"""`auto` with reg: Sinkhorn if it will take at most this many iterations; judged after a few dozen."""
MOST_ITERATIONS = {"exact": 100_000_000, "sinkhorn": 100_000, "sinkhorn_log": 20_000, "sns": 500}
"""Default of `max_iter` by solver: pivots, iterations, iterations, Newton steps."""


@dataclass(frozen=True)
class Plan:
    """A transport plan and its prices.

    Args:
        plan: float64[n, m]; a `scipy.sparse.csr_array` under `form="sparse"`, None under `"none"`.
        value: <C, P>.
        regularised: <C, P> + reg KL(P | a b'); equal to `value` when exact.
        f, g: float64[n], float64[m] dual potentials, in the unit of the costs; at the optimum a.f + b.g = `regularised`.
        marginal_error: |P 1 - a|_1 + |P' 1 - b|_1, relative to the mass.
        iterations: sweeps of the cost, or scalings; 0 when exact.
        newton: Newton steps.
        converged: False only where the caller asked to have it so.
        solver: which one ran: exact, sinkhorn, sinkhorn_log or sns.
        reg: 0 when exact.
    """

    plan: Any
    value: float
    regularised: float
    f: np.ndarray
    g: np.ndarray
    marginal_error: float
    iterations: int
    newton: int
    converged: bool
    solver: str
    reg: float


def transport(
    cost: np.ndarray,
    a: np.ndarray | None = None,
    b: np.ndarray | None = None,
    *,
    solver: Solver = "auto",
    reg: float | None = None,
    eta: float | None = None,
    tol: float = 1e-9,
    max_iter: int | None = None,
    form: Form = "dense",
    on_unconverged: Literal["raise", "return"] = "raise",
) -> Plan:
    """The cheapest way to carry the masses `a` to the masses `b`.

    Args:
        cost: [n, m], finite.
        a, b: masses >= 0 of rows and columns, of equal sum; uniform by default.
        solver: `exact` (POT's network simplex), `sinkhorn` (matrix scaling), `sinkhorn_log`, `sns`
            (Sinkhorn-Newton-Sparse). `auto` without reg is exact up to 4 million entries, above that `sns` with
            reg = 0.001 of the range of the costs; with reg it is `sinkhorn` if that converges soon, else `sns`.
        reg: weight of the entropy, in the unit of the costs; needed by all but `exact` and `auto`.
        eta: 1/reg, instead of it.
        tol: marginal error that must be reached.
        max_iter: default by solver, see `MOST_ITERATIONS`.
        form: `sparse` leaves out entries that hold at most tol/20 of the mass in all; `none` keeps no plan.
        on_unconverged: `return` hands back a plan that does not satisfy `tol`, with `converged` False.

    Raises:
        ConfigError: an option that makes no sense; POT is not installed.
        DataError: costs or masses that are not usable.
        NumericsError: `tol` was not reached.
    """
    costs, a, b, mass = _checked(cost, a, b)
    reg = _checked_reg(solver, reg, eta, tol, max_iter)
    span = float(costs.max() - costs.min())
    if solver == "auto" and reg is None:
        solver, reg = ("exact", None) if costs.size <= EXACT_ENTRIES or span == 0 else ("sns", WEAKEST * span)
    if solver == "exact":
        return _exact(costs, a, b, mass, tol, max_iter, form, on_unconverged)
    return _entropic(costs, a, b, mass, solver, cast(float, reg), tol, max_iter, form, on_unconverged)


def _checked(cost: np.ndarray, a: Any, b: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """cost float64[n, m], a and b with sum 1, and their mass."""
    costs = np.ascontiguousarray(cost, dtype=np.float64)
    if costs.ndim != 2 or 0 in costs.shape:
        raise DataError(f"costs of shape {costs.shape}, expected [n, m] with n, m >= 1", where="cost", fix="give one row a source point")
    if not np.isfinite(costs).all():
        i, j = np.argwhere(~np.isfinite(costs))[0]
        raise DataError(f"cost[{i}, {j}] is {costs[i, j]}", where="cost", fix="give finite costs; a large one for a forbidden pair")
    weights = [_weights(value, size, name) for value, size, name in ((a, costs.shape[0], "a"), (b, costs.shape[1], "b"))]
    mass = [float(value.sum()) for value in weights]
    if abs(mass[0] - mass[1]) > 1e-6 * mass[0]:
        raise DataError(f"a sums to {mass[0]:g}, b to {mass[1]:g}", where="a, b", fix="scale them to the same sum")
    return costs, weights[0] / mass[0], weights[1] / mass[1], mass[0]


def _weights(value: Any, size: int, name: str) -> np.ndarray:
    weights = np.full(size, 1 / size) if value is None else np.asarray(value, dtype=np.float64)
    if weights.shape != (size,):
        raise DataError(f"masses of shape {weights.shape}, expected ({size},)", where=name, fix="give one mass a point")
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.sum() > 0:
        raise DataError("masses that are negative, not finite or all 0", where=name, fix="give masses >= 0 with a positive sum")
    return weights


def _checked_reg(solver: str, reg: float | None, eta: float | None, tol: float, max_iter: int | None) -> float | None:
    if solver not in SOLVERS:
        raise ConfigError(f"unknown solver `{solver}`; known: {', '.join(SOLVERS)}", where="solver")
    if reg is not None and eta is not None:
        raise ConfigError("reg and eta are given, and one is the inverse of the other", where="reg", fix="give one of them")
    if reg is None and eta is not None:
        reg = 1 / eta if eta > 0 else 0.0
    if reg is not None and not (0 < reg < np.inf):
        raise ConfigError(f"reg is {reg:g}, must be positive and finite", where="reg", fix="leave it out for an exact plan")
    if solver == "exact" and reg is not None:
        raise ConfigError("the exact solver has no reg", where="reg", fix="leave reg out, or take another solver")
    if solver not in ("auto", "exact") and reg is None:
        raise ConfigError(f"`{solver}` needs reg (or eta)", where="reg", fix="a thousandth of the largest cost is weak, a twentieth strong")
    if not tol > 0:
        raise ConfigError(f"tol is {tol:g}, must be positive", where="tol")
    if max_iter is not None and max_iter < 1:
        raise ConfigError(f"max_iter is {max_iter}, must be at least 1", where="max_iter")
    return reg


def _exact(
    cost: np.ndarray, a: np.ndarray, b: np.ndarray, mass: float, tol: float, max_iter: int | None, form: Form, on_unconverged: str
) -> Plan:
    try:
        import ot
    except ImportError as missing:
        fix = "pip install 'posttrain[select]', or give reg"
        raise ConfigError("exact transport needs POT, which is not installed", where="solver", fix=fix) from missing
    scale = float(np.abs(cost).max()) or 1.0
    limit = MOST_ITERATIONS["exact"] if max_iter is None else max_iter
    plan, log = ot.emd(a, b, cost / scale, numItermax=limit, log=True, check_marginals=False)
    g = np.asarray(log["v"], dtype=np.float64) * scale
    f = (cost - g).min(1)
    g = (cost - f[:, None]).min(0)
    value, error = float((plan * cost).sum()), _marginal_error(plan, a, b)
    gap = value - float(a @ f + b @ g)
    converged = bool(log.get("warning") is None and error <= tol and abs(gap) <= max(tol, 1e-9) * scale)
    if not converged and on_unconverged == "raise":
        raise NumericsError(
            f"the network simplex stopped with marginal error {error:.2g} (tol {tol:g}) and duality gap {gap:.2g}: {log.get('warning')}",
            where="transport", fix="raise max_iter, or give reg for an entropic plan",
        )  # fmt: skip
    f, g = _balanced(f, g, a, b)
    return Plan(_formed(plan * mass, tol, form), value * mass, value * mass, f, g, error, 0, 0, converged, "exact", 0.0)


def _entropic(
    cost: np.ndarray, a: np.ndarray, b: np.ndarray, mass: float, solver: str, reg: float,
    tol: float, max_iter: int | None, form: Form, on_unconverged: str,
) -> Plan:  # fmt: skip
    rows, columns = np.flatnonzero(a > 0), np.flatnonzero(b > 0)
    whole = len(rows) == len(a) and len(columns) == len(b)
    part = cost if whole else cost[np.ix_(rows, columns)]
    least, turned = float(part.min()), part.shape[0] < part.shape[1]
    if not float(part.max()) - least <= MOST_REACH * reg:
        raise ConfigError(
            f"reg is {reg:g}, but the costs span {part.max() - least:g}: exponents of that size have no digits left",
            where="reg", fix="raise reg, or take solver exact",
        )  # fmt: skip
    shifted = np.ascontiguousarray((part - least).T) if turned else part - least
    one, other = (b[columns], a[rows]) if turned else (a[rows], b[columns])
    problem = Problem(shifted, one, other)
    solver, dual = _solved(problem, solver, 1 / reg, tol, max_iter)
    small = dual.plan.T if turned else dual.plan
    x, y = (dual.y, dual.x) if turned else (dual.x, dual.y)
    f, g = reg * (x - np.log(a[rows])) + least / 2, reg * (y - np.log(b[columns])) + least / 2
    error = _marginal_error(small, a[rows], b[columns])
    converged = error <= tol
    if not converged and on_unconverged == "raise":
        raise _unconverged(solver, dual, error, tol, reg, max_iter)
    value = float((small * part).sum())
    regularised = float(f @ small.sum(1) + g @ small.sum(0))
    plan = small if whole else np.zeros(cost.shape)
    if not whole:
        plan[np.ix_(rows, columns)] = small
        f, g = _everywhere(cost, reg, (a, b), (rows, columns), (f, g))
    f, g = _balanced(f, g, a, b)
    formed = _formed(plan if mass == 1 else plan * mass, tol, form)
    return Plan(formed, value * mass, regularised * mass, f, g, error, dual.iterations, dual.newton, converged, solver, reg)


def _solved(problem: Problem, solver: str, eta: float, tol: float, max_iter: int | None) -> tuple[str, Dual]:
    """The solver that ran, and where it stopped. Solvers aim below `tol`, since the rows' rounding comes on top."""
    aim = 0.9 * tol
    most = {name: max_iter or limit for name, limit in MOST_ITERATIONS.items()}
    if solver == "auto":
        dual = kernel(problem, eta, aim, min(PATIENCE, most["sinkhorn"]), PATIENCE)
        if dual.error <= aim:
            return "sinkhorn", dual
        solver = "sns"
    if solver == "sinkhorn":
        return solver, kernel(problem, eta, aim, most["sinkhorn"])
    if solver == "sinkhorn_log":
        return solver, log_domain(problem, eta, aim, most["sinkhorn_log"])
    return solver, newton_sparse(problem, eta, aim, most["sns"])


def _unconverged(solver: str, dual: Dual, error: float, tol: float, reg: float, max_iter: int | None) -> NumericsError:
    limit = max_iter or MOST_ITERATIONS[solver]
    steps, fix = f"{dual.newton} Newton steps", f"raise reg (now {reg:g}) or tol, or take solver exact"
    if solver != "sns":
        steps = f"{dual.iterations} iterations"
        fix = f"take solver sns, which is made for small reg, or raise max_iter (now {limit}) or reg (now {reg:g})"
    return NumericsError(f"{solver} stopped after {steps} with marginal error {error:.2g}, above tol {tol:g}", where="transport", fix=fix)


def _marginal_error(plan: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    error = float(np.abs(plan.sum(1) - a).sum() + np.abs(plan.sum(0) - b).sum())
    return error if np.isfinite(error) else float("inf")


def _everywhere(cost: np.ndarray, reg: float, weights: Any, support: Any, potentials: Any) -> tuple[np.ndarray, np.ndarray]:
    """Potentials of points without mass too, by the soft c-transform."""
    (a, b), (rows, columns), (f, g) = weights, support, potentials
    all_f = softmin(np.ascontiguousarray(cost[:, columns]), reg, b[columns], g)
    all_g = softmin(np.ascontiguousarray(cost[rows].T), reg, a[rows], f)
    all_f[rows], all_g[columns] = f, g
    return all_f, all_g


def _balanced(f: np.ndarray, g: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f + t and g - t with a.f = b.g."""
    t = (b @ g - a @ f) / 2
    return f + t, g - t


def _formed(plan: np.ndarray, tol: float, form: Form) -> Any:
    if form == "none":
        return None
    if form == "dense":
        return plan
    from scipy.sparse import csr_array

    bound = tol / 20 * plan.sum() / plan.size
    return csr_array(np.where(plan > bound, plan, 0.0))

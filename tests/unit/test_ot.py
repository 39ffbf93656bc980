"""Transport against linear programming and plain loops, the solvers against each other, and inputs that break others."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from scipy.optimize import linprog

from data_pipelines import ot, sinkhorn
from data_pipelines.fastexp import exp, fast
from data_pipelines.ot import transport
from posttrain.errors import ConfigError, DataError, NumericsError

ENTROPIC = ("sinkhorn", "sinkhorn_log", "sns", "auto")


def problem(n: int, m: int, seed: int = 0, uniform: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    cost = rng.random((n, m))
    a, b = (np.full(n, 1 / n), np.full(m, 1 / m)) if uniform else (rng.dirichlet(np.ones(n)), rng.dirichlet(np.ones(m)))
    return cost, a, b


def by_linear_programming(cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    n, m = cost.shape
    rows = np.kron(np.eye(n), np.ones(m))
    columns = np.kron(np.ones(n), np.eye(m))
    found = linprog(cost.ravel(), A_eq=np.vstack([rows, columns]), b_eq=np.concatenate([a, b]), method="highs")
    assert found.status == 0
    return float(found.fun)


def by_loops(cost: np.ndarray, a: np.ndarray, b: np.ndarray, reg: float) -> np.ndarray:
    """Sinkhorn in extended precision, one number at a time."""
    n, m = cost.shape
    c, f, g = cost.astype(np.longdouble), np.zeros(n, np.longdouble), np.zeros(m, np.longdouble)
    for _ in range(4000):
        for i in range(n):
            terms = (g - c[i]) / reg
            f[i] = reg * (np.log(np.longdouble(a[i])) - terms.max() - np.log(np.exp(terms - terms.max()).sum()))
        for j in range(m):
            terms = (f - c[:, j]) / reg
            g[j] = reg * (np.log(np.longdouble(b[j])) - terms.max() - np.log(np.exp(terms - terms.max()).sum()))
        plan = np.exp((f[:, None] + g[None] - c) / reg)
        if np.abs(plan.sum(1) - a).sum() < 1e-14:
            break
    return plan.astype(np.float64)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 5), (6, 1), (4, 7), (9, 5), (8, 8)])
def test_exact_is_the_linear_program(n: int, m: int) -> None:
    cost, a, b = problem(n, m, seed=n + m)
    found = transport(cost, a, b)
    assert found.solver == "exact" and found.converged and found.marginal_error < 1e-12
    assert found.value == pytest.approx(by_linear_programming(cost, a, b), abs=1e-12)
    assert (found.f[:, None] + found.g[None] <= cost + 1e-12).all()
    assert a @ found.f + b @ found.g == pytest.approx(found.value, abs=1e-12)
    assert a @ found.f == pytest.approx(b @ found.g, abs=1e-12)


@pytest.mark.parametrize("solver", ENTROPIC)
@pytest.mark.parametrize(("n", "m", "reg"), [(5, 4, 0.5), (4, 6, 0.05), (7, 7, 0.02), (1, 3, 0.1), (3, 1, 0.1)])
def test_entropic_plan_is_that_of_plain_loops(solver: Any, n: int, m: int, reg: float) -> None:
    cost, a, b = problem(n, m, seed=n * m)
    found, wanted = transport(cost, a, b, solver=solver, reg=reg, tol=1e-12), by_loops(cost, a, b, reg)
    np.testing.assert_allclose(found.plan, wanted, atol=1e-11)
    kl = float((wanted * np.log(np.maximum(wanted, 1e-300) / np.outer(a, b))).sum())
    assert found.value == pytest.approx((wanted * cost).sum(), abs=1e-10)
    assert found.regularised == pytest.approx((wanted * cost).sum() + reg * kl, abs=1e-10)
    np.testing.assert_allclose(np.outer(a, b) * np.exp((found.f[:, None] + found.g - cost) / reg), wanted, atol=1e-11)


@pytest.mark.parametrize("eta", [1.0, 30.0, 200.0])
def test_the_solvers_agree(eta: float) -> None:
    cost, a, b = problem(40, 30)
    plans = {solver: transport(cost, a, b, solver=solver, eta=eta, tol=1e-10, max_iter=2_000_000) for solver in ("sns", "sinkhorn", "auto")}
    if eta <= 30:
        plans["sinkhorn_log"] = transport(cost, a, b, solver="sinkhorn_log", eta=eta, tol=1e-10)
    for plan in plans.values():
        np.testing.assert_allclose(plan.plan, plans["sns"].plan, atol=3e-8)
        np.testing.assert_allclose(plan.f, plans["sns"].f, atol=1e-5)
        assert plan.marginal_error <= 1e-10 and plan.value >= transport(cost, a, b).value - 1e-10


def test_weak_regularisation_approaches_the_exact_plan() -> None:
    cost, a, b = problem(30, 20)
    exact, weak = transport(cost, a, b), transport(cost, a, b, eta=1e4)
    assert weak.solver == "sns" and abs(weak.value - exact.value) < 1e-4
    assert (weak.f[:, None] + weak.g - cost).max() < 3e-3  # nearly feasible, and the value is right: nearly optimal prices
    assert a @ weak.f + b @ weak.g == pytest.approx(exact.value, abs=3e-3)


def test_auto_takes_the_solver_that_suits() -> None:
    cost, a, b = problem(60, 50, uniform=True)
    assert transport(cost).solver == "exact"
    assert transport(cost, a, b, eta=10).solver == "sinkhorn"
    assert transport(cost, a, b, eta=3000).solver == "sns"


def test_auto_without_reg_is_entropic_where_exact_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    cost, _, _ = problem(20, 30)
    exact = transport(cost)
    monkeypatch.setattr(ot, "EXACT_ENTRIES", 599)
    found = transport(cost)
    assert found.solver == "sns" and found.reg == pytest.approx(1e-3 * np.ptp(cost))
    assert exact.value <= found.value < exact.value * 1.05


@pytest.mark.parametrize("solver", ["exact", "sinkhorn", "sinkhorn_log", "sns"])
def test_masses_of_zero(solver: Any) -> None:
    cost, a, b = problem(6, 5)
    a[[1, 4]], b[2] = 0.0, 0.0
    a, b = a / a.sum(), b / b.sum()
    reg = None if solver == "exact" else 0.1
    found = transport(cost, a, b, solver=solver, reg=reg)
    small = transport(cost[np.ix_(a > 0, b > 0)], a[a > 0], b[b > 0], solver=solver, reg=reg)
    assert found.value == pytest.approx(small.value, abs=1e-9) and not found.plan[1].any() and not found.plan[:, 2].any()
    assert np.isfinite(found.f).all() and np.isfinite(found.g).all()
    if reg:
        soft = -reg * np.log((b * np.exp((found.g - cost) / reg)).sum(1))
        np.testing.assert_allclose(found.f, soft, atol=1e-8)
    else:
        assert (found.f[:, None] + found.g <= cost + 1e-12).all()


@pytest.mark.parametrize("solver", ["exact", "sinkhorn", "sns"])
def test_units_and_offsets_of_cost_and_mass(solver: Any) -> None:
    cost, a, b = problem(12, 9)
    reg = None if solver == "exact" else 0.05
    plain = transport(cost, a, b, solver=solver, reg=reg)
    scaled = transport(cost * 1e8 - 5e7, 3 * a, 3 * b, solver=solver, reg=reg and reg * 1e8)
    np.testing.assert_allclose(scaled.plan, 3 * plain.plan, atol=1e-8)
    np.testing.assert_allclose(scaled.f, plain.f * 1e8 - 2.5e7, rtol=1e-6, atol=10)
    assert scaled.value == pytest.approx(3 * (plain.value * 1e8 - 5e7), rel=1e-6)


@pytest.mark.parametrize("solver", ["exact", "sinkhorn", "sns"])
def test_equal_costs_and_integer_costs(solver: Any) -> None:
    reg = None if solver == "exact" else 1e-3
    assert transport(np.full((5, 4), 2.0), solver=solver, reg=reg).value == pytest.approx(2.0)
    cost = np.random.default_rng(0).integers(0, 3, (20, 20)).astype(float)
    assert transport(cost, solver=solver, reg=reg).value == pytest.approx(transport(cost).value, abs=1e-2)


def test_float32_and_strided_costs() -> None:
    cost = np.random.default_rng(0).random((40, 30)).astype(np.float32)
    found = transport(cost.T[::2], eta=50)
    np.testing.assert_allclose(found.plan, transport(np.ascontiguousarray(cost.T[::2]).astype(float), eta=50).plan)
    assert found.plan.dtype == np.float64


def test_sparse_and_no_plan() -> None:
    cost, a, b = problem(40, 30)
    for options in ({}, {"eta": 2000.0}):
        dense = transport(cost, a, b, **options)
        sparse, none = transport(cost, a, b, form="sparse", **options), transport(cost, a, b, form="none", **options)
        assert sparse.plan.nnz < dense.plan.size / 4 and none.plan is None and none.value == dense.value
        np.testing.assert_allclose(sparse.plan.toarray(), dense.plan, atol=1e-11)
        assert np.abs(sparse.plan.sum(1) - a).sum() + np.abs(sparse.plan.sum(0) - b).sum() <= 1.1e-9


@pytest.mark.parametrize("solver", ["sinkhorn", "sinkhorn_log", "sns"])
def test_an_unconverged_plan_is_an_error_unless_asked_for(solver: Any) -> None:
    cost, a, b = problem(30, 20)
    with pytest.raises(NumericsError, match=r"stopped after .* with marginal error .* above tol"):
        transport(cost, a, b, solver=solver, eta=2000, max_iter=2)
    found = transport(cost, a, b, solver=solver, eta=2000, max_iter=2, on_unconverged="return")
    assert not found.converged and found.marginal_error > 1e-9 and np.isfinite(found.plan).all()
    measured = np.abs(found.plan.sum(1) - a).sum() + np.abs(found.plan.sum(0) - b).sum()
    assert found.marginal_error == pytest.approx(measured)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_simplex_that_stops_early_is_an_error() -> None:
    cost, a, b = problem(30, 20)
    with pytest.raises(NumericsError, match="network simplex"):
        transport(cost, a, b, solver="exact", max_iter=3)


BAD_INPUTS: dict[str, tuple[Any, Any, Any]] = {
    "vector": (np.ones(3), None, None),
    "empty": (np.ones((0, 3)), None, None),
    "nan": (np.array([[1.0, np.nan]]), None, None),
    "infinite": (np.array([[1.0, np.inf]]), None, None),
    "length of a": (np.ones((2, 2)), np.ones(3) / 3, None),
    "negative": (np.ones((2, 2)), np.array([1.5, -0.5]), None),
    "not finite": (np.ones((2, 2)), None, np.array([np.nan, 1.0])),
    "all zero": (np.ones((2, 2)), np.zeros(2), np.zeros(2)),
    "other sum": (np.ones((2, 2)), np.array([0.5, 0.5]), np.array([1.0, 1.0])),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_inputs(name: str) -> None:
    cost, a, b = BAD_INPUTS[name]
    with pytest.raises(DataError):
        transport(cost, a, b)


BAD_OPTIONS: tuple[dict[str, Any], ...] = (
    {"solver": "simplex"}, {"reg": 1.0, "eta": 1.0}, {"reg": 0.0}, {"reg": -1.0}, {"eta": 0.0}, {"reg": float("nan")},
    {"solver": "exact", "reg": 1.0}, {"solver": "sns"}, {"tol": 0.0}, {"max_iter": 0, "reg": 1.0}, {"reg": 1e-11},
)  # fmt: skip


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=str)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        transport(np.eye(3), **options)


def test_exact_without_pot_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ConfigError, match=r"posttrain\[select\]"):
        transport(np.eye(3))
    assert transport(np.eye(3), reg=0.1).converged


def test_kernel_form_survives_where_the_kernel_underflows() -> None:
    cost, a, b = problem(40, 30)
    cost[3] += 0.5
    assert not np.exp(-3000 * cost)[3].any()
    found = transport(cost, a, b, solver="sinkhorn", eta=3000, tol=1e-5)
    np.testing.assert_allclose(found.plan, transport(cost, a, b, solver="sns", eta=3000).plan, atol=1e-4)


def test_annealed_is_the_published_loop() -> None:
    cost = np.random.default_rng(0).random((7, 5))
    diameter, blur = 1.7, 0.01

    def soft(c: np.ndarray, eps: float, potential: np.ndarray) -> np.ndarray:
        return np.array(
            [-eps * np.log(np.mean(np.exp((potential - row - (potential - row).max()) / eps))) - (potential - row).max() for row in c]
        )

    steps, eps = [diameter**2], diameter**2
    while eps > blur**2 * (1 + 1e-9):
        steps.append(eps)
        eps /= 4
    steps.append(blur**2)
    f, g = soft(cost, steps[0], np.zeros(5)), soft(cost.T, steps[0], np.zeros(7))
    for eps in steps:
        f, g = (f + soft(cost, eps, g)) / 2, (g + soft(cost.T, eps, f)) / 2
    f, g = soft(cost, eps, g), soft(cost.T, eps, f)
    value, ours_f, ours_g = sinkhorn.annealed(cost, diameter, blur)
    np.testing.assert_allclose(ours_f, f, atol=1e-12)
    np.testing.assert_allclose(ours_g, g, atol=1e-12)
    assert value == pytest.approx(f.mean() + g.mean())


@fast
def _exp_of(values: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(values)):
        out[i] = exp(values[i])


def test_exp_is_right_to_the_last_bits() -> None:
    values = np.concatenate([np.linspace(-650, 709, 100_003), np.linspace(-1, 1, 10_001), [0.0, -1e-300, -5e3, -1e308]])
    out = np.empty_like(values)
    _exp_of(values, out)
    wanted = np.exp(np.maximum(values, -650).astype(np.longdouble))
    assert float(np.abs(out / wanted - 1).max()) < 4e-16

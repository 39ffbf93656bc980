"""Exact transport over a shortlist of pairs against the whole problem, by linear programming and by POT."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linprog

from data_pipelines import ot_shortlist
from data_pipelines.ot import transport
from data_pipelines.ot_shortlist import KEEP, SMALLEST, exact
from posttrain.errors import DataError


def clouds(n: int, m: int, seed: int = 0, dim: int = 6) -> np.ndarray:
    """Distances between two samples in clusters."""
    rng = np.random.default_rng(seed)
    centres = 2 * rng.standard_normal((5, dim))
    x, y = (centres[rng.integers(0, most, k)] + rng.standard_normal((k, dim)) for k, most in ((n, 5), (m, 3)))
    return np.sqrt(((x[:, None] - y[None]) ** 2).sum(2))


def repeated(n: int, m: int, seed: int = 0) -> np.ndarray:
    """Many rows and columns are copies of one another."""
    cost = clouds(n, m, seed)
    rng = np.random.default_rng(seed)
    return cost[rng.integers(0, n // 8, n)][:, rng.integers(0, m // 8, m)]


CASES = {
    "square": clouds(120, 120),
    "wide": clouds(40, 300),
    "tall": clouds(400, 30),
    "no common divisor": clouds(97, 101),
    "copies": repeated(150, 120),
    "integers": np.random.default_rng(1).integers(0, 3, (90, 110)).astype(float),
    "all equal": np.full((80, 70), 2.5),
    "all zero": np.zeros((80, 70)),
    "negative": clouds(90, 80) - 7,
    "huge": 1e12 * clouds(90, 80),
    "tiny": 1e-12 * clouds(90, 80),
    "one far row": np.vstack([clouds(99, 80), np.full((1, 80), 1e6)]),
    "dimension one": np.abs(np.linspace(0, 1, 130)[:, None] - np.linspace(0.2, 1.5, 90)[None]),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_optimum_and_the_prices_prove_it(name: str) -> None:
    cost = CASES[name]
    assert cost.size >= SMALLEST
    assert min(cost.shape) > max(KEEP)
    found, whole = exact(cost), transport(cost, form="none")
    scale = np.abs(cost).max() or 1.0
    assert abs(found.value - whole.value) <= 2e-9 * scale
    assert (found.f[:, None] + found.g[None] <= cost + 1e-9 * scale).all()
    assert abs(found.f.mean() + found.g.mean() - found.value) <= 2e-9 * scale
    assert abs(found.f.mean() - found.g.mean()) <= 1e-9 * scale


def test_it_is_the_linear_program() -> None:
    cost = clouds(70, 60, seed=3)
    n, m = cost.shape
    equal = np.vstack([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    best = linprog(cost.ravel(), A_eq=equal, b_eq=np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)]), method="highs").fun
    assert exact(cost).value == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("prices", ["good", "random", "absurd"])
def test_any_prices_will_do_to_begin_with(prices: str) -> None:
    cost = clouds(150, 110, seed=5)
    best = transport(cost, form="none")
    rng = np.random.default_rng(0)
    g = {"good": best.g, "random": rng.standard_normal(110), "absurd": np.where(np.arange(110) % 2, 1e9, -1e9)}[prices]
    assert exact(cost, g).value == pytest.approx(best.value, abs=1e-8)


def test_a_growing_set_begins_with_the_prices_before() -> None:
    cost, g = clouds(400, 120, seed=7), None
    for rows in (60, 130, 260, 400):
        found = exact(cost[:rows], g)
        assert found.value == pytest.approx(transport(cost[:rows], form="none").value, abs=1e-8)
        g = found.g


def test_the_whole_problem_is_solved_where_the_shortlist_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = clouds(90, 80, seed=9)
    wanted = transport(cost, form="none")
    monkeypatch.setattr(ot_shortlist, "ROUNDS", 0)
    assert exact(cost).value == wanted.value
    monkeypatch.setattr(ot_shortlist, "ROUNDS", 8)
    monkeypatch.setattr(ot_shortlist, "_solved", lambda *_: None)
    assert exact(cost).value == wanted.value


def test_far_fewer_pairs_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: the shortlist ends without the whole problem."""

    def refuse(_: np.ndarray) -> None:
        raise AssertionError("the whole problem was solved")

    monkeypatch.setattr(ot_shortlist, "_whole", refuse)
    for name in ("square", "wide", "tall", "copies", "one far row"):
        assert exact(CASES[name]).value > 0


def test_small_problems_are_solved_whole() -> None:
    cost = clouds(9, 7)
    assert exact(cost).value == transport(cost, form="none").value


def test_costs_that_are_not_finite_are_refused() -> None:
    cost = clouds(90, 80)
    cost[3, 4] = np.nan
    with pytest.raises(DataError, match=r"cost\[3, 4\]"):
        exact(cost)

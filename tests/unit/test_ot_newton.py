"""Sinkhorn-Newton-Sparse: against the paper taken literally, and on problems where that fails."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.sparse import bmat, csr_array, diags_array
from scipy.sparse.linalg import cg
from sklearn.datasets import load_digits

from data_pipelines.ot import transport
from data_pipelines.sinkhorn import Problem
from data_pipelines.sinkhorn_newton import newton_sparse


def text_like(n: int, m: int, d: int = 64, seed: int = 0) -> np.ndarray:
    """sqrt(2 - 2 cos) between unit vectors: most near sqrt(2), some close pairs."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((40, d))
    points = centres[rng.integers(0, 40, n + m)] * rng.random((n + m, 1)) + rng.standard_normal((n + m, d))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    return np.sqrt(np.maximum(2 - 2 * points[:n] @ points[n:].T, 0))


def digit_images(p: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two images of 24 x 24 pixels as masses; the cost is the L1 distance of pixels (the plan is not unique) or the squared L2."""
    images = [np.kron(image, np.ones((3, 3))).ravel() for image in load_digits().images[:2]]
    a, b = ((image + 0.01 * image.max()) / (image + 0.01 * image.max()).sum() for image in images)
    grid = np.stack(np.meshgrid(np.arange(24), np.arange(24), indexing="ij"), -1).reshape(-1, 2) / 23
    cost = (np.abs(grid[:, None] - grid[None]) ** p).sum(-1)
    return cost / cost.max(), a, b


def literal(
    cost: np.ndarray, a: np.ndarray, b: np.ndarray, eta: float, n1: int, n2: int, share: float, tol: float
) -> tuple[np.ndarray, int]:
    """Algorithm 1 of Tang et al.: N1 Sinkhorn steps, then Newton steps on the Hessian sparsified to its largest entries."""
    n, m = cost.shape
    x, y = np.zeros(n), np.zeros(m)

    def plan(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.exp(np.minimum(eta * (x[:, None] + y - cost) - 1, 700))

    def dual(x: np.ndarray, y: np.ndarray) -> float:
        return float(-plan(x, y).sum() / eta + a @ x + b @ y)

    for _ in range(n1):
        x = x + (np.log(a) - np.log(plan(x, y).sum(1))) / eta
        y = y + (np.log(b) - np.log(plan(x, y).sum(0))) / eta
    for step in range(n2):
        p = plan(x, y)
        gradient = np.concatenate([a - p.sum(1), b - p.sum(0)])
        if np.abs(gradient).sum() <= tol:
            return p, step
        bound = np.partition(p.ravel(), -int(np.ceil(share * n * m)))[-int(np.ceil(share * n * m))]
        block = csr_array(np.where(p >= bound, p, 0))
        hessian = eta * bmat([[diags_array(p.sum(1)), block], [block.T, diags_array(p.sum(0))]], format="csr")
        jacobi = diags_array(1 / hessian.diagonal())
        z, _ = cg(hessian, gradient, rtol=1e-10, maxiter=5000, M=jacobi)
        length, before, slope = 1.0, dual(x, y), gradient @ z
        while length > 1e-9 and dual(x + length * z[:n], y + length * z[n:]) < before + 1e-4 * length * slope:
            length /= 2
        x, y = x + length * z[:n], y + length * z[n:]
    return plan(x, y), n2


@pytest.mark.parametrize(("eta", "share"), [(20.0, 0.5), (60.0, 0.3), (200.0, 0.2)])
def test_agrees_with_the_literal_algorithm_where_that_converges(eta: float, share: float) -> None:
    rng = np.random.default_rng(0)
    cost, a, b = rng.random((40, 30)), rng.dirichlet(np.full(40, 5.0)), rng.dirichlet(np.full(30, 5.0))
    wanted, steps = literal(cost, a, b, eta, 40, 200, share, 1e-11)
    assert steps < 200
    found = transport(cost, a, b, solver="sns", eta=eta, tol=1e-11)
    np.testing.assert_allclose(found.plan, wanted, atol=1e-11)
    assert found.newton <= steps + 5


def uniform(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return cost, np.full(cost.shape[0], 1 / cost.shape[0]), np.full(cost.shape[1], 1 / cost.shape[1])


PROBLEMS: dict[str, Any] = {
    "text-20": lambda: (*uniform(text_like(600, 400)), 20),
    "text-100": lambda: (*uniform(text_like(600, 400)), 100),
    "text-1000": lambda: (*uniform(text_like(600, 400)), 1000),
    "assignment-1200": lambda: (*uniform(np.random.default_rng(0).random((500, 500))), 1200),
    "digits-l1-1200": lambda: (*digit_images(1), 1200),
    "digits-l2-1200": lambda: (*digit_images(2), 1200),
    "wide-2000": lambda: (*uniform(text_like(100, 700)), 2000),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_converges_within_forty_newton_steps(name: str) -> None:
    cost, a, b, eta = PROBLEMS[name]()
    found = transport(cost, a, b, solver="sns", eta=eta)
    measured = np.abs(found.plan.sum(1) - a).sum() + np.abs(found.plan.sum(0) - b).sum()
    assert np.isfinite(found.plan).all() and (found.plan >= 0).all()
    assert measured == pytest.approx(found.marginal_error, rel=1e-3, abs=1e-13) and measured <= 1e-9
    assert found.newton <= 40
    exact = transport(cost, a, b, form="none").value
    assert exact <= found.value + 1e-8 and found.value <= exact + np.log(min(cost.shape)) / eta


@pytest.mark.parametrize("linear", ["dense", "sparse", "cg"])
def test_every_way_to_solve_newtons_systems(linear: Any) -> None:
    cost, a, b = uniform(text_like(120, 80))
    found = newton_sparse(Problem(cost - cost.min(), a, b), 500.0, 1e-11, linear=linear)
    np.testing.assert_allclose(found.plan, transport(cost, a, b, solver="sns", eta=500, tol=1e-11).plan, atol=1e-11)


def test_masses_over_many_orders_of_magnitude() -> None:
    rng = np.random.default_rng(0)
    points, others = rng.normal(size=(150, 2)), rng.normal(size=(90, 2)) + 2
    cost = ((points[:, None] - others[None]) ** 2).sum(-1)
    a, b = rng.dirichlet(np.full(150, 0.05)) + 1e-14, rng.dirichlet(np.full(90, 0.05)) + 1e-14
    a, b = a / a.sum(), b / b.sum()
    for eta in (10.0, 100.0, 1000.0):
        found = transport(cost, a, b, solver="sns", eta=eta)
        assert found.marginal_error <= 1e-9
        assert found.value >= transport(cost, a, b, form="none").value - 1e-8


def test_two_far_apart_clusters() -> None:
    """Blocks of the plan joined by nothing: the Hessian is singular to working precision beyond its known null vector."""
    rng = np.random.default_rng(0)
    one, two = np.sort(rng.random(60)), np.sort(rng.random(60))
    one[30:] += 50
    two[30:] += 50
    cost = np.abs(one[:, None] - two[None])
    found = transport(cost, solver="sns", eta=300)
    assert found.marginal_error <= 1e-9 and found.plan[:30, 30:].max() < 1e-20
    assert found.value == pytest.approx(np.abs(one - two).mean(), abs=0.02)

"""Whitening against the eigendecomposition in float64, moments in any cut, and rows that do not see each other."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipelines import whitening
from data_pipelines.whitening import added, covariance, effective_rank, moments, whiten, whitener


def features(n: int = 500, d: int = 24, scale: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(0)
    spread = 10.0 ** np.linspace(-3, 1, d)
    return (scale * (rng.standard_normal((n, d)) * spread @ rng.standard_normal((d, d)) + 3)).astype(np.float32)


def fitted(x: np.ndarray, eps: float = 0.0, relative: bool = True) -> tuple[np.ndarray, np.ndarray]:
    mean, s = covariance(moments([x]))
    return mean, whitener(s, eps, relative)


def test_the_moments_are_those_of_numpy():
    x = features()
    mean, s = covariance(moments([x[:3], x[3:]]))
    exact = x.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(s, np.cov(exact.T, bias=True), rtol=0, atol=1e-11 * np.abs(s).max())


def test_whitened_covariance_is_the_identity():
    x = features()
    mean, w = fitted(x)
    y = (x - mean) @ w
    np.testing.assert_allclose(np.cov(y.T, bias=True), np.eye(24), atol=1e-6)
    assert (np.tril(w, -1) == 0).all()


@pytest.mark.parametrize(("eps", "relative"), [(1e-3, True), (1e-5, False)])
def test_distances_equal_those_of_the_eigendecomposition(eps, relative):
    x = features()
    exact = x.astype(np.float64) - x.astype(np.float64).mean(0)
    s = exact.T @ exact / len(x)
    values, vectors = np.linalg.eigh(s + (eps * np.trace(s) / 24 if relative else eps) * np.eye(24))
    y = exact @ vectors / np.sqrt(values)
    unit = y / np.linalg.norm(y, axis=1, keepdims=True)
    z = whiten(x, *fitted(x, eps, relative)).astype(np.float64)
    assert z.dtype == np.float64 and np.abs(z @ z.T - unit @ unit.T).max() < 1e-6


def test_a_relative_ridge_does_not_see_the_scale():
    small, large = features(scale=1e-6), features(scale=1e4)
    found = [whiten(x, *fitted(x, 1e-2)) for x in (small, large)]
    np.testing.assert_allclose(*found, atol=1e-5)
    absolute = [whiten(x, *fitted(x, 1e-2, False)) for x in (small, large)]
    assert np.abs(absolute[0] - absolute[1]).max() > 0.1


@pytest.mark.parametrize("cuts", [[250], [1, 2, 3], [100, 100, 499]])
def test_shards_add_up(cuts):
    x = features()
    parts = [moments([piece]) for piece in np.split(x, cuts)]
    together, whole = added(parts), moments([x])
    assert together["n"] == whole["n"] == 500
    np.testing.assert_allclose(together["square"], whole["square"], rtol=1e-12)
    z = [whiten(x, mean, whitener(s, 1e-3)) for mean, s in (covariance(together), covariance(whole))]
    np.testing.assert_allclose(z[0], z[1], rtol=0, atol=1e-6)


def test_batches_of_any_size_give_the_same_moments():
    x = features()
    whole = moments([x])
    for size in (1, 7, 499):
        split = moments(x[i : i + size] for i in range(0, 500, size))
        assert all(np.array_equal(split[name], whole[name]) for name in whole)


@pytest.mark.parametrize("d", [5, 24, 130])
def test_a_row_has_the_same_bits_in_every_batch(d):
    x = features(300, d)
    mean, w = fitted(x, 1e-3)
    together = whiten(x, mean, w)
    order = np.random.default_rng(1).permutation(300)
    assert np.array_equal(whiten(x[order], mean, w), together[order])
    for i in range(0, 300, 37):
        assert np.array_equal(whiten(x[i : i + 1], mean, w)[0], together[i])


def test_rows_without_features_stay_out():
    x = features()
    x[[3, 77]] = 0
    found, clean = moments([x]), moments([np.delete(x, [3, 77], 0)])
    assert found["zero"] == 2 and found["n"] == 498
    np.testing.assert_allclose(found["sum"], clean["sum"])
    z = whiten(x, *fitted(x, 1e-3))
    assert not z[[3, 77]].any()
    np.testing.assert_allclose(np.delete(np.linalg.norm(z, axis=1), [3, 77]), 1, atol=1e-6)


def test_without_whitening_features_are_centred_and_of_unit_length():
    x = features()
    z = whiten(x, x.astype(np.float64).mean(0), None)
    y = x - x.astype(np.float64).mean(0)
    np.testing.assert_allclose(z, y / np.linalg.norm(y, axis=1, keepdims=True), atol=1e-6)


def test_a_covariance_that_is_not_definite_is_refused():
    with pytest.raises(np.linalg.LinAlgError):
        whitener(np.diag([1.0, -1.0]), 0.0)


def test_effective_rank():
    assert effective_rank(np.eye(7)) == pytest.approx(7)
    assert effective_rank(np.diag([1.0, 0, 0])) == pytest.approx(1)
    assert effective_rank(np.zeros((3, 3))) == 0


def test_empty_parts_change_nothing():
    x = features()
    assert all(np.array_equal(added([moments([]), moments([x])])[name], moments([x])[name]) for name in ("n", "sum", "square"))
    assert whitening.moments([])["n"] == 0

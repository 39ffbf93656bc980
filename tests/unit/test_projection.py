"""Random projections against their explicit matrix in float64, and what makes them usable: one result for every cut."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from data_pipelines import projection
from data_pipelines.projection import Projector
from posttrain.errors import NumericsError

KINDS = ["sparse", "rademacher"]


def vectors(rows: int = 3, size: int = 1000) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, size)).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "dim"), [(1000, 64), (1000, 100), (130, 257), (63, 1)])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_equals_the_explicit_matrix(kind, size, dim, device):
    projector = Projector(size, dim, kind, seed=3, checked=False)
    values = vectors(size=size)
    expected = values.astype(np.float64) @ projector.matrix().T
    sums = projector.zeros(3, device)
    if device is None:
        projector.add(sums, values, 0)
    else:
        import torch

        projector.add(sums, torch.from_numpy(values), 0)
    np.testing.assert_allclose(projector.finish(sums), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", [None, "cpu"])
def test_pieces_and_batches_give_the_same_bits(kind, device):
    import torch

    projector = Projector(1000, 96, kind)
    values = vectors(5)
    whole = projector.project(values)
    for cuts in ([0, 1, 64, 500, 1000], [0, 96, 97, 1000]):
        for rows in (slice(0, 5), slice(3, 4)):
            sums = projector.zeros(len(values[rows]), device)
            for a, b in itertools.pairwise(cuts):
                piece = np.ascontiguousarray(values[rows, a:b])
                projector.add(sums, piece if device is None else torch.from_numpy(piece), a)
            if device is None:
                assert (projector.finish(sums) == whole[rows]).all()
            else:
                np.testing.assert_allclose(projector.finish(sums), whole[rows], rtol=1e-6, atol=1e-6)


def test_a_small_chunk_on_a_device_changes_nothing(monkeypatch):
    import torch

    values = torch.from_numpy(vectors())
    found = []
    for chunk in (1 << 22, 70):
        monkeypatch.setattr(projection, "CHUNK", chunk)
        projector = Projector(1000, 64)
        sums = projector.zeros(3, "cpu")
        projector.add(sums, values, 0)
        found.append(projector.finish(sums))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_norms_and_angles_are_kept(kind):
    size, dim = 5000, 256
    projector = Projector(size, dim, kind, seed=1)
    rng = np.random.default_rng(1)
    values = rng.standard_normal((64, size)).astype(np.float32)
    values[32:] = 0.5 * values[:32] + np.sqrt(0.75) * values[32:]
    out = projector.project(values).astype(np.float64)
    ratio = (out**2).sum(1) / (values.astype(np.float64) ** 2).sum(1)
    assert abs(ratio.mean() - 1) < 5 * np.sqrt(2 / dim / 64) and ratio.std() < 2 * np.sqrt(2 / dim)
    unit = out / np.linalg.norm(out, axis=1, keepdims=True)
    assert abs((unit[:32] * unit[32:]).sum(1).mean() - 0.5) < 5 / np.sqrt(dim * 32)


def test_the_seed_and_the_kind_name_the_matrix():
    values = vectors()
    found = [Projector(1000, 64, kind, seed).project(values) for kind in KINDS for seed in (0, 1)]
    assert all(not np.array_equal(a, b) for i, a in enumerate(found) for b in found[:i])
    assert np.array_equal(found[0], Projector(1000, 64, "sparse", 0).project(values))
    assert Projector(1000, 64).matrix()[:, 17].nonzero()[0].size <= 4


def test_a_projection_that_gives_zeros_is_refused(monkeypatch):
    monkeypatch.setattr(projection, "_add_sparse", lambda *_: None)
    with pytest.raises(NumericsError, match="does not keep norms"):
        Projector(1000, 64)


def test_coordinates_beyond_the_end_are_refused():
    projector = Projector(10, 4, checked=False)
    with pytest.raises(ValueError, match="11 of 10"):
        projector.add(projector.zeros(1), vectors(1, 6), 5)

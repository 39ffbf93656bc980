"""Nearest rows against sorting everything in float64; the same lists from any batches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from data_pipelines import neighbours as nb
from data_pipelines.neighbours import Neighbours, round_robin, top_neighbours
from posttrain.errors import ConfigError, DataError


def data(n: int, t: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = rng.permutation(10 * n)[:n].astype(np.int64)
    return ids, rng.standard_normal((n, d)).astype(np.float32), rng.standard_normal((t, d)).astype(np.float32)


def by_sorting(ids: np.ndarray, rows: np.ndarray, targets: np.ndarray, limit: int) -> Neighbours:
    """All pairs in float64, one dot product at a time."""
    found_ids, found_score = [], []
    for target in targets.astype(np.float64):
        scored = []
        for row_id, row in zip(ids, rows.astype(np.float64), strict=True):
            norm = np.sqrt((row * row).sum()) * np.sqrt((target * target).sum())
            scored.append((-float((row * target).sum() / norm) if norm else 0.0, int(row_id)))
        scored.sort()
        found_ids.append([row_id for _, row_id in scored[:limit]])
        found_score.append([-score for score, _ in scored[:limit]])
    return Neighbours(np.array(found_ids), np.array(found_score))


def batches(ids: np.ndarray, rows: np.ndarray, sizes: list[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    at = 0
    for size in sizes:
        yield ids[at : at + size], rows[at : at + size]
        at += size
    yield ids[at:], rows[at:]


@pytest.mark.parametrize(
    ("n", "t", "d", "limit"), [(1, 1, 1, 1), (50, 3, 4, 7), (200, 5, 33, 20), (30, 4, 8, 30), (30, 4, 8, 100), (300, 1, 2, 299)]
)
def test_against_sorting_all_pairs(n: int, t: int, d: int, limit: int) -> None:
    ids, rows, targets = data(n, t, d)
    found, wanted = top_neighbours([(ids, rows)], targets, limit), by_sorting(ids, rows, targets, limit)
    np.testing.assert_array_equal(found.ids, wanted.ids)
    np.testing.assert_allclose(found.score, wanted.score, atol=1e-14)
    assert found.ids.shape == (t, min(n, limit)) and found.score.dtype == np.float64


def test_the_same_bits_from_any_batches_blocks_and_order(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, rows, targets = data(400, 30, 70)
    one = top_neighbours([(ids, rows)], targets, 25)
    order = np.random.default_rng(1).permutation(400)
    for sizes in ([1] * 50, [0, 399], [7, 200, 3], [26, 100]):
        other = top_neighbours(batches(ids[order], rows[order], sizes), targets, 25)
        assert np.array_equal(one.ids, other.ids) and np.array_equal(one.score, other.score)
    monkeypatch.setattr(nb, "BLOCK", 17)
    small = top_neighbours([(ids, rows)], targets, 25)
    assert np.array_equal(one.ids, small.ids) and np.array_equal(one.score, small.score)


def test_ties_go_to_the_smaller_id() -> None:
    ids = np.array([9, 4, 7, 1, 12], np.int64)
    rows = np.array([[1, 0], [1, 0], [0, 1], [1, 0], [1, 0]], np.float32)
    for order in (np.arange(5), np.arange(5)[::-1]):
        found = top_neighbours([(ids[order], rows[order])], np.array([[2.0, 0]], np.float32), 3)
        assert found.ids.tolist() == [[1, 4, 9]] and found.score.tolist() == [[1.0, 1.0, 1.0]]


def test_nearly_equal_rows_are_told_apart() -> None:
    """Cosines that differ by less than float32 can hold."""
    angles = 0.3 + np.arange(200) * 1e-6
    rows = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    ids, targets = np.random.default_rng(0).permutation(200).astype(np.int64), np.array([[1.0, 0.0]], np.float32)
    np.testing.assert_array_equal(top_neighbours([(ids, rows)], targets, 50).ids, by_sorting(ids, rows, targets, 50).ids)


def test_length_does_not_matter_and_zeros_score_zero() -> None:
    ids, rows, targets = data(40, 3, 6)
    scale = 2.0 ** np.random.default_rng(0).integers(-40, 40, (40, 1)).astype(np.float32)
    plain, scaled = (top_neighbours([(ids, x)], targets, 40) for x in (rows, rows * scale))
    assert np.array_equal(plain.ids, scaled.ids)
    np.testing.assert_allclose(plain.score, scaled.score, rtol=1e-12)
    rows[5] = 0
    found = top_neighbours([(ids, rows)], targets, 40)
    assert (found.score[found.ids == ids[5]] == 0).all()
    assert (top_neighbours([(ids, rows)], np.zeros((1, 6), np.float32), 3).score == 0).all()


def test_no_rows_give_empty_lists() -> None:
    targets = np.ones((2, 3), np.float32)
    assert top_neighbours([], targets, 4).ids.shape == (2, 0)
    empty = (np.zeros(0, np.int64), np.zeros((0, 3), np.float32))
    found = top_neighbours([empty, empty], targets, 4)
    assert found.score.shape == (2, 0) and len(round_robin(found)[0]) == 0


def test_bad_inputs() -> None:
    ids, rows, targets = data(5, 2, 3)
    with pytest.raises(ConfigError):
        top_neighbours([(ids, rows)], targets, 0)
    broken = rows.copy()
    broken[2, 1] = np.nan
    cases = [
        (ids, rows[:, :2], targets),
        (ids[:4], rows, targets),
        (ids, broken, targets),
        (ids, rows, targets[:0]),
        (ids, rows, targets[0]),
    ]
    for some_ids, some_rows, some_targets in cases:
        with pytest.raises(DataError):
            top_neighbours([(some_ids, some_rows)], some_targets, 2)


def by_going_round(lists: Neighbours) -> list[tuple[int, int]]:
    taken: list[tuple[int, int]] = []
    for i in range(lists.ids.shape[1]):
        asked: dict[int, float] = {}
        for row_id, score in zip(lists.ids[:, i].tolist(), lists.score[:, i].tolist(), strict=True):
            if row_id not in dict(taken):
                asked[row_id] = max(score, asked.get(row_id, -9.0))
        taken += [(row_id, i) for row_id in sorted(asked, key=lambda r: (-asked[r], r))]
    return taken


@pytest.mark.parametrize("seed", range(4))
def test_round_robin_against_plain_loops(seed: int) -> None:
    ids, rows, targets = data(60, 9, 3, seed)
    lists = top_neighbours([(ids, np.round(rows, 0))], np.round(targets, 0), 12)
    found, layer = round_robin(lists)
    assert list(zip(found.tolist(), layer.tolist(), strict=True)) == by_going_round(lists)
    assert len(set(found.tolist())) == len(found)


def test_round_robin_stops_after_the_layer_that_is_enough() -> None:
    ids, rows, targets = data(100, 7, 5)
    lists = top_neighbours([(ids, rows)], targets, 20)
    whole, layers = round_robin(lists)
    some, some_layers = round_robin(lists, stop=15)
    assert len(some) >= 15 and np.array_equal(some, whole[: len(some)]) and np.array_equal(some_layers, layers[: len(some)])
    assert layers[len(some)] == some_layers[-1] + 1 and (some_layers < some_layers[-1]).sum() < 15

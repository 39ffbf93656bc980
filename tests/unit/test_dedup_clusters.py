"""Clusters of duplicates: union-find, groups of equal keys, and verified clusters against graph searches in plain Python."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.clusters import Members, equal_groups, flatten, join_bands, resolve, unite


def components(nodes: list[int], edges: list[tuple[int, int]]) -> dict[int, int]:
    """Smallest node of each node's component."""
    label = {node: node for node in nodes}
    changed = True
    while changed:
        changed = False
        for a, b in edges:
            low = min(label[a], label[b])
            changed |= label[a] != low or label[b] != low
            label[a] = label[b] = low
    return label


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 25).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1))))))
def test_union_find_gives_the_components(case):
    size, edges = case
    parent = np.arange(size)
    pairs = np.array(edges, np.int64).reshape(-1, 2)
    for part in np.array_split(pairs, 2):
        unite(parent, np.ascontiguousarray(part[:, 0]), np.ascontiguousarray(part[:, 1]))
    flatten(parent)
    assert dict(enumerate(parent.tolist())) == components(list(range(size)), edges)


def sweeps(columns: np.ndarray, cuts: list[int]):
    """A table in parts, as `KeysOf`."""
    return lambda line: ((columns[line, a:b], np.arange(a, b)) for a, b in pairwise(cuts))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.sampled_from([1, 3, 10, 1000]))
def test_bands_join_rows_whatever_the_window(seed, rows, window):
    draw = np.random.default_rng(seed)
    keys = draw.integers(0, max(2, rows), (3, rows)).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    edges = [(a, b) for line in keys.tolist() for a in range(rows) for b in range(a) if line[a] == line[b]]
    expected = components(list(range(rows)), edges)
    cuts = [0, *sorted(draw.integers(0, rows + 1, 2).tolist()), rows]
    assert dict(enumerate(join_bands(sweeps(keys, cuts), 3, rows, window).tolist())) == expected


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 40), st.sampled_from([1, 3, 1000]))
def test_equal_keys_are_grouped_whatever_the_window(seed, rows, window):
    draw = np.random.default_rng(seed)
    halves = draw.integers(0, 4, (2, rows)).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    found, group = equal_groups(sweeps(halves, [0, rows // 2, rows]), rows, window)
    groups = {frozenset(found[group == g].tolist()) for g in np.unique(group)}
    own = list(map(tuple, halves.T.tolist()))
    expected = {frozenset(i for i, key in enumerate(own) if key == one) for one in own}
    assert groups == {rows for rows in expected if len(rows) > 1} and len(found) == len(set(found.tolist()))


def members(sets: list[set[int]], bands: list[list[int]], known: int, sizes: list[int]) -> Members:
    keys = [np.array(sorted(one), np.uint64) for one in sets]
    end = np.cumsum([len(one) for one in keys])
    first = np.cumsum([0, *sizes])
    against = np.zeros(len(sets), bool)
    against[:known] = True
    return Members(first, against, np.array(bands, np.uint64), np.concatenate(keys), end)


def alike(a: set[int], b: set[int], least: float | None) -> bool:
    return least is None or (bool(a and b) and len(a & b) / len(a | b) >= least)


def slow_resolve(sets, bands, known, least, most) -> tuple[dict[int, int], dict[int, int]]:
    """(kept, root) of one cluster whose rows are 0, 1, ... in the order of rank, by all pairs."""
    count = len(sets)
    shares = [[any(line[a] == line[b] for line in bands) and alike(sets[a], sets[b], least) for b in range(count)] for a in range(count)]
    kept = {}
    for row in range(known, count):
        hits = [(min(i for i, line in enumerate(bands) if line[row] == line[k]), k) for k in range(known) if shares[row][k]]
        if hits:
            kept[row] = min(hits)[1]
    rest = [row for row in range(known, count) if row not in kept]
    root = dict(kept)
    if count <= most:
        label = components(rest, [(a, b) for a in rest for b in rest if shares[a][b]])
        kept.update(label)
        root.update(label)
    else:
        leaders: list[int] = []
        for row in rest:
            root[row] = rest[0]
            hits = [(min(i for i, line in enumerate(bands) if line[row] == line[k]), k) for k in leaders if shares[row][k]]
            kept[row] = min(hits)[1] if hits else row
            leaders += [] if hits else [row]
    return kept, root


@pytest.mark.parametrize("most", [1, 5, 1000])
@pytest.mark.parametrize("known", [0, 3])
@pytest.mark.parametrize("least", [0.4, 0.7, None])
@pytest.mark.parametrize("seed", range(6))
def test_clusters_equal_those_of_all_pairs(seed, least, known, most):
    draw = random.Random(seed)
    count = draw.randint(12, 40)
    base = [set(draw.sample(range(60), 12)) for _ in range(4)]
    sets = [set(draw.sample(sorted(draw.choice(base)), draw.randint(8, 12))) | {draw.randrange(60)} for _ in range(count)]
    bands = [[draw.randrange(3) for _ in range(count)] for _ in range(4)]
    found = resolve(members(sets, bands, known, [count]), least, most)
    kept, root = slow_resolve(sets, bands, known, least, most)
    rows = range(known, count)
    assert {row: int(found.kept[row]) for row in rows} == kept
    assert {row: int(found.root[row]) for row in rows} == root
    assert found.kept[:known].tolist() == list(range(known)) and found.untried == 0
    for row in rows:
        other = kept[row]
        expected = len(sets[row] & sets[other]) / len(sets[row] | sets[other])
        assert np.isnan(found.similarity[row]) if other == row or least is None else found.similarity[row] == expected


def test_a_chain_is_one_cluster_unless_the_cluster_is_large():
    sets = [set(range(i, i + 10)) for i in range(6)]
    bands = [[7] * 6]
    whole = resolve(members(sets, bands, 0, [6]), 0.8, 6)
    assert whole.kept.tolist() == [0] * 6 and whole.similarity[5] == 5 / 15
    large = resolve(members(sets, bands, 0, [6]), 0.8, 5)
    assert large.kept.tolist() == [0, 0, 2, 2, 4, 4] and large.root.tolist() == [0] * 6
    assert np.nanmin(large.similarity) >= 0.8


def test_large_clusters_of_copies_take_one_comparison_a_row():
    sets = [{1, 2, 3, 4}] * 300
    bands = [[1] * 300, [2] * 300]
    for most in (10, 1000):
        found = resolve(members(sets, bands, 0, [300]), 0.9, most)
        assert found.tried == 299 and found.kept.tolist() == [0] * 300


def test_strangers_in_a_large_cluster_are_counted_and_not_compared_for_ever():
    sets = [{i} for i in range(50)]
    found = resolve(members(sets, [[1] * 50], 0, [50]), 0.5, 10, most=4)
    assert found.kept.tolist() == list(range(50)) and found.untried == 46 and found.tried == 4 * 46 + 6


def test_clusters_are_decided_one_by_one():
    draw = random.Random(1)
    sets = [set(draw.sample(range(20), 8)) for _ in range(30)]
    bands = [[100 * (i // 10) + draw.randrange(2) for i in range(30)] for _ in range(3)]
    together = resolve(members(sets, bands, 0, [10, 10, 10]), 0.3, 10)
    for start in (0, 10, 20):
        alone = resolve(members(sets[start : start + 10], [line[start : start + 10] for line in bands], 0, [10]), 0.3, 10)
        assert (together.kept[start : start + 10] - start == alone.kept).all()


def test_no_rows():
    assert (
        len(
            resolve(
                Members(np.array([0]), np.zeros(0, bool), np.zeros((3, 0), np.uint64), np.zeros(0, np.uint64), np.zeros(0, np.int64)),
                0.7,
                5,
            ).kept
        )
        == 0
    )

"""TAROT's rules against plain loops with transport by linear programming."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from scipy.optimize import linprog

from data_pipelines import tarot_rules
from data_pipelines.neighbours import Neighbours, top_neighbours
from data_pipelines.tarot_rules import Gathered, ListsTooShort, Picked, Space, distance, fixed, folds_of, otm, repeats, with_lists
from posttrain.errors import ConfigError, DataError


def data(n: int, t: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows and targets in clusters, of unit length."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((5, d))
    rows = centres[rng.integers(0, 5, n)] + 0.5 * rng.standard_normal((n, d))
    targets = centres[rng.integers(0, 3, t)] + 0.5 * rng.standard_normal((t, d))
    return tuple((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (rows, targets))


def setting(n: int, t: int, d: int, seed: int = 0, limit: int = 1000) -> tuple[np.ndarray, np.ndarray, Neighbours, Space]:
    rows, targets = data(n, t, d, seed)
    lists = top_neighbours([(np.arange(n), rows)], targets, limit)
    return rows, targets, lists, Space(targets, lambda ids: rows[ids])


def w1(rows: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """Transport cost under d_w by linear programming, and what more mass at each row would cost."""
    x, y = rows.astype(np.float64), targets.astype(np.float64)
    cost = np.array([[np.sqrt(((u / np.linalg.norm(u) - v / np.linalg.norm(v)) ** 2).sum()) for v in y] for u in x])
    n, m = cost.shape
    equal = np.vstack([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    found = linprog(cost.ravel(), A_eq=equal, b_eq=np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)]), method="highs")
    return float(found.fun), found.eqlin.marginals[:n]


def layers_of(lists: Neighbours) -> list[list[int]]:
    seen: set[int] = set()
    out = []
    for i in range(lists.ids.shape[1]):
        layer = sorted(set(lists.ids[:, i].tolist()) - seen)
        seen |= set(layer)
        out.append(layer)
    return out


def test_distance_is_that_of_unit_vectors() -> None:
    rows, targets = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (y.astype(np.float64) for y in data(9, 7, 4)))
    wanted = np.linalg.norm(rows[:, None] - targets[None], axis=2)
    np.testing.assert_allclose(distance(rows, targets), wanted, atol=1e-7)
    assert (distance(rows, rows).diagonal() < 1e-3).all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 7, 20, 33])
def test_fixed_takes_whole_layers_then_the_potentials_asked_for(seed: int, k: int) -> None:
    _, _, lists, space = setting(60, 11, 5, seed)
    picked = fixed(lists, space, k, last="largest")
    chosen: list[int] = []
    for layer in layers_of(lists):
        if len(chosen) + len(layer) > k:
            break
        chosen += layer
    last = picked.ids[len(chosen) :]
    assert sorted(picked.ids[: len(chosen)].tolist()) == sorted(chosen) and len(picked.ids) == len(set(picked.ids.tolist())) == k
    assert set(last.tolist()) <= set(layer)
    if len(last):
        _, f = space.measure(np.array(layer))
        potential = dict(zip(layer, f.tolist(), strict=True))
        rest = [potential[i] for i in layer if i not in last]
        assert min(potential[i] for i in last.tolist()) >= max(rest) - 1e-12
        assert [potential[i] for i in last.tolist()] == sorted((potential[i] for i in last.tolist()), reverse=True)
        small = fixed(lists, space, k, last="smallest").ids[len(chosen) :]
        assert max(potential[i] for i in small.tolist()) <= min(potential[i] for i in layer if i not in small) + 1e-12


def test_measure_is_the_linear_program() -> None:
    rows, targets, _, space = setting(14, 9, 4)
    value, f = space.measure(np.arange(14))
    wanted, _ = w1(rows, targets)
    assert value == pytest.approx(wanted, abs=1e-7)
    cost = distance(space.rows(np.arange(14)), space.targets)
    g = (cost - f[:, None]).min(0)
    assert f.mean() + g.mean() == pytest.approx(wanted, abs=1e-7)
    some, _ = space.measure(np.arange(5), np.array([1, 3, 4]))
    assert some == pytest.approx(w1(rows[:5], targets[[1, 3, 4]])[0], abs=1e-7)


@pytest.mark.parametrize("solver", ["ours", "geomloss"])
def test_a_potential_is_what_mass_costs(solver: str) -> None:
    """d cost / d a_j - d cost / d a_i = f_j - f_i, by POT; so the largest potentials, which the authors' code keeps, are the dearest
    rows, and this is no matter of GeomLoss's sign, whose potentials of the rows rise with POT's."""
    import ot

    _, _, _, space = setting(40, 23, 5, seed=3)
    asked = space if solver == "ours" else Space(space.targets, space.rows, compat="repo")
    f = asked.measure(np.arange(40))[1]
    cost, step = distance(space.rows(np.arange(40)), space.targets), 1e-4
    base, equal = np.full(40, 1 / 40), np.full(23, 1 / 23)
    slopes = []
    for i in range(1, 40):
        shifted = base.copy()
        shifted[i], shifted[0] = shifted[i] + step, shifted[0] - step
        up = ot.emd2(shifted, equal, cost)
        shifted = base.copy()
        shifted[i], shifted[0] = shifted[i] - step, shifted[0] + step
        slopes.append((ot.emd2(shifted, equal, cost) - up) / (-2 * step))
    wanted, found = np.array(slopes), f[1:] - f[0]
    assert np.corrcoef(wanted, found)[0, 1] > 0.9
    if solver == "ours":
        np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_the_smallest_potentials_give_the_nearer_pick() -> None:
    costs = []
    for seed in range(6):
        _, _, lists, space = setting(300, 30, 6, seed)
        costs.append([space.measure(fixed(lists, space, 45, last=last).ids)[0] for last in ("smallest", "largest")])
    smallest, largest = np.array(costs).T
    assert (smallest < largest).sum() >= 5 and smallest.mean() < 0.97 * largest.mean()


def test_distances_kept_ahead_are_those_of_single_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, lists, space = setting(60, 11, 5)
    plain = otm(lists, space, folds=4)
    monkeypatch.setattr(tarot_rules, "AHEAD", 1)
    _, _, lists, other = setting(60, 11, 5)
    few = otm(lists, other, folds=4)
    monkeypatch.setattr(tarot_rules, "KEPT", 0)
    _, _, lists, none = setting(60, 11, 5)
    assert not none.keep(np.arange(3))
    without = otm(lists, none, folds=4)
    for found in (few, without):
        assert found.ids.tolist() == plain.ids.tolist()
        np.testing.assert_allclose(found.weight, plain.weight, atol=1e-9)


def test_weights_are_the_potentials_of_the_whole_pick() -> None:
    _, _, lists, space = setting(60, 11, 5)
    picked = fixed(lists, space, 25)
    np.testing.assert_array_equal(picked.weight, space.measure(picked.ids)[1])


def by_loops(rows: np.ndarray, targets: np.ndarray, lists: Neighbours, folds: int, seed: int, patience: int) -> set[int]:
    """Algorithm 2, one layer at a time, all from the start."""
    union: set[int] = set()
    for part in folds_of(len(targets), folds, seed):
        others = [t for t in range(len(targets)) if t not in part]
        best, kept, failed, before = np.inf, set[int](), 0, set[int]()
        for k in range(1, lists.ids.shape[1] + 1):
            chosen = {int(lists.ids[t, i]) for t in part for i in range(k) if lists.score[t, i] > 0}
            if chosen == before:
                continue
            before = chosen
            cost, _ = w1(rows[sorted(chosen)], targets[others])
            if cost < best:
                best, kept, failed = cost, chosen, 0
            else:
                failed += 1
            if failed == patience:
                break
        union |= kept
    return union


@pytest.mark.parametrize(("seed", "folds", "patience"), [(0, 3, 1), (1, 4, 1), (2, 3, 3), (3, 2, 2)])
def test_otm_keeps_the_best_layers_of_each_fold(seed: int, folds: int, patience: int) -> None:
    rows, targets, lists, space = setting(50, 12, 5, seed, limit=15)
    picked = otm(lists, space, folds=folds, seed=7, patience=patience)
    assert set(picked.ids.tolist()) == by_loops(rows, targets, lists, folds, 7, patience)
    value, weight = space.measure(picked.ids)
    assert picked.facts["cost"] == pytest.approx(value) and np.array_equal(picked.weight, weight)
    assert len(picked.facts["fold_rows"]) == folds == len(picked.facts["fold_costs"])


def test_otm_order_is_that_of_the_round_robin() -> None:
    from data_pipelines.neighbours import round_robin

    _, _, lists, space = setting(50, 12, 5)
    picked = otm(lists, space, folds=3)
    order = round_robin(lists)[0].tolist()
    assert [order.index(i) for i in picked.ids.tolist()] == sorted(order.index(i) for i in picked.ids.tolist())


def test_the_rules_do_not_see_the_order_of_rows() -> None:
    rows, targets = data(80, 10, 6)
    ids = np.arange(80)
    turn = np.random.default_rng(0).permutation(80)
    one = top_neighbours([(ids, rows)], targets, 40)
    other = top_neighbours([(ids[turn][:30], rows[turn][:30]), (ids[turn][30:], rows[turn][30:])], targets, 40)
    space = Space(targets, lambda wanted: rows[wanted])
    for rule in (lambda lists: fixed(lists, space, 23), lambda lists: otm(lists, space, folds=4)):
        a, b = rule(one), rule(other)
        assert np.array_equal(a.ids, b.ids) and np.array_equal(a.weight, b.weight)


def test_gathered_fetches_what_is_asked_for_in_few_sweeps() -> None:
    rows, targets, lists, plain = setting(300, 9, 5, limit=100)
    sweeps = []

    def sweep() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        sweeps.append(0)
        for at in range(0, 300, 70):
            yield np.arange(300)[at : at + 70], rows[at : at + 70]

    gathered = Gathered(sweep, lists)
    space = Space(targets, gathered)
    for rule in (lambda s: fixed(lists, s, 150), lambda s: otm(lists, s, folds=3, patience=3)):
        one, other = rule(space), rule(plain)
        assert np.array_equal(one.ids, other.ids) and np.array_equal(one.weight, other.weight)
    assert 1 <= len(sweeps) <= 5
    early = Gathered(sweep, lists)
    before = len(sweeps)
    early.reach(100)
    assert np.array_equal(early(lists.ids[0]), rows[lists.ids[0]]) and len(sweeps) == before + 1
    with pytest.raises(DataError):
        early(np.array([10**6]))
    with pytest.raises(DataError, match="not among the rows"):
        Gathered(lambda: iter([(np.arange(5), rows[:5])]), lists)(lists.ids[0])


@pytest.mark.parametrize("compat", ["", "repo"])
def test_short_lists_that_grow_give_the_pick_of_long_ones(compat: str) -> None:
    rows, targets = data(120, 9, 5)
    space, made = Space(targets, lambda ids: rows[ids], compat=compat), []

    def make(limit: int) -> Neighbours:
        made.append(limit)
        return top_neighbours([(np.arange(120), rows)], targets, limit)

    rules = [lambda lists, whole, k=k: fixed(lists, space, k, whole=whole) for k in (3, 40, 80)]
    rules.append(lambda lists, whole: otm(lists, space, folds=3, patience=2, whole=whole))
    for rule in rules:
        one, other = with_lists(make, rule, 2, 60), rule(make(60), True)
        assert np.array_equal(one.ids, other.ids) and np.array_equal(one.weight, other.weight)
    assert made[0] == 2 and 8 in made and 32 in made
    with pytest.raises(ListsTooShort):
        fixed(make(2), space, 100, whole=False)
    if not compat:
        with pytest.raises(ListsTooShort):
            with_lists(make, rules[2], 2, 5)


def test_repeats_are_exact_and_follow_the_weights() -> None:
    rng = np.random.default_rng(0)
    for total in (0, 1, 17, 1000):
        weight = rng.random(23)
        found = repeats(weight, total)
        assert found.sum() == total and (found >= 0).all()
        assert (np.abs(found - weight / weight.sum() * total) < 1).all()
    assert repeats(np.array([1.0, 1.0, 1.0]), 4).tolist() == [2, 1, 1]
    assert repeats(np.array([-1.0, 3.0, 1.0]), 8).tolist() == [0, 6, 2]
    assert repeats(np.array([-1.0, -2.0]), 3).tolist() == [2, 1]
    assert repeats(np.array([1.0, 3.0]), 10, targets=2).tolist() == [1, 3, 3, 3]
    assert repeats(np.array([0.0, 3.0, 1.0]), 7, at_least=1).tolist() == [1, 4, 2]
    assert repeats(np.zeros(0), 0).tolist() == []


def test_bad_inputs() -> None:
    rows, targets, lists, space = setting(20, 4, 3, limit=2)
    with pytest.raises(DataError, match="keep more neighbours"):
        fixed(lists, space, 19)
    with pytest.raises(DataError, match="at least two targets"):
        otm(Neighbours(lists.ids[:1], lists.score[:1]), Space(targets[:1], lambda ids: rows[ids]))
    with pytest.raises(DataError, match="no row has a positive cosine"):
        otm(Neighbours(lists.ids, -np.abs(lists.score)), space)
    bad = (
        lambda: fixed(lists, space, 0), lambda: fixed(lists, space, 2, last="middle"), lambda: otm(lists, space, folds=1),
        lambda: otm(lists, space, patience=0), lambda: Space(targets, space.rows, compat="official"),
        lambda: repeats(np.ones(3), 2, at_least=1),
    )  # fmt: skip
    for call in bad:
        with pytest.raises(ConfigError):
            call()
    with pytest.raises(DataError):
        repeats(np.array([np.nan, 1.0]), 3)


def test_more_folds_than_targets() -> None:
    _, _, lists, space = setting(30, 4, 3)
    assert isinstance(otm(lists, space, folds=10), Picked)


def test_where_the_layers_give_exactly_k() -> None:
    _, _, lists, space = setting(60, 11, 5)
    sizes = np.cumsum([len(layer) for layer in layers_of(lists)])
    for k in sizes[:4].tolist():
        assert len(fixed(lists, space, k).ids) == k
    assert tarot_rules.fixed(lists, space, 60).ids.shape == (60,)

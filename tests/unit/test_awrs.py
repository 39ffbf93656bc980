"""AWRS: every estimator is proper, by enumeration of all orders; the orders draw without replacement; edges of floating point."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from posttrain.rollout.awrs import (
    MAX_PROBES,
    Draw,
    GreedyOrder,
    InverseOrder,
    ListedOrder,
    awrs,
    geometric,
    gumbel_order,
    local,
    masked,
    noise,
    two_pass,
)

CASES = [(size, seed) for size in (2, 3, 4, 5) for seed in (0, 1)]


def row(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng([size, seed]).dirichlet(np.full(size, 0.3 + 0.7 * seed))


def masks(size: int) -> Iterator[np.ndarray]:
    for bits in itertools.product([False, True], repeat=size):
        yield np.array(bits)


def orders(p: np.ndarray, given_out: frozenset[int] = frozenset()) -> Iterator[tuple[float, list[tuple[int, float]]]]:
    """(probability, order) of all draws without replacement of what is not given out."""
    tokens = [i for i in range(len(p)) if i not in given_out]
    for order in itertools.permutations(tokens):
        chance = 1.0
        for at, i in enumerate(order):
            chance *= p[i] / math.fsum(p[j] for j in order[at:])
        yield chance, [(i, float(p[i])) for i in order]


class Told(ListedOrder):
    """An order whose noise is one given number."""

    def __init__(self, pairs: list[tuple[int, float]], number: float, p: np.ndarray) -> None:
        super().__init__(pairs)
        self.number, self.p = number, p

    def uniform(self) -> float:
        return self.number

    def probabilities(self) -> np.ndarray:
        return self.p


def proper(p: np.ndarray, allowed: np.ndarray, outcomes: Iterator[tuple[float, Draw]]) -> None:
    """E[w 1{x = t}] = p(t) c(t), and the token's law is p c / Z."""
    mean, law, whole = np.zeros(len(p)), np.zeros(len(p)), 0.0
    for chance, draw in outcomes:
        whole += chance
        if draw.token is not None:
            assert allowed[draw.token]
            assert draw.logprob == pytest.approx(math.log(p[draw.token]), abs=1e-12)
            mean[draw.token] += chance * math.exp(draw.log_weight)
            law[draw.token] += chance
        else:
            assert not allowed.any() and draw.log_weight == -math.inf
    assert whole == pytest.approx(1.0, abs=1e-12)
    assert np.abs(mean - p * allowed).max() < 1e-12
    if allowed.any():
        assert np.abs(law - p * allowed / (p @ allowed)).max() < 1e-9


@pytest.mark.parametrize(("size", "seed"), CASES)
@pytest.mark.parametrize("probes", [1, 2, 8, "auto"])
def test_every_number_of_probes_is_proper(size, seed, probes):
    p = row(size, seed)
    for allowed in masks(size):
        proper(p, allowed, ((chance, awrs(ListedOrder(order), allowed.__getitem__, probes=probes)) for chance, order in orders(p)))


@pytest.mark.parametrize(("size", "seed"), [case for case in CASES if case[0] < 5])
@pytest.mark.parametrize("max_calls", [0, 1, 2])
def test_a_mask_may_take_over_at_any_moment(size, seed, max_calls):
    p = row(size, seed)
    for allowed in masks(size):

        def outcomes(allowed: np.ndarray = allowed) -> Iterator[tuple[float, Draw]]:
            shares = p * allowed
            cuts = np.concatenate([[0.0], np.cumsum(shares) / shares.sum()]) if allowed.any() else np.array([0.0, 1.0])
            for chance, order in orders(p):
                for low, high in ((a, b) for a, b in itertools.pairwise(cuts) if a < b):
                    told = Told(order, (low + high) / 2, p)
                    yield chance * (high - low), awrs(told, allowed.__getitem__, probes=1, max_calls=max_calls, mask=lambda: allowed)

        proper(p, allowed, outcomes())


@pytest.mark.parametrize("listed", [1, 2, 3])
def test_a_listed_order_goes_on_by_the_mask(listed):
    p = row(4, 0)
    for allowed in masks(4):

        def outcomes(allowed: np.ndarray = allowed) -> Iterator[tuple[float, Draw]]:
            shares = p * allowed
            cuts = np.concatenate([[0.0], np.cumsum(shares) / shares.sum()]) if allowed.any() else np.array([0.0, 1.0])
            for chance, order in orders(p):
                for low, high in ((a, b) for a, b in itertools.pairwise(cuts) if a < b):
                    told = ListedOrder(order[:listed], lambda: p, iter([(low + high) / 2]))
                    yield chance * (high - low), awrs(told, allowed.__getitem__, probes=2, mask=lambda: allowed)

        proper(p, allowed, outcomes())


@pytest.mark.parametrize("seed", [0, 1])
def test_the_two_passes_of_the_paper_are_proper(seed):
    p = row(4, seed)
    for allowed in masks(4):

        def outcomes(allowed: np.ndarray = allowed) -> Iterator[tuple[float, Draw]]:
            for chance, order in orders(p):
                rejected = frozenset(i for i, _ in itertools.takewhile(lambda item: not allowed[item[0]], order))
                for again, other in orders(p, rejected):
                    yield chance * again, two_pass(ListedOrder(order), lambda _, other=other: ListedOrder(other), allowed.__getitem__)

        proper(p, allowed, outcomes())


def test_the_geometric_form_counts_draws_with_replacement():
    p = np.array([0.5, 0.3, 0.2])
    allowed = [False, True, True]
    draws = {0: 0.25, 1: 0.65, 2: 0.9}
    for tokens, weight in (([1, 2], 1), ([0, 0, 1, 0, 2], 1 / 4), ([2, 0, 2], 1 / 2)):
        asked: list[int] = []
        found = geometric(p, lambda x, asked=asked: asked.append(x) or allowed[x], iter([draws[i] for i in tokens]))
        assert math.exp(found.log_weight) == pytest.approx(weight) and found.token == next(i for i in tokens if i)
        assert sorted(asked) == sorted(set(tokens)) and found.calls == len(asked)
    z = 0.5
    series = sum((n - 1) * z**2 * (1 - z) ** (n - 2) / (n - 1) for n in range(2, 200))
    assert series == pytest.approx(z, abs=1e-12)
    assert geometric(p, lambda x: False, noise(0, 0)).token is None


def test_the_local_sampler_has_the_law_and_no_weight():
    p = row(4, 1)
    for allowed in masks(4):
        law = np.zeros(4)
        for chance, order in orders(p):
            draw = local(ListedOrder(order), allowed.__getitem__)
            if draw.token is not None:
                law[draw.token] += chance
                assert draw.log_weight == 0.0
        assert np.abs(law - (p * allowed / (p @ allowed) if allowed.any() else 0)).max() < 1e-12


def test_calls_are_what_theory_says():
    """1 + sum over rejected tokens of p / (p + Z), and one probe more."""
    p = row(5, 1)
    for allowed in masks(5):
        if allowed.any() and not allowed.all():
            calls = sum(chance * local(ListedOrder(order), allowed.__getitem__).calls for chance, order in orders(p))
            assert calls == pytest.approx(1 + sum(q / (q + p @ allowed) for q in p[~allowed]), rel=1e-9)


def test_more_probes_make_a_steadier_weight():
    p = 1 / np.arange(1, 301) ** 1.5
    p /= p.sum()
    allowed = np.random.default_rng(0).random(300) < 0.3
    spread = []
    for probes in (1, 4, 16):
        weights = [math.exp(awrs(InverseOrder(p, noise(7, i)), allowed.__getitem__, probes=probes).log_weight) for i in range(3000)]
        assert np.mean(weights) == pytest.approx(p @ allowed, abs=4 * np.std(weights) / math.sqrt(3000))
        spread.append(np.std(weights))
    assert spread[0] > 1.3 * spread[1] > 1.3 * 1.2 * spread[2]


def test_auto_stops_looking_where_nothing_is_left():
    asked: list[int] = []
    awrs(ListedOrder([(0, 0.5), (1, 0.499), (2, 0.0005), (3, 0.0004), (4, 0.0001)]), lambda x: asked.append(x) or True)
    assert len(asked) == 3
    flat = np.full(1000, 1e-3)
    asked.clear()
    awrs(InverseOrder(flat, noise(1, 0)), lambda x: asked.append(x) or True)
    assert len(asked) == 1 + MAX_PROBES


def test_inverse_draws_are_without_replacement():
    """Chi-square of the first two tokens against p(a) p(b) / (1 - p(a))."""
    p = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    runs = 40_000
    for make in (
        lambda i: InverseOrder(p, noise(3, i)),
        lambda i: gumbel_order(np.log(p), np.array([u for u, _ in zip(noise(3, i), p, strict=False)]), 3),
    ):
        seen = np.zeros((5, 5))
        for i in range(runs):
            order = make(i)
            seen[order.draw()[0], order.draw()[0]] += 1
        want = np.array([[runs * p[a] * p[b] / (1 - p[a]) if a != b else 0.0 for b in range(5)] for a in range(5)])
        off = ~np.eye(5, dtype=bool)
        assert not seen[~off].any()
        assert ((seen - want)[off] ** 2 / want[off]).sum() < chi2.ppf(0.9999, 19)


def test_a_second_draw_steps_over_the_first_exactly():
    p = np.array([0.1, 0.25, 0.05, 0.6])
    grid = (np.arange(2000) + 0.5) / 2000
    for first, start in ((0, 0.05), (1, 0.2), (2, 0.37), (3, 0.9)):
        counts = np.zeros(4)
        for u in grid:
            order = InverseOrder(p, iter([start, u, 0.5, 0.5]))
            assert order.draw()[0] == first
            counts[order.draw()[0]] += 1
        want = np.where(np.arange(4) == first, 0, p) / (1 - p[first])
        assert np.abs(counts / 2000 - want).max() < 2e-3


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1e-300, 1e-40, 1e-30, 1e-18, 1e-12, 1e-6, 0.1, 0.3, 0.9, 1.0]), min_size=1, max_size=12),
    st.integers(0, 2**63 - 1),
)
def test_every_token_comes_once_and_the_rest_is_known_exactly(weights, seed):
    p = np.array(weights)
    order = InverseOrder(p, noise(seed, 0))
    found = []
    while (drawn := order.draw()) is not None:
        before = math.fsum(w for i, w in enumerate(weights) if i not in found)
        assert order.left + drawn[1] == pytest.approx(before, rel=1e-9)
        found.append(drawn[0])
    assert sorted(found) == [i for i, w in enumerate(weights) if w > 0]


@pytest.mark.parametrize("size", [1e-5, 1e-12, 1e-30, 1e-40])
def test_an_allowed_token_however_rare_is_found_with_its_weight(size):
    p = np.concatenate([np.random.default_rng(0).dirichlet(np.ones(50)) * (1 - size), [size]])
    allowed = np.arange(51) == 50
    walked = awrs(InverseOrder(p, noise(0, 0)), allowed.__getitem__)
    took_over = awrs(InverseOrder(p, noise(0, 0)), allowed.__getitem__, max_calls=10, mask=lambda: allowed)
    for found in (walked, took_over, masked(InverseOrder(p, noise(0, 1)), lambda: allowed)):
        assert found.token == 50 and found.log_weight == pytest.approx(math.log(size), rel=1e-9)
    assert (walked.calls, took_over.calls, took_over.masked) == (51, 10, True)


def test_dead_ends_and_temperature_zero():
    p = row(5, 0)
    for found in (
        awrs(InverseOrder(p, noise(0, 0)), lambda x: False),
        awrs(InverseOrder(p, noise(0, 0)), lambda x: False, max_calls=2, mask=lambda: np.zeros(5, bool)),
        local(InverseOrder(p, noise(0, 0)), lambda x: False),
    ):
        assert found.token is None and found.log_weight == -math.inf
    best = np.argsort(-p, kind="stable")
    assert local(GreedyOrder(p), lambda x: x != best[0]).token == best[1]
    assert local(GreedyOrder(p), lambda x: False).token is None
    with pytest.raises(ValueError, match="at least 1"):
        awrs(InverseOrder(p, noise(0, 0)), lambda x: True, probes=0)
    with pytest.raises(ValueError, match="no mask to go on with"):
        awrs(ListedOrder([(0, 0.1)], lambda: np.full(10, 0.1)), lambda x: False)


def test_noise_is_of_its_place_alone():
    first = [u for u, _ in zip(noise(5, 3), range(4), strict=False)]
    assert first == [u for u, _ in zip(noise(5, 3), range(4), strict=False)]
    others = {tuple(u for u, _ in zip(noise(seed, at), range(2), strict=False)) for seed in range(30) for at in range(30)}
    assert len(others) == 900
    many = np.array([next(noise(seed, 7)) for seed in range(20_000)])
    assert many.min() > 0 and many.max() < 1
    counts = np.histogram(many, 20, (0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < chi2.ppf(0.9999, 19)
    pairs = np.histogram2d([next(noise(1, at)) for at in range(20_000)], [next(noise(2, at)) for at in range(20_000)], 10, [[0, 1]] * 2)[0]
    assert ((pairs - 200) ** 2 / 200).sum() < chi2.ppf(0.9999, 99)

"""Intervals and estimators against brute force."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from posttrain.eval.intervals import exponential, pass_at_k, pass_ks, rate, token_mean, wilson


def test_wilson_known_values():
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_rate_of_single_trials_is_wilson():
    shares = [1.0] * 30 + [0.0] * 70
    found = rate(shares)
    assert (found["value"], found["n"]) == (pytest.approx(0.3), 100)
    assert (found["low"], found["high"]) == pytest.approx(wilson(0.3, 100))


def test_rows_not_samples_are_the_unit():
    correlated = rate([1.0] * 5 + [0.0] * 5)
    spread = rate([0.5] * 9 + [0.4])
    assert correlated["high"] - correlated["low"] > 3 * (spread["high"] - spread["low"])
    assert rate([0.5] * 10)["low"] < 0.5
    assert rate([]) == {"value": None, "low": None, "high": None, "n": 0}


def test_rate_covers():
    rng = random.Random(0)
    hits = 0
    for _ in range(400):
        chances = [rng.betavariate(2, 3) for _ in range(60)]
        found = rate([sum(rng.random() < p for _ in range(4)) / 4 for p in chances])
        hits += found["low"] <= 0.4 <= found["high"]
    assert 0.91 < hits / 400 <= 0.99


def test_token_mean_weights_tokens_and_covers():
    assert token_mean([2.0, 30.0, 0.0], [1, 10, 0])["value"] == pytest.approx(32 / 11)
    assert token_mean([2.0, 30.0, 0.0], [1, 10, 0])["n"] == 2
    assert token_mean([], [])["value"] is None
    rng = random.Random(1)
    hits = 0
    for _ in range(400):
        counts = [rng.randint(1, 50) for _ in range(80)]
        sums = [sum(rng.expovariate(0.5) for _ in range(t)) for t in counts]
        found = token_mean(sums, counts)
        hits += found["low"] <= 2.0 <= found["high"]
    assert 0.91 < hits / 400 <= 0.985


def test_perplexity_is_the_exponential():
    found = exponential(token_mean([2.0, 4.0, 3.0], [1, 2, 1]))
    assert found["value"] == pytest.approx(math.exp(9 / 4))
    assert found["low"] < found["value"] < found["high"]
    assert exponential({"value": 1e9, "low": None, "high": None, "n": 1})["value"] == math.exp(700)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_pass_at_k_by_enumeration(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_bounds():
    with pytest.raises(ValueError, match="pass@3"):
        pass_at_k(2, 1, 3)
    assert pass_ks(1) == [1]
    assert pass_ks(8) == [1, 2, 4, 8]
    assert pass_ks(6) == [1, 2, 4, 6]

"""SMC: schemes, weights, ancestry, and expectations on an enumerable language, where local masking fails."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from posttrain.rollout.awrs import InverseOrder, awrs, local, noise
from posttrain.rollout.smc import Population, ancestors, effective_size, log_sum, normalised

SCHEMES = ["systematic", "stratified", "multinomial", "residual"]
NEXT = np.array([[0.1, 0.6, 0.3], [0.5, 0.1, 0.4], [0.3, 0.3, 0.4]])
FIRST = np.array([0.7, 0.2, 0.1])
LENGTH = 4


def allowed(text: tuple[int, ...], token: int) -> bool:
    """`0` forces the rare continuation `0 0`; a `2` may not follow a `1`; texts have an even number of `1`s at the end."""
    new = (*text, token)
    if new[0] == 0 and len(new) > 1 and any(x != 0 for x in new[1:3]):
        return False
    if len(new) > 1 and new[-2:] == (1, 2):
        return False
    return len(new) < LENGTH or new.count(1) % 2 == 0


def chance(text: tuple[int, ...]) -> float:
    p = FIRST[text[0]]
    for a, b in itertools.pairwise(text):
        p *= NEXT[a, b]
    return float(p)


TEXTS = [t for t in itertools.product(range(3), repeat=LENGTH) if all(allowed(t[:i], t[i]) for i in range(LENGTH))]
Z = sum(chance(t) for t in TEXTS)
MEAN = {symbol: sum(chance(t) * (t[0] == symbol) for t in TEXTS) / Z for symbol in range(3)}


def run(particles: int, threshold: float, scheme: str, seed: int, sampler=awrs) -> tuple[list[tuple[int, ...] | None], Population]:
    texts: list[tuple[int, ...] | None] = [()] * particles
    population = Population(particles, threshold, scheme)
    for step in range(LENGTH):
        gained = np.zeros(particles)
        for i, text in enumerate(texts):
            if text is None:
                continue
            order = InverseOrder(NEXT[text[-1]] if text else FIRST, noise(seed * particles + i, step))
            found = sampler(order, lambda token, text=text: allowed(text, token))
            gained[i] = found.log_weight
            texts[i] = None if found.token is None else (*text, found.token)
        population.add(gained)
        back = population.resample(noise(seed, 1000 + step))
        if back is not None:
            texts = [texts[i] for i in back]
    return texts, population


@pytest.mark.parametrize(
    ("threshold", "scheme"), [(0.0, "systematic"), (0.5, "systematic"), (0.9, "stratified"), (1.01, "multinomial"), (0.9, "residual")]
)
def test_estimates_equal_enumeration(threshold, scheme):
    zs, tops = [], []
    for seed in range(2500):
        texts, population = run(6, threshold, scheme, seed)
        z = math.exp(population.log_z())
        shares = normalised(population.log_weights)
        zs.append(z)
        tops.append(z * sum(w for w, t in zip(shares, texts, strict=True) if t and t[0] == 0))
        assert all(t in TEXTS for t, w in zip(texts, shares, strict=True) if w)
    for values, want in ((zs, Z), (tops, Z * MEAN[0])):
        assert abs(np.mean(values) - want) < 4.5 * np.std(values) / math.sqrt(len(values))


def test_local_masking_fails_the_same_test():
    starts = []
    for seed in range(2500):
        texts, _ = run(1, 0.0, "systematic", seed, local)
        starts += [t[0] == 0 for t in texts if t]
    error = np.std(starts) / math.sqrt(len(starts))
    assert abs(np.mean(starts) - MEAN[0]) > 20 * error


@pytest.mark.parametrize("scheme", SCHEMES)
def test_children_are_in_proportion(scheme):
    shares = np.array([0.5, 0.0, 0.3, 0.05, 0.15])
    counts = np.zeros(5)
    for seed in range(8000):
        found = ancestors(shares, noise(seed, 0), scheme)
        assert len(found) == 5 and (np.diff(found) >= 0).all()
        counts += np.bincount(found, minlength=5)
        if scheme in ("systematic", "residual"):
            assert (np.bincount(found, minlength=5) >= np.floor(5 * shares + 1e-9)).all()
    assert counts[1] == 0
    assert np.abs(counts / 8000 - 5 * shares).max() < 4.5 * math.sqrt(5 / 8000)


def test_weights_and_ancestry():
    population = Population(4, 0.5)
    population.add(np.log([0.9, 0.05, 0.03, 0.02]))
    before = population.log_z()
    back = population.resample(noise(0, 0))
    assert back is not None and list(back).count(0) >= 3
    assert np.allclose(population.log_weights, before) and population.log_z() == pytest.approx(before)
    assert effective_size(population.log_weights) == pytest.approx(4)
    assert population.resample(noise(0, 1)) is None
    population.add(np.log([1e-9, 1.0, 1e-9, 1e-9]))
    second = population.resample(noise(0, 2))
    assert list(population.originals()) == [int(back[i]) for i in second]


def test_ends_of_a_population():
    dead = Population(3)
    dead.add(np.full(3, -np.inf))
    assert dead.resample(noise(0, 0)) is None and dead.log_z() == -math.inf and effective_size(dead.log_weights) == 0
    assert normalised(dead.log_weights).tolist() == [0, 0, 0]
    alone = Population(1)
    alone.add(np.array([-5.0]))
    assert alone.resample(noise(0, 0)) is None and alone.log_z() == -5.0
    one = Population(3)
    one.add(np.array([-np.inf, 0.0, -np.inf]))
    assert one.resample(noise(0, 0)).tolist() == [1, 1, 1]
    assert log_sum(np.array([-1e4, -1e4])) == pytest.approx(-1e4 + math.log(2))

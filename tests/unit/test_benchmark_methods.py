"""The benchmarks of D2O, repeats and AWRS measure what they say."""

from __future__ import annotations

import numpy as np
import pytest
from benchmark_kit import load

torch = pytest.importorskip("torch")

for part in ("_harness", "_corpus", "_lm", "_judges"):
    load(part)
load("noisefit_effect")
effect, repeats, calls = load("d2o_effect"), load("repeat_effect"), load("awrs_calls")


def test_the_language_of_d2o() -> None:
    language = effect.Language(0, 12)
    assert not set(language.trained) & set(language.asked) and len(language.trained) == len(language.asked) == 6
    kinds = dict.fromkeys(effect.OPENINGS, 0)
    for _ in range(2000):
        words = language.answer("t3").split()
        kinds[next(k for k, group in effect.OPENINGS.items() if words[0] in group)] += 1
        assert len(words) == effect.LENGTH and set(words[1:]) <= set(language.own["t3"])
    assert all(abs(kinds[k] / 2000 - share) < 0.05 for k, share in effect.SHARES.items())
    known = set(range(10))
    assert effect._well_formed([3, 4, 5, 6, 7, 1], known)
    assert not effect._well_formed([3, 4, 5, 6, 1], known) and not effect._well_formed([3, 4, 5, 6, 99, 1], known)


def test_every_arm_of_repeats_sees_as_many_tokens() -> None:
    for epochs in {epochs for _, _, epochs in repeats.ARMS.values()}:
        assert repeats.FULL.blocks % epochs == 0 and repeats.QUICK.blocks % epochs == 0
    assert repeats.ARMS["repeated"][1] == 0.0 == repeats.ARMS["qwen2"][1]


def test_calls_beside_theory() -> None:
    p, allowed = calls.row(500, 0.4, 0)
    assert p.sum() == pytest.approx(1) and 0.25 < allowed.mean() < 0.55
    found = calls.calls(300, 0.5, 800)
    assert abs(found["calls"] - found["theory"]) < 5 * found["standard_error"]
    assert found["weights"]["auto"]["variation"] < found["weights"]["1"]["variation"]
    predicate = calls.Predicate(np.array([True, False]))
    assert predicate(0) and not predicate(1) and predicate.calls == 2

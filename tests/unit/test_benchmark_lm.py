"""The judges of the quality benchmark, against slow, obvious references."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


_load("_corpus")
lm = _load("_lm")

TRAIN = ["the cat sat on the mat .", "the dog sat on the log .", "a cat and a dog", ""]
TEST = ["the cat sat on the log .", "unseen words here", "a mat and a log .", ""]


def _reference(train: list[list[int]], document: list[int], size: int, discount: float) -> list[float]:
    """Counts in dicts, one probability at a time."""
    grams = [Counter(), Counter(), Counter()]
    for ids in train:
        padded = [size, size, *ids]
        for i in range(2, len(padded)):
            for order in range(3):
                grams[order][tuple(padded[i - order : i + 1])] += 1

    def probability(order: int, context: tuple[int, ...], word: int) -> float:
        if order < 0:
            return 1 / size
        after = {gram: n for gram, n in grams[order].items() if gram[:-1] == context}
        below = probability(order - 1, context[1:], word)
        if not after:
            return below
        total = sum(after.values())
        return max(after.get((*context, word), 0) - discount, 0) / total + discount * len(after) / total * below

    padded = [size, size, *document]
    return [probability(2, tuple(padded[i - 2 : i]), padded[i]) for i in range(2, len(padded))]


@pytest.mark.parametrize("discount", [0.75, 0.3])
def test_trigrams_equal_the_formula(discount: float) -> None:
    vocabulary = lm.Vocabulary(TRAIN, 9)
    train, test = vocabulary.encode(TRAIN), vocabulary.encode(TEST)
    expected = [p for document in test for p in _reference([list(d) for d in train], list(document), vocabulary.size, discount)]
    model = lm.Trigrams(train, vocabulary.size, discount)
    np.testing.assert_allclose(model.probability(test), expected, rtol=1e-12)
    assert model.loss(test) == pytest.approx(-sum(map(math.log, expected)) / len(expected))


def test_trigrams_sum_to_one_and_an_empty_pick_is_uniform() -> None:
    vocabulary = lm.Vocabulary(TRAIN, 100)
    model = lm.Trigrams(vocabulary.encode(TRAIN), vocabulary.size)
    for context in (["the", "cat"], ["sat", "on"], ["and", "."], ["never", "seen"]):
        ids = [vocabulary.ids.get(word, 0) for word in context]
        documents = [np.array([*ids, word]) for word in range(vocabulary.size)]
        assert model.probability(documents)[2::3].sum() == pytest.approx(1.0)
    assert lm.Trigrams([], 50).loss([np.array([3, 4])]) == pytest.approx(math.log(50))


def test_vocabulary_keeps_the_most_frequent_words() -> None:
    vocabulary = lm.Vocabulary(["B a b c a b", "d"], 3)
    assert vocabulary.ids == {"b": 1, "a": 2}
    assert vocabulary.size == 3
    assert vocabulary.encode(["a b d"])[0].tolist() == [2, 1, 0]


def test_transformer_learns_what_it_is_given() -> None:
    other = [f"{i} + {i} = {2 * i}" for i in range(60)]
    english = ["the cat sat on the mat and the dog sat on the log ."] * 30
    judge = lm.Transformer(TRAIN + other, vocabulary=300, steps=20, rows=4, length=32)
    near, far = judge.loss(english, TRAIN[:2], 0), judge.loss(other, TRAIN[:2], 0)
    assert near < far
    assert judge.loss(english, TRAIN[:2], 0) == near

"""The judges of the quality benchmark, against slow, obvious references."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from benchmark_kit import load

corpus = load("_corpus")
lm = load("_lm")
judges = load("_judges")

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


def _rows(label: str, texts: list[str]) -> list[dict[str, str]]:
    return [{"id": f"{label}-{i}", "text": text, "label": label} for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def judge() -> object:
    near = [f"the {a} sat on the {b} and the {b} sat on the {a} ." for a in ("cat", "dog", "cow", "hen") for b in ("mat", "log", "bed")]
    far = [f"int {a} = {b} ; return {a} * {b} ;" for a in ("x", "y", "z", "w") for b in ("1", "2", "3")]
    raw = _rows("docstring", near[:8]) + _rows("code", far)
    return judges.Judge(corpus.Corpus(0, {}, raw, _rows("target", near[8:10]), _rows("target", near[10:]), {}), vocabulary=50)


def test_every_measure_prefers_what_is_near_the_held_out_rows(judge) -> None:
    near, far = _rows("docstring", judge.heldout), _rows("code", ["int x = 1 ; return x * 1 ;"] * 2)
    good, bad = judge(near), judge(far)
    assert (bad["relevant_tokens"], good["relevant_tokens"]) == (0.0, 1.0)
    assert judges.precision(near + far, 3) == pytest.approx(2 / 3) and judges.precision(far + near, 500) == 0.5
    assert good["loss"] < bad["loss"] and good["perplexity"] == pytest.approx(math.exp(good["loss"]))
    assert good["transport"] == pytest.approx(0.0, abs=1e-6) and bad["transport"] > 0.5
    assert good["kl_reduction"] > bad["kl_reduction"]
    assert (good["rows"], good["tokens"], good["labels"]) == (2, sum(len(text.split()) for text in judge.heldout), {"docstring": 2})


def test_transport_is_the_cost_of_the_best_matching(judge) -> None:
    from itertools import permutations

    texts = ["the cat sat on the mat", "int x = 1 ; return x"]
    points = judge.embed(texts)
    cost = [[math.sqrt(max(0.0, 2 - 2 * float(a @ b))) for b in judge.heldout_points] for a in points]
    best = min(sum(cost[i][j] for i, j in enumerate(order)) / 2 for order in permutations(range(2)))
    assert judge.transport(texts) == pytest.approx(best)


def test_interval_is_students() -> None:
    found = judges.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found["mean"] == 3.0 and found["high"] - 3.0 == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-5)
    assert judges.interval([2.0])["low"] is None
    assert judges.paired([3.0, 5.0], [1.0, 2.0])["mean"] == 2.5

"""Measures of variety and copying, against sequences made by hand and a slow search."""

from __future__ import annotations

import random

import pytest

from posttrain.eval.diversity import Corpus, distinct, ngrams, repetition, type_token_ratio


def test_by_hand():
    assert type_token_ratio([1, 2, 1, 3]) == 0.75 and type_token_ratio([]) == 0.0 and type_token_ratio([5] * 96) == 1 / 96
    assert ngrams([1, 2, 3], 2) == [(1, 2), (2, 3)] and ngrams([1], 2) == []
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 - 4 / 5) and repetition([1, 2, 3]) == 0.0
    assert repetition(list(range(50))) == 0.0 and repetition([7] * 10, 2) == pytest.approx(1 - 1 / 9)
    assert distinct([[1, 2, 1, 2], [1, 2]]) == pytest.approx(2 / 4) and distinct([[1]]) == 0.0


def slow(ids, texts) -> int:
    """Longest common run, by trying all."""
    best = 0
    for i in range(len(ids)):
        for j in range(i + best + 1, len(ids) + 1):
            part = ids[i:j]
            if not any(part == text[k : k + len(part)] for text in texts for k in range(len(text) - len(part) + 1)):
                break
            best = max(best, len(part))
    return best


def test_the_longest_match_equals_a_slow_search():
    draw = random.Random(0)
    for size in (2, 5, 50):
        texts = [[draw.randrange(size) for _ in range(draw.randint(1, 40))] for _ in range(4)]
        corpus = Corpus(texts)
        for _ in range(30):
            ids = [draw.randrange(size) for _ in range(draw.randint(0, 25))]
            if draw.random() < 0.5:
                text = draw.choice(texts)
                ids[3:3] = text[draw.randrange(len(text)) :]
            assert corpus.longest_match(ids) == slow(ids, texts)
    assert Corpus([]).longest_match([1, 2]) == 0 and Corpus([[1, 2]]).longest_match([]) == 0

"""The word-salad guard against dictionaries of strings, and on real text with and without its order."""

from __future__ import annotations

import ast
import functools
import itertools
import math
import random
import re
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import guard, ngrams
from data_pipelines.parts import load_arrays, save_arrays
from data_pipelines.selector import Guard

CFG = Guard(salad=True)
WORDS = ["alpha", "beta", "gamma", "delta", "Epsilon", "zeta", "ÉTA", "θ", "日本", "..."]


def texts(count: int, seed: int = 0, most: int = 60) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(0, most))) for _ in range(count)]


def watched(given: list[str]) -> dict[str, np.ndarray]:
    rows = [{"id": str(i), "text": text} for i, text in enumerate(given)]
    passing, finish = guard.watch(iter(rows), CFG)
    assert [row["id"] for row in passing] == [row["id"] for row in rows]
    return finish()


def fitted(raw: list[str], target: list[str]) -> dict[str, np.ndarray]:
    return guard.merge([watched(raw)], [watched(target)], CFG)


def slow_scores(judged: list[str], counted: list[str], own: bool, min_pairs: int) -> list[float]:
    """The module docstring's formula, with dictionaries that know every word and pair."""
    cut = [re.findall(r"\w+|[^\w\s]+", text.lower()) for text in counted]
    words, pairs = Counter(w for x in cut for w in x), Counter(p for x in cut for p in itertools.pairwise(x))
    found = []
    for text in judged:
        x = re.findall(r"\w+|[^\w\s]+", text.lower())
        mine = list(itertools.pairwise(x))
        if len(mine) < min_pairs:
            found.append(math.nan)
            continue
        less_words, less_pairs = (Counter(x), Counter(mine)) if own else (Counter(), Counter())
        total = words.total() - less_words.total()
        foreign_pairs, foreign_words = total / 2**guard.PAIR_BITS, total / 2**guard.WORD_BITS
        values = []
        for a, b in mine:
            both = max(pairs[a, b] - less_pairs[a, b] - foreign_pairs, 0)
            left, right = (max(words[w] - less_words[w] - foreign_words, 0) for w in (a, b))
            values.append(math.log((both + 1 + foreign_pairs) / (left * right / total + 1 + foreign_pairs)))
        found.append(math.fsum(values) / len(values))
    return found


@pytest.mark.parametrize("own", [True, False])
def test_scores_follow_the_formula(own):
    raw, target = texts(60, 0), texts(20, 1)
    state = fitted(raw, target)
    judged = raw if own else texts(30, 2)
    expected = slow_scores(judged, raw + target, own, CFG.min_pairs)
    found = guard.mean_pmi(judged, state, CFG, own=own)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(guard.scores(judged, state, CFG, own=own), (found - state["null"][0]) / state["null"][1])
    assert np.isnan(expected).any() and np.isfinite(expected).any()


def test_a_row_alone_in_the_data_has_no_sign():
    """Its own counts out, nothing is left: zero, not minus infinity."""
    text = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    state = fitted([text], [text.replace("e", "x")])
    assert guard.mean_pmi([text], state, CFG)[0] == pytest.approx(0, abs=1e-6)


def test_the_null_is_the_targets_words_in_random_order():
    raw, target = texts(60, 0), [*texts(30, 1, 300), "too short"]
    state = fitted(raw, target)
    mixed = []
    for text in target:
        words = text.lower().split()[: guard.SAMPLE_WORDS]
        mixed += [" ".join(words[i] for i in guard.random_order(len(words), turn)) for turn in range(guard.ORDERS)]
    expected = np.array(slow_scores(mixed, raw + target, True, CFG.min_pairs))
    np.testing.assert_allclose(state["null"], [np.nanmean(expected), np.nanstd(expected)], rtol=1e-9)
    assert sorted(guard.random_order(50, 1)) == list(range(50))


def test_the_null_comes_from_a_sample_of_fixed_size(monkeypatch):
    monkeypatch.setattr(guard, "SAMPLE_ROWS", 5)
    target = texts(40, 1)
    part = watched(target)
    assert len(part["sample_sizes"]) == 5 and part["sample_sizes"].max() <= guard.SAMPLE_WORDS
    backwards, again = watched(target[::-1]), watched(target * 3)
    assert all((part[name] == other[name]).all() for other in (backwards, again) for name in part if name.startswith("sample"))


def test_without_a_target_row_to_judge_nothing_is_salad():
    state = fitted(texts(40), ["short"] * 100)
    assert np.isnan(state["null"]).all() and np.isnan(guard.scores(texts(40), state, CFG)).all()
    assert guard.threshold(guard.scores(["short"] * 100, state, CFG), CFG) == -np.inf


def test_fewer_pairs_than_the_least_are_not_judged():
    state = fitted(texts(40), texts(10, 1))
    given = [" ".join(["alpha"] * count) for count in (0, 1, 16, 17)]
    assert np.isnan(guard.scores(given, state, CFG)).tolist() == [True, True, True, False]


def test_shards_parts_and_windows_do_not_matter(monkeypatch, tmp_path):
    raw, target = [*texts(50), " ".join(texts(30, 5))], texts(20, 1)
    whole = fitted(raw, target)
    expected = guard.scores(raw, whole, CFG)
    for module in (ngrams, guard):
        monkeypatch.setattr(module, "WINDOW", 100)
    for i, part in enumerate(watched(raw[i::4]) for i in range(4)):
        save_arrays(tmp_path / f"{i}.safetensors", part)
    parts = (load_arrays(tmp_path / f"{i}.safetensors") for i in range(4))
    split = guard.merge(parts, [watched(target[:5]), watched(target[5:])], CFG)
    assert all((split[name] == whole[name]).all() for name in whole) and set(split) == set(whole)
    np.testing.assert_array_equal(guard.scores(raw, split, CFG), expected)
    np.testing.assert_array_equal(guard.scores(raw[::-1], split, CFG)[::-1], expected)


def test_full_tables_are_written_whole(monkeypatch):
    monkeypatch.setattr(guard, "PAIR_BITS", 5)
    monkeypatch.setattr(guard, "WORD_BITS", 8)
    part = watched(texts(50))
    assert "pairs" in part and "words_at" in part
    assert (guard.merge([part, part], [], CFG)["pairs"] == 2 * part["pairs"]).all()


@functools.cache
def docstrings(count: int) -> list[str]:
    """Runs of 120 words of the standard library's docstrings, each file at most 10 times."""
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if len(found) >= count:
            break
        nodes = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
        words = " ".join(ast.get_docstring(node) or "" for node in nodes).split()
        found += [" ".join(words[i : i + 120]) for i in range(0, len(words) - 120, 120)][:10]
    return found[:count]


@pytest.mark.parametrize("bits", [22, 14])
def test_salad_is_found_and_text_is_kept(monkeypatch, bits):
    """Also with tables that are far too small: 5 foreign pairs a place."""
    monkeypatch.setattr(guard, "PAIR_BITS", bits)
    every = docstrings(400)
    target, real = every[::4], [text for i, text in enumerate(every) if i % 4]
    draw, vocabulary = random.Random(0), ngrams.WORD.findall(" ".join(target))
    salad = [" ".join(draw.choices(vocabulary, k=120)) for _ in range(60)]
    state = fitted(real + salad, target)
    limit = guard.threshold(guard.scores(target, state, CFG), CFG)
    assert limit <= guard.SALAD
    assert np.mean(guard.scores(salad, state, CFG) < limit) >= 0.99
    assert np.mean(guard.scores(real, state, CFG) < limit) <= 0.01


def test_a_target_of_templates_does_not_make_salad_of_other_text():
    """Its own rows lie far above any other text, which a quantile of them would call salad."""
    draw, real = random.Random(0), docstrings(400)[::2]
    target = [f"Question: how many {n}s has Anna if she had {a} and gets {a} more? Answer: Anna has {2 * a} {n}s, I think, now." for a in
              range(60) for n in (draw.choice(["apple", "book", "car"]),)]  # fmt: skip
    vocabulary = ngrams.WORD.findall(" ".join(real + target))
    salad = [" ".join(draw.choices(vocabulary, k=120)) for _ in range(60)]
    state = fitted(real + salad, target)
    figures = guard.scores(target, state, CFG)
    limit = guard.threshold(figures, CFG)
    assert np.mean(guard.scores(real, state, CFG) < np.quantile(figures, 0.02)) > 0.5
    assert np.mean(guard.scores(real, state, CFG) < limit) <= 0.05
    assert np.mean(guard.scores(salad, state, CFG) < limit) >= 0.9


def test_a_small_target_sets_no_threshold():
    values = np.linspace(0, 100, 200)
    assert guard.threshold(values, CFG) == pytest.approx(2)
    assert guard.threshold(values + 50, CFG) == guard.SALAD
    assert guard.threshold(np.append(values[: guard.MIN_TARGET_ROWS], np.nan), CFG) > 0
    assert guard.threshold(np.append(values[: guard.MIN_TARGET_ROWS - 1], [np.nan] * 100), CFG) == -np.inf
    assert guard.threshold(np.zeros(0), CFG) == -np.inf

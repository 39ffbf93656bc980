"""Quality filters against plain Python and against datatrove's."""

from __future__ import annotations

import random
import re
import string
from collections import Counter

import numpy as np
import pytest

from data_pipelines import filters, ngrams
from data_pipelines.filters import FUNCTION_WORDS, reasons
from data_pipelines.selector import Filters

PAPER, GOPHER = Filters(quality="dsir-paper"), Filters(repetition="gopher")


def judged(texts: list[str], chosen: Filters) -> list[str]:
    return reasons(texts, ngrams.count_words(texts), chosen).tolist()


def repeating(count: int, seed: int = 0) -> list[str]:
    """Texts with all amounts of repeated words, lines and paragraphs."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        vocabulary = [f"w{i}" for i in range(draw.choice([2, 5, 20, 200]))]
        lines = [" ".join(draw.choices(vocabulary, k=draw.randint(1, 30))) for _ in range(draw.randint(1, 12))]
        parts = draw.choices(lines, k=draw.randint(1, 20))
        found.append("".join(part + draw.choice(["\n", "\n\n", " ", ". ", "\n \n"]) for part in parts))
    return found


def slow_quality(text: str) -> bool:
    words = re.findall(r"\w+|[^\w\s]+", text.lower())
    stop = {word for words in FUNCTION_WORDS.values() for word in words.split()} | {"_"}
    count = len(words)
    frequent = max(Counter(words).values()) / count
    informative = sum(word not in stop and bool(re.match(r"\w", word)) for word in words) / count
    worded = sum(word not in set(string.digits) for word in words) / count
    return 40 < count < 500 and 0.02 < frequent < 0.2 and 0.3 < informative < 0.7 and worded > 0.8


def english(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    stop = " ".join(FUNCTION_WORDS.values()).split()
    other = [*(f"noun{i}" for i in range(300)), "1", "7", "42", "...", "Ünal", '",']
    found = []
    for _ in range(count):
        share, digits = draw.random(), draw.random() * 0.4
        pick = draw.choice("123456789") if draw.random() < digits else draw.choice(stop if draw.random() < share else other)
        found.append(" ".join([pick, *(draw.choice(stop if draw.random() < share else other) for _ in range(draw.randint(1, 600)))]))
        found.append(" ".join(draw.choice("0123456789") if draw.random() < digits else draw.choice(stop + other) for _ in range(200)))
    return found


def test_quality_equals_plain_python():
    texts = english(150)
    found = judged(texts, PAPER)
    assert [not reason for reason in found] == [slow_quality(text) for text in texts]
    assert {"dsir-paper: words", "dsir-paper: informative words", "dsir-paper: digits", ""} <= set(found)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("the cat " * 20, "dsir-paper: words"),
        ("the cat " * 21, "dsir-paper: most frequent word"),
        (" ".join(f"the a{i}" for i in range(100)) + " of and", "dsir-paper: most frequent word"),
        (" ".join(f"noun{i} verb{i}" for i in range(30)), "dsir-paper: most frequent word"),
        (" ".join(f"noun{i}" for i in range(40)) + " x x", "dsir-paper: informative words"),
        (" ".join(f"noun{i}" for i in range(25)) + " the of and in we , ; ! the of", ""),
        ("x", "dsir-paper: words"),
        ("", ""),
    ],
)
def test_each_rule_of_the_paper(text, reason):
    if reason == "":
        text = text and text + " is are was were be been"
    assert judged([text], PAPER) == [reason]


@pytest.fixture
def oracle(monkeypatch):
    """datatrove's filter on our words."""
    from datatrove.data import Document
    from datatrove.pipeline.filters import gopher_repetition_filter as module

    monkeypatch.setattr(module, "split_into_words", lambda text, language: ngrams.WORD.findall(text.lower()))
    filter_ = module.GopherRepetitionFilter()
    return lambda text: filter_.filter(Document(text=text, id="0"))


NAMES = {
    "dup_para_frac": "repeated paragraphs", "dup_para_char_frac": "characters in repeated paragraphs", "dup_line_frac": "repeated lines",
    "dup_line_char_frac": "characters in repeated lines",
    **{f"top_{n}_gram": f"characters in the most frequent {n}-gram" for n in (2, 3, 4)},
    **{f"duplicated_{n}_n_grams": f"characters in repeated {n}-grams" for n in range(5, 11)},
}  # fmt: skip


def test_repetition_equals_datatrove(oracle):
    texts = [*repeating(600), "one", "one two three four", "a\n\na\n\na", "\n\n\n x \n", "y" * 3000, "nothing here comes twice at all"]
    found = judged(texts, GOPHER)
    for text, reason in zip(texts, found, strict=True):
        expected = oracle(text)
        assert reason == ("" if expected is True else f"gopher: {NAMES[expected[1]]}"), text[:80]
    assert len(set(found)) >= 8


def test_the_oracles_figures_agree_one_by_one():
    """Also those that an earlier rule hides."""
    from datatrove.pipeline.filters.gopher_repetition_filter import find_all_duplicate, find_top_duplicate, get_n_grams

    for text in repeating(200, 1):
        words = ngrams.WORD.findall(text.lower())
        key, length, _ = filters._words(text)
        characters = np.zeros(9, np.int64)
        filters._in_ngrams(key, length, np.arange(2, 11), 3, characters)
        expected = [find_top_duplicate(grams) if (grams := get_n_grams(words, n)) else 0 for n in (2, 3, 4)]
        assert characters.tolist() == expected + [find_all_duplicate(words, n) for n in range(5, 11)]


def test_long_rows_come_in_windows(monkeypatch):
    texts = repeating(20, 2)
    whole = judged(texts, GOPHER), judged(texts, PAPER)
    monkeypatch.setattr(ngrams, "WINDOW", 50)
    assert (judged(texts, GOPHER), judged(texts, PAPER)) == whole


def test_both_filters_and_none():
    texts = ["the cat " * 30, "w1 w2 w3\n" * 30, ""]
    assert judged(texts, Filters()) == ["", "", ""]
    both = judged(texts, Filters(quality="dsir-paper", repetition="gopher"))
    assert both[0].startswith("dsir-paper") and both[1].startswith("dsir-paper") and both[2] == ""
    assert judged(texts, GOPHER)[1] == "gopher: repeated lines"

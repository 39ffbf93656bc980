"""Words, buckets and counts of the compiled loops against plain Python, code point by code point and byte by byte."""

from __future__ import annotations

import hashlib
import importlib
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import ngrams
from data_pipelines.ngrams import Hasher

REPO = Path(__file__).parent.parent.parent

TEXTS = [
    "", " ", "\n\n", "!!!", "a", "Hello, world: hello", "a_b __c 1.5e-3 ... (x)", "Straße ΟΔΟΣ ΣΑΣ İx naïve café ΣΣ Σ",
    "日本語 テスト です。", "\U0001f642 emoji\U0001f642", "tab\tand\x1cfs\u2028line\u00a0nbsp", "x" * 5000, "e\u0301 combining",
    "\ud800 lone \udfff\ud800", "nul\x00nul", "the quick brown fox " * 40, "word " * 3 + "end", "ไม่มีช่องว่าง", "ǅ ǈ Ⅷ ᾈ K Å ﬁ ẞ",
]  # fmt: skip


def slow_words(text: str, unit: str = "word", regex: str = "re") -> list[str]:
    pattern = r"\w+|[^\w\s]+" if unit == "word" else r"\S"
    return importlib.import_module(regex).findall(pattern, text.lower())


def slow_counts(text: str, n: int, buckets: int, **kind) -> dict[int, int]:
    words = slow_words(text, **kind)
    grams = [" ".join(words[i : i + m]) for m in range(1, n + 1) for i in range(len(words) - m + 1)]
    return Counter(int(hashlib.sha256(gram.encode("utf-8", "surrogatepass")).hexdigest(), 16) % buckets for gram in grams)


def dense(counts: dict[int, int], buckets: int) -> list[int]:
    return [counts.get(i, 0) for i in range(buckets)]


def cut(text: str, regex: str = "re") -> list[str]:
    """The words as the compiled loop sees them."""
    found = []
    for piece in ngrams.pieces([text], 1, regex=regex):
        words = ngrams.find_words([piece.text], regex=regex)
        lower = (ngrams.char_table(regex)[words.codes] >> np.uint32(2)).astype("<u4")
        found += [lower[a:b].tobytes().decode("utf-32-le", "surrogatepass") for a, b in zip(words.start, words.end, strict=True)]
    return found


@pytest.mark.parametrize("regex", ["re", "regex"])
def test_every_code_point_is_cut_and_lowered_as_the_engine_does(monkeypatch, regex):
    every = [chr(code) for code in range(0x110000)]
    random.Random(0).shuffle(every)
    text = "".join(every)
    monkeypatch.setattr(ngrams, "WINDOW", len(text))
    assert cut(text, regex) == slow_words(text, regex=regex)


def test_the_two_engines_differ():
    assert (ngrams.char_table("re") != ngrams.char_table("regex")).sum() > 1000
    assert ngrams.table_digest("re") != ngrams.table_digest("regex")
    assert cut("a\x1fb") == ["a", "b"] and cut("a\x1fb", "regex") == ["a", "\x1f", "b"]


@pytest.mark.parametrize("unit", ["word", "char"])
@pytest.mark.parametrize(("n", "buckets"), [(1, 16), (2, 10_000), (3, 997), (5, 100_003)])
def test_counts_equal_plain_python(n, buckets, unit):
    hasher = Hasher(n, buckets, unit=unit)
    for text in TEXTS:
        counts = hasher.count([text])
        found = np.flatnonzero(counts)
        expected = slow_counts(text, n, buckets, unit=unit)
        assert dict(zip(found.tolist(), counts[found].tolist(), strict=True)) == dict(expected), repr(text[:30])


def test_the_largest_number_of_buckets():
    found = np.flatnonzero(Hasher(2, 2**24 - 1).count(["hello world"]))
    assert set(found.tolist()) == set(slow_counts("hello world", 2, 2**24 - 1))


@pytest.mark.parametrize("char", ["a", "é", "日", "\U00020000", "\ud800"])
def test_grams_at_the_end_of_a_block(char):
    """53 to 70 bytes, in one word and in two, cut between characters of one to four bytes."""
    size = len(char.encode("utf-8", "surrogatepass"))
    sizes = [(a, b) for a in range(40 // size, 72 // size + 1) for b in range(13)]
    hasher = Hasher(2, 9973)
    for a, b in sizes:
        text = f"{char * a} {'b' * b}"
        assert hasher.count([text]).tolist() == dense(slow_counts(text, 2, 9973), 9973), (a, b)


def test_many_misses_fill_the_lanes_and_repeat(monkeypatch):
    monkeypatch.setattr(ngrams, "TABLE_BITS", 4)
    draw = random.Random(1)
    texts = [" ".join(f"{draw.choice('abcdef')}{draw.randint(0, 300)}" for _ in range(draw.randint(0, 400))) for _ in range(20)]
    expected = np.sum([dense(slow_counts(text, 3, 500), 500) for text in texts], axis=0)
    hasher = Hasher(3, 500)
    assert (hasher.count(texts) == expected).all() and (hasher.count(texts) == expected).all()


def test_rows_and_weights_equal_the_counts():
    texts = [*TEXTS, "a b " * 300, "", "c"]
    made = Hasher(2, 500).rows(texts)
    assert made.shape == (len(texts), 500) and made.has_canonical_format
    expected = np.array([dense(slow_counts(text, 2, 500), 500) for text in texts])
    assert (made.toarray() == expected).all()
    log_diff = np.random.default_rng(0).normal(size=(500, 3))
    score, words, grams = Hasher(2, 500).weigh(texts, log_diff)
    np.testing.assert_allclose(score, expected @ log_diff, atol=1e-9)
    assert words.tolist() == [len(slow_words(text)) for text in texts] and grams.tolist() == expected.sum(1).tolist()
    one = Hasher(2, 500).weigh(texts, log_diff[:, 1].copy())[0]
    assert one.shape == (len(texts),) and (one == score[:, 1]).all()


def test_no_rows():
    assert Hasher().rows([]).shape == (0, 10_000) and Hasher().count([]).sum() == 0
    assert Hasher().weigh([], np.zeros(10_000))[0].shape == (0,) and ngrams.count_words([]).shape == (0,)


def test_long_rows_come_in_windows_and_are_whole_again(monkeypatch):
    texts = ["short", " ".join(TEXTS) * 4, "", "y" * 900 + " z", " " * 2000, "w " * 700]
    rows, words = ngrams.hashed_counts(texts, 3, 997), ngrams.count_words(texts)
    characters = sum(len(word) for text in texts for word in slow_words(text))
    assert Hasher(3, 997).tally(texts)[1:] == (words.sum(), characters)
    assert words.tolist() == [len(slow_words(text)) for text in texts]
    monkeypatch.setattr(ngrams, "WINDOW", 200)
    assert sum(1 for _ in ngrams.pieces(texts, 3)) > 12
    assert (ngrams.hashed_counts(texts, 3, 997) != rows).nnz == 0 and (ngrams.count_words(texts) == words).all()
    assert Hasher(3, 997).tally(texts)[1:] == (words.sum(), characters)
    assert ngrams.count_words(texts, "char").tolist() == [len(slow_words(text, "char")) for text in texts]


def test_keys_of_different_words_differ():
    """Words of a polynomial's weak spot (Thue-Morse words collide modulo 2^64 under any base) and of the alphabet."""
    thue = "a"
    for _ in range(12):
        thue += thue.translate(str.maketrans("ab", "ba"))
    words = [thue, thue.translate(str.maketrans("ab", "ba")), *(f"w{i}" for i in range(50_000)), *(chr(c) for c in range(0x3041, 0x3097))]
    assert len(set(ngrams.find_words([" ".join(words)]).key.tolist())) == len(words)


def test_the_code_runs_from_a_place_that_cannot_be_written(tmp_path):
    """No folder for compiled code: neither beside the source nor in a home."""
    package = tmp_path / "data_pipelines"
    package.mkdir()
    for name in ("__init__.py", "jit.py", "ngrams.py"):
        shutil.copy(REPO / "data_pipelines" / name, package / name)
    (package / "__pycache__").touch()
    code = "from data_pipelines.ngrams import Hasher; print(Hasher(2, 100).count(['a b']).sum())"
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null/x", "PYTHONDONTWRITEBYTECODE": "1"}
    env.pop("NUMBA_CACHE_DIR", None)
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == "3", done.stderr

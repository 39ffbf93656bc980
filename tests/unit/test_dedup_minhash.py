"""MinHash, n-gram keys, Jaccard and contamination shares against slow references in plain Python; hostile texts."""

from __future__ import annotations

import random
import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import contamination
from data_pipelines.minhash import Blob, MinHash, Sets, band_keys, distinct, fold, grams, jaccard, shares_a_band

MASK = 2**64 - 1
HOSTILE = [
    "", " \n\t ", "a", "a b", "Ünïcode ﬁ İstanbul ΣΑΣ", "日本語のテキスト、句読点。", "ภาษาไทย", "a\x00b\x00c d", "\ud83d lone \udc00",
    "é é", "...!!! ??", "x" * 5000, "word " * 3000, "\u2028line\u2029sep\x1c\x1d\x85end", "👩\u200d👧 family 🏳️",
    "1e-5 a_b __init__", "\U0010ffff\U00010000",
]  # fmt: skip
TEXTS = st.text(alphabet=st.sampled_from(list("aAbß é.,-_1 \n\u00a0\ud800日İ\x00")), max_size=40)


def mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def words_of(text: str, unit: str = "words") -> list[str]:
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower())
    if unit == "chars":
        return list(re.sub(r"\s+", " ", folded).strip(" "))
    return re.findall(r"\w+|[^\w\s]+" if unit == "words" else r"\w+", folded)


def grams_of(text: str, n: int, unit: str = "words", whole: bool = True) -> list[tuple[str, ...]]:
    words = words_of(text, unit)
    if 0 < len(words) < n:
        return [tuple(words)] if whole else []
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def key_of(gram: tuple[str, ...]) -> int:
    total = 0
    for word in gram:
        h = 0xCBF29CE484222325
        for char in word:
            h = ((h ^ ord(char)) * 0x100000001B3) & MASK
        total = (total * 0xD6E8FEB86659FD93 + mix(h)) & MASK
    return mix(total)


def split(sets: Sets) -> list[list[int]]:
    return [part.tolist() for part in np.split(sets.key, sets.end[:-1])] if len(sets.end) else []


@pytest.mark.parametrize("unit", ["words", "letters", "chars"])
@pytest.mark.parametrize("n", [1, 3, 5])
def test_keys_are_those_of_the_reference(unit, n):
    for whole in (True, False):
        found = split(grams(Blob(HOSTILE).words(unit), n, whole=whole))
        assert found == [[key_of(gram) for gram in grams_of(text, n, unit, whole)] for text in HOSTILE]


@settings(max_examples=200, deadline=None)
@given(st.lists(TEXTS, max_size=4), st.integers(1, 6), st.sampled_from(["words", "letters", "chars"]))
def test_keys_do_not_depend_on_the_neighbours(texts, n, unit):
    together = grams(Blob(texts).words(unit), n)
    alone = [grams(Blob([text]).words(unit), n).key.tolist() for text in texts]
    assert split(together) == alone == [[key_of(gram) for gram in grams_of(text, n, unit)] for text in texts]


@settings(max_examples=200, deadline=None)
@given(st.lists(TEXTS, max_size=4))
def test_normalised_text_has_single_spaces(texts):
    found = [bytes(piece).decode("utf-8", "surrogatepass") for piece in Blob(texts).normalised()]
    assert found == [re.sub(r"\s+", " ", fold(text)).strip(" ") for text in texts]


def test_case_composition_and_white_space_do_not_count():
    assert fold("Caf\u00e9 A\u030a") == fold("cafe\u0301 \u00c5")
    one, two = Blob(["Caf\u00e9  AU\nLait "]).normalised()[0], Blob(["cafe\u0301 au lait"]).normalised()[0]
    assert bytes(one) == bytes(two)


def test_signatures_are_minima_of_the_linear_maps():
    hasher = MinHash(16, seed=5)
    texts = ["a b c d e f g", "a", "", " ".join(map(str, range(19)))]
    found = hasher.sign(grams(Blob(texts).words(), 5))
    for text, signature in zip(texts, found, strict=True):
        keys = [key_of(gram) >> 32 for gram in grams_of(text, 5)]
        assert signature.tolist() == [min([a * key % 2**32 for key in keys], default=2**32 - 1) for a in hasher.a.tolist()]
    assert all(hasher.a % 2 == 1) and len(set(hasher.a.tolist())) == 16
    assert (MinHash(16, seed=6).a != hasher.a).any() and (MinHash(16, seed=5).a == hasher.a).all()


def pairs(count: int, size: int, both: int, seed: int) -> tuple[Sets, Sets, float]:
    """`count` pairs of random sets of `size` keys with `both` in common."""
    keys = np.random.default_rng(seed).integers(0, 2**64, (count, 2 * size - both), dtype=np.uint64)
    end = np.arange(1, count + 1) * size
    one, two = (np.ascontiguousarray(part).ravel() for part in (keys[:, :size], keys[:, size - both :]))
    return Sets(one, end), Sets(two, end), both / (2 * size - both)


@pytest.mark.parametrize(("size", "both"), [(6, 3), (50, 20), (50, 42), (400, 330)])
def test_the_estimate_is_unbiased_with_binomial_variance(size, both):
    one, two, true = pairs(2000, size, both, seed=size + both)
    hasher = MinHash(112, seed=3)
    share = (hasher.sign(one) == hasher.sign(two)).mean(axis=1)
    deviation = np.sqrt(true * (1 - true) / 112)
    assert abs(share.mean() - true) < 4 * deviation / np.sqrt(2000)
    assert share.std() == pytest.approx(deviation, rel=0.08)


@pytest.mark.parametrize(("bands", "rows", "both"), [(14, 8, 82), (14, 8, 90), (20, 5, 60)])
def test_bands_are_shared_as_often_as_the_curve_says(bands, rows, both):
    one, two, true = pairs(3000, 100, both, seed=both)
    hasher = MinHash(bands * rows)
    keys = [band_keys(hasher.sign(sets), bands, rows) for sets in (one, two)]
    expected = shares_a_band(true, bands, rows)
    found = (keys[0] == keys[1]).any(axis=0).mean()
    assert abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / 3000) + 1e-3


def test_band_keys_are_equal_where_their_signatures_are():
    signature = np.random.default_rng(0).integers(0, 3, (300, 6)).astype(np.uint32)
    keys = band_keys(signature, 3, 2)
    for band in range(3):
        own = [tuple(row) for row in signature[:, 2 * band : 2 * band + 2].tolist()]
        assert len(set(zip(own, keys[band].tolist(), strict=True))) == len(set(own)) == len(set(keys[band].tolist()))
    assert len(set(keys.ravel().tolist())) == 27
    with pytest.raises(ValueError, match="not 4 bands of 2"):
        band_keys(signature, 4, 2)


@settings(max_examples=300, deadline=None)
@given(st.sets(st.integers(0, 30)), st.sets(st.integers(0, 30)), st.sampled_from([0.0, 0.2, 0.5, 0.7, 2 / 3, 1.0]))
def test_jaccard_is_exact_and_stops_only_below_the_limit(a, b, least):
    true = len(a & b) / len(a | b) if a and b else 0.0
    found = jaccard(np.array(sorted(a), np.uint64), np.array(sorted(b), np.uint64), least)
    assert found == (true if true >= least else -1.0)


def test_distinct_sorts_each_text_by_itself():
    sets = grams(Blob(["b a b a", "", "a b"]).words(), 1)
    found = split(distinct(sets))
    assert found == [sorted({key_of(("a",)), key_of(("b",))}), [], sorted({key_of(("a",)), key_of(("b",))})]


def test_long_texts_are_one_pass(monkeypatch):
    text = " ".join(f"w{i % 50_000}" for i in range(400_000))
    sets = grams(Blob(["x y", text, "x y"]).words(), 5)
    assert np.diff(sets.end, prepend=0).tolist() == [1, 399_996, 1] and sets.key[0] == sets.key[-1]
    assert len(distinct(sets).key) == 50_000 + 2


def reference_share(row: str, known: list[str], n: int) -> tuple[float, int]:
    own, best = set(grams_of(row, n, "letters", False)), (0.0, -1)
    for i, text in enumerate(known):
        theirs = set(grams_of(text, n, "letters", False))
        if theirs and own & theirs and len(own & theirs) / len(theirs) > best[0]:
            best = (len(own & theirs) / len(theirs), i)
    return best


@pytest.mark.parametrize("seed", range(4))
def test_contamination_is_the_largest_share_of_a_known_row(seed):
    draw = random.Random(seed)
    known = [" ".join(draw.choices("abc", k=draw.randint(0, 12))) for _ in range(30)]
    rows = [" , ".join(draw.choices("abcd", k=draw.randint(0, 40))) for _ in range(60)]
    table = contamination.build(distinct(grams(Blob(known).words("letters"), 3, whole=False)))
    share, hit = contamination.shares(grams(Blob(rows).words("letters"), 3, whole=False), table)
    expected = [reference_share(row, known, 3) for row in rows]
    assert list(zip(share.tolist(), hit.tolist(), strict=True)) == expected
    assert len({at for _, at in expected}) > 3


def test_nothing_is_known_of_no_rows():
    table = contamination.build(Sets(np.empty(0, np.uint64), np.empty(0, np.int64)))
    share, hit = contamination.shares(grams(Blob(["a b c"]).words("letters"), 2), table)
    assert share.tolist() == [0.0] and hit.tolist() == [-1]

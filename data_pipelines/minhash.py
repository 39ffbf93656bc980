"""MinHash signatures of texts (Broder 1997) over n-grams of words or characters, in jitted loops over UTF-8.

The text is folded (NFC, lower case), and its words are the matches of `\\w+|[^\\w\\s]+`. With h(w) a 64-bit hash of a
word and K odd, the n-gram that ends at word i has the key

    key_i = mix(h_i + h_{i-1} K + ... + h_{i-n+1} K^{n-1})        mod 2^64, one multiplication a word

and a text's set is its distinct keys; a text of fewer than n words has one key, that of all its words, and a text
without a word has none. Two n-grams share a key with probability 2^-64, so the Jaccard similarity |A & B| / |A | B| of two
sets of keys is that of the n-grams. Signature i of a text is the least value of a linear map,

    min over keys x of  a_i x mod 2^32        x: the upper half of the key, a_i odd and random,

and two texts agree in each of the k signatures with probability J: the share of equal ones is an unbiased estimate with
variance J (1 - J) / k. Cut into b bands of r, two texts share a band with probability 1 - (1 - J^r)^b, which is the curve
`shares_a_band`; (1 / b)^(1 / r) is where it is steepest.
"""

from __future__ import annotations

import functools
import itertools
import unicodedata
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from data_pipelines.jit import jit
from data_pipelines.ngrams import char_table, mix

Unit = Literal["words", "letters", "chars"]
"""`words`: `\\w+|[^\\w\\s]+`; `letters`: `\\w+` alone; `chars`: characters, a run of white space counting as one space."""

_SPACE, _LETTER, _PUNCT = 0, 1, 2
_MODES = {"words": 0, "letters": 1, "chars": 2}
_K = np.uint64(0xD6E8FEB86659FD93)
_FNV = np.uint64(0x100000001B3)
_START = np.uint64(0xCBF29CE484222325)
_TOP = np.uint32(0xFFFFFFFF)


class Sets(NamedTuple):
    """Keys of the texts laid end to end, uint64, and where each text's end, int64[n]."""

    key: np.ndarray
    end: np.ndarray


def fold(text: str) -> str:
    """The text in NFC and lower case; texts that differ only in these count as equal."""
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower())


@functools.cache
def _classes() -> np.ndarray:
    """uint8 class of every code point: white space, part of a word, or punctuation."""
    return (char_table() & np.uint32(3)).astype(np.uint8)


@jit
def _mixed(x: np.uint64) -> np.uint64:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@jit
def _code(blob: np.ndarray, at: int) -> tuple[int, int]:
    """Code point at a byte of valid UTF-8 (lone surrogates included) and its size in bytes."""
    lead = int(blob[at])
    if lead < 0x80:
        return lead, 1
    if lead < 0xE0:
        return (lead & 0x1F) << 6 | (int(blob[at + 1]) & 0x3F), 2
    if lead < 0xF0:
        return (lead & 0x0F) << 12 | (int(blob[at + 1]) & 0x3F) << 6 | (int(blob[at + 2]) & 0x3F), 3
    tail = (int(blob[at + 1]) & 0x3F) << 12 | (int(blob[at + 2]) & 0x3F) << 6 | (int(blob[at + 3]) & 0x3F)
    return (lead & 0x07) << 18 | tail, 4


@jit
def _words(blob: np.ndarray, ends: np.ndarray, classes: np.ndarray, letters_only: bool, key: np.ndarray, out: np.ndarray) -> int:
    """Keys of the words of each text into `key`, their ends into `out`; returns how many."""
    found = 0
    at = 0
    for text in range(len(ends)):
        before = _SPACE
        held = _START
        while at < ends[text]:
            code, size = _code(blob, at)
            at += size
            kind = classes[code]
            if kind != before:
                if before == _LETTER or (before == _PUNCT and not letters_only):
                    key[found] = _mixed(held)
                    found += 1
                held = _START
                before = kind
            held = (held ^ np.uint64(code)) * _FNV
        if before == _LETTER or (before == _PUNCT and not letters_only):
            key[found] = _mixed(held)
            found += 1
        out[text] = found
    return found


@jit
def _chars(blob: np.ndarray, ends: np.ndarray, classes: np.ndarray, key: np.ndarray, out: np.ndarray) -> int:
    """As `_words`, of characters; white space at both ends is left out and runs of it are one space."""
    found = 0
    at = 0
    for text in range(len(ends)):
        first = found
        space = False
        while at < ends[text]:
            code, size = _code(blob, at)
            at += size
            if classes[code] == _SPACE:
                space = True
                continue
            if space and found > first:
                key[found] = _mixed((_START ^ np.uint64(32)) * _FNV)
                found += 1
            space = False
            key[found] = _mixed((_START ^ np.uint64(code)) * _FNV)
            found += 1
        out[text] = found
    return found


@jit
def _grams(word: np.ndarray, ends: np.ndarray, n: int, whole: bool, key: np.ndarray, out: np.ndarray) -> int:
    """Keys of n-grams; of a text of 1 to n - 1 words that of them all if `whole`, else none."""
    leaving = np.uint64(1)
    for _ in range(n):
        leaving = leaving * _K
    found = 0
    start = 0
    for text in range(len(ends)):
        held = np.uint64(0)
        for i in range(start, ends[text]):
            held = held * _K + word[i]
            if i - start >= n:
                held -= word[i - n] * leaving
            if i - start >= n - 1:
                key[found] = _mixed(held)
                found += 1
        if whole and 0 < ends[text] - start < n:
            key[found] = _mixed(held)
            found += 1
        out[text] = found
        start = ends[text]
    return found


@jit
def _distinct(key: np.ndarray, ends: np.ndarray, out: np.ndarray) -> int:
    """Sorts each text's keys and moves the distinct ones together, in place."""
    found = 0
    start = 0
    for text in range(len(ends)):
        run = np.sort(key[start : ends[text]])
        start = ends[text]
        for i in range(len(run)):
            if i == 0 or run[i] != run[i - 1]:
                key[found] = run[i]
                found += 1
        out[text] = found
    return found


@jit
def _sign(key: np.ndarray, ends: np.ndarray, a: np.ndarray, out: np.ndarray) -> None:
    """Least values of the linear maps; eight keys at a time, since loading and storing `out` costs more than a map."""
    h = np.uint64(32)
    start = 0
    for text in range(len(ends)):
        least = out[text]
        end = ends[text]
        i = start
        while i + 8 <= end:
            x0, x1, x2, x3 = np.uint32(key[i] >> h), np.uint32(key[i + 1] >> h), np.uint32(key[i + 2] >> h), np.uint32(key[i + 3] >> h)
            x4, x5, x6, x7 = np.uint32(key[i + 4] >> h), np.uint32(key[i + 5] >> h), np.uint32(key[i + 6] >> h), np.uint32(key[i + 7] >> h)
            for j in range(len(a)):
                v0 = min(np.uint32(a[j] * x0), np.uint32(a[j] * x1))
                v1 = min(np.uint32(a[j] * x2), np.uint32(a[j] * x3))
                v2 = min(np.uint32(a[j] * x4), np.uint32(a[j] * x5))
                v3 = min(np.uint32(a[j] * x6), np.uint32(a[j] * x7))
                least[j] = min(least[j], min(min(v0, v1), min(v2, v3)))
            i += 8
        while i < end:
            x0 = np.uint32(key[i] >> h)
            for j in range(len(a)):
                least[j] = min(least[j], np.uint32(a[j] * x0))
            i += 1
        start = end


@jit
def _bands(signature: np.ndarray, rows: int, out: np.ndarray) -> None:
    for text in range(signature.shape[0]):
        for band in range(out.shape[0]):
            held = _mixed(np.uint64(band + 1))
            for i in range(band * rows, (band + 1) * rows):
                held = _mixed(held ^ np.uint64(signature[text, i])) + _K
            out[band, text] = held


@jit
def _collapse(blob: np.ndarray, ends: np.ndarray, classes: np.ndarray, out: np.ndarray, out_ends: np.ndarray) -> int:
    """Copies the texts with runs of white space as one space and none at both ends."""
    found = 0
    at = 0
    for text in range(len(ends)):
        first = found
        space = False
        while at < ends[text]:
            code, size = _code(blob, at)
            if classes[code] == _SPACE:
                space = True
            else:
                if space and found > first:
                    out[found] = np.uint8(32)
                    found += 1
                space = False
                for i in range(size):
                    out[found + i] = blob[at + i]
                found += size
            at += size
        out_ends[text] = found
    return found


@jit
def jaccard(a: np.ndarray, b: np.ndarray, least: float) -> float:
    """|A & B| / |A | B| of two sorted arrays of distinct keys; -1 where it is below `least` (0 always gives the value).

    Two empty sets have similarity 0: a text without words is like no other.
    """
    i, j, both = 0, 0, 0
    if len(a) == 0 or len(b) == 0:
        return 0.0 if least <= 0 else -1.0
    needed = int(least / (1.0 + least) * (len(a) + len(b))) - 1
    while i < len(a) and j < len(b):
        if both + min(len(a) - i, len(b) - j) < needed:
            return -1.0
        x, y = a[i], b[j]
        both += x == y
        i += x <= y
        j += y <= x
    found = both / (len(a) + len(b) - both)
    return found if found >= least else -1.0


class Blob:
    """Folded texts as one piece of UTF-8; what is wanted of them is worked out from it.

    Args:
        texts: any; lone surrogates are kept.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        whole: Sequence[str] | list[bytes] = texts
        joined = "".join(texts)
        if joined.isascii():
            encoded = joined.lower().encode()
        else:
            whole = [fold(text).encode("utf-8", "surrogatepass") for text in texts]
            encoded = b"".join(whole)
        self.bytes = np.frombuffer(encoded, np.uint8)
        self.ends = np.cumsum(np.fromiter(map(len, whole), np.int64, len(whole)))

    def words(self, unit: Unit = "words") -> Sets:
        """Keys of the words (or characters) in order, repeats included."""
        key, end = np.empty(len(self.bytes), np.uint64), np.empty(len(self.ends), np.int64)
        if unit == "chars":
            found = _chars(self.bytes, self.ends, _classes(), key, end)
        else:
            found = _words(self.bytes, self.ends, _classes(), unit == "letters", key, end)
        return Sets(key[:found], end)

    def normalised(self) -> list[memoryview]:
        """UTF-8 of each text with runs of white space as one space and none at both ends."""
        out, end = np.empty(len(self.bytes), np.uint8), np.empty(len(self.ends), np.int64)
        _collapse(self.bytes, self.ends, _classes(), out, end)
        view, starts = memoryview(out), [0, *end.tolist()]  # type: ignore[arg-type]
        return [view[a:b] for a, b in itertools.pairwise(starts)]


def grams(words: Sets, n: int, *, whole: bool = True) -> Sets:
    """Keys of the n-grams of words, in order.

    Args:
        words: of `Blob.words`.
        n: words a gram.
        whole: a text of fewer than n words counts as one gram.
    """
    key, end = np.empty(len(words.key), np.uint64), np.empty(len(words.end), np.int64)
    found = _grams(words.key, words.end, n, whole, key, end)
    return Sets(key[:found], end)


def distinct(keys: Sets) -> Sets:
    """Each text's keys sorted, without repeats."""
    key, end = keys.key.copy(), np.empty(len(keys.end), np.int64)
    found = _distinct(key, keys.end, end)
    return Sets(key[:found].copy(), end)


class MinHash:
    """Linear maps, the same on every machine.

    Args:
        permutations: signatures a text, k.
        seed: of the maps.
    """

    def __init__(self, permutations: int = 112, seed: int = 1) -> None:
        drawn = mix(mix(np.arange(1, permutations + 1, dtype=np.uint64)) + mix(np.array([seed], np.uint64)))
        self.a = (drawn >> np.uint64(32)).astype(np.uint32) | np.uint32(1)

    def sign(self, keys: Sets) -> np.ndarray:
        """uint32[n, k]; all ones for a text without keys, which must not be compared."""
        out = np.full((len(keys.end), len(self.a)), _TOP, np.uint32)
        _sign(keys.key, keys.end, self.a, out)
        return out


def band_keys(signature: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """uint64[bands, n]: one hash of each band of `rows` signatures.

    Raises:
        ValueError: the signature is not bands x rows long.
    """
    if signature.shape[1] != bands * rows:
        raise ValueError(f"{signature.shape[1]} signatures are not {bands} bands of {rows}")
    out = np.empty((bands, len(signature)), np.uint64)
    _bands(signature, rows, out)
    return out


def shares_a_band(similarity: float, bands: int, rows: int) -> float:
    """Probability that two texts of this Jaccard similarity share a band."""
    return float(1 - (1 - similarity**rows) ** bands)

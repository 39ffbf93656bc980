"""How varied texts are, and how much of them is copied: pure functions of token ids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Ids = Sequence[int]


def type_token_ratio(ids: Ids) -> float:
    """Different tokens over tokens; 0 for no tokens. Of a window of 96 it is the measure of hyperfitting (arXiv 2412.04318)."""
    return len(set(ids)) / len(ids) if ids else 0.0


def ngrams(ids: Ids, n: int) -> list[tuple[int, ...]]:
    """All n-grams, in order."""
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def repetition(ids: Ids, n: int = 4) -> float:
    """rep-n (Welleck et al. 2020): share of n-grams that occurred before in the same text; 0 for a text without one."""
    found = ngrams(ids, n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def distinct(texts: Sequence[Ids], n: int = 2) -> float:
    """distinct-n (Li et al. 2016): different n-grams over n-grams of all texts together; 0 where there is none."""
    found = [gram for ids in texts for gram in ngrams(ids, n)]
    return len(set(found)) / len(found) if found else 0.0


class Corpus:
    """Texts in which copies are looked for.

    Args:
        texts: token ids of each.
    """

    def __init__(self, texts: Sequence[Ids]) -> None:
        self._texts = [np.asarray(ids, np.uint64) for ids in texts]
        self._hashes: dict[int, np.ndarray] = {}

    def longest_match(self, ids: Ids) -> int:
        """Most tokens in a row of `ids` that one of the texts holds as well."""
        own = np.asarray(ids, np.uint64)
        low, high = 0, min(len(ids), max(map(len, self._texts), default=0))
        while low < high:
            middle = (low + high + 1) // 2
            if np.isin(_windows(own, middle), self._known(middle)).any():
                low = middle
            else:
                high = middle - 1
        return low

    def _known(self, size: int) -> np.ndarray:
        if size not in self._hashes:
            self._hashes[size] = np.unique(np.concatenate([_windows(text, size) for text in self._texts]))
        return self._hashes[size]


def _windows(ids: np.ndarray, size: int) -> np.ndarray:
    """64-bit hash of each window of `size` tokens, by a polynomial over the tokens' mixed ids."""
    if size == 0 or len(ids) < size:
        return np.zeros(0, np.uint64)
    with np.errstate(over="ignore"):
        mixed = (ids + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(32)
        base, total, power = np.uint64(0x100000001B3), np.zeros(len(ids) - size + 1, np.uint64), np.uint64(1)
        for offset in range(size - 1, -1, -1):
            total += mixed[offset : offset + len(total)] * power
            power *= base
    return total

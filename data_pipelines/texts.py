"""The text side of a batch of rows, measured once for every selector: bytes and limits of length."""

from __future__ import annotations

from typing import Any

import numpy as np


def count_bytes(texts: list[str]) -> np.ndarray:
    """int64[n]: length in UTF-8."""
    return np.array([len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass")) for text in texts], np.int64)


def length_reasons(words: np.ndarray, filters: Any) -> np.ndarray:
    """Why a row of so many words is not picked; "" = it may be."""
    longest = filters.max_words or np.iinfo(np.int64).max
    cases = [words == 0, words < filters.min_words, words > longest]
    return np.select(cases, ["without words", f"below {filters.min_words} words", f"above {filters.max_words} words"], "")

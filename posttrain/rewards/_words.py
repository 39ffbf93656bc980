r"""Words, n-grams and loops of a text, for rewards.

`words`: NLTK's `wordpunct_tokenize`, i.e. runs of `\w` and runs of other characters that are no white space. `units`: the same
with each Chinese or Japanese character alone, since those languages write no spaces and a sentence would be one word.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

_WORD = re.compile(r"\w+|[^\w\s]+")
_ALONE = "\u3005\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_UNIT = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+|[^\w\s]+")


def words(text: str) -> list[str]:
    """Words as NLTK's `wordpunct_tokenize` cuts them."""
    return _WORD.findall(text)


def units(text: str) -> list[str]:
    """Words, Chinese and Japanese characters one by one."""
    return _UNIT.findall(text)


def unique_share(items: Sequence[Hashable], n: int = 3) -> float:
    """Different n-grams over all n-grams, in (0, 1]; 1.0 where there are fewer than n items."""
    grams = len(items) - n + 1
    return len(set(zip(*(items[i:] for i in range(n)), strict=False))) / grams if grams > 0 else 1.0


def loop_length(items: Sequence[Hashable], repeats: int) -> int:
    """Length of the longest end of `items` that repeats one unit at least `repeats` times (the first may be cut); 0 if none does.

    An end of length m has period p where every item equals the one p places before it; it repeats its unit m / p times.
    Linear time: the Z-function of the reversed sequence gives for each p how far the end agrees with itself shifted by p.
    """
    text = items[::-1]
    best, reach = 0, _z_function(text)
    for period in range(1, len(text) // repeats + 1):
        length = period + reach[period]
        if length >= repeats * period and length > best:
            best = length
    return best


def _z_function(text: Sequence[Hashable]) -> list[int]:
    """For each place, how many items from there equal those from the start."""
    size = len(text)
    reach, left, right = [0] * size, 0, 0
    for i in range(1, size):
        length = min(right - i, reach[i - left]) if i < right else 0
        while i + length < size and text[length] == text[i + length]:
            length += 1
        reach[i] = length
        if i + length > right:
            left, right = i, i + length
    return reach

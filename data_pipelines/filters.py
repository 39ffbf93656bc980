"""Published quality filters: rows that are left out before anything is picked, each with its reason.

`dsir-paper`: the filter of the experiments of Xie et al. 2023 (arXiv 2302.03169; the code of the authors' repository), on
the words of the lower-cased text:

    40 < words < 500,   0.02 < share of the most frequent word < 0.2,   0.3 < informative share < 0.7,   words not one digit > 0.8

Informative is what is neither a function word of English nor punctuation. Two differences: words are those of the authors'
package (`ngrams.WORD`) instead of NLTK's `word_tokenize`, whose model is a download, so `don't` is three words, all of them
uninformative, instead of two; and a run of punctuation is one uninformative word instead of several. It is a filter for
English.

`gopher`: the repetition rules of Rae et al. 2021 (arXiv 2112.11446), table A1, counted as datatrove's GopherRepetitionFilter
does, on the words above instead of a tokenizer's by language: shares of repeated lines and paragraphs and of the characters
in them; characters of the most frequent n-gram (n = 2, 3, 4; the words joined by spaces, times its count) and of the
n-grams (n = 5 ... 10; read from left to right without overlap) that have come before, over the characters of the text.
"""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np

from data_pipelines.jit import jit
from data_pipelines.ngrams import char_table, find_words, mix1, pieces
from data_pipelines.selector import Filters

LINES = (("paragraphs", re.compile(r"\n{2,}"), 0.30, 0.20), ("lines", re.compile(r"\n+"), 0.30, 0.20))
"""What is repeated, where it is cut, and the largest shares of repeated ones and of their characters."""
TOP = ((2, 0.20), (3, 0.18), (4, 0.16))
"""n and the largest share of characters in the most frequent n-gram."""
REPEATED = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
"""n and the largest share of characters in n-grams that have come before."""

FUNCTION_WORDS = {
    "articles and determiners": "a an the this that these those each few more most other some such no any all both own same",
    "personal pronouns": "i me we you he him she her it they them",
    "possessives": "my our your his its their ours yours hers theirs",
    "reflexives": "myself ourselves yourself yourselves himself herself itself themselves",
    "interrogatives and relatives": "what which who whom when where why how",
    "be, have, do and modals": "am is are was were be been being have has had having do does did doing can will should",
    "conjunctions": "and but if or because as until while than so nor",
    "prepositions and particles": (
        "of at by for with about against between into through during before after above below to from up down in out on off over under"
    ),
    "adverbs": "again further then once here there not only too very just now",
    "what is left of contractions": (
        "s t d m o y ll re ve ma don ain aren couldn didn doesn hadn hasn haven isn mightn mustn needn shan shouldn wasn weren won wouldn"
    ),
}
"""Words of English that carry grammar instead of content, with the pieces into which `don't` or `we'll` fall."""

_K = np.uint64(0x8CB92BA72F3D8DD7)


def reasons(texts: list[str], words: np.ndarray, filters: Filters) -> np.ndarray:
    """Why each row is left out by `filters.quality` and `filters.repetition`; "" = it is not. Lengths are judged elsewhere.

    Args:
        texts: n of them.
        words: int64[n], as counted by the selector.
        filters: which to apply.

    Returns:
        object[n] of str.
    """
    found = np.full(len(texts), "", object)
    for i, text in enumerate(texts):
        if not words[i]:
            continue
        key, length, punctuation = _words(text)
        if filters.quality == "dsir-paper":
            found[i] = quality_reason(key, punctuation)
        if not found[i] and filters.repetition == "gopher":
            found[i] = repetition_reason(text, key, length)
    return found


def _words(text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Key uint64 and characters int64 of each word, and whether it is punctuation."""
    keys, lengths, kinds = [], [], []
    for piece in pieces([text], 1):
        words = find_words([piece.text])
        keys.append(words.key)
        lengths.append((words.end - words.start).astype(np.int64))
        kinds.append(char_table()[words.codes[words.start]] & 3 == 2)
    return np.concatenate(keys), np.concatenate(lengths), np.concatenate(kinds)


@functools.cache
def _known() -> tuple[np.ndarray, np.ndarray]:
    """Keys of the uninformative words that are not punctuation, and of the digits."""
    listed = [*chain.from_iterable(words.split() for words in FUNCTION_WORDS.values()), "_"]
    return find_words([f"{word} " for word in listed]).key, find_words([f"{digit} " for digit in string.digits]).key


def quality_reason(key: np.ndarray, punctuation: np.ndarray) -> str:
    """The first rule of `dsir-paper` that words with these keys break, or ""."""
    count = len(key)
    stop, digits = _known()
    frequent = int(np.unique(key, return_counts=True)[1].max()) / count
    informative = int((~punctuation & ~np.isin(key, stop)).sum()) / count
    worded = int((~np.isin(key, digits)).sum()) / count
    rules = (
        ("words", 40 < count < 500), ("most frequent word", 0.02 < frequent < 0.2),
        ("informative words", 0.3 < informative < 0.7), ("digits", worded > 0.8),
    )  # fmt: skip
    return next((f"dsir-paper: {name}" for name, kept in rules if not kept), "")


def repetition_reason(text: str, key: np.ndarray, length: np.ndarray) -> str:
    """The first rule of `gopher` that the text breaks, or ""."""
    for name, cut, share, char_share in LINES:
        parts = cut.split(text.strip() if name == "paragraphs" else text)
        repeated, characters = _repeated(parts)
        if repeated / len(parts) > share:
            return f"gopher: repeated {name}"
        if characters / len(text) > char_share:
            return f"gopher: characters in repeated {name}"
    sizes = np.array([n for n, _ in (*TOP, *REPEATED)])
    inside = np.zeros(len(sizes), np.int64)
    _in_ngrams(key, length, sizes, len(TOP), inside)
    for i, (n, share) in enumerate((*TOP, *REPEATED)):
        if inside[i] / len(text) > share:
            return f"gopher: characters in {'the most frequent' if i < len(TOP) else 'repeated'} {n}-gram{'s' if i >= len(TOP) else ''}"
    return ""


def _repeated(parts: Iterable[str]) -> tuple[int, int]:
    """How many of the parts have come before, and their characters."""
    seen: set[str] = set()
    count = characters = 0
    for part in parts:
        if part in seen:
            count, characters = count + 1, characters + len(part)
        seen.add(part)
    return count, characters


@jit
def _in_ngrams(key: np.ndarray, length: np.ndarray, sizes: np.ndarray, top: int, characters: np.ndarray) -> None:
    """Characters in the most frequent n-gram for the first `top` sizes, and in repeated n-grams for the others.

    Sets of n-grams are tables with open addresses of at least twice the words; `stamp` tells one size's entries from another's.
    """
    places = 16
    while places < 2 * len(key):
        places *= 2
    grams, stamp, count = np.zeros(places, np.uint64), np.zeros(places, np.int8), np.zeros(places, np.int64)
    mask = np.uint64(places - 1)
    for s in range(len(sizes)):
        n = sizes[s]
        best = i = 0
        while i < len(key) - n + 1:
            gram = key[i]
            size = length[i]
            for j in range(i + 1, i + n):
                gram = mix1(gram * _K + key[j])
                size += length[j]
            at = gram & mask
            while stamp[at] == s + 1 and grams[at] != gram:
                at = (at + np.uint64(1)) & mask
            if stamp[at] != s + 1:
                stamp[at], grams[at], count[at] = s + 1, gram, 0
            elif s >= top:
                characters[s] += size
                i += n
                continue
            count[at] += 1
            if s < top and count[at] > best:
                best = count[at]
            i += 1
        if s < top and best:
            characters[s] = _first_of(key, length, n, best, grams, stamp, count, s + 1)


@jit
def _first_of(
    key: np.ndarray, length: np.ndarray, n: int, best: int, grams: np.ndarray, stamp: np.ndarray, count: np.ndarray, mark: int
) -> Any:
    """`best` times the characters, with spaces between words, of the first n-gram that occurs so often."""
    mask = np.uint64(len(grams) - 1)
    for i in range(len(key) - n + 1):
        gram = key[i]
        size = length[i]
        for j in range(i + 1, i + n):
            gram = mix1(gram * _K + key[j])
            size += length[j] + 1
        at = gram & mask
        while stamp[at] == mark and grams[at] != gram:
            at = (at + np.uint64(1)) & mask
        if count[at] == best:
            return best * size
    return 0

"""Word-salad guard: rows whose neighbouring words do not belong together are left out, whatever bag of words they hold.

From the counts c of words and of adjacent word pairs in target and raw rows together, with N words in all, a pair (a, b)
of row x has the smoothed pointwise mutual information, its own row left out (c'),

    PMI(a, b) = log (c'_ab + lambda) / (e_ab + lambda),     e_ab = c'_a c'_b / N'

and the row's figure is the mean over its pairs. Independent draws have c_ab near e_ab, so their mean is near or below zero
however likely each word is; written text lies above, in every language and in code. Pairs too rare to judge shrink to
zero. The threshold is a low quantile of the target rows' own figures.

Counts are kept in tables of fixed size by the hash of a word or pair: memory is 40 MB for any number of rows, and since
sums of integers do not depend on the order, neither do the figures depend on shards or workers. Pairs that share a place
add their counts; N / places of foreign counts are expected in each, which is subtracted, and lambda = 1 + N / places keeps
what is left of them from being taken for a sign. So with ever more rows the guard goes by ever more frequent pairs. Rows
that are in the data twice vouch for one another: deduplicate first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from data_pipelines.jit import jit
from data_pipelines.ngrams import WINDOW, batches, find_words, mix1, pieces
from data_pipelines.selector import Arrays, Guard, Row

PAIR_BITS, WORD_BITS = 22, 20
"""log2 of the places for pairs and for words; 8 bytes each."""
MIN_TARGET_ROWS = 50
"""Fewer judged target rows than this set no threshold."""
_K = np.uint64(0xA0761D6478BD642F)
_DENSE = 4
"""Tables are written as lists of (place, count) where fewer than one place in so many is used."""


def watch(rows: Iterable[Row], cfg: Guard) -> tuple[Iterator[Row], Callable[[], Arrays]]:
    """Counts rows as they pass by on their way to a selector's own fit.

    Args:
        rows: of one shard, raw or target.
        cfg: not used; all guards count alike.

    Returns:
        (iterator over the same rows, function that gives the counts once the iterator is exhausted).
    """
    pairs, words = np.zeros(1 << PAIR_BITS, np.int64), np.zeros(1 << WORD_BITS, np.int64)

    def passing() -> Iterator[Row]:
        from posttrain.data.rows import row_text

        held: list[str] = []
        size = 0
        for row in rows:
            held.append(row_text(row))
            size += len(held[-1]) + 1
            if size >= WINDOW:
                _add(held, pairs, words)
                held, size = [], 0
            yield row
        _add(held, pairs, words)

    return passing(), lambda: {**_packed("pairs", pairs), **_packed("words", words)}


def merge(raw_parts: Iterable[Arrays], target_parts: Iterable[Arrays], cfg: Guard) -> Arrays:
    """The guard's tables, `pairs` int64[2^PAIR_BITS] and `words` int64[2^WORD_BITS], from what `watch` counted in each shard."""
    pairs, words = np.zeros(1 << PAIR_BITS, np.int64), np.zeros(1 << WORD_BITS, np.int64)
    for parts in (raw_parts, target_parts):
        for part in parts:
            _unpack("pairs", part, pairs)
            _unpack("words", part, words)
    return {"pairs": pairs, "words": words}


def scores(texts: list[str], state: Arrays, cfg: Guard, own: bool = True) -> np.ndarray:
    """Mean PMI of each text's adjacent words, float64[n]; nan where it has fewer than `cfg.min_pairs` pairs.

    Args:
        texts: any number.
        state: of `merge`.
        cfg: for `min_pairs`.
        own: the texts were counted in the tables, so each one's own counts are taken out before it is judged.
    """
    found = np.full(len(texts), np.nan)
    total = int(state["words"].sum())
    own_pairs, own_words = np.zeros(1 << PAIR_BITS, np.int32), np.zeros(1 << WORD_BITS, np.int32)
    for document, key, first in _keys(texts):
        mean = np.empty(len(document))
        _judge(key, first, state["pairs"], state["words"], total, own_pairs, own_words, own, cfg.min_pairs, mean)
        found[document] = mean
    return found


def threshold(target_scores: np.ndarray, cfg: Guard) -> float:
    """The `cfg.quantile` quantile of the target rows' figures: raw rows below it are salad.

    -inf, which lets every row pass, where fewer than MIN_TARGET_ROWS target rows could be judged.
    """
    judged = target_scores[np.isfinite(target_scores)]
    return float(np.quantile(judged, cfg.quantile)) if len(judged) >= MIN_TARGET_ROWS else -np.inf


def _keys(texts: Iterable[str]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Numbers of some texts, the keys of their words end to end, and where each text's begin (and the end); all texts, in order."""
    held, held_key = -1, np.zeros(0, np.uint64)
    for batch in batches(pieces(texts, 1)):
        words = find_words([piece.text for piece in batch])
        document = np.array([piece.document for piece in batch])
        if held >= 0:
            document = np.append(held, document)
        size = np.append(len(held_key), np.diff(words.first)) if held >= 0 else np.diff(words.first)
        key = np.concatenate([held_key, words.key])
        last = len(document) - 1
        while last and document[last - 1] == document[-1]:
            last -= 1
        ends = np.cumsum(np.append(0, size))
        if last:
            whole, at = np.unique(document[:last], return_index=True)
            yield whole, key, np.append(ends[at], ends[last])
        held, held_key = int(document[-1]), key[ends[last] :]
    if held >= 0:
        yield np.array([held]), held_key, np.array([0, len(held_key)])


def _add(texts: list[str], pairs: np.ndarray, words: np.ndarray) -> None:
    for _, key, first in _keys(texts):
        _count(key, first, pairs, words)


@jit
def _count(key: np.ndarray, first: np.ndarray, pairs: np.ndarray, words: np.ndarray) -> None:
    """Adds the words key[first[d]:first[d+1]] of each text, and their adjacent pairs."""
    for d in range(len(first) - 1):
        for i in range(first[d], first[d + 1]):
            words[key[i] & np.uint64(len(words) - 1)] += 1
            if i + 1 < first[d + 1]:
                pairs[mix1(key[i] * _K + key[i + 1]) & np.uint64(len(pairs) - 1)] += 1


@jit
def _judge(
    key: np.ndarray, first: np.ndarray, pairs: np.ndarray, words: np.ndarray, total: int,
    own_pairs: np.ndarray, own_words: np.ndarray, own: bool, min_pairs: int, mean: np.ndarray,
) -> None:  # fmt: skip
    """The mean PMI of each text; `own_pairs` and `own_words` are zero before and after."""
    pair_mask, word_mask = np.uint64(len(pairs) - 1), np.uint64(len(words) - 1)
    for d in range(len(first) - 1):
        start, stop = first[d], first[d + 1]
        if stop - start <= min_pairs:
            mean[d] = np.nan
            continue
        if own:
            for i in range(start, stop):
                own_words[key[i] & word_mask] += 1
                if i + 1 < stop:
                    own_pairs[mix1(key[i] * _K + key[i + 1]) & pair_mask] += 1
        rest = max(total - (stop - start), 1) if own else max(total, 1)
        foreign_pairs, foreign_words = rest / len(pairs), rest / len(words)
        smooth = 1.0 + foreign_pairs
        found = 0.0
        for i in range(start, stop - 1):
            at, left, right = mix1(key[i] * _K + key[i + 1]) & pair_mask, key[i] & word_mask, key[i + 1] & word_mask
            both = max(pairs[at] - own_pairs[at] - foreign_pairs, 0.0)
            a = max(words[left] - own_words[left] - foreign_words, 0.0)
            b = max(words[right] - own_words[right] - foreign_words, 0.0)
            found += np.log((both + smooth) / (a * b / rest + smooth))
        mean[d] = found / (stop - start - 1)
        if own:
            for i in range(start, stop):
                own_words[key[i] & word_mask] = 0
                if i + 1 < stop:
                    own_pairs[mix1(key[i] * _K + key[i + 1]) & pair_mask] = 0


def _packed(name: str, table: np.ndarray) -> Arrays:
    """A table as it is, or its used places, whichever is smaller."""
    at = np.flatnonzero(table)
    if len(at) * _DENSE > len(table):
        return {name: table}
    return {f"{name}_at": at.astype(np.uint32), f"{name}_count": table[at]}


def _unpack(name: str, part: Arrays, table: np.ndarray) -> None:
    """Adds a packed table to `table`."""
    if name in part:
        table += part[name]
    else:
        table[part[f"{name}_at"]] += part[f"{name}_count"]

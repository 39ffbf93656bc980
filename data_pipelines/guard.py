"""Word-salad guard: rows whose neighbouring words do not belong together are left out, whatever bag of words they hold.

From the counts c of words and of adjacent word pairs in target and raw rows together, with N words in all, a pair (a, b)
of row x has the smoothed pointwise mutual information, its own row left out (c'),

    PMI(a, b) = log (c'_ab + lambda) / (e_ab + lambda),     e_ab = c'_a c'_b / N'

and the row's PMI is the mean over its pairs. Independent draws have c_ab near e_ab, so their mean is near or below zero
however likely each word is; written text lies above, in every language and in code. Pairs too rare to judge shrink to
zero. Where "near zero" is depends on the data, so it is measured: a sample of target rows with their words in random order
gives the mean mu and deviation sigma of the PMI of salad, and a row's figure is

    z(x) = (PMI(x) - mu) / sigma

A row is salad below z = 4, or below a low quantile of the target rows' own figures where that is lower (so that no target
loses its rows). The quantile alone would not do: a target of few templates or with rows that are there twice has a far
higher PMI than any other text.

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
from data_pipelines.ngrams import WINDOW, batches, find_words, mix, mix1, pieces
from data_pipelines.selector import Arrays, Guard, Row

PAIR_BITS, WORD_BITS = 22, 20
"""log2 of the places for pairs and for words; 8 bytes each."""
MIN_TARGET_ROWS = 50
"""Fewer judged target rows than this set no threshold."""
SALAD = 4.0
"""Figure below which a row is salad."""
SAMPLE_ROWS, SAMPLE_WORDS, ORDERS = 64, 256, 4
"""Target rows that are put in random order, how much of each, and how often."""
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
    pairs, words, sample = np.zeros(1 << PAIR_BITS, np.int64), np.zeros(1 << WORD_BITS, np.int64), _Sample()

    def passing() -> Iterator[Row]:
        from posttrain.data.rows import row_text

        held: list[str] = []
        size = 0
        for row in rows:
            held.append(row_text(row))
            size += len(held[-1]) + 1
            if size >= WINDOW:
                _add(held, pairs, words, sample)
                held, size = [], 0
            yield row
        _add(held, pairs, words, sample)

    return passing(), lambda: {**_packed("pairs", pairs), **_packed("words", words), **sample.packed()}


def merge(raw_parts: Iterable[Arrays], target_parts: Iterable[Arrays], cfg: Guard) -> Arrays:
    """The guard's tables, from what `watch` counted in each shard.

    Returns:
        `pairs` int64[2^PAIR_BITS], `words` int64[2^WORD_BITS], `null` float64[2]: mu and sigma, nan without a target row that
        can be judged.
    """
    pairs, words, sample = np.zeros(1 << PAIR_BITS, np.int64), np.zeros(1 << WORD_BITS, np.int64), _Sample()
    for part in raw_parts:
        _unpack("pairs", part, pairs)
        _unpack("words", part, words)
    for part in target_parts:
        _unpack("pairs", part, pairs)
        _unpack("words", part, words)
        sample.unpack(part)
    tables = {"pairs": pairs, "words": words}
    return {**tables, "null": _null(list(sample.rows.values()), tables, cfg)}


def scores(texts: list[str], state: Arrays, cfg: Guard, own: bool = True) -> np.ndarray:
    """How far each text is from words in random order, z(x), float64[n]; nan where it has fewer than `cfg.min_pairs` pairs.

    Args:
        texts: any number.
        state: of `merge`.
        cfg: for `min_pairs`.
        own: the texts were counted in the tables, so each one's own counts are taken out before it is judged.
    """
    mean, deviation = state["null"]
    found: np.ndarray = (mean_pmi(texts, state, cfg, own) - mean) / deviation
    return found


def mean_pmi(texts: list[str], state: Arrays, cfg: Guard, own: bool = True) -> np.ndarray:
    """Mean PMI of each text's adjacent words in nats, float64[n]; nan and arguments as in `scores`."""
    found, judge = np.full(len(texts), np.nan), _judged(state, cfg, own)
    for document, key, first in _keys(texts):
        found[document] = judge(key, first)
    return found


def _judged(state: Arrays, cfg: Guard, own: bool) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """(keys end to end, where each text's begin) -> mean PMI of each text."""
    pairs, words = state["pairs"], state["words"]
    own_pairs, own_words, total = np.zeros(len(pairs), np.int32), np.zeros(len(words), np.int32), int(words.sum())

    def judge(key: np.ndarray, first: np.ndarray) -> np.ndarray:
        mean = np.empty(len(first) - 1)
        _judge(key, first, pairs, words, total, own_pairs, own_words, own, cfg.min_pairs, mean)
        return mean

    return judge


def _null(rows: list[np.ndarray], tables: Arrays, cfg: Guard) -> np.ndarray:
    """Mean and deviation of the PMI of rows (given by their words' keys) in random order."""
    mixed = [key[random_order(len(key), turn)] for key in rows for turn in range(ORDERS)]
    key = np.concatenate([np.zeros(0, np.uint64), *mixed])
    found = _judged(tables, cfg, True)(key, np.cumsum([0, *map(len, mixed)]))
    found = found[np.isfinite(found)]
    return np.array([found.mean(), max(float(found.std()), 1e-6)]) if len(found) else np.full(2, np.nan)


def random_order(count: int, turn: int) -> np.ndarray:
    """A permutation of 0..count-1, the same for the same arguments."""
    return np.argsort(mix(np.arange(count, dtype=np.uint64) + np.uint64((turn + 1) << 32)))


class _Sample:
    """The rows with the smallest hashes of their words, as keys; rows with the same words are one."""

    def __init__(self) -> None:
        self.rows: dict[int, np.ndarray] = {}
        self._limit = np.uint64(2**64 - 1)

    def add(self, hashes: np.ndarray, key: np.ndarray, first: np.ndarray) -> None:
        for d in np.flatnonzero(hashes < self._limit):
            self.rows[int(hashes[d])] = key[first[d] : min(first[d + 1], first[d] + SAMPLE_WORDS)].copy()
        self._shrink()

    def _shrink(self) -> None:
        self.rows = dict(sorted(self.rows.items())[:SAMPLE_ROWS])
        if len(self.rows) == SAMPLE_ROWS:
            self._limit = np.uint64(max(self.rows))

    def packed(self) -> Arrays:
        sizes = np.array([len(key) for key in self.rows.values()], np.int64)
        keys = np.concatenate([np.zeros(0, np.uint64), *self.rows.values()])
        return {"sample_hashes": np.array(list(self.rows), np.uint64), "sample_sizes": sizes, "sample_keys": keys}

    def unpack(self, part: Arrays) -> None:
        first = np.cumsum(np.append(0, part["sample_sizes"]))
        self.add(part["sample_hashes"], part["sample_keys"], first)


def threshold(target_scores: np.ndarray, cfg: Guard) -> float:
    """The figure below which a raw row is salad: SALAD, or the `cfg.quantile` quantile of the target rows' if that is lower.

    -inf, which lets every row pass, where fewer than MIN_TARGET_ROWS target rows could be judged.
    """
    judged = target_scores[np.isfinite(target_scores)]
    return min(SALAD, float(np.quantile(judged, cfg.quantile))) if len(judged) >= MIN_TARGET_ROWS else -np.inf


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


def _add(texts: list[str], pairs: np.ndarray, words: np.ndarray, sample: _Sample) -> None:
    for _, key, first in _keys(texts):
        hashes = np.empty(len(first) - 1, np.uint64)
        _count(key, first, pairs, words, hashes)
        sample.add(hashes, key, first)


@jit
def _count(key: np.ndarray, first: np.ndarray, pairs: np.ndarray, words: np.ndarray, hashes: np.ndarray) -> None:
    """Adds the words key[first[d]:first[d+1]] of each text, and their adjacent pairs; `hashes` takes a hash of its words."""
    for d in range(len(first) - 1):
        h = np.uint64(0)
        for i in range(first[d], first[d + 1]):
            words[key[i] & np.uint64(len(words) - 1)] += 1
            h = h * _K + key[i]
            if i + 1 < first[d + 1]:
                pairs[mix1(key[i] * _K + key[i + 1]) & np.uint64(len(pairs) - 1)] += 1
        hashes[d] = mix1(h)


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

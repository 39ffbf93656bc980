"""Which rows duplicate which: equal keys, shared bands, and pairs verified by their true Jaccard similarity.

Rows are numbers 0, 1, ... over all shards. Nothing here depends on how those numbers are given: rows are compared by
their keys and by `rank`, a total order made of what the rows are.

    bands     rows that share a band, directly or through others, are one candidate cluster: one band at a time, its
              (key, row) pairs sorted, equal neighbours united in a union-find over row numbers
    verify    inside a candidate cluster, pairs that share a band and have Jaccard similarity >= the threshold are edges;
              rows joined by edges, directly or through others, are one cluster, of which the best-ranked row is kept
    large     a candidate cluster above `max_cluster` is most often a false one, chained by boilerplate. There nothing goes
              by way of others: in the order of rank, a row is dropped only if it is itself similar enough to a row already
              kept with which it shares a band

and rows of `against`, ranked before all others, are compared directly, are never united, and never dropped.

Memory: 8 bytes a row for the union-find, and while a band is sorted about 32 bytes for each row of a window; a band with
more rows than a window is taken in slices of the key's range. Verifying holds the sets of a group of clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from data_pipelines.jit import jit
from data_pipelines.minhash import jaccard

WINDOW_ROWS = 1 << 25
"""(key, row) pairs that are sorted at a time, by default."""

MOST_COMPARED = 10_000
"""Kept rows of a large cluster that a row is compared with at most."""

KeysOf = Callable[[int], Iterator[tuple[np.ndarray, np.ndarray]]]
"""Column -> (keys uint64, rows int64) shard by shard."""


@jit
def _find(parent: np.ndarray, x: int) -> int:
    while parent[x] != x:
        parent[x] = parent[parent[x]]
        x = parent[x]
    return x


@jit
def _union(parent: np.ndarray, x: int, y: int) -> None:
    x, y = _find(parent, x), _find(parent, y)
    if x < y:
        parent[y] = x
    elif y < x:
        parent[x] = y


@jit
def unite(parent: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
    """Joins the sets of first[i] and second[i]; a set's root is its smallest member."""
    for i in range(len(first)):
        _union(parent, first[i], second[i])


@jit
def flatten(parent: np.ndarray) -> None:
    """Makes every entry the root of its set."""
    for x in range(len(parent)):
        parent[x] = parent[parent[x]] if parent[x] < x else x


def slices(rows: int, window: int) -> list[tuple[int, int]]:
    """(bits, value): keys whose upper `bits` bits are `value` are taken together, about `window` of them or fewer."""
    bits = max(0, (max(rows, 1) - 1) // max(window, 1)).bit_length()
    return [(bits, value) for value in range(1 << bits)]


def _in_slice(keys: np.ndarray, bits: int, value: int) -> np.ndarray:
    if not bits:
        return np.arange(len(keys))
    return np.flatnonzero((keys >> np.uint64(64 - bits)) == np.uint64(value))


def join_bands(keys_of: KeysOf, bands: int, rows: int, window: int = WINDOW_ROWS) -> np.ndarray:
    """Candidate clusters: int64[rows], the smallest row number of each row's cluster.

    Args:
        keys_of: band -> keys and row numbers of the rows that take part.
        bands: how many.
        rows: how many row numbers there are.
        window: pairs sorted at a time; does not change the result.
    """
    parent = np.arange(rows, dtype=np.int64)
    for band in range(bands):
        for bits, value in slices(rows, window):
            taken = [(keys[at], where[at]) for keys, where in keys_of(band) for at in [_in_slice(keys, bits, value)]]
            keys, where = (np.concatenate(column) for column in zip(*taken, strict=True))
            order = np.argsort(keys)
            same = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
            unite(parent, where[order[same]], where[order[same + 1]])
    flatten(parent)
    return parent


def equal_groups(keys_of: KeysOf, rows: int, window: int = WINDOW_ROWS) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose 128-bit key is also another row's: (row numbers, number of their group), group by group.

    Args:
        keys_of: 0 or 1 -> lower or upper halves of the keys, and row numbers.
        rows, window: as in `join_bands`.
    """
    found, group, count = [np.empty(0, np.int64)], [np.empty(0, np.int64)], 0
    for bits, value in slices(rows, window):
        taken = []
        for (low, where), (high, _) in zip(keys_of(0), keys_of(1), strict=True):
            at = _in_slice(low, bits, value)
            taken.append((low[at], high[at], where[at]))
        low, high, where = (np.concatenate(column) for column in zip(*taken, strict=True))
        order = np.lexsort((high, low))
        low, high, where = low[order], high[order], where[order]
        label = np.cumsum(np.append(True, (low[1:] != low[:-1]) | (high[1:] != high[:-1]))[: len(low)])
        several = np.bincount(label)[label] > 1 if len(label) else np.empty(0, bool)
        names, inverse = np.unique(label[several], return_inverse=True)
        found.append(where[several])
        group.append(inverse + count)
        count += len(names)
    return np.concatenate(found), np.concatenate(group)


class Members(NamedTuple):
    """Rows of whole candidate clusters, each cluster's together and in the order of rank.

    Args:
        first: int64[c + 1]; where each cluster begins.
        against: bool[k]; rows that are only compared with; they stand first in their cluster.
        bands: uint64[bands, k].
        key, end: sets of keys laid end to end, uint64, and where each row's ends, int64[k]; both empty if nothing is verified.
    """

    first: np.ndarray
    against: np.ndarray
    bands: np.ndarray
    key: np.ndarray
    end: np.ndarray


class Verdict(NamedTuple):
    """What becomes of the members.

    Args:
        kept: int64[k]; the member that stands for this one: itself if it stays.
        similarity: float64[k]; true Jaccard similarity to it; NaN where none was worked out.
        root: int64[k]; best-ranked member of this one's cluster (in a large one, of the rows that are not of `against`).
        tried: pairs whose sets were compared; 0 if nothing is verified.
        untried: rows that stay although some pairs were left out: they had been compared with `most` kept rows.
    """

    kept: np.ndarray
    similarity: np.ndarray
    root: np.ndarray
    tried: int
    untried: int


def resolve(members: Members, least: float | None, max_cluster: int, most: int = MOST_COMPARED) -> Verdict:
    """Decides candidate clusters; see the module docstring.

    Args:
        members: the clusters.
        least: Jaccard similarity of an edge; None: sharing a band is enough.
        max_cluster: rows above which a candidate cluster is a large one.
        most: kept rows of a large cluster that a row is compared with at most.
    """
    count = len(members.against)
    kept, root = np.arange(count), np.arange(count)
    begin = np.zeros(count, np.int64)
    begin[1:] = members.end[:-1] if least is not None else 0
    end = members.end if least is not None else begin
    rule = (members.key, begin, end, least is not None, least or 0.0)
    order = np.argsort(members.bands, axis=1, kind="stable")
    size = np.diff(members.first)
    tried = _meet_against(order, members.bands, members.against, *rule, kept) if members.against.any() else 0
    tried += _link(order, members.bands, members.against, np.repeat(size, size) <= max_cluster, *rule, kept, root)
    untried = 0
    for which in np.flatnonzero(size > max_cluster).tolist():
        at = slice(int(members.first[which]), int(members.first[which + 1]))
        bucket = np.stack([np.unique(keys, return_inverse=True)[1] for keys in members.bands[:, at]])
        pairs, open_rows = _lead(bucket, at.start, members.against, *rule, most, kept, root)
        tried, untried = tried + pairs, untried + open_rows
    similarity = np.full(count, np.nan)
    if least is not None:
        _similarities(members.key, begin, end, kept, similarity)
    return Verdict(kept, similarity, root, tried if least is not None else 0, untried)


@jit
def _met_before(bands: np.ndarray, band: int, x: int, y: int) -> bool:
    """An earlier band is shared too, so this pair has had its turn."""
    met = False
    for i in range(band):
        met |= bands[i, x] == bands[i, y]
    return met


@jit
def _alike(key: np.ndarray, begin: np.ndarray, end: np.ndarray, verify: bool, least: float, x: int, y: int) -> bool:
    return not verify or jaccard(key[begin[x] : end[x]], key[begin[y] : end[y]], least) >= 0


@jit
def _run_end(order: np.ndarray, keys: np.ndarray, start: int) -> int:
    """End of the run of rows with equal key that begins at `start` of the sorted order."""
    end = start + 1
    while end < len(order) and keys[order[end]] == keys[order[start]]:
        end += 1
    return end


@jit
def _meet_against(
    order: np.ndarray, bands: np.ndarray, against: np.ndarray,
    key: np.ndarray, begin: np.ndarray, end: np.ndarray, verify: bool, least: float, kept: np.ndarray,
) -> int:  # fmt: skip
    """Gives each row that is like a row of `against` that row to stand for it: the first by band, then by rank."""
    tried = 0
    for band in range(len(bands)):
        start = 0
        while start < order.shape[1]:
            stop = _run_end(order[band], bands[band], start)
            middle = start
            while middle < stop and against[order[band, middle]]:
                middle += 1
            for at in range(middle, stop):
                x = order[band, at]
                for other in range(start, middle):
                    if kept[x] != x:
                        break
                    y = order[band, other]
                    if not _met_before(bands, band, x, y):
                        tried += 1
                        if _alike(key, begin, end, verify, least, x, y):
                            kept[x] = y
            start = stop
    return tried


@jit
def _link(
    order: np.ndarray, bands: np.ndarray, against: np.ndarray, small: np.ndarray,
    key: np.ndarray, begin: np.ndarray, end: np.ndarray, verify: bool, least: float, kept: np.ndarray, root: np.ndarray,
) -> int:  # fmt: skip
    """Unites rows of small clusters along edges; `root` is the union-find, and at the end each row's best-ranked member.

    The rows of one run (one band's equal keys) seen so far are kept as chains, one for each set of the union-find; a new
    row is compared with the rows of a chain only until one is like it. So a run of m copies costs m comparisons.
    """
    count = order.shape[1]
    head, tail, after = np.empty(count, np.int64), np.empty(count, np.int64), np.empty(count, np.int64)
    tried = 0
    for band in range(len(bands)):
        start = 0
        while start < count:
            stop = _run_end(order[band], bands[band], start)
            chains = 0
            for at in range(start, stop if small[order[band, start]] else start):
                x = order[band, at]
                if against[x] or kept[x] != x:
                    continue
                for chain in range(chains):
                    y = head[chain]
                    while y >= 0 and _find(root, y) != _find(root, x):
                        if not _met_before(bands, band, x, y):
                            tried += 1
                            if _alike(key, begin, end, verify, least, x, y):
                                _union(root, x, y)
                        y = after[y]
                after[x] = -1
                head[chains], tail[chains] = x, x
                chains = _merge_chains(head, tail, after, chains + 1, root, _find(root, x))
            start = stop
    for x in range(count):
        if kept[x] != x:
            root[x] = kept[x]
        else:
            root[x] = _find(root, x)
    for x in range(count):
        if kept[x] == x:
            kept[x] = root[x]
    return tried


@jit
def _merge_chains(head: np.ndarray, tail: np.ndarray, after: np.ndarray, chains: int, root: np.ndarray, which: int) -> int:
    """Makes one chain of those whose rows are in the set `which`; returns how many chains there are."""
    left, merged = 0, -1
    for chain in range(chains):
        if _find(root, head[chain]) == which:
            if merged >= 0:
                after[tail[merged]] = head[chain]
                tail[merged] = tail[chain]
                continue
            merged = left
        head[left], tail[left] = head[chain], tail[chain]
        left += 1
    return left


@jit
def _lead(
    bucket: np.ndarray, first: int, against: np.ndarray,
    key: np.ndarray, begin: np.ndarray, end: np.ndarray, verify: bool, least: float,
    most: int, kept: np.ndarray, root: np.ndarray,
) -> tuple[int, int]:  # fmt: skip
    """One large cluster: a row is dropped for the first kept row, by band and rank, that shares a band and is like it.

    `bucket` int64[bands, k] numbers the distinct keys of each band.
    """
    bands, count = bucket.shape
    head, tail = np.full((bands, count), -1), np.full((bands, count), -1)
    after, stamp = np.full((bands, count), -1), np.full(count, -1)
    tried, untried, best = 0, 0, -1
    for x in range(count):
        row = first + x
        if against[row] or kept[row] != row:
            continue
        best = row if best < 0 else best
        root[row] = best
        compared = 0
        for band in range(bands):
            y = head[band, bucket[band, x]]
            while y >= 0 and kept[row] == row and compared < most:
                if stamp[y] != x:
                    stamp[y] = x
                    compared += 1
                    if _alike(key, begin, end, verify, least, row, first + y):
                        kept[row] = first + y
                y = after[band, y]
        tried += compared
        if kept[row] != row:
            continue
        untried += compared >= most
        for band in range(bands):
            if head[band, bucket[band, x]] < 0:
                head[band, bucket[band, x]] = x
            else:
                after[band, tail[band, bucket[band, x]]] = x
            tail[band, bucket[band, x]] = x
    return tried, untried


@jit
def _similarities(key: np.ndarray, begin: np.ndarray, end: np.ndarray, kept: np.ndarray, out: np.ndarray) -> None:
    for x in range(len(kept)):
        if kept[x] != x:
            y = kept[x]
            out[x] = jaccard(key[begin[x] : end[x]], key[begin[y] : end[y]], 0.0)

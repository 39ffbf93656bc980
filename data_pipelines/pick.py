"""Cutting a total order of rows at a budget: exact, streaming, and blind to shards, workers and row order.

Rows are ordered by (key descending, uid ascending), where uid is a 64-bit hash of the row's id. Rows equal in both are
the same row twice; their place in the input decides, and either choice picks the same text.

Gumbel top-k. With G = -log(-log u) and u a pure function of (seed, uid), the k largest of score/T + G are a sample
without replacement with odds exp(score/T) (Plackett-Luce; Kool et al. 2019). Since u belongs to the row and not to a
stream of random numbers, the top k of all rows are the top k of any shards' top k, samples are nested in k, and
picking again under another budget, seed or temperature needs the scores only.

The cut. float64 keys become uint64 with the same order, best first, and the 128-bit pair (key, uid) is narrowed 16
bits at a time: each sweep over the scores adds the rows' weights (1, words or bytes) into 65,536 bins, which finds the
bin where the budget runs out; once that bin holds few rows they are sorted. Integer sums make it exact, and memory is a
few megabytes for any number of rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

SORTED_AT_ONCE = 1 << 18
"""Rows that are sorted in memory at the end of the search."""
_BITS = 16
_LEVELS = 8


class Keys(NamedTuple):
    """Eligible rows of one shard: rank uint64 (best first), uid uint64, shard, row int64, weight int64."""

    rank: np.ndarray
    uid: np.ndarray
    shard: int
    row: np.ndarray
    weight: np.ndarray


class Cut(NamedTuple):
    """Where the order is cut; `last` = (rank, uid, shard, row), rows up to and including it are picked; None: all are.

    A cut in front of a row has shard and row -1.
    """

    last: tuple[int, int, int, int] | None
    rows: int
    weight: int
    eligible_rows: int
    eligible_weight: int


def row_uid(row_id: str) -> int:
    """64-bit hash of a row id."""
    return int.from_bytes(hashlib.blake2b(row_id.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def gumbel(uid: np.ndarray, seed: int) -> np.ndarray:
    """Standard Gumbel noise, float64, a pure function of (seed, uid)."""
    from data_pipelines.ngrams import mix

    salt = int.from_bytes(hashlib.blake2b(f"gumbel:{seed}".encode(), digest_size=8).digest(), "little")
    bits = mix(mix(uid ^ np.uint64(salt)) + np.uint64(salt))
    uniform: np.ndarray = ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    noise: np.ndarray = -np.log(-np.log(uniform))
    return noise


def rank_of(key: np.ndarray) -> np.ndarray:
    """uint64 that sort ascending as finite float64 `key` sorts descending."""
    bits = (key + 0.0).view(np.uint64)
    sign = np.uint64(1 << 63)
    return ~np.where(bits & sign, ~bits, bits | sign)


def find_cut(sweep: Callable[[], Iterator[Keys]], budget: int) -> Cut:
    """The longest prefix of the order whose weights sum to at most `budget`.

    Args:
        sweep: gives the keys of all shards, afresh at each call.
        budget: in the unit of the weights.
    """
    rows, weight = _totals(sweep)
    if weight <= budget:
        return Cut(None, rows, weight, rows, weight)
    prefix, before_rows, before = 0, 0, 0
    for level in range(_LEVELS):
        bin_rows, bin_weight = _histogram(sweep, prefix, level)
        ends = before + np.cumsum(bin_weight)
        at = int(np.searchsorted(ends, budget, side="right"))
        before_rows += int(bin_rows[:at].sum())
        before = int(ends[at - 1]) if at else before
        prefix = (prefix << _BITS) | at
        if bin_rows[at] <= SORTED_AT_ONCE:
            break
    return _finish(sweep, prefix, level, budget, (before_rows, before), (rows, weight))


def _totals(sweep: Callable[[], Iterator[Keys]]) -> tuple[int, int]:
    rows = weight = 0
    for keys in sweep():
        rows, weight = rows + len(keys.rank), weight + int(keys.weight.sum())
    return rows, weight


def _digits(keys: Keys, level: int) -> np.ndarray:
    source = keys.rank if level < _LEVELS // 2 else keys.uid
    shift = np.uint64(64 - _BITS * (level % (_LEVELS // 2) + 1))
    return ((source >> shift) & np.uint64(0xFFFF)).astype(np.int64)


def _inside(keys: Keys, prefix: int, level: int) -> np.ndarray:
    """Rows whose first `level` digits are those of `prefix`."""
    inside = np.ones(len(keys.rank), bool)
    for i in range(level):
        inside &= _digits(keys, i) == (prefix >> (_BITS * (level - 1 - i))) & 0xFFFF
    return inside


def _histogram(sweep: Callable[[], Iterator[Keys]], prefix: int, level: int) -> tuple[np.ndarray, np.ndarray]:
    rows, weight = np.zeros(1 << _BITS, np.int64), np.zeros(1 << _BITS, np.int64)
    for keys in sweep():
        inside = _inside(keys, prefix, level)
        digits = _digits(keys, level)[inside]
        rows += np.bincount(digits, minlength=1 << _BITS)
        np.add.at(weight, digits, keys.weight[inside])
    return rows, weight


def _finish(
    sweep: Callable[[], Iterator[Keys]], prefix: int, level: int, budget: int, before: tuple[int, int], total: tuple[int, int]
) -> Cut:
    near: list[np.ndarray] = []
    for keys in sweep():
        at = np.flatnonzero(_inside(keys, prefix, level + 1))
        shard = np.full(len(at), keys.shard, np.uint64)
        columns = [keys.rank[at], keys.uid[at], shard, keys.row[at].astype(np.uint64), keys.weight[at].astype(np.uint64)]
        near.append(np.stack(columns))
    rank, uid, shard, row, weight = np.concatenate(near, axis=1)
    order = np.lexsort((row, shard, uid, rank))
    spent = before[1] + np.cumsum(weight[order].astype(np.int64))
    fits = int(np.searchsorted(spent, budget, side="right"))
    if fits == 0:
        return Cut((int(rank[order[0]]), int(uid[order[0]]), -1, -1), *before, *total)
    at = order[fits - 1]
    return Cut((int(rank[at]), int(uid[at]), int(shard[at]), int(row[at])), before[0] + fits, int(spent[fits - 1]), *total)


def picked(keys: Keys, cut: Cut) -> np.ndarray:
    """bool mask of the rows at or before the cut."""
    if cut.last is None:
        return np.ones(len(keys.rank), bool)
    rank, uid, shard, row = cut.last
    tied = (keys.rank == np.uint64(rank)) & (keys.uid == np.uint64(uid))
    inside = keys.row <= row if keys.shard == shard else np.full(len(keys.rank), keys.shard < shard)
    before: np.ndarray = (keys.rank < np.uint64(rank)) | ((keys.rank == np.uint64(rank)) & (keys.uid < np.uint64(uid)))
    before |= tied & inside
    return before


def cut_to_json(cut: Cut) -> dict[str, Any]:
    """JSON-ready; 64-bit numbers as hex text."""
    last = cut.last and [f"{cut.last[0]:016x}", f"{cut.last[1]:016x}", cut.last[2], cut.last[3]]
    return {**cut._asdict(), "last": last}


def cut_from_json(value: dict[str, Any]) -> Cut:
    """Inverse of `cut_to_json`."""
    last = value["last"]
    return Cut(**{**value, "last": last and (int(last[0], 16), int(last[1], 16), last[2], last[3])})

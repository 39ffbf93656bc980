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
few megabytes for any number of rows. Several groups of rows, each with its own budget, are cut in the same sweeps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

SORTED_AT_ONCE = 1 << 16
"""Rows of a group that are sorted in memory at the end of the search."""
GROUPS_AT_ONCE = 8
"""Groups that are searched in the same sweeps; about 4 MB each."""
_BITS = 16
_BINS = 1 << _BITS
_LEVELS = 8


class Keys(NamedTuple):
    """Rows of one shard: rank uint64 (best first), uid uint64, shard, row int64, weight int64, group int64 (None = all 0)."""

    rank: np.ndarray
    uid: np.ndarray
    shard: int
    row: np.ndarray
    weight: np.ndarray
    group: np.ndarray | None = None

    def groups(self) -> np.ndarray:
        """int64[n]: the group of each row; -1 takes no part."""
        return np.zeros(len(self.rank), np.int64) if self.group is None else self.group


class Cut(NamedTuple):
    """Where the order is cut; `last` = (rank, uid, shard, row), rows up to and including it are picked; None: all are.

    A cut in front of a row has shard and row -1.
    """

    last: tuple[int, int, int, int] | None
    rows: int
    weight: int
    eligible_rows: int
    eligible_weight: int


Sweep = Callable[[], Iterator[Keys]]
"""Gives the keys of all shards, afresh at each call."""


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


def key_of(rank: int) -> float:
    """The finite key that `rank_of` maps to `rank`."""
    bits = np.array([rank ^ 0xFFFFFFFFFFFFFFFF], np.uint64)
    sign = np.uint64(1 << 63)
    found = np.where(bits & sign, bits ^ sign, ~bits)
    return float(found.view(np.float64)[0])


def find_cut(sweep: Sweep, budget: int, *, crossing: bool = False) -> Cut:
    """`find_cuts` of a single group."""
    return find_cuts(sweep, [budget], crossing=crossing)[0]


def find_cuts(sweep: Sweep, budgets: list[int], *, crossing: bool = False) -> list[Cut]:
    """For each group, the longest prefix of its order whose weights sum to at most its budget.

    Args:
        sweep: keys with groups 0..G-1.
        budgets: of the groups, in the unit of the weights.
        crossing: one row more, the first that does not fit.
    """
    rows, weight = _totals(sweep, len(budgets))
    cuts = [Cut(None, int(r), int(w), int(r), int(w)) for r, w in zip(rows, weight, strict=True)]
    searched = [group for group, budget in enumerate(budgets) if weight[group] > budget]
    for at in range(0, len(searched), GROUPS_AT_ONCE):
        found = _search(sweep, {group: _Search(budgets[group]) for group in searched[at : at + GROUPS_AT_ONCE]}, len(budgets))
        for group, search in found.items():
            cuts[group] = search.cut(int(rows[group]), int(weight[group]), crossing)
    return cuts


def _totals(sweep: Sweep, groups: int) -> tuple[np.ndarray, np.ndarray]:
    rows, weight = np.zeros(groups, np.int64), np.zeros(groups, np.int64)
    for keys in sweep():
        inside = np.flatnonzero(keys.groups() >= 0)
        group = keys.groups()[inside]
        rows += np.bincount(group, minlength=groups)
        weight += np.bincount(group, weights=keys.weight[inside], minlength=groups).astype(np.int64)
    return rows, weight


class _Search:
    """One group's search: the bin, named by the first 16 * `level` bits of (rank, uid), in which its budget runs out."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.level, self.prefix, self.rows, self.weight = 0, 0, 0, 0
        self.narrow = True
        self.near: list[np.ndarray] = []

    def inside(self, keys: Keys) -> np.ndarray:
        """Rows in the bin."""
        bits = self.level * _BITS
        if not bits:
            return np.ones(len(keys.rank), bool)
        if bits <= 64:
            found: np.ndarray = keys.rank >> np.uint64(64 - bits) == np.uint64(self.prefix)
            return found
        rank, uid = self.prefix >> (bits - 64), self.prefix & ((1 << (bits - 64)) - 1)
        both: np.ndarray = (keys.rank == np.uint64(rank)) & (keys.uid >> np.uint64(128 - bits) == np.uint64(uid))
        return both

    def digits(self, keys: Keys) -> np.ndarray:
        """int64[n]: the next 16 bits."""
        source = keys.rank if self.level < _LEVELS // 2 else keys.uid
        shift = np.uint64(64 - _BITS * (self.level % (_LEVELS // 2) + 1))
        return ((source >> shift) & np.uint64(_BINS - 1)).astype(np.int64)

    def step(self, rows: np.ndarray, weight: np.ndarray) -> None:
        """Goes into the bin of these 65,536 where the budget runs out."""
        ends = self.weight + np.cumsum(weight)
        at = int(np.searchsorted(ends, self.budget, side="right"))
        self.rows += int(rows[:at].sum())
        self.weight = int(ends[at - 1]) if at else self.weight
        self.prefix, self.level = (self.prefix << _BITS) | at, self.level + 1
        self.narrow = rows[at] > SORTED_AT_ONCE and self.level < _LEVELS

    def gather(self, keys: Keys, mine: np.ndarray) -> None:
        """Keeps the rows of the bin."""
        at = mine[self.inside(_take(keys, mine))]
        shard = np.full(len(at), keys.shard, np.uint64)
        self.near.append(np.stack([keys.rank[at], keys.uid[at], shard, keys.row[at].astype(np.uint64), keys.weight[at].astype(np.uint64)]))

    def cut(self, rows: int, weight: int, crossing: bool) -> Cut:
        """The cut among the rows of the bin; `rows` and `weight` are the group's totals."""
        rank, uid, shard, row, weights = np.concatenate(self.near, axis=1)
        order = np.lexsort((row, shard, uid, rank))
        spent = self.weight + np.cumsum(weights[order].astype(np.int64))
        fits = int(np.searchsorted(spent, self.budget, side="right")) + crossing
        if fits == 0:
            return Cut((int(rank[order[0]]), int(uid[order[0]]), -1, -1), self.rows, self.weight, rows, weight)
        at = order[fits - 1]
        last = (int(rank[at]), int(uid[at]), int(shard[at]), int(row[at]))
        return Cut(last, self.rows + fits, int(spent[fits - 1]), rows, weight)


def _take(keys: Keys, at: np.ndarray) -> Keys:
    return Keys(keys.rank[at], keys.uid[at], keys.shard, keys.row[at], keys.weight[at], keys.groups()[at])


def _members(keys: Keys, searches: dict[int, _Search], groups: int) -> Iterator[tuple[int, np.ndarray]]:
    """(group, its rows) of the searched groups that occur in these keys."""
    group = keys.groups()
    for found in np.flatnonzero(np.bincount(group[group >= 0], minlength=groups)).tolist():
        if found in searches:
            yield found, np.flatnonzero(group == found)


def _search(sweep: Sweep, searches: dict[int, _Search], groups: int) -> dict[int, _Search]:
    while open_ones := {group: search for group, search in searches.items() if search.narrow}:
        bins = {group: np.zeros((2, _BINS), np.int64) for group in open_ones}
        for keys in sweep():
            for group, mine in _members(keys, open_ones, groups):
                members = _take(keys, mine)
                inside = open_ones[group].inside(members)
                digits = open_ones[group].digits(members)[inside]
                bins[group][0] += np.bincount(digits, minlength=_BINS)
                bins[group][1] += np.bincount(digits, weights=members.weight[inside], minlength=_BINS).astype(np.int64)
        for group, search in open_ones.items():
            search.step(*bins[group])
    for keys in sweep():
        for group, mine in _members(keys, searches, groups):
            searches[group].gather(keys, mine)
    return searches


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

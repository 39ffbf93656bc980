"""Several targets, each with its own scores: going round them in one pass, whichever order they are written in.

Each target t sorts the rows by its own key. With rank_t(x) the rank of row x there, from 0, and share_t the target's share
of the pick, the rows are taken in ascending order of

    m(x) = min_t (rank_t(x) + 1) / share_t          ties by the row's uid,

until the budget is spent: at any moment each target has had about its share, a row that two targets ask for is taken
once, and nothing depends on the order of targets, shards or workers.

Only rows that can matter are held. Let x be picked through target t. Every row before x in t's order has a smaller m, so
it is picked too, and these rows fit into the budget; so x lies in the prefix of t's order that alone would fill the
budget. One row more of each target is held, the first that does not fit: the row at which the merged order stops is among
them. For all others m can only be overestimated, which leaves them behind that row.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from data_pipelines.engine import Job
from data_pipelines.orders import Groups, Mask, OwnOrder, TableOrder, sweep
from data_pipelines.pick import Cut, Sweep, find_cuts, picked
from data_pipelines.shards import Shard


def target_shares(names: tuple[str, ...], given: dict[str, float]) -> list[float]:
    """Share of each target, equal where none are given."""
    return [given[name] if given else 1 / len(names) for name in names]


def merged_order(job: Job, shards: list[Shard], name: str, amounts: list[int], groups: Groups, without: Mask | None) -> TableOrder:
    """The rows that the targets ask for within `amounts` (by group), with key -m and `target`, the one that asks first.

    Args:
        name: of the table.
        amounts: budget of each group.
        groups: numbers of the quota groups; each group is ranked by itself.
        without: rows that do not take part.
    """
    prefixes = []
    for target in job.targets:
        keys = sweep(job, shards, OwnOrder(job, target), job.config.budget.unit, groups, without)
        prefixes.append(_prefix(keys, find_cuts(keys, amounts, crossing=True)))
    merged = merge_prefixes(prefixes, target_shares(job.targets, job.config.target_shares))
    return TableOrder.write(name, job.folder / "orders" / name, merged)


def _prefix(keys: Sweep, cuts: list[Cut]) -> dict[str, np.ndarray]:
    """`shard`, `place`, and `rank` from 0 within the group, of the rows at or before their group's cut."""
    parts: list[np.ndarray] = []
    for batch in keys():
        group = batch.groups()
        inside = np.zeros(len(group), bool)
        for code, cut in enumerate(cuts):
            inside |= picked(batch, cut) & (group == code)
        at = np.flatnonzero(inside)
        shard = np.full(len(at), batch.shard, np.uint64)
        columns = (group[at].astype(np.uint64), batch.rank[at], batch.uid[at], shard, batch.row[at].astype(np.uint64))
        parts.append(np.stack(columns))
    group, rank, uid, shard, place = np.concatenate(parts, axis=1)
    order = np.lexsort((place, shard, uid, rank, group))
    sizes = np.bincount(group.astype(np.int64), minlength=len(cuts))
    ranks = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return {"shard": shard[order].astype(np.int64), "place": place[order].astype(np.int64), "rank": ranks}


def merge_prefixes(prefixes: list[dict[str, np.ndarray]], shares: list[float]) -> dict[str, np.ndarray]:
    """`shard`, `place`, `key` = -min_t (rank_t + 1) / share_t and `target` (the first by number among equals) of all rows.

    Args:
        prefixes: of each target, `shard`, `place`, `rank`.
        shares: of each target.
    """
    columns: dict[str, Any] = {name: np.concatenate([prefix[name] for prefix in prefixes]) for name in ("shard", "place")}
    key = np.concatenate([(prefix["rank"] + 1) / share for prefix, share in zip(prefixes, shares, strict=True)])
    target = np.repeat(np.arange(len(prefixes), dtype=np.int16), [len(prefix["rank"]) for prefix in prefixes])
    order = np.lexsort((target, key, columns["place"], columns["shard"]))
    shard, place = columns["shard"][order], columns["place"][order]
    first = np.ones(len(order), bool)
    first[1:] = (np.diff(shard) != 0) | (np.diff(place) != 0)
    return {"shard": shard[first], "place": place[first], "key": -key[order][first], "target": target[order][first]}

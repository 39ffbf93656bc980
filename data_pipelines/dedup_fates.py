"""Which rows go, and why: from marks to the verdict.

    exact        equal keys -> groups; the best row of each goes on
    n-grams      rows that hold enough of a known one
    bands        one band after the other -> candidate clusters                            KEY/candidates.safetensors
    sets         each shard -> the distinct n-grams of its candidates, from the text       KEY/{against,data}_sets/*
    verify       groups of clusters -> near copies

Peak memory of the first process, for N rows of which C are candidates or exact copies: about 26 N bytes (union-find, flags,
counts), 40 bytes a row of one sorting window, 250 C bytes, and the sets of one group of clusters, 8 bytes a word. The
sets of a single cluster that is larger than `memory` lie in a file whose pages the system can drop. A worker holds the
marks of one shard, and of the longest row about 12 times its size.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from data_pipelines.clusters import Members, equal_groups, join_bands, resolve
from data_pipelines.dedup import MinHashConfig
from data_pipelines.engine import Driver, each_shard
from data_pipelines.marks import Arrays, DedupJob, Table, collect_sets, gather, near_grams, open_arrays, set_sizes
from data_pipelines.minhash import Sets
from data_pipelines.parts import load_arrays, save_arrays
from data_pipelines.pick import row_uid
from data_pipelines.shards import Shard, rows_at
from posttrain.core.events import Events

MIB = 1 << 20
WHY = ("exact", "near", "contaminated: exact", "contaminated: near", "contaminated: n-grams")
EXACT, NEAR, KNOWN_EXACT, KNOWN_NEAR, KNOWN_GRAMS = range(5)


@dataclasses.dataclass(frozen=True)
class Fates:
    """Rows that go: numbers of the rows and of those that stand for them, why, similarity, best row of the cluster."""

    row: np.ndarray
    kept: np.ndarray
    why: np.ndarray
    similarity: np.ndarray
    root: np.ndarray


def _fates(row: np.ndarray, kept: np.ndarray, why: Any, similarity: Any, root: np.ndarray) -> Fates:
    size = len(row)
    return Fates(row, kept, np.full(size, why, np.uint8), np.full(size, similarity, np.float64), root)


def decide(job: DedupJob, table: Table, data: list[Shard], against: list[Shard], driver: Driver, events: Events) -> None:
    """Works out which rows go and saves the verdict: `row` ascending, `kept`, `why`, `similarity`, `cluster`, and counts."""
    alive = np.ones(table.rows, bool)
    twins = _twins(job, table)
    alive[twins.row] = False
    leaked = _leaked(job, table, alive)
    alive[leaked.row] = False
    near, candidates, facts = _near(job, job.config.minhash, table, alive, {"against_sets": against, "data_sets": data}, driver, events)
    found = _joined([leaked, near])
    verdict = _joined([found, _inherit(twins, found, *candidates)])
    order = np.argsort(verdict.row)
    columns = {name: np.ascontiguousarray(getattr(verdict, name)[order]) for name in ("row", "kept", "why", "similarity")}
    save_arrays(job.file("verdict"), {**columns, "cluster": _cluster_numbers(table, verdict.root[order]), **facts})


def _joined(several: list[Fates]) -> Fates:
    return Fates(*(np.concatenate([getattr(one, field.name) for one in several]) for field in dataclasses.fields(Fates)))


def _window(job: DedupJob) -> int:
    """Rows sorted at a time."""
    return max(1, int(job.config.memory) * MIB // 40)


def _twins(job: DedupJob, table: Table) -> Fates:
    """Rows equal to a better-ranked one; among them rows of `against`, which need not be compared with twice."""
    none = np.empty(0, np.int64)
    if job.config.exact == "off":
        return _fates(none, none, EXACT, 1.0, none)
    rows, group = equal_groups(lambda half: table.sweep(("low", "high")[half]), table.rows, _window(job))
    order = table.ranked(rows, group)
    rows, group = rows[order], group[order]
    begins = np.flatnonzero(np.diff(group, prepend=-1))
    best = np.repeat(rows[begins], np.diff(begins, append=len(rows)))
    goes = rows != best
    why = np.where(best[goes] < table.against, KNOWN_EXACT, EXACT)
    return _fates(rows[goes], best[goes], why, 1.0, best[goes])


def _leaked(job: DedupJob, table: Table, alive: np.ndarray) -> Fates:
    """Rows that hold enough of a known row."""
    none = np.empty(0, np.int64)
    path = job.file("known")
    if not path.exists():
        return _fates(none, none, KNOWN_GRAMS, 0.0, none)
    part = Table(table.parts[job.against :], 0, list(job.priority[job.against :]))
    rows, known, share = [none], [none], [np.empty(0)]
    for (values, where), (hit, _) in zip(part.sweep("share"), part.sweep("hit"), strict=True):
        at = np.flatnonzero((values >= job.config.contamination.share) & (hit >= 0) & alive[where + table.against])
        rows.append(where[at] + table.against)
        known.append(open_arrays(path)["order"][hit[at]])
        share.append(values[at])
    kept = np.concatenate(known)
    return _fates(np.concatenate(rows), kept, KNOWN_GRAMS, np.concatenate(share), kept)


def _near(
    job: DedupJob, rule: MinHashConfig | str, table: Table, alive: np.ndarray,
    steps: dict[str, list[Shard]], driver: Driver, events: Events,
) -> tuple[Fates, tuple[np.ndarray, np.ndarray], Arrays]:  # fmt: skip
    """(rows that are near copies, (candidate rows ascending, best row of each one's cluster), facts)."""
    none = np.empty(0, np.int64)
    if isinstance(rule, str):
        return _fates(none, none, NEAR, 1.0, none), (none, none), {}
    if not job.file("candidates").exists():
        save_arrays(job.file("candidates"), _candidates(job, table, alive))
    found = load_arrays(job.file("candidates"))
    rows, first = found["row"], found["first"]
    events.log(f"{len(rows)} of {table.rows} rows share a band with another, in {len(first) - 1} clusters to verify")
    if rule.verify is not None:
        for step, shards in steps.items():
            each_shard(_sets_shard, job, step, shards, driver, events)
    kept, root, similarity = rows.copy(), rows.copy(), np.full(len(rows), np.nan)
    size = np.diff(first)
    facts = {"tried": 0, "untried": 0, "large": int((size > rule.max_cluster).sum()), "largest": int(size.max(initial=0))}
    for at, members in _groups(job, rule, table, found):
        verdict = resolve(members, rule.verify, rule.max_cluster)
        kept[at], root[at], similarity[at] = rows[at][verdict.kept], rows[at][verdict.root], verdict.similarity
        facts["tried"] += verdict.tried
        facts["untried"] += verdict.untried
    goes = (kept != rows) & (rows >= table.against)
    why = np.where(kept[goes] < table.against, KNOWN_NEAR, NEAR)
    order = np.argsort(rows)
    fates = _fates(rows[goes], kept[goes], why, similarity[goes], root[goes])
    return fates, (rows[order], root[order]), {name: np.array([value], np.int64) for name, value in facts.items()}


def _candidates(job: DedupJob, table: Table, alive: np.ndarray) -> Arrays:
    """Rows of clusters with at least two rows, one of `data` among them: `row` by cluster and rank, `first`, `sorted`."""
    takes = alive & np.concatenate([values > 0 for values, _ in table.sweep("words")])
    root = join_bands(lambda band: table.sweep("bands", band, takes), job.config.minhash.bands, table.rows, _window(job))
    size = np.bincount(root[takes], minlength=table.rows)
    takes &= size[root] >= 2
    size = np.bincount(root[table.against :][takes[table.against :]], minlength=table.rows)
    rows = np.flatnonzero(takes & (size[root] >= 1))
    order = table.ranked(rows, root[rows])
    begins = np.flatnonzero(np.diff(root[rows][order], prepend=-1))
    return {"row": rows[order], "first": np.append(begins, len(rows)), "sorted": rows, "part": table.first}


def _sets_shard(job: Any, step: str, shard: Shard) -> None:
    found = open_arrays(job.file("candidates"))
    place = job.place(step, shard)
    bounds = found["part"][place : place + 2]
    local = found["sorted"][slice(*np.searchsorted(found["sorted"], bounds))] - bounds[0]
    numbers = open_arrays(job.part(step.removesuffix("_sets"), shard))["row"][local]
    rule = job.config.minhash
    save_arrays(job.part(step, shard), collect_sets(rows_at(shard, numbers.tolist()), lambda blob: near_grams(blob, rule)))


def _groups(job: DedupJob, rule: MinHashConfig, table: Table, found: Arrays) -> Iterator[tuple[np.ndarray, Members]]:
    """Candidate clusters in groups whose sets fit the memory (or a single one that does not): (places, members)."""
    rows, first = found["row"], found["first"]
    verify, limit, files = rule.verify is not None, int(job.config.memory) * MIB, job.parts("_sets")
    local = [found["sorted"][slice(*np.searchsorted(found["sorted"], pair))] for pair in itertools.pairwise(table.first.tolist())]
    weight = np.full(len(rows), 16 * rule.bands)
    weight += 8 * set_sizes(files, table.first, local, rows) if verify else 0
    spent = np.append(0, np.cumsum(weight))[first]
    start = 0
    while start < len(first) - 1:
        stop = max(start + 1, int(np.searchsorted(spent, spent[start] + limit, "right")) - 1)
        at = np.arange(first[start], first[stop])
        sets = Sets(np.empty(0, np.uint64), np.empty(0, np.int64))
        if verify:
            sets = gather(files, table.first, local, rows[at], job.folder if spent[stop] - spent[start] > limit else None)
        yield at, Members(first[start : stop + 1] - first[start], rows[at] < table.against, table.take("bands", rows[at]), *sets)
        start = stop


def _inherit(twins: Fates, found: Fates, candidates: np.ndarray, roots: np.ndarray) -> Fates:
    """Equal rows share one fate: those whose best one goes, go for its reason. Rows of `against` are left out."""
    order = np.argsort(found.row)
    at = _lookup(found.row[order], twins.kept)
    goes = at >= 0
    columns = {field.name: getattr(twins, field.name).copy() for field in dataclasses.fields(Fates)}
    for name in ("kept", "why", "similarity", "root"):
        columns[name][goes] = getattr(found, name)[order][at[goes]]
    best = _lookup(candidates, twins.kept)
    stays = ~goes & (best >= 0)
    columns["root"][stays] = roots[best[stays]]
    return Fates(**columns)


def _lookup(table: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Place of each wanted number in an ascending table, -1 where it is not there."""
    if not len(table):
        return np.full(len(wanted), -1)
    at = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return np.where(table[at] == wanted, at, -1)


def _cluster_numbers(table: Table, root: np.ndarray) -> np.ndarray:
    """uint64 made of the id and text of each cluster's best row."""
    rows, inverse = np.unique(root, return_inverse=True)
    raw = table.take("raw", rows).tolist() if len(rows) else []
    names = [f"{name.decode('utf-8', 'surrogatepass')}:{text:016x}" for name, text in zip(table.ids(rows), raw, strict=True)]
    return np.array([row_uid(name) for name in names], np.uint64)[inverse]

"""Figures of a selection from its score tables alone, in a few sweeps and in bounded memory.

For log importance weights s_i of the n eligible rows, with w_i = exp(s_i),

    ess = (sum w)^2 / sum w^2        effective sample size (Kish 1965), between 1 and n
    top_1_percent = sum of the largest ceil(n / 100) w_i / sum w

Histograms share their bins between all eligible rows and the picked ones. The bins of the score span its 0.5 % to 99.5 %
quantiles (to about 6 %, from the leading bits of the numbers); what lies outside is counted in the first and last bin.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np

from data_pipelines.choice import Choice
from data_pipelines.engine import Job
from data_pipelines.orders import sweep
from data_pipelines.pick import Cut, Keys, find_cut, key_of, picked, rank_of
from data_pipelines.scores import score_columns
from data_pipelines.shards import Shard

BINS = 40
SHOWN = 5
LONGEST = 1 << 17
"""Words beyond this count as this many in medians."""
TAIL = 0.005
_SHIFT = np.uint64(48)


class _Score:
    """The score itself as an order."""

    name = "score"

    def keys(self, shard: Shard, columns: dict[str, Any]) -> np.ndarray:
        found: np.ndarray = columns["score"]
        return found


class _First:
    """The few first rows of all batches in the order of (rank, uid), or the few last ones."""

    def __init__(self, last: bool = False) -> None:
        self._last = last
        self._held: list[tuple[int, int, int, int, float, int]] = []

    def add(self, rank: np.ndarray, which: np.ndarray, shard: Shard, columns: dict[str, Any]) -> None:
        rank, uid = (~rank, ~columns["uid"]) if self._last else (rank, columns["uid"])
        at = np.flatnonzero(which)
        if len(at) > SHOWN:
            limit = np.partition(rank[at], SHOWN - 1)[SHOWN - 1]
            at = at[rank[at] <= limit]
        if len(at) > SHOWN:
            at = at[np.lexsort((columns["place"][at], uid[at], rank[at]))[:SHOWN]]
        for i in at.tolist():
            row = (int(rank[i]), int(uid[i]), shard.index, int(columns["place"][i]))
            self._held.append((*row, float(columns["score"][i]), int(columns["words"][i])))
        self._held = sorted(self._held)[:SHOWN]

    def rows(self) -> list[dict[str, Any]]:
        return [{"shard": s, "place": p, "score": score, "words": words} for _, _, s, p, score, words in self._held]


class Figures:
    """What the sweeps found; `rows` and `words` of the picked rows, `groups` and `targets` count them."""

    def __init__(self) -> None:
        self.rows = self.words = 0
        self.groups: Counter[str] = Counter()
        self.targets: Counter[str] = Counter()
        self.summary: dict[str, Any] = {}
        self.examples: dict[str, list[dict[str, Any]]] = {}


def measure(job: Job, shards: list[Shard], choice: Choice) -> Figures:
    """All figures of a choice."""
    found, lengths = Figures(), np.zeros((2, LONGEST + 1), np.int64)
    leading = np.zeros(1 << 16, np.int64)
    few = {"best": _First(), "last_in": _First(last=True), "first_out": _First(), "worst": _First(last=True)}
    highest = -math.inf
    last = choice.last if any(cut.rows for cut in choice.last.cuts) else choice.rounds[0]
    for shard in shards:
        for columns in score_columns(job.part("scores", shard), groups=choice.quotas):
            mask, score = choice.mask(shard, columns), columns["score"]
            words = np.minimum(columns["words"], LONGEST)
            lengths[0] += np.bincount(words, minlength=LONGEST + 1)
            lengths[1] += np.bincount(words[mask], minlength=LONGEST + 1)
            leading += np.bincount((rank_of(score) >> _SHIFT).astype(np.int64), minlength=1 << 16)
            highest = max(highest, float(score.max(initial=-math.inf)))
            found.rows += int(mask.sum())
            found.words += int(columns["words"][mask].sum())
            if choice.quotas:
                found.groups.update(columns["group"][mask].tolist())
            _count_targets(job, choice, shard, columns, mask, found.targets)
            key = last.order.keys(shard, columns)
            known, rank = ~np.isnan(key), rank_of(np.nan_to_num(key))
            few["best"].add(rank_of(score), mask, shard, columns)
            few["worst"].add(rank_of(score), mask, shard, columns)
            few["last_in"].add(rank, last.mask(shard, columns, choice.quotas) & known, shard, columns)
            few["first_out"].add(rank, ~mask & known, shard, columns)
    found.examples = {name: some.rows() for name, some in few.items()}
    found.summary = _summary(job, shards, choice, lengths, leading, highest)
    return found


def _count_targets(job: Job, choice: Choice, shard: Shard, columns: dict[str, Any], mask: np.ndarray, counts: Counter[str]) -> None:
    if len(job.targets) < 2 or job.hook("rank"):
        return
    left = mask
    for item in choice.rounds:
        mine = left & item.mask(shard, columns, choice.quotas)
        target = item.order.column("target", shard, columns, -1)[mine]  # type: ignore[attr-defined]
        counts.update({name: int((target == i).sum()) for i, name in enumerate(job.targets)})
        left = left & ~mine


def _summary(job: Job, shards: list[Shard], choice: Choice, lengths: np.ndarray, leading: np.ndarray, highest: float) -> dict[str, Any]:
    edges = _edges(leading)
    counts, weights = np.zeros((2, BINS), np.int64), np.zeros(3)
    heaviest = _top_percent(job, shards, int(leading.sum())) if job.hook("LOG_WEIGHTS") else None
    for shard in shards:
        for columns in score_columns(job.part("scores", shard), groups=choice.quotas):
            mask, score = choice.mask(shard, columns), columns["score"]
            place = np.clip(np.searchsorted(edges, score, side="right") - 1, 0, BINS - 1)
            counts[0] += np.bincount(place, minlength=BINS)
            counts[1] += np.bincount(place[mask], minlength=BINS)
            if heaviest is not None:
                weight = np.exp(score - highest)
                top = picked(Keys(rank_of(score), columns["uid"], shard.index, columns["place"], columns["words"]), heaviest)
                weights += [weight.sum(), (weight**2).sum(), weight[top].sum()]
    medians = {name: _median(lengths[i]) for i, name in enumerate(("raw", "picked"))}
    facts = {"median_words": medians, "score_histogram": _histogram(edges, counts), "words_histogram": _lengths(lengths)}
    if heaviest is None:
        return facts
    return {"ess": float(weights[0] ** 2 / weights[1]), "top_1_percent": float(weights[2] / weights[0]), **facts}


def _top_percent(job: Job, shards: list[Shard], rows: int) -> Cut:
    return find_cut(sweep(job, shards, _Score(), "rows"), -(-rows // 100))


def _edges(leading: np.ndarray) -> np.ndarray:
    """BINS + 1 edges over the middle 99 % of the scores, from counts by the first 16 bits of their ranks."""
    ends = np.cumsum(leading)
    best = int(np.searchsorted(ends, TAIL * ends[-1], side="right"))
    worst = int(np.searchsorted(ends, (1 - TAIL) * ends[-1], side="left"))
    high, low = (_finite(key_of(bits)) for bits in (best << 48, (worst << 48) | 0xFFFFFFFFFFFF))
    if not low < high:
        low, high = low - 0.5, low + 0.5
    return np.linspace(low, high, BINS + 1)


def _finite(value: float) -> float:
    limit = 1e300
    return min(max(value, -limit), limit) if value == value else 0.0


def _median(counts: np.ndarray) -> int:
    """The middle value of a count by value; 0 of nothing."""
    ends = np.cumsum(counts)
    return int(np.searchsorted(ends, ends[-1] / 2)) if ends[-1] else 0


def _histogram(edges: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    return {"edges": edges.tolist(), "raw": counts[0].tolist(), "picked": counts[1].tolist()}


def _lengths(lengths: np.ndarray) -> dict[str, Any]:
    """Words a row in BINS equal bins up to the 99.5 % quantile of all rows; longer rows are in the last."""
    ends = np.cumsum(lengths[0])
    longest = max(BINS, int(np.searchsorted(ends, (1 - TAIL) * ends[-1])) + 1)
    edges = np.linspace(0, longest, BINS + 1)
    place = np.clip(np.searchsorted(edges, np.arange(lengths.shape[1]), side="right") - 1, 0, BINS - 1)
    counts = np.stack([np.bincount(place, weights=one, minlength=BINS).astype(np.int64) for one in lengths])
    return _histogram(edges, counts)

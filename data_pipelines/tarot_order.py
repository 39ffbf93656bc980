"""The order that TAROT's rules make of all rows, for any budget.

`tarot_rules` knows how many rows it wants. A budget may also be of tokens or bytes: then layers of the round robin are taken
whole while they fit, and the first that does not is ordered by dual potential. Under quotas, where every group is cut in
another layer, layers are ordered by cosine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines.neighbours import Neighbours, round_robin, top_neighbours
from data_pipelines.selector import Ranking, Scored
from data_pipelines.tarot_rules import Gathered, Picked, Space, fixed, otm, repeats
from data_pipelines.whitening import whiten
from posttrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from data_pipelines.tarot import TarotConfig

Arrays = dict[str, np.ndarray]
Measure = Callable[[np.ndarray], tuple[float, np.ndarray]]

MOST_PAIRS = 1 << 24
"""Largest transport problem, rows times targets. A larger last layer is ordered by cosine, and the summary says so."""
COLUMN = {"tokens": "words", "bytes": "bytes"}


class Rows:
    """All eligible rows, numbered in the order of the sweep; the first sweep notes where they are and what they weigh."""

    def __init__(self, scored: Scored, unit: str) -> None:
        self._scored, self._column = scored, COLUMN.get(unit)
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.shard = self.row = self.weight = np.zeros(0, np.int64)

    def sweep(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids int64[n], features float32[n, d])."""
        first, start = not len(self.shard), 0
        for batch in self._scored.batches():
            n = len(batch["row"])
            if first:
                weight = batch[self._column] if self._column else np.ones(n, np.int64)
                self._parts.append((batch["shard"], batch["row"], weight))
            yield np.arange(start, start + n), batch["features"]
            start += n
        if first and self._parts:
            self.shard, self.row, self.weight = (np.concatenate(part) for part in zip(*self._parts, strict=True))
            self._parts = []

    def features(self, ids: np.ndarray) -> np.ndarray:
        """float32[k, d] of some rows, by one sweep over all."""
        held: np.ndarray | None = None
        order = np.argsort(ids, kind="stable")
        wanted = ids[order]
        for numbers, features in self.sweep():
            if not len(numbers):
                continue
            a, b = np.searchsorted(wanted, [numbers[0], numbers[-1] + 1])
            held = np.empty((len(ids), features.shape[1]), np.float32) if held is None else held
            held[order[a:b]] = features[wanted[a:b] - numbers[0]]
        assert held is not None
        return held


def ranking(scored: Scored, state: Arrays, cfg: TarotConfig) -> Ranking:
    """The order of `rule: fixed` or `otm`.

    Raises:
        ConfigError: a budget that the rule, or `as_published`, cannot serve.
        DataError: nothing to rank; a transport problem that is too large.
    """
    rows = Rows(scored, cfg.budget.unit)

    def white(features: np.ndarray) -> np.ndarray:
        return whiten(features, state["mean"], state.get("whitener"))

    batches = ((ids, white(features)) for ids, features in rows.sweep())
    neighbours = top_neighbours(batches, state["targets"], cfg.limit)
    if not len(rows.row):
        raise DataError("there is no row to rank", fix="give more raw rows")
    gathered = Gathered(rows.sweep, neighbours)
    space = Space(state["targets"], lambda ids: white(gathered(ids)), "repo" if cfg.as_published else "")
    budget = None if cfg.budget.auto else cfg.budget.amount(int(state["figures"][0]))
    if cfg.rule == "otm" or cfg.as_published:
        picked = _by_rule(neighbours, space, cfg, budget)
        return _ranking(rows, picked.ids, picked.facts, _repeats(picked.weight, cfg, len(picked.ids)))

    def measure(ids: np.ndarray) -> tuple[float, np.ndarray]:
        return space.measure(_unit(white(rows.features(ids))))

    assert budget is not None
    if cfg.quotas is not None:
        ids, layer = round_robin(neighbours)
        return _ranking(rows, ids, {"layers": int(layer[-1]) + 1, "last_layer_by": "cosine"}, None)
    ids, facts = fixed_order(neighbours, rows.weight, budget, measure, len(state["targets"]))
    counts = None
    if cfg.repeats is not None:
        taken = int(np.searchsorted(np.cumsum(rows.weight[ids]), budget, side="right"))
        counts = np.ones(len(ids), np.int64)
        if taken:
            _check_pairs(taken, len(state["targets"]))
            found = _repeats(measure(ids[:taken])[1], cfg, taken)
            assert found is not None
            counts[:taken] = found
    return _ranking(rows, ids, facts, counts)


def _unit(rows: np.ndarray) -> np.ndarray:
    wide = rows.astype(np.float64)
    out: np.ndarray = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return out


def _by_rule(neighbours: Neighbours, space: Space, cfg: TarotConfig, budget: int | None) -> Picked:
    """`otm`, or either rule as published."""
    if cfg.rule == "otm":
        return otm(neighbours, space, folds=cfg.folds, seed=cfg.folds_seed)
    if cfg.budget.unit not in ("rows", "share") or cfg.quotas is not None:
        fix = "give `rows` or `share` without quotas, or drop `as_published`"
        raise ConfigError("the published rule knows a number of rows only", where="budget", fix=fix)
    assert budget is not None
    return fixed(neighbours, space, budget)


def fixed_order(
    neighbours: Neighbours, weight: np.ndarray, budget: int, measure: Measure, targets: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Ids in the order of `rule: fixed`, through the layer in which the budget ends.

    Args:
        neighbours: lists of all targets.
        weight: int64[N] of all rows, in the budget's unit.
        budget: in that unit.
        measure: (cost, potentials) of some rows' transport to the targets.
        targets: their number.
    """
    stop = 1024
    while True:
        ids, layer = round_robin(neighbours, stop)
        spent = np.cumsum(weight[ids])
        if spent[-1] > budget or len(ids) < stop:
            break
        stop *= 2
    fits = int(np.searchsorted(spent, budget, side="right"))
    if fits == len(ids):
        return ids, {"layers": int(layer[-1]) + 1, "in_last_layer": 0, "last_layer_by": "cosine"}
    a, b = np.searchsorted(layer, [layer[fits], layer[fits] + 1])
    last, by = ids[a:b], "cosine"
    room = budget - (int(spent[a - 1]) if a else 0)
    if room > 0 and len(last) * targets <= MOST_PAIRS:
        last, by = last[np.argsort(-measure(last)[1], kind="stable")], "potential"
    return np.concatenate([ids[:a], last]), {"layers": int(layer[fits]), "in_last_layer": len(last), "last_layer_by": by}


def _check_pairs(rows: int, targets: int) -> None:
    if rows * targets > MOST_PAIRS:
        message = f"`repeats` needs the transport of {rows} rows to {targets} targets, {rows * targets} pairs; at most {MOST_PAIRS}"
        raise DataError(message, where="repeats", fix="pick fewer rows, take a sample of the target, or drop `repeats`")


def _repeats(weight: np.ndarray, cfg: TarotConfig, rows: int) -> np.ndarray | None:
    if cfg.repeats is None:
        return None
    return repeats(weight, round(cfg.repeats * rows), at_least=1)


def _ranking(rows: Rows, ids: np.ndarray, facts: dict[str, Any], counts: np.ndarray | None) -> Ranking:
    key = -np.arange(len(ids), dtype=np.float64)
    return Ranking(rows.shard[ids], rows.row[ids], key, counts, {"ranked_rows": len(ids), **facts})

"""The order that TAROT's rules make of all rows, for any budget.

`tarot_rules` knows how many rows it wants. A budget may also be of tokens or bytes: then layers of the round robin are taken
whole while they fit, and the first that does not is ordered by dual potential. Under quotas, where every group is cut in
another layer, layers are ordered by cosine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines.neighbours import Neighbours, round_robin, top_neighbours
from data_pipelines.selector import Ranking, Scored
from data_pipelines.tarot_rules import Gathered, ListsTooShort, Picked, Space, fixed, otm, repeats, with_lists
from data_pipelines.whitening import whiten
from posttrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from data_pipelines.tarot import TarotConfig

Arrays = dict[str, np.ndarray]

MOST_PAIRS = 1 << 24
"""Largest transport problem, rows times targets. A larger last layer is ordered by cosine, and the summary says so."""
FIRST_LISTS = 64
"""Neighbours of a target in the first sweep, a few percent dearer than 16 and a sweep cheaper; the lists grow as they are needed."""
QUOTA_LISTS = 2000
"""Neighbours of a target under quotas, where the budget does not say how many are needed."""
EVERY = 1 << 40
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


class Rules:
    """TAROT's rules over all rows.

    Args:
        rows: the rows.
        state: of the selector.
        cfg: which rule.
    """

    def __init__(self, rows: Rows, state: Arrays, cfg: TarotConfig) -> None:
        self._rows, self._state, self._cfg = rows, state, cfg
        self.targets: np.ndarray = state["targets"]
        self._budget = None if cfg.budget.auto else cfg.budget.amount(int(state["figures"][0]))

    def ranking(self) -> Ranking:
        """See `ranking`."""
        cfg = self._cfg
        if cfg.quotas is not None and cfg.rule == "fixed":
            picked = self._by_layers(self._lists(cfg.limit or QUOTA_LISTS))
        else:
            picked = with_lists(self._lists, self._pick, self._first_limit(), cfg.limit or EVERY)
        counts = None
        if cfg.repeats is not None:
            counts = np.ones(len(picked.ids), np.int64)
            counts[: len(picked.weight)] = repeats(picked.weight, round(cfg.repeats * len(picked.weight)), at_least=1)
        key = -np.arange(len(picked.ids), dtype=np.float64)
        facts = {"ranked_rows": len(picked.ids), **picked.facts}
        return Ranking(self._rows.shard[picked.ids], self._rows.row[picked.ids], key, counts, facts)

    def _lists(self, limit: int) -> Neighbours:
        batches = ((ids, self._white(features)) for ids, features in self._rows.sweep())
        lists = top_neighbours(batches, self.targets, limit)
        if not lists.ids.size:
            raise DataError("there is no row to rank", fix="give more raw rows")
        return lists

    def _first_limit(self) -> int:
        if self._budget is None or self._cfg.budget.unit not in ("rows", "share"):
            return FIRST_LISTS
        return max(FIRST_LISTS, 4 * self._budget // len(self.targets))

    def _white(self, features: np.ndarray) -> np.ndarray:
        return whiten(features, self._state["mean"], self._state.get("whitener"))

    def _pick(self, lists: Neighbours, whole: bool) -> Picked:
        cfg = self._cfg
        if cfg.rule == "fixed" and not cfg.as_published:
            return self._fixed(lists, whole)
        gathered = Gathered(self._rows.sweep, lists)
        space = Space(self.targets, lambda ids: self._white(gathered(ids)), "repo" if cfg.as_published else "")
        if cfg.rule == "otm":
            found = otm(lists, space, folds=cfg.folds, seed=cfg.folds_seed, patience=cfg.patience, whole=whole)
            layers = [len(costs) for costs in found.facts["fold_costs"]]
            return Picked(found.ids, found.weight, {"fold_rows": found.facts["fold_rows"], "fold_layers": layers})
        if cfg.budget.unit not in ("rows", "share") or cfg.quotas is not None:
            fix = "give `rows` or `share` without quotas, or drop `as_published`"
            raise ConfigError("the published rule knows a number of rows only", where="budget", fix=fix)
        assert self._budget is not None
        return fixed(lists, space, self._budget, last=cfg.last, whole=whole)

    def _by_layers(self, lists: Neighbours) -> Picked:
        ids, layer = round_robin(lists)
        return Picked(ids, np.zeros(0), {"whole_layers": int(layer[-1]) + 1, "last_layer_by": "cosine"})

    def _fixed(self, lists: Neighbours, whole: bool) -> Picked:
        """Layers in order, through the one in which the budget ends; weights of the rows within the budget if they are wanted."""
        assert self._budget is not None
        ids, layer, spent = self._layers(lists)
        if spent[-1] < self._budget and not whole:
            raise ListsTooShort(f"the lists hold {len(ids)} rows", where="neighbours", fix="raise `limit`")
        facts = {"whole_layers": int(layer[-1]) + 1, "in_last_layer": 0, "last_layer_by": "cosine"}
        if spent[-1] > self._budget:
            ids, facts = self._cut_layer(ids, layer, spent)
        weight = np.zeros(0)
        if self._cfg.repeats is not None:
            taken = int(np.searchsorted(np.cumsum(self._rows.weight[ids]), self._budget, side="right"))
            _check_pairs(taken, len(self.targets))
            weight = self._potentials(ids[:taken]) if taken else weight
        return Picked(ids, weight, facts)

    def _layers(self, lists: Neighbours) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids, their layers, summed weights) of the round robin, until the budget is spent."""
        assert self._budget is not None
        stop = 1024
        while True:
            ids, layer = round_robin(lists, stop)
            spent = np.cumsum(self._rows.weight[ids])
            if spent[-1] > self._budget or len(ids) < stop:
                return ids, layer, spent
            stop *= 2

    def _cut_layer(self, ids: np.ndarray, layer: np.ndarray, spent: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        """Ids through the layer that is cut, its rows by potential; and facts."""
        assert self._budget is not None
        first = layer[int(np.searchsorted(spent, self._budget, side="right"))]
        a, b = np.searchsorted(layer, [first, first + 1])
        last, by = ids[a:b], "cosine"
        room = self._budget - (int(spent[a - 1]) if a else 0)
        if room > 0 and len(last) * len(self.targets) <= MOST_PAIRS:
            sign = -1 if self._cfg.last == "largest" else 1
            last, by = last[np.argsort(sign * self._potentials(last), kind="stable")], "potential"
        return np.concatenate([ids[:a], last]), {"whole_layers": int(first), "in_last_layer": len(last), "last_layer_by": by}

    def _potentials(self, ids: np.ndarray) -> np.ndarray:
        """float64[k] dual potentials of the rows in their transport to all targets."""
        space = Space(self.targets, lambda ids: self._white(self._rows.features(ids)))
        return space.measure(ids)[1]


def ranking(scored: Scored, state: Arrays, cfg: TarotConfig) -> Ranking:
    """The order of `rule: fixed` or `otm`.

    Raises:
        ConfigError: a budget that `as_published` cannot serve.
        DataError: nothing to rank; a transport problem that is too large.
    """
    return Rules(Rows(scored, cfg.budget.unit), state, cfg).ranking()


def _check_pairs(rows: int, targets: int) -> None:
    if rows * targets > MOST_PAIRS:
        message = f"`repeats` needs the transport of {rows} rows to {targets} targets, {rows * targets} pairs; at most {MOST_PAIRS}"
        raise DataError(message, where="repeats", fix="pick fewer rows, take a sample of the target, or drop `repeats`")

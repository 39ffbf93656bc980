"""TAROT's rules (Feng et al. 2025, arXiv 2412.00420, algorithms 1 and 2) as functions of neighbour lists and distances.

    fixed   k rows: layer i of the round robin is every target's i-th nearest row; layers are taken whole until the next one
            would exceed k, and of that one the rows with the largest dual potential in its transport to all targets
    otm     as many rows as transport asks for: over K folds of the targets, layers of one part's neighbours (with a positive
            cosine) are added while the transport cost to the other parts falls; the union over the folds
    repeats how often each row is to be seen, in proportion to its dual potential

The distance is d_w = sqrt(2 - 2 cos) of whitened features; costs are transport costs W1 between uniform weights, exact up to
4 million pairs. A potential is what the mass at a row costs: moving a little of it from row i to row j changes the cost by
f_j - f_i. So the largest potentials belong to the rows far from the targets.

The authors' code differs from the definition, and `compat="repo"` does what it does: costs and potentials are those of ten
annealed steps that are not converged (see `sinkhorn.annealed`); a fold keeps the k that no longer lowered the cost; a layer
that adds nothing counts as such a k; the last layer is never looked at; where the layers give exactly k rows, the next layer
is added on top. `last="largest"` is theirs too: they keep the largest of GeomLoss's potentials of the rows, which agree with
POT's, so that of the layer that is cut the rows stay that are the dearest to carry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from data_pipelines.neighbours import Neighbours, round_robin
from data_pipelines.ot_shortlist import exact
from data_pipelines.sinkhorn import annealed
from posttrain.errors import ConfigError, DataError

Compat = Literal["", "repo"]
KEPT = 1 << 24
"""Distances that are kept, 8 bytes each."""
AHEAD = 8
"""Layers whose distances `otm` makes together at first; then twice as many each time."""
Batches = Iterable[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Picked:
    """Rows in the order they were picked.

    Args:
        ids: int64[k].
        weight: float64[k], each row's dual potential in the transport of all of them to all targets.
        facts: JSON-ready.
    """

    ids: np.ndarray
    weight: np.ndarray
    facts: dict[str, Any]


class Space:
    """Whitened features of targets and rows, and what transport between them costs.

    Args:
        targets: float[T, d]; brought to unit length, as the rows are.
        features: float[k, d] of the rows of int64[k] ids; see `Gathered`.
        compat: `repo`: costs and potentials as the authors' code has them, of features as they are.
    """

    def __init__(self, targets: np.ndarray, features: Callable[[np.ndarray], np.ndarray], compat: Compat = "") -> None:
        if compat not in ("", "repo"):
            raise ConfigError(f"unknown compat `{compat}`; known: repo", where="compat")
        self.compat, self._features = compat, features
        self.targets = self._unit(targets)
        self._known, self._place, self._held = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, len(self.targets)))

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Unit vectors float64[k, d]."""
        return self._unit(self._features(ids))

    def distances(self, ids: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """float64[k, c] of rows to some targets; kept, since every fold asks for nearly the same rows, up to `KEPT` of them."""
        if not self.keep(ids):
            return distance(self.rows(ids), self.targets[columns])
        rows = self._held[self._place[np.searchsorted(self._known, ids)]]
        return rows if len(columns) == len(self.targets) else rows[:, columns]

    def keep(self, ids: np.ndarray) -> bool:
        """Makes the distances of rows that will be asked for, in one product of matrices; False if these would be too many."""
        missing = np.setdiff1d(ids, self._known)
        if (len(self._known) + len(missing)) * len(self.targets) > KEPT:
            return False
        if len(missing):
            self._add(missing)
        return True

    def _add(self, ids: np.ndarray) -> None:
        count = len(self._known)
        if count + len(ids) > len(self._held):
            held = np.empty((2 * count + len(ids), len(self.targets)))
            held[:count], self._held = self._held[:count], held
        self._held[count : count + len(ids)] = distance(self.rows(ids), self.targets)
        known, place = np.concatenate([self._known, ids]), np.concatenate([self._place, np.arange(count, count + len(ids))])
        order = np.argsort(known)
        self._known, self._place = known[order], place[order]

    def _unit(self, rows: np.ndarray) -> np.ndarray:
        wide = np.asarray(rows, np.float64)
        if self.compat == "repo":
            return wide
        norm = np.sqrt((wide * wide).sum(1))[:, None]
        unit: np.ndarray = wide / np.where(norm > 0, norm, 1.0)
        return unit

    def measure(self, ids: np.ndarray, columns: np.ndarray | None = None) -> tuple[float, np.ndarray]:
        """Transport cost of rows int64[k] to the targets (or some of them), and the rows' potentials float64[k]."""
        growing = Growing(self, columns)
        growing.add(ids)
        return growing.measure()


class Growing:
    """A set of rows that grows, and its transport to the targets or some of them; each solution begins with the prices before it.

    Args:
        space: where they are.
        columns: which targets; all by default.
    """

    def __init__(self, space: Space, columns: np.ndarray | None = None) -> None:
        self._space, self._repo = space, space.compat == "repo"
        self._columns = np.arange(len(space.targets)) if columns is None else columns
        self._cost, self._rows = np.empty((0, len(self._columns))), 0
        self._prices: np.ndarray | None = None
        targets = space.targets[self._columns]
        self._low, self._high = targets.min(0), targets.max(0)

    def add(self, ids: np.ndarray) -> None:
        """Rows int64[k]."""
        if self._rows + len(ids) > len(self._cost):
            room = np.empty((2 * self._rows + len(ids), len(self._columns)))
            room[: self._rows] = self._cost[: self._rows]
            self._cost = room
        self._cost[self._rows : self._rows + len(ids)] = self._space.distances(ids, self._columns)
        self._rows += len(ids)
        if self._repo and len(ids):
            rows = self._space.rows(ids)
            self._low, self._high = np.minimum(self._low, rows.min(0)), np.maximum(self._high, rows.max(0))

    def measure(self) -> tuple[float, np.ndarray]:
        """Transport cost, and the rows' potentials float64[k] in the order in which they were added."""
        cost = self._cost[: self._rows]
        if self._repo:
            value, f, _ = annealed(cost, float(np.linalg.norm(self._high - self._low)))
            return value, f
        found = exact(cost, self._prices)
        self._prices = found.g
        return found.value, found.f


def distance(rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """d_w = sqrt(2 - 2 cos), float64[k, T], of unit vectors."""
    square = rows @ targets.T
    square *= -2
    square += 2
    found: np.ndarray = np.sqrt(np.abs(square, out=square), out=square)
    return found


class ListsTooShort(DataError):
    """A rule has come to the end of the neighbour lists."""


def with_lists(make: Callable[[int], Neighbours], rule: Callable[[Neighbours, bool], Picked], first: int, most: int) -> Picked:
    """What `rule` picks from lists of `most`, found with lists as short as it can do with.

    They begin with `first` and grow four times longer each time the rule comes to their end. Lists of a few dozen cost a
    fraction of lists of thousands.

    Args:
        make: limit -> lists.
        rule: (lists, whole) -> pick: `fixed` or `otm`.
        first: length to begin with; for `fixed`, four times k over the number of targets will do.
        most: longest lists.
    """
    limit = min(first, most)
    while True:
        lists = make(limit)
        whole = limit >= most or lists.ids.shape[1] < limit
        try:
            return rule(lists, whole)
        except ListsTooShort:
            if whole:
                raise
        limit = min(4 * limit, most)


class Gathered:
    """Features of the rows in neighbour lists, fetched by sweeps over all rows as they are asked for; for `Space`.

    A sweep takes along the rows of the layers that will be asked for next: twice as many layers as before.

    Args:
        sweep: gives (ids, features float32[n, d]) of all rows, afresh at each call.
        neighbours: the lists.
    """

    def __init__(self, sweep: Callable[[], Batches], neighbours: Neighbours) -> None:
        self._sweep, self._lists = sweep, neighbours
        self._layers = 0
        self._ids, self._held = np.zeros(0, np.int64), np.zeros((0, 0), np.float32)

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """float32[k, d] of ids int64[k]."""
        while not np.isin(ids, self._ids).all():
            if self._layers >= self._lists.ids.shape[1]:
                raise DataError("features are asked for of rows that are in no list", where="neighbours")
            self._layers = min(max(8, 2 * self._layers), self._lists.ids.shape[1])
            self._fetch(np.unique(self._lists.ids[:, : self._layers]))
        held: np.ndarray = self._held[np.searchsorted(self._ids, ids)]
        return held

    def reach(self, layers: int) -> None:
        """Fetches the rows of the first `layers` layers in one sweep."""
        if layers > self._layers:
            self._layers = min(layers, self._lists.ids.shape[1])
            self._fetch(np.unique(self._lists.ids[:, : self._layers]))

    def _fetch(self, wanted: np.ndarray) -> None:
        held: np.ndarray | None = None
        missing = np.ones(len(wanted), bool)
        for ids, features in self._sweep():
            at = np.searchsorted(wanted, ids)
            here = (at < len(wanted)) & (wanted[np.minimum(at, len(wanted) - 1)] == ids)
            if held is None:
                held = np.empty((len(wanted), features.shape[1]), np.float32)
            held[at[here]], missing[at[here]] = features[here], False
        if held is None or missing.any():
            raise DataError(f"row {int(wanted[missing][0])} of the lists is not among the rows", where="neighbours")
        self._ids, self._held = wanted, held


def fixed(neighbours: Neighbours, space: Space, k: int, *, last: Literal["largest", "smallest"] = "smallest", whole: bool = True) -> Picked:
    """Algorithm 1: `k` rows.

    Args:
        neighbours: of all targets, in their order.
        space: the targets and the rows' features.
        k: how many rows.
        last: which potentials of the layer that is cut are kept; `largest` as in the authors' code. A potential is what mass
            there costs, and `smallest` gave the pick the lower transport cost in 32 of 32 cases, by 0.15 % on average, and in 25 of
            32 to held-out targets (`benchmarks/select_tarot.py`, part `last`).
        whole: there are no longer lists to be had; see `with_lists`.

    Raises:
        ConfigError: k below 1, or another `last`.
        ListsTooShort: the lists hold fewer than `k` rows; under `compat="repo"`, which returns what there is, if not `whole`.
    """
    if k < 1:
        raise ConfigError(f"k is {k}, must be at least 1", where="k")
    if last not in ("largest", "smallest"):
        raise ConfigError(f"unknown `{last}`; known: largest, smallest", where="last")
    needed = k + 1 if space.compat == "repo" else k
    order, layer = round_robin(neighbours, stop=needed)
    if len(order) < needed and not (whole and space.compat == "repo"):
        message = f"the lists hold {len(order)} rows, {k} are wanted"
        raise ListsTooShort(message, where="neighbours", fix="keep more neighbours of each target")
    full = int(layer[k]) if len(order) > k else int(layer.max()) + 1
    ids = order[layer < full]
    left = order[layer == full]
    if len(left):
        ids = np.concatenate([ids, _last_layer(space, left, k - len(ids), -1 if last == "largest" else 1)])
    _, weight = space.measure(ids)
    return Picked(
        ids, weight, {"whole_layers": full, "in_last_layer": len(left), "kept_of_last_layer": len(ids) - int((layer < full).sum())}
    )


def _last_layer(space: Space, ids: np.ndarray, wanted: int, sign: int) -> np.ndarray:
    """The `wanted` rows with the smallest `sign` times potential, these first; ties in the order of `ids`."""
    if wanted == 0:
        return ids if space.compat == "repo" else ids[:0]
    _, potential = space.measure(ids)
    return ids[np.argsort(sign * potential, kind="stable")[:wanted]]


def folds_of(targets: int, folds: int, seed: int) -> list[np.ndarray]:
    """The targets of each part, ascending; those of scikit-learn's `KFold(folds, shuffle=True, random_state=seed)`."""
    order = np.arange(targets)
    np.random.RandomState(seed).shuffle(order)
    return [np.sort(part) for part in np.array_split(order, folds)]


def otm(neighbours: Neighbours, space: Space, *, folds: int = 10, seed: int = 42, patience: int = 1, whole: bool = True) -> Picked:
    """Algorithm 2: the number of rows that minimises the transport cost to targets that had no say in the choice.

    Args:
        neighbours: of all targets, in their order.
        space: the targets and the rows' features.
        folds: parts of the targets; at most their number is used.
        seed: of the parts.
        patience: a fold ends after this many layers in a row that do not lower its cost; it keeps the best set seen.
        whole: there are no longer lists to be had; see `with_lists`.

    Raises:
        ConfigError: folds below 2 or patience below 1.
        ListsTooShort: a fold's cost falls to the end of the lists, and these are not `whole`.
        DataError: one target only, or no row with a positive cosine to any.
    """
    targets = len(space.targets)
    if folds < 2 or patience < 1:
        raise ConfigError(f"folds is {folds}, at least 2; patience is {patience}, at least 1", where="folds")
    if targets < 2:
        raise DataError("folds need at least two targets", fix="give more target rows, or take rule fixed")
    parts = folds_of(targets, min(folds, targets), seed)
    space.keep(np.unique(neighbours.ids[:, :AHEAD]))
    found = [_fold(neighbours, space, part, patience, whole) for part in parts]
    union = np.unique(np.concatenate([ids for ids, _ in found]))
    if not len(union):
        raise DataError("no row has a positive cosine to any target", fix="take rule fixed")
    order, _ = round_robin(neighbours)
    ids = order[np.isin(order, union)]
    cost, weight = space.measure(ids)
    sizes = [len(ids) for ids, _ in found]
    return Picked(ids, weight, {"cost": cost, "fold_rows": sizes, "fold_costs": [costs for _, costs in found]})


def _fold(neighbours: Neighbours, space: Space, part: np.ndarray, patience: int, whole: bool) -> tuple[np.ndarray, list[float]]:
    """Ids (ascending) that the fold keeps, and the cost after each layer that was looked at."""
    repo = space.compat == "repo"
    others = np.setdiff1d(np.arange(len(space.targets)), part)
    lists, positive = neighbours.ids[part], neighbours.score[part] > 0
    ids, growing = np.zeros(0, np.int64), Growing(space, others)
    kept, best, failed, costs = ids, np.inf, 0, []
    for layer in range(lists.shape[1] - repo):
        if layer >= AHEAD and layer & (layer - 1) == 0:
            space.keep(np.unique(neighbours.ids[:, : 2 * layer]))
        new = np.setdiff1d(lists[positive[:, layer], layer], ids)
        if len(new):
            ids = np.concatenate([ids, new])
            growing.add(new)
        elif not repo or not len(ids):
            continue
        cost, _ = growing.measure()
        costs.append(cost)
        failed = 0 if cost < best else failed + 1
        if not failed or repo:
            kept = ids
        best = min(best, cost)
        if failed >= (1 if repo else patience):
            break
    else:
        if not whole and positive[:, -1:].any():
            raise ListsTooShort(
                "a fold's cost falls to the end of the lists", where="neighbours", fix="keep more neighbours of each target"
            )
    return np.sort(kept), costs


def repeats(weight: np.ndarray, total: int, *, targets: int = 0, at_least: int = 0, compat: Compat = "") -> np.ndarray:
    """How often each row is to be seen, in proportion to its weight, by largest remainders.

    Args:
        weight: float64[k]; weights below 0 count as 0, and if no weight is above 0 all are equal.
        total: sum of the repeats.
        targets: so many rows with the largest weight are appended: the target rows, where they are trained on too.
        at_least: least number of each.
        compat: `repo`: as in the authors' code, where negative weights count in the sum.

    Returns:
        int64[k + targets], with sum `total`; ties go to the earlier row. Under `compat="repo"` negative counts are 0 and
        the sum may differ.

    Raises:
        ConfigError: `total` below `at_least` for each row.
    """
    weights = np.asarray(weight, np.float64)
    weights = np.concatenate([weights, np.full(targets, weights.max(initial=0.0))])
    if total < at_least * len(weights) or total < 0:
        raise ConfigError(f"{total} repeats for {len(weights)} rows, at least {at_least} each", where="total")
    if not len(weights):
        return np.zeros(0, np.int64)
    if not np.isfinite(weights).all():
        raise DataError("weights that are not finite", where="weight")
    if compat != "repo":
        weights = np.maximum(weights, 0)
        weights = weights if weights.any() else np.ones(len(weights))
        total -= at_least * len(weights)
    share = weights / weights.sum() * total
    count = np.floor(share).astype(np.int64)
    rest = total - int(count.sum())
    count[np.argsort(count - share, kind="stable")[: max(0, rest)]] += 1
    counts: np.ndarray = np.maximum(count, 0) + at_least
    return counts

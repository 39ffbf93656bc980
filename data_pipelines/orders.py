"""Total orders of the eligible rows, swept shard by shard: by the selector's own key, or by keys in a table.

`OwnOrder` asks the selector's `order` for the key of every row; nothing is held. `TableOrder` holds the keys of the rows
that matter, memory-mapped: what a selector's `rank` gave, or the rows that several targets ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_pipelines.engine import Job
from data_pipelines.parts import new_part
from data_pipelines.pick import Keys, Sweep, rank_of
from data_pipelines.scores import score_columns
from data_pipelines.shards import Shard
from posttrain.errors import PosttrainError

Columns = dict[str, Any]
Mask = Callable[[Shard, Columns], np.ndarray]
WEIGHT = {"tokens": "words", "bytes": "bytes"}
"""Unit of a budget -> the column that it sums; other units count rows."""


class Order(Protocol):
    """Keys of a batch of rows."""

    name: str

    def keys(self, shard: Shard, columns: Columns) -> np.ndarray:
        """float64[n], higher first; NaN: the row is not in this order."""


class OwnOrder:
    """The selector's `order`, or the score itself; of one target's score under separate targets."""

    def __init__(self, job: Job, target: str = "") -> None:
        self.name, self._job = "own", job
        self._column = f"score.{target}" if target else "score"

    def keys(self, shard: Shard, columns: Columns) -> np.ndarray:
        """See `Order`."""
        columns = {**columns, "score": columns[self._column]}
        own = self._job.hook("order")
        found: np.ndarray = own(columns, self._job.config, self._job.seed) if own else columns["score"]
        return found


class TableOrder:
    """Keys of some rows, in files of one column each, sorted by (shard, place)."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self._folder = name, folder
        paths = folder.glob("*.npy")
        self._arrays: dict[str, np.ndarray] = {path.stem: np.load(path, mmap_mode="r", allow_pickle=False) for path in paths}

    @classmethod
    def write(cls, name: str, folder: Path, arrays: dict[str, np.ndarray]) -> TableOrder:
        """A table of the columns `shard`, `place`, `key` and any others, as long as these; in any order of rows.

        Raises:
            PosttrainError: a row that is there twice, or a key that is not finite.
        """
        order = np.lexsort((arrays["place"], arrays["shard"]))
        arrays = {column: np.ascontiguousarray(values[order]) for column, values in arrays.items()}
        twice = (np.diff(arrays["shard"]) == 0) & (np.diff(arrays["place"]) == 0)
        if twice.any() or not np.isfinite(arrays["key"]).all():
            raise PosttrainError("a ranking holds a row twice, or a key that is not finite", where=name, fix="mend the selector's `rank`")
        for column, values in arrays.items():
            with new_part(folder / f"{column}.npy") as path, open(path, "wb") as file:
                np.save(file, values, allow_pickle=False)
        return cls(name, folder)

    def _at(self, shard: Shard, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
        """(rows of the batch that are in the table, their places in it)."""
        begin, end = np.searchsorted(self._arrays["shard"], np.array([shard.index, shard.index + 1])).tolist()
        known = self._arrays["place"][begin:end]
        at = np.searchsorted(known, np.asarray(columns["place"]))
        inside = np.flatnonzero(at < len(known))
        inside = inside[known[at[inside]] == columns["place"][inside]]
        return inside, begin + at[inside]

    def column(self, name: str, shard: Shard, columns: Columns, absent: Any) -> np.ndarray:
        """One column of the batch's rows, `absent` for those that are not in the table (or for all, if there is no such column)."""
        if name not in self._arrays:
            return np.full(len(columns["place"]), absent)
        inside, at = self._at(shard, columns)
        found = np.full(len(columns["place"]), absent, self._arrays[name].dtype)
        found[inside] = self._arrays[name][at]
        return found

    def keys(self, shard: Shard, columns: Columns) -> np.ndarray:
        """See `Order`."""
        return self.column("key", shard, columns, np.nan)

    def has(self, name: str) -> bool:
        """There is such a column."""
        return name in self._arrays


class Groups:
    """Quota groups as numbers.

    Args:
        names: of the groups.
        merged: all of them are number 0; otherwise they are 0..G-1.
        rest: rows of other groups are number 0 too, instead of none.
        by_group: the score tables have groups; otherwise all rows are number 0.
    """

    def __init__(self, names: list[str], *, merged: bool = False, rest: bool = False, by_group: bool = True) -> None:
        self._by_group, self._other = by_group, 0 if rest else -1
        self._codes = {name: 0 if merged else code for code, name in enumerate(names)}

    def codes(self, columns: Columns) -> np.ndarray:
        """int64[n]; -1: in no group."""
        if not self._by_group:
            return np.zeros(len(columns["place"]), np.int64)
        return np.fromiter((self._codes.get(name, self._other) for name in columns["group"]), np.int64, len(columns["place"]))


ALL = Groups([], by_group=False)


def sweep(job: Job, shards: list[Shard], order: Order, unit: str, groups: Groups = ALL, without: Mask | None = None) -> Sweep:
    """Sweeps over the keys of the eligible rows of all shards.

    Args:
        unit: of the weights, `tokens`, `bytes` or anything else for rows.
        groups: rows in none of them are passed over.
        without: rows that are passed over.
    """

    def keys() -> Iterator[Keys]:
        for shard in shards:
            for columns in score_columns(job.part("scores", shard), groups=bool(job.config.quotas)):
                if without is not None:
                    kept = ~without(shard, columns)
                    columns = {name: values[kept] for name, values in columns.items()}
                yield keys_of(shard, columns, order, unit, groups)

    return keys


def keys_of(shard: Shard, columns: Columns, order: Order, unit: str, groups: Groups = ALL) -> Keys:
    """Keys of the batch's rows that are in the order and in a group."""
    key, group = order.keys(shard, columns), groups.codes(columns)
    at = np.flatnonzero(~np.isnan(key) & (group >= 0))
    weight = columns[WEIGHT[unit]][at] if unit in WEIGHT else np.ones(len(at), np.int64)
    return Keys(rank_of(key[at]), columns["uid"][at], shard.index, columns["place"][at], weight, group[at])

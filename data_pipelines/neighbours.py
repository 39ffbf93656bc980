"""The nearest rows of every target, exactly and in one sweep, and going round the targets with them.

Similarity is the cosine. A float32 matrix product finds the rows that may belong to a target's best; each of these is scored
again in float64, one dot product whose order of summation depends on nothing but the number of coordinates. The margin
between the two is a bound on the product's rounding, d 2^-24, not a guess, so the result is that of a full float64
comparison, whatever batches, blocks or threads the rows came in. Ties go to the smaller id. Memory is one block of
similarities and the lists themselves, 16 bytes an entry.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from data_pipelines.fastexp import fast
from posttrain.errors import ConfigError, DataError

BLOCK = 2048
"""Rows and targets of one matrix product; 16 MiB of similarities."""


UNIT = 2.0**-21
"""Rows whose norms are 1 within this are not divided by them; the margin allows for it on both sides."""


class Neighbours(NamedTuple):
    """Best first: `ids` int64[T, L], `score` float64[T, L] cosines; L is the limit, or the number of rows if that is less."""

    ids: np.ndarray
    score: np.ndarray


@fast
def _dot(left: np.ndarray, right: np.ndarray) -> float:
    total = 0.0
    for i in range(len(left)):
        total += np.float64(left[i]) * np.float64(right[i])
    return total


@fast
def _norms(rows: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(rows)):
        out[i] = np.sqrt(_dot(rows[i], rows[i]))


@fast
def _sink(score: np.ndarray, ids: np.ndarray, size: int) -> None:
    """Restores the heap after its root was replaced: the root is the worst, the lowest score and of these the largest id."""
    at = 0
    while True:
        worst = at
        for child in (2 * at + 1, 2 * at + 2):
            if child < size and (score[child] < score[worst] or (score[child] == score[worst] and ids[child] > ids[worst])):
                worst = child
        if worst == at:
            return
        score[at], score[worst] = score[worst], score[at]
        ids[at], ids[worst] = ids[worst], ids[at]
        at = worst


@fast
def _rise(score: np.ndarray, ids: np.ndarray, at: int) -> None:
    while at > 0:
        parent = (at - 1) // 2
        if not (score[at] < score[parent] or (score[at] == score[parent] and ids[at] > ids[parent])):
            return
        score[at], score[parent] = score[parent], score[at]
        ids[at], ids[parent] = ids[parent], ids[at]
        at = parent


@fast
def _admit(
    rough: np.ndarray, rows: np.ndarray, row_norm: np.ndarray, row_ids: np.ndarray, targets: np.ndarray, target_norm: np.ndarray,
    margin: float, count: np.ndarray, score: np.ndarray, ids: np.ndarray,
) -> None:  # fmt: skip
    """Puts the rows into the targets' heaps; `rough` float32[targets, rows] is within `margin` of the cosines."""
    limit = score.shape[1]
    for t in range(len(targets)):
        for r in range(len(rows)):
            if count[t] == limit and rough[t, r] < score[t, 0] - margin:
                continue
            scale = row_norm[r] * target_norm[t]
            cosine = min(1.0, max(-1.0, _dot(rows[r], targets[t]) / scale)) if scale > 0 else 0.0
            if count[t] < limit:
                score[t, count[t]], ids[t, count[t]] = cosine, row_ids[r]
                _rise(score[t], ids[t], count[t])
                count[t] += 1
            elif cosine > score[t, 0] or (cosine == score[t, 0] and row_ids[r] < ids[t, 0]):
                score[t, 0], ids[t, 0] = cosine, row_ids[r]
                _sink(score[t], ids[t], limit)


def top_neighbours(batches: Iterable[tuple[np.ndarray, np.ndarray]], targets: np.ndarray, limit: int) -> Neighbours:
    """The `limit` rows with the largest cosine to each target.

    Args:
        batches: (ids int64[n], features float32[n, d]) of all rows, in any order and any batches; every id once. Rows need not
            be of unit length; the cosine of a row of zeros is 0.
        targets: float32[T, d].
        limit: rows a target, at least 1.

    Raises:
        ConfigError: `limit` below 1.
        DataError: no targets, numbers of coordinates that differ, or features that are not finite.
    """
    if limit < 1:
        raise ConfigError(f"limit is {limit}, must be at least 1", where="limit")
    goal = _features(targets, None, "targets")
    if not len(goal):
        raise DataError("there are no targets", fix="give target rows")
    lists = _Lists(goal, limit)
    for ids, features in batches:
        rows = _features(features, goal.shape[1], "features")
        if len(ids) != len(rows):
            raise DataError(f"{len(ids)} ids for {len(rows)} rows", where="batches")
        for at in range(0, len(rows), BLOCK):
            lists.add(np.asarray(ids[at : at + BLOCK], np.int64), rows[at : at + BLOCK])
    return lists.sorted()


def _features(values: np.ndarray, size: int | None, name: str) -> np.ndarray:
    rows = np.ascontiguousarray(values, dtype=np.float32)
    if rows.ndim != 2 or (size is not None and len(rows) and rows.shape[1] != size):
        expected = "[n, d]" if size is None else f"[n, {size}]"
        raise DataError(f"{name} of shape {rows.shape}, expected {expected}", where=name, fix="make them by one model")
    if not np.isfinite(rows).all():
        raise DataError(f"row {int(np.flatnonzero(~np.isfinite(rows).all(1))[0])} of {name} is not finite", where=name)
    return rows


class _Lists:
    """The lists of all targets, as heaps."""

    def __init__(self, targets: np.ndarray, limit: int) -> None:
        self._targets, self._limit = targets, limit
        self._norm, self._unit = _unit(targets)
        self._margin = (targets.shape[1] + 8) * 2.0**-24 + 2.1 * UNIT
        self._count = np.zeros(len(targets), np.int64)
        self._score, self._ids = np.empty((len(targets), 0)), np.empty((len(targets), 0), np.int64)
        self._seen = 0

    def add(self, ids: np.ndarray, rows: np.ndarray) -> None:
        """Rows of one block."""
        self._grow(len(rows))
        norm, unit = _unit(rows)
        for at in range(0, len(self._targets), BLOCK):
            part = slice(at, at + BLOCK)
            rough = self._unit[part] @ unit.T
            _admit(
                rough, rows, norm, ids, self._targets[part], self._norm[part], self._margin,
                self._count[part], self._score[part], self._ids[part],
            )  # fmt: skip

    def _grow(self, rows: int) -> None:
        """Room for as many rows as there have been, up to the limit; heaps that are full only by their room stay heaps."""
        self._seen += rows
        wanted, room = min(self._limit, self._seen), self._score.shape[1]
        if wanted > room:
            room = min(self._limit, max(wanted, 2 * room))
            score, ids = np.zeros((len(self._targets), room)), np.zeros((len(self._targets), room), np.int64)
            score[:, : self._score.shape[1]], ids[:, : self._ids.shape[1]] = self._score, self._ids
            self._score, self._ids = score, ids

    def sorted(self) -> Neighbours:
        """The lists, best first."""
        held = int(self._count[0])
        score, ids = self._score[:, :held], self._ids[:, :held]
        for t in range(len(ids)):
            order = np.lexsort((ids[t], -score[t]))
            score[t], ids[t] = score[t][order], ids[t][order]
        return Neighbours(np.ascontiguousarray(ids), np.ascontiguousarray(score))


def _unit(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(norms float64[n], rows of unit length float32[n, d], or such rows as they are if all are that already to within UNIT)."""
    norm = np.empty(len(rows))
    _norms(rows, norm)
    if len(norm) and np.abs(norm - 1).max() <= UNIT:
        return norm, rows
    return norm, (rows / np.where(norm > 0, norm, 1.0)[:, None]).astype(np.float32)


def round_robin(neighbours: Neighbours, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Every target's best, then every target's second best, and so on; what RDS+ calls round robin (Ivison et al. 2025).

    Layer i is the union of each target's i-th best row without the rows of earlier layers; inside a layer the row that is
    nearest to the target that asks for it comes first, then the smaller id.

    Args:
        neighbours: of the targets.
        stop: no further layer once there are this many rows.

    Returns:
        (ids int64[k] in order, layer int64[k] from 0).
    """
    known, number = np.unique(neighbours.ids, return_inverse=True)
    targets, layers = neighbours.ids.shape
    number = number.reshape(targets, layers)
    taken = np.zeros(len(known), bool)
    order: list[np.ndarray] = []
    count = 0
    for i in range(layers):
        fresh = ~taken[number[:, i]]
        layer, score = number[fresh, i], neighbours.score[fresh, i]
        best = layer[np.lexsort((layer, -score))]
        layer = best[np.sort(np.unique(best, return_index=True)[1])]
        taken[layer] = True
        order.append(layer)
        count += len(layer)
        if stop is not None and count >= stop:
            break
    sizes = [len(layer) for layer in order]
    ids = known[np.concatenate(order)] if order else np.zeros(0, np.int64)
    return ids, np.repeat(np.arange(len(sizes)), sizes)

"""The `rank` hook: all eligible rows in batches, and the order that the selector makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from data_pipelines.engine import Job
from data_pipelines.orders import TableOrder
from data_pipelines.scores import score_columns
from data_pipelines.shards import Shard
from posttrain.core.durable import write_json
from posttrain.core.rundir import read_json
from posttrain.errors import DataError

MIB = 1 << 20


class ScoredTables:
    """All eligible rows; see `selector.Scored`.

    Args:
        raw: shards of the raw rows.
        targets: shards of each target.
    """

    def __init__(self, job: Job, raw: list[Shard], targets: list[list[Shard]]) -> None:
        self._job, self._raw, self._targets = job, raw, targets

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        """See `selector.Scored`; `row` is the row's place among the shard's scored rows."""
        for shard in self._raw:
            vectors = self._vectors(shard)
            for columns in score_columns(self._job.part("scores", shard), groups=False):
                columns["row"] = columns.pop("place")
                columns["shard"] = np.full(len(columns["row"]), shard.index, np.int64)
                yield from self._with_vectors(columns, vectors)

    def _vectors(self, shard: Shard) -> np.ndarray | None:
        if self._job.vectors is None:
            return None
        from data_pipelines.feature_files import open_vectors

        return open_vectors(self._job.part("features.raw", shard))

    def _with_vectors(self, columns: dict[str, np.ndarray], vectors: np.ndarray | None) -> Iterator[dict[str, np.ndarray]]:
        rows = len(columns["row"])
        if vectors is None or not rows:
            if rows:
                yield columns
            return
        step = max(1, self._job.config.memory * MIB // 4 // (4 * vectors.shape[1]))
        for at in range(0, rows, step):
            part = {name: values[at : at + step] for name, values in columns.items()}
            yield {**part, "features": vectors[part["row"]]}

    def target_features(self) -> list[np.ndarray]:
        """See `selector.Scored`."""
        if self._job.vectors is None:
            return []
        from data_pipelines.feature_files import joined

        parts = [[self._job.part("features.target", shard) for shard in shards] for shards in self._targets]
        return [joined(files, self._job.folder / "targets" / f"{i:03d}.npy") for i, files in enumerate(parts)]


def rank_rows(job: Job, raw: list[Shard], targets: list[list[Shard]], where: str) -> dict[str, Any]:
    """Asks the selector for its order, keeps it as the table `ranking`, and returns its facts.

    Raises:
        DataError: the order is empty.
        PosttrainError: it is not an order.
    """
    folder = job.folder / "orders" / "ranking"
    if (known := read_json(folder / "facts.json")) is not None:
        return dict(known)
    found = job.methods.rank(ScoredTables(job, raw, targets), job.state(), job.config, job.seed)
    if not len(found.key):
        raise DataError("the selector ranked no row at all", where=where, fix="give more raw or target rows")
    arrays = {"shard": _whole(found.shard), "place": _whole(found.row), "key": np.asarray(found.key, np.float64)}
    if found.repeat is not None:
        arrays["repeat"] = _whole(found.repeat)
    TableOrder.write("ranking", folder, arrays)
    facts = dict(found.facts or {})
    write_json(folder / "facts.json", facts)
    return facts


def _whole(values: Any) -> np.ndarray:
    return np.asarray(values, np.int64)

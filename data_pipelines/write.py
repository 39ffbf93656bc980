"""The write: each shard is read again, and its picked rows go out in input order with their score."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.choice import Choice, load_choice
from data_pipelines.engine import Job
from data_pipelines.parts import link_part, new_part, save_arrays
from data_pipelines.scores import score_columns
from data_pipelines.selector import FEATURES
from data_pipelines.shards import Shard
from data_pipelines.stream import items_at
from posttrain.core.durable import write_json
from posttrain.core.rundir import read_json

Row = dict[str, Any]
EXCERPT = 300
"""Characters of a row that are shown as an example."""
CARD = """---
configs:
- config_name: default
  data_files: rows-*{suffix}
---
Rows picked by `{method}`. The scores of all raw rows are in `scores-*.parquet`, figures and examples in `selection.json`.
"""


class Wanted(NamedTuple):
    """An item that the write needs: where it is, and whether it is picked or only shown as an example."""

    place: int
    number: int
    chunk: int
    score: float
    repeat: int | None
    picked: bool


def write_shard(job: Job, step: str, shard: Shard) -> None:
    """Writes one shard's picked rows, their statistics for the report, and the texts of examples."""
    shown: dict[int, dict[str, Any]] = {}
    with new_part(job.part(step, shard)) as path, open(path, "wb") as file:
        rows = _written(job, shard, file, shown)
        tells = job.hook("report") is not None
        statistics = job.methods.fit_shard(rows, job.config, step) if tells else {}
        for _ in rows:
            pass
        save_arrays(job.part("statistics", shard), statistics)
        write_json(job.part("examples", shard), {str(place): value for place, value in sorted(shown.items())})


def _written(job: Job, shard: Shard, file: Any, shown: dict[int, dict[str, Any]]) -> Iterator[Row]:
    """Writes the picked rows as they pass by on their way into the statistics."""
    from posttrain.data.rows import row_text
    from posttrain.data.shards import json_line

    examples = example_places(job, shard)
    queue: deque[Wanted] = deque()
    for item in items_at(job, shard, _ahead(wanted_items(job, shard, load_choice(job), examples), queue)):
        want = _of(item.place, queue)
        if item.place in examples:
            shown[item.place] = {"id": item.row["id"], "text": row_text(item.row)[:EXCERPT]}
        if want.picked:
            row = {name: value for name, value in item.row.items() if name != FEATURES}
            file.write(json_line(with_score(row, want.score, shard.ref.name, job.config.score_as, want.repeat)))
            yield item.row


def _of(place: int, queue: deque[Wanted]) -> Wanted:
    while (want := queue.popleft()).place != place:
        continue
    return want


def _ahead(wanted: Iterator[Wanted], queue: deque[Wanted]) -> Iterator[tuple[int, int, int]]:
    for item in wanted:
        queue.append(item)
        yield item.place, item.number, item.chunk


def wanted_items(job: Job, shard: Shard, choice: Choice, examples: frozenset[int]) -> Iterator[Wanted]:
    """The shard's picked items and its examples, in their order."""
    for columns in score_columns(job.part("scores", shard), groups=choice.quotas):
        mask, repeats = choice.mask(shard, columns), choice.repeats(shard, columns)
        at = np.flatnonzero(mask | np.isin(columns["place"], list(examples)))
        chunk = columns["chunk"][at] if "chunk" in columns else np.full(len(at), -1)
        repeat = [None] * len(at) if repeats is None else repeats[at].tolist()
        values = (columns["place"][at].tolist(), columns["row"][at].tolist(), chunk.tolist(), columns["score"][at].tolist())
        yield from map(Wanted, *values, repeat, mask[at].tolist())


def example_places(job: Job, shard: Shard) -> frozenset[int]:
    """Places of the shard's rows that the report shows."""
    found = json.loads((job.folder / "examples.json").read_text(encoding="utf-8"))
    return frozenset(item["place"] for items in found.values() for item in items if item["shard"] == shard.index)


def with_score(row: Row, score: float, source: str, name: str, repeat: int | None = None) -> Row:
    """The row with all its columns plus `source`, `weight` (1 where it has none), its score, and `repeat` where there is one.

    A column that already has such a name is kept as `NAME_before` (or `NAME_before_before`, ...).
    """
    added = {name: score} if repeat is None else {name: score, "repeat": repeat}
    kept = {}
    for column in added:
        if column in row:
            before = f"{column}_before"
            while before in row:
                before += "_before"
            kept[before] = row[column]
    return {**row, **kept, "source": row.get("source") or source, "weight": row.get("weight", 1.0), **added}


def write_out(job: Job, shards: list[Shard], out: Path) -> dict[str, Any]:
    """The dataset of all picked rows, the score tables and the state in `out`; returns the facts of `dataset.json`."""
    from posttrain.data.dataset import write_dataset
    from posttrain.data.shards import read_shard

    rows = (row for shard in shards for _, row in read_shard(job.part("picked", shard)))
    facts = write_dataset(rows, out, shards[0].kind, suffix=job.config.suffix)
    for shard in shards:
        link_part(job.part("scores", shard), out / f"scores-{shard.index:05d}.parquet")
    link_part(job.folder / "state.safetensors", out / "state.safetensors")
    (out / "README.md").write_text(CARD.format(suffix=job.config.suffix, method=job.config.method), encoding="utf-8")
    return facts


def shown_examples(job: Job, shards: list[Shard]) -> dict[str, list[dict[str, Any]]]:
    """The examples with their texts."""
    found = json.loads((job.folder / "examples.json").read_text(encoding="utf-8"))
    texts = {shard.index: read_json(job.part("examples", shard)) for shard in shards if example_places(job, shard)}
    return {
        kind: [
            {**texts[item["shard"]][str(item["place"])], **{name: value for name, value in item.items() if name not in ("shard", "place")}}
            for item in items
        ]
        for kind, items in found.items()
    }

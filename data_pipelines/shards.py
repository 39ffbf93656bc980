"""The frozen list of shards behind a stage's inputs, and the rows of one shard.

A shard is the unit of work, of resuming and of parallelism: one file of a source or of a committed dataset, a part of a
large file (see `data_pipelines.split`), or a whole hub dataset. Rows come out normalised, with their row number, only those
of the wanted part, and never a row that is held out for evaluation.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.core.artifact import InputRef
from posttrain.data.shards import Span
from posttrain.errors import ConfigError, DataError


@dataclass(frozen=True)
class Shard:
    """One unit of work.

    Args:
        index: place in the list, from 0.
        label: name shown in scores and messages; no absolute path.
        path: the file; empty for a hub dataset.
        ref: the input it belongs to.
        kind: row type.
        columns: renames, our field -> their column.
        validation, test: held-out shares.
        on_bad: `stop` or `skip`.
        size: bytes of the file or part; 0 for a hub dataset.
        span: the part of the file; None = all of it.
    """

    index: int
    label: str
    path: str
    ref: InputRef
    kind: str
    columns: dict[str, str] = field(default_factory=dict)
    validation: float = 0.0
    test: float = 0.0
    on_bad: str = "stop"
    size: int = 0
    span: Span | None = None

    def stamp(self) -> list[Any]:
        """What tells this shard's content apart: input, label, size and modification time."""
        facts = os.stat(self.path) if self.path else None
        return [self.ref.key, self.ref.label, self.label, facts and facts.st_size, facts and facts.st_mtime_ns, self.span]


def list_shards(refs: list[InputRef], where: str = "", cache: Path | None = None) -> list[Shard]:
    """Shards of all references, in the order written and then by name; large files are several.

    Args:
        refs: inputs of a port.
        where: the port, for messages.
        cache: file that remembers where the lines of large files begin; None = large files stay whole.

    Raises:
        ConfigError: a mixture share or repeat, which a selector's budget makes meaningless.
        DataError: no shard at all.
    """
    found: list[Shard] = []
    for ref in refs:
        if ref.share is not None or (ref.repeat is not None and ref.repeat != 1):
            raise ConfigError("a selector reads every row once", where=where, fix="drop `share` and `repeat`; set `budget` instead")
        facts = _artifact_facts(ref) if ref.origin == "stage" else _source_facts(ref)
        files = facts.pop("files")
        labels = _labels(files)
        for file, label in zip(files, labels, strict=True):
            name = f"{ref.name}/{label}" if label else ref.name
            for part, span, size in _parts(file, cache):
                found.append(Shard(len(found), f"{name}{part}", str(file) if file else "", ref, size=size, span=span, **facts))
    if not found:
        raise DataError("no shards to read", where=where, fix="give at least one source or dataset")
    return found


def _labels(files: list[Path | None]) -> list[str]:
    if files == [None]:
        return [""]
    root = Path(os.path.commonpath([file.parent for file in files if file]))
    return [file.relative_to(root).as_posix() for file in files if file]


def _parts(file: Path | None, cache: Path | None) -> list[tuple[str, Span | None, int]]:
    """(suffix of the label, part, bytes) of a file."""
    from data_pipelines.split import spans_of

    size = file.stat().st_size if file else 0
    spans = spans_of(file, cache) if file and cache else []
    if len(spans) < 2:
        return [("", None, size)]
    return [(f" part {i} of {len(spans)}", span, bytes_of_it) for i, (span, bytes_of_it) in enumerate(spans, 1)]


def _artifact_facts(ref: InputRef) -> dict[str, Any]:
    from posttrain.data.sources import DATASET_GLOB

    artifact = ref.artifact()
    files = sorted(artifact.path.glob(DATASET_GLOB))
    return {"files": files, "kind": artifact.manifest.get("meta", {}).get("row_type") or ref.rows, **_shares(ref)}


def _source_facts(ref: InputRef) -> dict[str, Any]:
    from posttrain.data.shards import expand_shards

    spec = ref.spec
    columns = dict(spec.get("columns") or {}) | ({"answer": spec["answer"]} if spec.get("answer") else {})
    files = [None] if spec.get("hub") else [Path(os.path.abspath(path)) for path in expand_shards(spec["path"])]
    return {"files": files, "kind": spec["kind"], "columns": columns, "on_bad": spec.get("on_bad", "stop"), **_shares(ref)}


def _shares(ref: InputRef) -> dict[str, float]:
    from posttrain.data.sources import split_shares

    return dict(zip(("validation", "test"), split_shares(ref), strict=True))


def shard_rows(
    shard: Shard, heldout: frozenset[str] = frozenset(), tally: Counter[str] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number, row) of a shard's part.

    `tally` takes the number of rows `read`, and of those left out: `bad: REASON`, `other part`, `held out`. The sequence is
    the same at every reading.
    """
    from posttrain.data.rows import row_key, split_of

    tally = tally if tally is not None else Counter()
    for number, row in _part_rows(shard, tally) if shard.path else _hub_rows(shard, tally):
        tally["read"] += 1
        part = shard.ref.split
        splits = bool(shard.path and part != "all" and (shard.validation or shard.test))
        key = row_key(row) if splits or heldout else ""
        if splits and split_of(key, shard.validation, shard.test) != part:
            tally["other part"] += 1
        elif key in heldout:
            tally["held out"] += 1
        else:
            yield number, row


def rows_at(shard: Shard, numbers: Iterable[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows with these ascending numbers, which `shard_rows` gave before; the others are neither parsed nor checked again."""
    from posttrain.data.rows import normalise
    from posttrain.data.shards import read_shard

    if not shard.path:
        yield from _hub_rows_at(shard, numbers)
        return
    for number, row in read_shard(shard.path, on_bad=shard.on_bad, span=shard.span, only=numbers):
        yield number, normalise(row, shard.kind, f"{shard.path}:{number}", shard.columns)


def _hub_rows_at(shard: Shard, numbers: Iterable[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    wanted = iter(numbers)
    number = next(wanted, None)
    for found, row in _hub_rows(shard, Counter()):
        if number is None:
            return
        if found == number:
            yield found, row
            number = next(wanted, None)


def _part_rows(shard: Shard, tally: Counter[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    from posttrain.data.rows import checked
    from posttrain.data.shards import BadRows, read_shard
    from posttrain.data.strict_json import RowError

    bad = BadRows()
    for number, row in read_shard(shard.path, on_bad=shard.on_bad, bad=bad, span=shard.span):
        try:
            row = checked(row, shard.kind, shard.columns)
        except RowError as error:
            bad.take(error, f"{shard.path}:{number}", shard.on_bad)
        else:
            yield number, row
    _count_bad(bad, tally)


def _count_bad(bad: Any, tally: Counter[str]) -> None:
    tally["read"] += bad.total
    tally.update({f"bad: {reason}": count for reason, count in bad.counts.items()})


def _hub_rows(shard: Shard, tally: Counter[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    from posttrain.data.shards import BadRows
    from posttrain.data.sources import open_rows

    bad = BadRows()
    yield from enumerate(open_rows(shard.ref, bad=bad), 1)
    _count_bad(bad, tally)

"""Rows behind a reference: local shards, a hub dataset, or the committed dataset of an earlier stage.

The part of a row (train, validation, test) follows from the hash of what it asks, so nothing about splits is stored with
the rows. Rows of a source are checked and renamed while they stream by; rows of a committed dataset were checked when
they were written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.core.artifact import InputRef
from posttrain.core.digests import file_digests
from posttrain.core.rundir import read_json
from posttrain.data.rows import Row, checked, row_key, split_of
from posttrain.data.shards import BadRows, expand_shards, plain, read_shard
from posttrain.data.strict_json import RowError, check_surrogates
from posttrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from posttrain.core.events import Events

DATASET_GLOB = "rows-*"
COLUMNS = {
    "messages": {"messages"},
    "preference": {"chosen", "rejected"},
    "verifiable": {"prompt", "answer"},
    "prompt": {"prompt"},
    "text": {"text"},
}
"""Row type -> the columns by which it is known, the most telling first."""
LISTED = 20
LOOK_ON = 10_000


def open_rows(ref: InputRef, *, events: Events | None = None, bad: BadRows | None = None) -> Iterator[dict[str, Any]]:
    """Normalised rows of the reference's part, in file order, in bounded memory.

    Args:
        ref: a dataset reference; `ref.split` is the part, `all` gives every row.
        events: progress, and a warning about skipped rows.
        bad: takes the counts of rows that `on_bad: skip` left out.

    Raises:
        DataError: a bad row under `on_bad: stop`, a damaged file, or not one usable row in the whole source.
    """
    bad = bad if bad is not None else BadRows()
    before, seen = bad.total, 0
    shares = split_shares(ref)
    for row in _all_rows(ref, events, bad):
        seen += 1
        if ref.split == "all" or split_of(row_key(row), *shares) == ref.split:
            yield row
    skipped = bad.total - before
    if not seen and (ref.origin == "source" or skipped):
        raise _no_rows(ref, bad, skipped)
    if skipped and events is not None:
        events.warn(f"{ref.name}: left out {skipped} of {seen + skipped} rows ({bad})", **bad.report())


def load_rows(ref: InputRef, *, events: Events | None = None, bad: BadRows | None = None) -> list[dict[str, Any]]:
    """`open_rows` as a list."""
    return list(open_rows(ref, events=events, bad=bad))


def _no_rows(ref: InputRef, bad: BadRows, skipped: int) -> DataError:
    where = str(ref.spec.get("path") or ref.spec.get("hub") or ref.path)
    if not skipped:
        return DataError("no rows", where=where, fix=f"source `{ref.name}` must hold at least one row")
    return DataError(f"all {skipped} rows were left out ({bad})", where=where, fix=f"first: {bad.examples[0]}")


def split_shares(ref: InputRef) -> tuple[float, float]:
    """(validation, test) of the source's config or the dataset's manifest."""
    held = ref.spec.get("split") if ref.origin == "source" else ref.artifact().manifest.get("meta", {}).get("split")
    held = held or {}
    return float(held.get("validation", 0.0)), float(held.get("test", 0.0))


def _all_rows(ref: InputRef, events: Events | None, bad: BadRows) -> Iterator[dict[str, Any]]:
    if ref.kind != "dataset":
        raise ConfigError(
            f"expected a dataset, got {ref.kind}", where=f"in.{ref.port}", fix="refer to a source or a stage that writes rows"
        )
    if ref.origin == "source":
        yield from _source_rows(ref, events, bad)
        return
    files = sorted(ref.artifact().path.glob(DATASET_GLOB))
    for where, row in _shard_rows(files, ref.name, "stop", events, bad):
        yield Row(row, where=where)


def _source_rows(ref: InputRef, events: Events | None, bad: BadRows) -> Iterator[dict[str, Any]]:
    if ref.spec.get("on_bad", "stop") == "skip":
        yield from _checked_rows(ref, events, bad)
        return
    faults, after = BadRows(keep=LISTED), 0
    for row in _checked_rows(ref, events, faults):
        if not faults.total:
            yield row
            continue
        after += 1
        if faults.total >= LISTED or after >= LOOK_ON:
            break
    if faults.total:
        raise _listed(faults)


def _listed(faults: BadRows) -> DataError:
    """One error for the bad rows found: the first, and those within the next LOOK_ON good rows."""
    where, message, fix = faults.first
    others = [f"also {line}" for line in faults.examples[1:]]
    rest = faults.total - len(faults.examples)
    open_end = ", and perhaps more" if faults.total >= LISTED else ""
    more = [f"and {rest} more like these{open_end}"] if rest else ["... and perhaps more"] if open_end else []
    return DataError("\n  ".join([message, *others, *more]), where=where, fix=fix or "mend the rows, or set `on_bad: skip`")


def _checked_rows(ref: InputRef, events: Events | None, bad: BadRows) -> Iterator[dict[str, Any]]:
    spec = ref.spec
    columns = dict(spec.get("columns") or {}) | ({"answer": spec["answer"]} if spec.get("answer") else {})
    raw = _hub_rows(spec, bad) if spec.get("hub") else _shard_rows(expand_shards(spec["path"]), ref.name, "skip", events, bad)
    for where, row in raw:
        try:
            row = checked(row, spec["kind"], columns)
        except RowError as error:
            bad.take(error, where, "skip")
        else:
            yield Row(row, where=where)


def _shard_rows(files: list[Path], name: str, on_bad: str, events: Events | None, bad: BadRows) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = 0
    for done, file in enumerate(files):
        if events is not None:
            events.progress(f"read {name}", done, len(files), "shards", rows=rows)
        for number, row in read_shard(file, on_bad=on_bad, bad=bad):
            rows += 1
            yield f"{file}:{number}", row
    if events is not None:
        events.progress(f"read {name}", len(files), len(files), "shards", rows=rows)


def _hub_rows(spec: dict[str, Any], bad: BadRows) -> Iterator[tuple[str, dict[str, Any]]]:
    place = f"{spec['hub']}@{spec['revision'][:8]}"
    try:
        import datasets

        found = datasets.load_dataset(spec["hub"], spec.get("config"), split=spec.get("hub_split", "train"), revision=spec["revision"])
    except Exception as error:
        raise DataError(
            f"cannot load the hub dataset: {error}", where=place, fix="check id, revision and network, or download it and give `path`"
        ) from None
    for number, row in enumerate(found, 1):
        try:
            row = {key: plain(value) for key, value in row.items()}
            check_surrogates(row)
        except RowError as error:
            bad.take(error, f"{place}:{number}", "skip")
        else:
            yield f"{place}:{number}", row


def row_type_of(paths: str | Path | Iterable[str | Path], accepted: tuple[str, ...] = ()) -> str:
    """Row type of local shards: the only accepted one, what a stage noted beside its rows, or what the first row looks like.

    Raises:
        DataError: no rows, or columns of none of the accepted types (of any type where none is given).
    """
    if len(accepted) == 1:
        return accepted[0]
    listed = [paths] if isinstance(paths, str | Path) else list(paths)
    noted = read_json(Path(listed[0]) / "dataset.json") if len(listed) == 1 and Path(listed[0]).is_dir() else None
    if isinstance(noted, dict) and "row_type" in noted:
        return str(noted["row_type"])
    for shard in expand_shards(listed):
        for number, row in read_shard(shard, on_bad="skip"):
            for kind, columns in COLUMNS.items():
                if columns <= row.keys() and (not accepted or kind in accepted):
                    return kind
            wanted = " or ".join(accepted or COLUMNS)
            raise DataError(
                f"no row type fits the columns {', '.join(sorted(row))}; expected rows of type {wanted}",
                where=f"{shard}:{number}",
                fix="name the row type and rename the columns (`kind` and `columns` of a source)",
            )
    raise DataError("no row can be read", where=", ".join(map(str, listed)), fix="give a file with at least one row")


def source_digest(spec: dict[str, Any], *, cache: Path | None = None) -> str:
    """sha256 over what decides a source's rows: shard contents in order, row type, columns, split shares, `on_bad`.

    Where files lie does not enter. A hub dataset is its id, configuration, split and commit.

    Args:
        spec: SourceConfig as a dict.
        cache: as in `file_digests`.

    Raises:
        DataError: no such shards, or one that cannot be read.
    """
    view = {name: spec.get(name) for name in ("kind", "columns", "answer", "split", "on_bad")}
    if spec.get("hub"):
        content: Any = [spec["hub"], spec.get("revision"), spec.get("config"), spec.get("hub_split")]
    else:
        files = expand_shards(spec["path"])
        content = [[_format(file), digest] for file, digest in zip(files, file_digests(files, cache), strict=True)]
    text = json.dumps([view, content], sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _format(file: Path) -> str:
    return "".join(file.suffixes[-2:]) if file.suffix in (".gz", ".zst") else file.suffix

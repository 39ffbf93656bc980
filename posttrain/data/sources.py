"""Rows behind a reference: local shards, a hub dataset, or the committed dataset of an earlier stage.

The part of a row (train, validation, test) follows from the hash of what it asks, so nothing about splits is stored with
the rows. Rows of a source are checked and renamed while they stream by; rows of a committed dataset were checked when
they were written.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.core.artifact import InputRef
from posttrain.data.rows import Row, checked, row_key, split_of
from posttrain.data.shards import BadRows, expand_shards, plain, read_shard
from posttrain.data.strict_json import RowError, check_surrogates
from posttrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from posttrain.core.events import Events

DATASET_GLOB = "rows-*"
LISTED = 20
LOOK_ON = 10_000
_RACY_S = 2.0


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
    more = ["... and perhaps more"] if faults.total >= LISTED else []
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


def source_digest(spec: dict[str, Any], *, cache: Path | None = None) -> str:
    """sha256 over what decides a source's rows: shard contents in order, row type, columns, split shares, `on_bad`.

    File hashes are kept in a JSON file by (path, size, mtime, inode), since hashing again takes seconds a gigabyte. Where
    files lie does not enter. A hub dataset is its id, configuration, split and commit.

    Args:
        spec: SourceConfig as a dict.
        cache: the JSON file; default `digests.json` under `$XDG_CACHE_HOME/posttrain` (`~/.cache/posttrain`).

    Raises:
        DataError: no such shards, or one that cannot be read.
    """
    view = {name: spec.get(name) for name in ("kind", "columns", "answer", "split", "on_bad")}
    if spec.get("hub"):
        content: Any = [spec["hub"], spec.get("revision"), spec.get("config"), spec.get("hub_split")]
    else:
        content = _file_digests(expand_shards(spec["path"]), cache or default_cache())
    text = json.dumps([view, content], sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def default_cache() -> Path:
    """Where hashes of source files are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "posttrain" / "digests.json"


def _file_digests(files: list[Path], cache: Path) -> list[list[str]]:
    known = _read_cache(cache)
    found, fresh = [], {}
    for file in files:
        name, stamp = str(file.resolve()), _stamp(file)
        entry = known.get(name)
        digest = entry[1] if isinstance(entry, list) and len(entry) == 2 and entry[0] == stamp else _hash_file(file)
        if time.time() - stamp[1] / 1e9 > _RACY_S and _stamp(file) == stamp:
            fresh[name] = [stamp, digest]
        found.append(["".join(file.suffixes[-2:]) if file.suffix in (".gz", ".zst") else file.suffix, digest])
    if any(known.get(name) != entry for name, entry in fresh.items()):
        _write_cache(cache, {**known, **fresh})
    return found


def _stamp(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _hash_file(file: Path) -> str:
    try:
        with open(file, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=str(file)) from None


def _read_cache(cache: Path) -> dict[str, Any]:
    try:
        known = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write_cache(cache: Path, entries: dict[str, Any]) -> None:
    new = cache.with_name(f"{cache.name}.{os.getpid()}")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps(entries), encoding="utf-8")
        os.replace(new, cache)
    except OSError:
        new.unlink(missing_ok=True)

"""What deduplication keeps of each row instead of its text, one part a shard, and how parts are read without loading them.

    row int64         number in the shard           size, words int64 characters, words
    id, id_end        ids as UTF-8, end to end      raw uint64        hash of the text, the last word in a tie
    low, high uint64  128-bit key of the text, equal for exact copies
    bands uint64[bands, n]                          MinHash bands; rows without a word take no part
    hit int64, share  best known row by contamination.shares

A row takes 75 + 8 bands bytes. Rows of all shards are numbered through: those of `against` first, then those of `data`.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines import contamination, minhash
from data_pipelines.dedup import ContaminationConfig, DedupConfig, MinHashConfig
from data_pipelines.engine import Job
from data_pipelines.shards import Shard
from posttrain.data.rows import row_text

Row = dict[str, Any]
Arrays = dict[str, np.ndarray]

BATCH_CHARS = 1 << 20
BATCH_ROWS = 1024
OPEN_PARTS = 256
_TYPES = {"U8": np.uint8, "BOOL": np.bool_, "I64": np.int64, "U64": np.uint64, "F64": np.float64}


def compared_text(row: Row) -> str:
    """`row_text`, and the rejected answer of preference rows."""
    text = row_text(row)
    rejected = row.get("rejected") if "chosen" in row else None
    if rejected is None:
        return text
    turns = rejected if isinstance(rejected, list) else [{"role": "assistant", "content": rejected}]
    return f"{text}\n{row_text({'messages': turns})}"


def batches(rows: Iterable[tuple[int, Row]]) -> Iterator[list[tuple[int, Row, str]]]:
    """(number, row, text) in lists of about BATCH_CHARS characters; a longer row comes by itself."""
    held: list[tuple[int, Row, str]] = []
    size = 0
    for number, row in rows:
        text = compared_text(row)
        if held and (size + len(text) > BATCH_CHARS or len(held) >= BATCH_ROWS):
            yield held
            held, size = [], 0
        held.append((number, row, text))
        size += len(text)
    if held:
        yield held


def near_grams(blob: minhash.Blob, rule: MinHashConfig) -> minhash.Sets:
    """n-gram keys for MinHash, in order, repeats included."""
    return minhash.grams(blob.words(rule.unit), rule.ngram)


def known_grams(blob: minhash.Blob, rule: ContaminationConfig) -> minhash.Sets:
    """n-gram keys for the contamination rule."""
    return minhash.grams(blob.words("letters" if rule.unit == "words" else "chars"), rule.ngram, whole=False)


def _half_keys(pieces: Iterable[Any], size: int) -> np.ndarray:
    digests = b"".join(hashlib.blake2b(piece, digest_size=size).digest() for piece in pieces)
    return np.frombuffer(digests, "<u8").reshape(-1, size // 8)


def mark(batch: list[tuple[int, Row, str]], cfg: DedupConfig, table: Arrays | None) -> Arrays:
    """Marks of a batch of rows.

    Args:
        batch: of `batches`.
        table: of `contamination.build`; None where the rule is off or the rows are those of `against`.
    """
    texts = [text for _, _, text in batch]
    blob = minhash.Blob(texts)
    plain = [text.encode("utf-8", "surrogatepass") for text in texts]
    keys = _half_keys(plain if cfg.exact == "raw" else blob.normalised(), 16)
    ids = [str(row["id"]).encode("utf-8", "surrogatepass") for _, row, _ in batch]
    out: Arrays = {
        "row": np.array([number for number, _, _ in batch], np.int64),
        "size": np.array([len(text) for text in texts], np.int64),
        "raw": _half_keys(plain, 8)[:, 0],
        "low": keys[:, 0],
        "high": keys[:, 1],
        "id": np.frombuffer(b"".join(ids), np.uint8),
        "id_end": np.cumsum([len(name) for name in ids]),
    }
    if (rule := cfg.minhash) != "off":
        words = blob.words(rule.unit)
        signature = minhash.MinHash(rule.bands * rule.rows, rule.seed).sign(minhash.grams(words, rule.ngram))
        out["bands"] = minhash.band_keys(signature, rule.bands, rule.rows)
        out["words"] = np.diff(words.end, prepend=0)
    if table is not None and cfg.contamination != "off":
        out["share"], out["hit"] = contamination.shares(known_grams(blob, cfg.contamination), table)
    return out


def collect(rows: Iterable[tuple[int, Row]], cfg: DedupConfig, table: Arrays | None, tally: Counter[str]) -> Arrays:
    """Marks of a shard's rows, with the tally of what was left out while they were read."""
    parts = [mark([], cfg, table), *(mark(batch, cfg, table) for batch in batches(rows))]
    out = {name: np.concatenate([part[name] for part in parts], axis=-1) for name in parts[0]}
    out["id_end"] = np.concatenate([part["id_end"] + before for part, before in zip(parts, _before(parts, "id"), strict=True)])
    out["left_out"] = np.frombuffer(json.dumps(dict(sorted(tally.items()))).encode(), np.uint8)
    return out


def collect_sets(items: Iterable[tuple[int, Row]], grams: Callable[[minhash.Blob], minhash.Sets]) -> Arrays:
    """Distinct n-grams of rows: `key` uint64 end to end, `end` int64."""
    texts = ([text for _, _, text in batch] for batch in batches(items))
    parts: list[Arrays] = [minhash.distinct(grams(minhash.Blob(batch)))._asdict() for batch in ([], *texts)]
    end = np.concatenate([part["end"] + before for part, before in zip(parts, _before(parts, "key"), strict=True)])
    return {"key": np.concatenate([part["key"] for part in parts]), "end": end}


def _before(parts: list[Arrays], name: str) -> list[int]:
    sizes = [len(part[name]) for part in parts]
    return [0, *np.cumsum(sizes).tolist()][: len(parts)]


def open_arrays(path: Path) -> Arrays:
    """Arrays of a safetensors part, mapped into memory; not to be written to."""
    facts = os.stat(path)
    return _mapped(path, facts.st_ino, facts.st_mtime_ns)


@functools.lru_cache(maxsize=OPEN_PARTS)
def _mapped(path: Path, inode: int, changed: int) -> Arrays:
    with open(path, "rb") as file:
        start = int.from_bytes(file.read(8), "little") + 8
        header: dict[str, Any] = json.loads(file.read(start - 8))
    header.pop("__metadata__", None)
    blob = np.asarray(np.memmap(path, np.uint8, "r"))
    return {name: _column(blob[start:], **facts) for name, facts in header.items()}


def _column(blob: np.ndarray, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    return blob[slice(*data_offsets)].view(_TYPES[dtype]).reshape(shape)


def forget_parts() -> None:
    """Closes what `open_arrays` and `table_of` hold open."""
    _mapped.cache_clear()
    _table.cache_clear()


@dataclass(frozen=True)
class DedupJob(Job):
    """What a worker is told.

    Args:
        against: how many shards are of `against`.
        sources: name of each shard's input, those of `against` first.
        priority: of each shard; the smaller one's rows stay.
    """

    against: int = 0
    sources: tuple[str, ...] = ()
    priority: tuple[int, ...] = ()

    def part(self, step: str, shard: Shard) -> Path:
        """Name of a shard's part."""
        return self._name(step, shard.index)

    def parts(self, suffix: str = "") -> list[Path]:
        """Parts of the steps `against` and `data` (or of these names with a suffix), in the order of the table."""
        data = len(self.sources) - self.against
        return [self._name(f"against{suffix}", i) for i in range(self.against)] + [self._name(f"data{suffix}", i) for i in range(data)]

    def done(self, step: str, shard: Shard) -> bool:
        """The shard's part (for the rows that stay also the table of the others) is there."""
        return all(self.part(name, shard).exists() for name in ((step, "duplicates") if step == "kept" else (step,)))

    def file(self, name: str) -> Path:
        """A file of the whole job."""
        return self.folder / f"{name}.safetensors"

    def place(self, step: str, shard: Shard) -> int:
        """The shard's place in the table."""
        return shard.index + (0 if step.startswith("against") else self.against)

    def _name(self, step: str, index: int) -> Path:
        suffix = {"kept": ".jsonl", "duplicates": ".parquet"}.get(step, ".safetensors")
        return self.folder / step / f"{index:06d}{suffix}"


@functools.lru_cache(maxsize=1)
def _table(parts: tuple[Path, ...], against: int, priority: tuple[int, ...]) -> Table:
    return Table(list(parts), against, list(priority))


def table_of(job: DedupJob) -> Table:
    """Marks of all shards; read once a process."""
    return _table(tuple(job.parts()), job.against, job.priority)


class Table:
    """Marks of all shards as if they were one table; rows by their numbers.

    Args:
        parts: files of marks, those of `against` first.
        against: how many of them are of `against`.
        priority: of each part; smaller stays.
    """

    def __init__(self, parts: list[Path], against: int, priority: list[int]) -> None:
        self.parts = parts
        sizes = [len(open_arrays(part)["row"]) for part in parts]
        self.first = np.cumsum([0, *sizes])
        self.rows, self.against = int(self.first[-1]), int(self.first[against])
        self.priority = np.array(priority, np.int64)

    def sweep(self, name: str, at: int | None = None, only: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(a column, or line `at` of it, and the row numbers) part by part, of rows where the mask `only` is set."""
        for part, first in zip(self.parts, self.first[:-1].tolist(), strict=True):
            values = open_arrays(part)[name]
            values = values if at is None else values[at]
            rows = np.arange(first, first + len(values))
            if only is not None:
                inside = only[first : first + len(values)]
                values, rows = values[inside], rows[inside]
            yield np.asarray(values), rows

    def part_of(self, rows: np.ndarray) -> np.ndarray:
        """Which part each row is in."""
        return np.searchsorted(self.first, rows, "right") - 1

    def take(self, name: str, rows: np.ndarray) -> np.ndarray:
        """A column of these rows; of `bands` its last axis."""
        part = self.part_of(rows)
        out: np.ndarray | None = None
        for which in np.unique(part).tolist():
            at = np.flatnonzero(part == which)
            found = open_arrays(self.parts[which])[name][..., rows[at] - self.first[which]]
            if out is None:
                out = np.empty((*found.shape[:-1], len(rows)), found.dtype)
            out[..., at] = found
        return np.empty(0) if out is None else out

    def ids(self, rows: np.ndarray) -> list[bytes]:
        """Ids of these rows as UTF-8."""
        part = self.part_of(rows)
        out: list[bytes] = [b""] * len(rows)
        for which in np.unique(part).tolist():
            arrays = open_arrays(self.parts[which])
            for at in np.flatnonzero(part == which).tolist():
                local = int(rows[at] - self.first[which])
                begin = int(arrays["id_end"][local - 1]) if local else 0
                out[at] = arrays["id"][begin : int(arrays["id_end"][local])].tobytes()
        return out

    def ranked(self, rows: np.ndarray, group: np.ndarray) -> np.ndarray:
        """Order of rows by group, then from the one that stays: of `against`, source, longer, smaller id, text, place."""
        if not len(rows):
            return np.empty(0, np.int64)
        ids = self.ids(rows)
        place = {name: i for i, name in enumerate(sorted(set(ids)))}
        by_id = np.array([place[name] for name in ids])
        priority, last = self.priority[self.part_of(rows)], self.take("raw", rows)
        order: np.ndarray = np.lexsort((rows, last, by_id, -self.take("size", rows), priority, rows >= self.against, group))
        return order

    def left_out(self, parts: range) -> Counter[str]:
        """What was left out while the rows of these parts were read."""
        total: Counter[str] = Counter()
        for which in parts:
            total.update(json.loads(open_arrays(self.parts[which])["left_out"].tobytes()))
        return total


def rows_of(first: np.ndarray) -> list[np.ndarray]:
    """All rows of each part."""
    return [np.arange(begin, end) for begin, end in itertools.pairwise(first.tolist())]


def set_sizes(files: list[Path], first: np.ndarray, local: list[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """How many keys each row's set has; arguments as of `gather`."""
    part = np.searchsorted(first, rows, "right") - 1
    out = np.zeros(len(rows), np.int64)
    for which in np.unique(part).tolist():
        at = part == which
        out[at] = np.diff(open_arrays(files[which])["end"], prepend=0)[np.searchsorted(local[which], rows[at])]
    return out


def gather(files: list[Path], first: np.ndarray, local: list[np.ndarray], rows: np.ndarray, folder: Path | None) -> minhash.Sets:
    """Sets of these rows in this order.

    Args:
        files: of `collect_sets`, one a part.
        first: first row of each part.
        local: rows of each file, ascending.
        rows: wanted.
        folder: keep them in a nameless file there instead of in memory.
    """
    size = set_sizes(files, first, local, rows)
    end = np.cumsum(size)
    total = int(end[-1]) if len(end) else 0
    key = np.empty(total, np.uint64) if folder is None else _on_disk(folder / ".sets", total)
    part = np.searchsorted(first, rows, "right") - 1
    for which in np.unique(part).tolist():
        arrays = open_arrays(files[which])
        at = np.flatnonzero(part == which)
        stops = arrays["end"][np.searchsorted(local[which], rows[at])]
        for i, stop in zip(at.tolist(), stops.tolist(), strict=True):
            key[end[i] - size[i] : end[i]] = arrays["key"][stop - size[i] : stop]
    return minhash.Sets(key, end)


def _on_disk(path: Path, size: int) -> np.ndarray:
    """An array whose pages the system can drop; the file goes with it."""
    found = np.asarray(np.memmap(path, np.uint64, "w+", shape=(max(1, size),)))[:size]
    path.unlink()
    return found

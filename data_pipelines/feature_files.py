"""Feature vectors of all rows, made once: one memory-mapped float32 `.npy` file a shard, in the order of the shard's items.

They live beside the other parts in a folder whose name follows from what they depend on (the selector's `feature_key`,
its other inputs, the shards, chunks and held-out rows), so picking again under another rule, budget or seed finds them.
Beside each stands what its maker noted of the rows, with counts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines.parts import new_part
from posttrain.core.durable import write_json
from posttrain.errors import DataError

if TYPE_CHECKING:
    from data_pipelines.engine import Job
    from data_pipelines.shards import Shard
    from posttrain.core.context import StageContext

BATCH_ROWS = 256
"""Rows given to the maker at a time; fixed, since a network's vectors may depend on their batch in the last bit."""
BATCH_CHARS = 1 << 22
FORMAT = 2
"""Of the files; part of the folder's name."""
HEADER = 128
"""Bytes of the file's head, which is written again when the number of rows is known."""


def input_paths(ctx: StageContext) -> dict[str, list[str]]:
    """Port -> folders or files, of all inputs beside raw and target.

    Raises:
        ArtifactError: a model that is not there and cannot be fetched.
    """
    ports = (port for port in ctx.inputs if port not in ("raw", "target"))
    return {port: [path for ref in ctx.refs(port) for path in _paths(ref, ctx.trust_remote_code)] for port in ports}


def _paths(ref: Any, trust: bool) -> list[str]:
    if ref.kind in ("model", "adapter", "quantized"):
        from posttrain.models.load import fetch
        from posttrain.models.source import resolve_model

        return [str(fetch(resolve_model(ref), trust).local)]
    if ref.origin == "stage":
        return [str(ref.artifact().path)]
    from posttrain.data.shards import expand_shards

    return [str(path) for path in expand_shards(ref.spec["path"])] if ref.spec.get("path") else []


def input_digests(ctx: StageContext) -> list[list[str]]:
    """What tells the other inputs apart."""
    return [[port, ref.key, ref.digest] for port in sorted(ctx.inputs) if port not in ("raw", "target") for ref in ctx.refs(port)]


def feature_shard(job: Job, step: str, shard: Shard) -> None:
    """Writes the vectors of one shard, and what the maker notes of its rows; `step` is `features.raw` or `features.target`."""
    maker, role = job.maker(), step.partition(".")[2]
    before, final = Counter(getattr(maker, "notes", {})), job.part(step, shard)
    rows = width = 0
    with new_part(final) as path, open(path, "wb") as file:
        file.write(bytes(HEADER))
        for batch in _batches(job, shard, role):
            found = np.ascontiguousarray(maker(batch), np.float32)
            _check(found, len(batch), width, shard)
            file.write(found.tobytes())
            rows, width = rows + len(found), found.shape[1]
        file.seek(0)
        file.write(npy_header(rows, width))
        write_json(_notes_file(final), dict(Counter(getattr(maker, "notes", {})) - before))


def _notes_file(part: Path) -> Path:
    return part.with_name(f"notes-{part.stem}.json")


def notes_of(parts: Iterable[Path]) -> dict[str, int]:
    """What befell the rows of these feature files, with counts: cut at max_length, without text, ..."""
    total: Counter[str] = Counter()
    for path in parts:
        total.update(json.loads(_notes_file(path).read_text(encoding="utf-8")))
    return dict(sorted(total.items()))


def _batches(job: Job, shard: Shard, role: str) -> Iterator[list[dict[str, Any]]]:
    from data_pipelines.scores import row_batches
    from data_pipelines.stream import shard_items

    for batch in row_batches(shard_items(job, shard, role, features=False), BATCH_ROWS, BATCH_CHARS):
        yield [item.row for item in batch]


def _check(found: np.ndarray, rows: int, width: int, shard: Shard) -> None:
    if found.ndim != 2 or len(found) != rows or (width and found.shape[1] != width):
        raise DataError(f"the feature maker gave an array of shape {found.shape} for {rows} rows", where=shard.label)
    bad = np.flatnonzero(~np.isfinite(found).all(axis=1))
    if bad.size:
        raise DataError(f"{bad.size} of {rows} feature vectors are not finite", where=shard.label, fix="look at the model, or its dtype")


def npy_header(rows: int, width: int) -> bytes:
    """128 bytes of a version 1.0 `.npy` head of little-endian float32[rows, width]."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {width}), }}"
    return b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little") + text.ljust(HEADER - 11).encode() + b"\n"


def open_vectors(path: Path) -> np.ndarray:
    """float32[n, d], memory-mapped; n may be 0."""
    if path.stat().st_size == HEADER:
        return np.zeros((0, 0), np.float32)
    found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return found


def joined(parts: list[Path], to: Path) -> np.ndarray:
    """One memory-mapped array out of the files of several shards, written to `to` where there are several."""
    filled = [path for path in parts if path.stat().st_size > HEADER]
    if len(filled) == 1:
        return open_vectors(filled[0])
    if not to.exists():
        arrays = [open_vectors(path) for path in filled]
        with new_part(to) as temporary, open(temporary, "wb") as file:
            file.write(npy_header(sum(map(len, arrays)), arrays[0].shape[1] if arrays else 0))
            for array in arrays:
                for at in range(0, len(array), 4096):
                    file.write(array[at : at + 4096].tobytes())
    return open_vectors(to)

"""Canonical JSON and content digests; the stage key is a hash of these and nothing else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from posttrain.core.events import jsonable


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; equal values give equal text on every platform."""
    return json.dumps(jsonable(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest_of(value: Any) -> str:
    """sha256 of the canonical JSON of `value`, hex."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, hex, in bounded memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_digest(files: list[dict[str, Any]]) -> str:
    """Digest of an artifact: sha256 over the sorted (path, sha256) pairs."""
    return digest_of(sorted((item["path"], item["sha256"]) for item in files))


def list_files(folder: Path) -> list[dict[str, Any]]:
    """`{path, size, sha256}` of every regular file below `folder`, sorted by path."""
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    return [{"path": p.relative_to(folder).as_posix(), "size": p.stat().st_size, "sha256": file_digest(p)} for p in found]

"""File hashes remembered between runs, since hashing a gigabyte again takes seconds.

They are kept in a JSON file by path, size, modification time and inode. A file changed within the last seconds may change
again without a new time, so its hash is not remembered.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from posttrain.core.hashing import file_digest
from posttrain.errors import DataError

RACY_S = 2.0


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/posttrain`, or `~/.cache/posttrain`: what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "posttrain"


def file_digests(files: list[Path], cache: Path | None = None) -> list[str]:
    """sha256 (hex) of each file's bytes, in order.

    Args:
        files: existing files.
        cache: the JSON file; default `digests.json` in `cache_folder()`. A damaged or read-only one costs time only.

    Raises:
        DataError: a file cannot be read.
    """
    cache = cache or cache_folder() / "digests.json"
    known = _read(cache)
    found, fresh = [], {}
    for file in files:
        name, stamp = str(file.resolve()), _stamp(file)
        entry = known.get(name)
        digest = entry[1] if isinstance(entry, list) and len(entry) == 2 and entry[0] == stamp else _hash(file)
        if time.time() - stamp[1] / 1e9 > RACY_S and _stamp(file) == stamp:
            fresh[name] = [stamp, digest]
        found.append(digest)
    if any(known.get(name) != entry for name, entry in fresh.items()):
        _write(cache, {**known, **fresh})
    return found


def _stamp(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _hash(file: Path) -> str:
    try:
        return file_digest(file)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=str(file)) from None


def _read(cache: Path) -> dict[str, Any]:
    try:
        known = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(cache: Path, entries: dict[str, Any]) -> None:
    new = cache.with_name(f"{cache.name}.{os.getpid()}")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps(entries), encoding="utf-8")
        os.replace(new, cache)
    except OSError:
        new.unlink(missing_ok=True)

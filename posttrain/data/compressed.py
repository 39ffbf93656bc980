"""gzip and zstd streams that say when they are cut.

Ready-made readers return the rows before a cut as if they were all (zstd) or raise an error without a name (gzip). Here a
stream must end with its last member or frame; several of them in one file are read one after another.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from posttrain.errors import DataError

CHUNK = 32 * 2**10
MAGIC = {"gzip": (b"\x1f\x8b",), "zstd": (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + i]) + b"\x2a\x4d\x18" for i in range(16)))}


def inflated(file: BinaryIO, path: Path, kind: str) -> Iterator[bytes]:
    """Decompressed pieces of a .gz (all members) or .zst (all frames); an empty file is empty."""
    new = _gz_decoder if kind.endswith(".gz") else _zst_decoder()
    name = "gzip" if kind.endswith(".gz") else "zstd"
    decoder, offset, fresh = new(), 0, True
    while chunk := file.read(CHUNK):
        while chunk:
            if fresh and offset and name == "gzip" and not chunk.strip(b"\0"):
                offset += len(chunk)
                break
            try:
                data = decoder.decompress(chunk)
            except Exception as error:
                raise _damaged(path, name, offset, chunk if fresh else None, error) from None
            yield data
            rest = decoder.unused_data if decoder.eof else b""
            offset, fresh = offset + len(chunk) - len(rest), False
            if decoder.eof:
                decoder, fresh = new(), True
            chunk = rest
    if not fresh:
        raise DataError(f"the {name} file is cut: it ends inside its data at byte {offset}", where=str(path), fix="fetch or write it again")


def _gz_decoder() -> Any:
    return zlib.decompressobj(wbits=31)


def _zst_decoder() -> Callable[[], Any]:
    import zstandard

    return lambda: zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()


def _damaged(path: Path, name: str, offset: int, head: bytes | None, error: Exception) -> DataError:
    """`head` is what stands where a member or frame should begin; None inside one."""
    foreign = head is not None and not head.startswith(MAGIC[name])
    if foreign and offset == 0:
        fix = f"rename it if it is plain text, or compress it with {name}"
        return DataError(f"not a {name} file, whatever its suffix says ({error})", where=str(path), fix=fix)
    what = f"bytes behind the end of the {name} data" if foreign else f"damaged {name} data"
    return DataError(f"{what} at byte {offset} ({error})", where=str(path), fix="fetch or write it again")

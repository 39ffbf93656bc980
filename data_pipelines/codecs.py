"""Compressed sizes C(x) of texts and of pairs x + y under five compressors, container header included.

    zlib        gzip container (deflate + 18 bytes), Python's own zlib; levels 0 (stored) to 9
    libdeflate  gzip container, package `deflate`; levels 1 to 12
    isal        gzip container, package `isal` (Intel ISA-L); levels 0 to 3
    lz4         lz4 frame that holds the content's size, package `lz4`; levels 0, 3 to 12, and below 0 (accelerated)
    zstd        zstd frame that holds the content's size, package `zstandard`; levels 1 to 22, and below 0

Sizes are those of the packages' own one-shot calls. zlib's pairs are counted by `deflate_size`, which gives the same
numbers; where this process's zlib is a fork that parses differently, or a pair is long, zlib itself does the work, with its
state after x copied for every y (deflate's output does not depend on how its input is cut).

Sizes differ between builds and versions of a library, so a codec has a `build`, which names the version and holds a
fingerprint of the sizes of fixed texts; numbers of two builds must not be mixed.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import zlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from posttrain.errors import ConfigError

if TYPE_CHECKING:
    from data_pipelines.deflate_size import PairSizer

GZIP = 18
"""Bytes of a gzip header and trailer; zlib's own container has 12 fewer."""
LONGEST_PAIR = 65_536 - 262
"""Bytes of a pair that can be counted."""
_CHUNK = 1 << 20

DEFAULT_LEVEL = {"zlib": 9, "libdeflate": 6, "isal": 3, "lz4": 0, "zstd": 3}
WINDOW = {"zlib": 32_768 - 262, "libdeflate": 32_768, "isal": 32_768, "lz4": 65_536, "zstd": 1 << 19}
"""Bytes back that a match can reach; zstd's at its lowest levels."""

# codec -> (levels that the library tells apart, in words)
_LEVELS: dict[str, tuple[Callable[[int], bool], str]] = {
    "zlib": (lambda level: 0 <= level <= 9, "0 to 9"),
    "libdeflate": (lambda level: 1 <= level <= 12, "1 to 12"),
    "isal": (lambda level: 0 <= level <= 3, "0 to 3"),
    "lz4": (lambda level: 3 <= level <= 12 or -65_536 <= level <= 0, "0, 3 to 12, and -65536 to -1; 1 and 2 are the same as 0"),
    "zstd": (lambda level: 1 <= level <= 22 or -131_072 <= level < 0, "1 to 22, and -131072 to -1; 0 is the same as 3"),
}


def level_problem(codec: str, level: int) -> str | None:
    """Why a codec has no such level of its own, or None."""
    fits, words = _LEVELS[codec]
    return None if fits(level) else f"{codec} has no level {level} of its own; levels: {words}"


class Texts(NamedTuple):
    """Texts end to end: `data` uint8, `offsets` int64[n + 1]."""

    data: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> np.ndarray:
        """int64[n] bytes."""
        return np.diff(self.offsets)

    def pieces(self) -> list[memoryview]:
        """The texts, without copies."""
        view = self.data.data
        ends = self.offsets.tolist()
        return [view[a:b] for a, b in itertools.pairwise(ends)]

    def take(self, which: np.ndarray) -> Texts:
        """Those of the given numbers, in that order."""
        pieces = self.pieces()
        return pack(pieces[int(i)] for i in which)


def pack(texts: Iterable[bytes | memoryview]) -> Texts:
    """Lays texts end to end."""
    listed = list(texts)
    offsets = np.zeros(len(listed) + 1, np.int64)
    np.cumsum([len(text) for text in listed], out=offsets[1:])
    return Texts(np.frombuffer(b"".join(listed), np.uint8), offsets)


class Codec:
    """A compressor at a level, for one thread at a time.

    Args:
        name: zlib, libdeflate, isal, lz4 or zstd.
        level: as the library's; none = `DEFAULT_LEVEL`.

    Raises:
        ConfigError: unknown codec, a level that the library ignores or takes for another, or a library that is not installed.
    """

    def __init__(self, name: str, level: int | None = None) -> None:
        if name not in _LEVELS:
            raise ConfigError(f"unknown codec `{name}`", where="codec", fix=f"known codecs: {', '.join(_LEVELS)}")
        self.name, self.level = name, DEFAULT_LEVEL[name] if level is None else level
        if problem := level_problem(name, self.level):
            raise ConfigError(problem, where="level")
        self._compress, self.version = _OPEN[name](self.level)
        self._sizer: PairSizer | None = None
        if name == "zlib" and self.level > 0:
            from data_pipelines.deflate_size import PairSizer, agrees

            self._sizer = PairSizer(self.level) if agrees(self.level) else None

    @functools.cached_property
    def build(self) -> str:
        """Version and fingerprint; equal where sizes can be compared."""
        from data_pipelines.deflate_size import probes

        sizes = [self.size(text) for text in [*probes(), b"", bytes(200_000)]]
        return f"{self.name} {self.level}: {self.version} {hashlib.sha256(repr(sizes).encode()).hexdigest()[:12]}"

    @property
    def counts(self) -> bool:
        """Sizes of pairs are counted instead of compressed; the numbers are the same."""
        return self._sizer is not None

    def size(self, text: bytes | memoryview) -> int:
        """C(text)."""
        if self.name == "zlib":
            return _stored(len(text)) if self.level == 0 else GZIP + _deflated(text, self.level)
        return len(self._compress(text))

    def sizes(self, texts: Texts) -> np.ndarray:
        """int64[n]: C of each."""
        return np.array([self.size(piece) for piece in texts.pieces()], np.int64)

    def pairs(self, first: bytes | memoryview, seconds: Texts) -> np.ndarray:
        """int64[n]: C(first + second) for each second."""
        if self.name != "zlib":
            return self._joined(first, seconds)
        if self.level == 0:
            return np.array([_stored(len(first) + size) for size in seconds.lengths().tolist()], np.int64)
        short = seconds.lengths() + len(first) <= LONGEST_PAIR
        if self._sizer is None or not short.any():
            return _continued(first, seconds, self.level)
        if short.all():
            return GZIP + self._sizer.sizes(np.frombuffer(first, np.uint8), seconds.data, seconds.offsets)
        out = np.zeros(len(seconds), np.int64)
        for mask in (short, ~short):
            out[mask] = self.pairs(first, seconds.take(np.flatnonzero(mask)))
        return out

    def _joined(self, first: bytes | memoryview, seconds: Texts) -> np.ndarray:
        start = len(first)
        buffer = bytearray(start + int(seconds.lengths().max(initial=0)))
        buffer[:start] = first
        view, compress = memoryview(buffer), self._compress
        out = np.zeros(len(seconds), np.int64)
        for index, piece in enumerate(seconds.pieces()):
            end = start + len(piece)
            view[start:end] = piece
            out[index] = len(compress(view[:end]))
        return out


@functools.lru_cache(1 << 14)
def _stored(length: int) -> int:
    """Size at level 0, where nothing but the length matters; Python's output buffer decides how blocks are cut."""
    return len(zlib.compress(bytes(length), 0)) + GZIP - 6


def _deflated(text: bytes | memoryview, level: int) -> int:
    """Bytes of raw deflate; the output is thrown away as it comes."""
    if len(text) <= _CHUNK:
        return len(zlib.compress(text, level)) - 6
    stream = zlib.compressobj(level, zlib.DEFLATED, -15)
    return _fed(stream, text) + len(stream.flush())


def _fed(stream: Any, text: bytes | memoryview) -> int:
    view = memoryview(text)
    return sum(len(stream.compress(view[at : at + _CHUNK])) for at in range(0, len(view), _CHUNK))


def _continued(first: bytes | memoryview, seconds: Texts, level: int) -> np.ndarray:
    """Pairs through copies of zlib's state after `first`."""
    stream = zlib.compressobj(level, zlib.DEFLATED, -15)
    before = GZIP + _fed(stream, first)
    out = np.zeros(len(seconds), np.int64)
    for index, piece in enumerate(seconds.pieces()):
        copy = stream.copy()
        out[index] = before + _fed(copy, piece) + len(copy.flush())
    return out


Opened = tuple[Callable[[Any], bytes], str]


def _open_zlib(level: int) -> Opened:
    return functools.partial(zlib.compress, level=level), f"zlib {zlib.ZLIB_RUNTIME_VERSION}"


def _open_libdeflate(level: int) -> Opened:
    deflate = _library("deflate")
    return functools.partial(deflate.gzip_compress, compresslevel=level), f"deflate {deflate.__version__}"


def _open_isal(level: int) -> Opened:
    isal, isal_zlib = _library("isal"), _library("isal.isal_zlib")
    return functools.partial(isal_zlib.compress, level=level, wbits=31), f"isal {isal.__version__}"


def _open_lz4(level: int) -> Opened:
    lz4, frame = _library("lz4"), _library("lz4.frame")
    return functools.partial(frame.compress, compression_level=level), f"lz4 {lz4.library_version_string()}"


def _open_zstd(level: int) -> Opened:
    import zstandard

    version = ".".join(map(str, zstandard.ZSTD_VERSION))
    return zstandard.ZstdCompressor(level=level).compress, f"zstd {version}"


def _library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ConfigError(
            f"the codec needs the package `{package}` ({error})", where="codec", fix="pip install 'posttrain[select]'"
        ) from None


_OPEN: dict[str, Callable[[int], Opened]] = {
    "zlib": _open_zlib,
    "libdeflate": _open_libdeflate,
    "isal": _open_isal,
    "lz4": _open_lz4,
    "zstd": _open_zstd,
}


class Dictionary:
    """Sizes of texts given a dictionary of other texts: one compression a text, whatever the dictionary's size.

    Args:
        codec: zstd (dictionary of any size, as raw content) or zlib (the last 32 KiB of it).
        texts: the dictionary; what comes last is cheapest to refer to.
    """

    CODECS = ("zstd", "zlib")

    def __init__(self, codec: Codec, texts: Texts) -> None:
        data = texts.data.tobytes()
        if codec.name == "zstd":
            self._compress = _with_dictionary(codec.level, data)
        elif codec.name == "zlib" and codec.level > 0:
            self._stream = zlib.compressobj(codec.level, zlib.DEFLATED, -15, zdict=data[-32_768:])
            self._compress = self._continue
        else:
            raise ConfigError(
                f"no dictionary with {codec.name} level {codec.level}", where="codec", fix="use zstd, or zlib at level 1 to 9"
            )

    def _continue(self, text: bytes | memoryview) -> bytes:
        copy = self._stream.copy()
        return bytes(GZIP) + copy.compress(text) + copy.flush()

    def size(self, text: bytes | memoryview) -> int:
        """C(text | dictionary), in the same container as `Codec.size`."""
        return len(self._compress(text))


@functools.lru_cache(64)
def _with_dictionary(level: int, data: bytes) -> Callable[[Any], bytes]:
    """zstd with a dictionary made ready once."""
    import zstandard

    shared = zstandard.ZstdCompressionDict(data, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    shared.precompute_compress(level=level)
    compress: Callable[[Any], bytes] = zstandard.ZstdCompressor(level=level, dict_data=shared, write_dict_id=False).compress
    return compress


@functools.cache
def shared_codec(name: str, level: int | None) -> Codec:
    """This process's codec."""
    return Codec(name, level)

"""Hashed n-gram features, equal to those of the DSIR authors' package, counted by compiled loops instead of per-word Python.

Features (Xie et al. 2023, arXiv 2302.03169, HashedNgramDSIR): the lower-cased text is cut into words, the matches of
`\\w+|[^\\w\\s]+`; every word and every run of 2..n neighbouring words joined by a space falls into the bucket

    bucket(g) = int(SHA256(utf8(g))) mod B            the digest read as a 256-bit big-endian integer

How it is made fast. Texts are laid end to end as UTF-32 code points; one table gives each code point's class (space,
word, punctuation) and its lower case, both read off the engines that are matched, and a loop cuts words and rolls their
64-bit keys in the same step,

    key(w) = mix(h_m),  h_i = s((h_{i-1} xor c_i) P),  s(x) = x xor (x >> 29)
    key(w_1..w_m) = mix(key(w_1..w_{m-1}) K + key(w_m))

A table of fixed size, sets of four places of 8 bytes, takes keys to buckets. N-grams that are not in it are collected
and hashed 64 at a time, by a SHA-256 whose every step runs over the 64 messages, which the compiler turns into vector
instructions: about 30 ns an n-gram where `hashlib` and the division take 650. Memory is bounded, and the result never
depends on what the table held before. A place keeps 39 bits of the key beside the 20 of its set, so an n-gram that is
new to the table is taken for another one with probability 4 x 2^-39; two n-grams share a key with probability 2^-64.

`fast` uses the high bits of the key as the bucket: the same method with other collisions, and no SHA-256 at all.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data_pipelines.jit import inlined, jit

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

WORD = re.compile(r"\w+|[^\w\s]+")
WINDOW = 1 << 17
"""Characters held as arrays at a time; about 30 bytes each."""
TABLE_BITS = 22
"""log2 of the table's places; 8 bytes each."""

_CODES = 0x110000
_P = np.uint64(0x9E3779B97F4A7C15)
_K = np.uint64(0xD6E8FEB86659FD93)
_START = np.uint64(0x243F6A8885A308D3)
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S27, _S29, _S30, _S31, _S32 = np.uint64(27), np.uint64(29), np.uint64(30), np.uint64(31), np.uint64(32)
_TOP, _CHECK, _BUCKET = np.uint64(1 << 63), np.uint64(0xFFFFFFFFFF000000), np.uint64(0xFFFFFF)
_SPACE, _LETTER, _PUNCT = 0, 1, 2
_WAYS = 4
_LANES = 64
_LONG = np.uint32(0xFFFFFFFF)
_BLOCK = 55
"""Bytes of UTF-8 that fit one block of SHA-256."""

_ROOTS = np.array([
    0x428A2F98, 0x71374491, 0xB5C0FBCF, 0xE9B5DBA5, 0x3956C25B, 0x59F111F1, 0x923F82A4, 0xAB1C5ED5, 0xD807AA98, 0x12835B01, 0x243185BE,
    0x550C7DC3, 0x72BE5D74, 0x80DEB1FE, 0x9BDC06A7, 0xC19BF174, 0xE49B69C1, 0xEFBE4786, 0x0FC19DC6, 0x240CA1CC, 0x2DE92C6F, 0x4A7484AA,
    0x5CB0A9DC, 0x76F988DA, 0x983E5152, 0xA831C66D, 0xB00327C8, 0xBF597FC7, 0xC6E00BF3, 0xD5A79147, 0x06CA6351, 0x14292967, 0x27B70A85,
    0x2E1B2138, 0x4D2C6DFC, 0x53380D13, 0x650A7354, 0x766A0ABB, 0x81C2C92E, 0x92722C85, 0xA2BFE8A1, 0xA81A664B, 0xC24B8B70, 0xC76C51A3,
    0xD192E819, 0xD6990624, 0xF40E3585, 0x106AA070, 0x19A4C116, 0x1E376C08, 0x2748774C, 0x34B0BCB5, 0x391C0CB3, 0x4ED8AA4A, 0x5B9CCA4F,
    0x682E6FF3, 0x748F82EE, 0x78A5636F, 0x84C87814, 0x8CC70208, 0x90BEFFFA, 0xA4506CEB, 0xBEF9A3F7, 0xC67178F2,
], np.uint32)  # fmt: skip
_SQUARES = np.array(
    [0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19], np.uint32
)  # FIPS 180-4: fractions of the square roots of the first primes, as _ROOTS are of the cube roots


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: a bijection of uint64 that spreads every bit."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


@functools.cache
def char_table(regex: str = "re") -> np.ndarray:
    """uint32 of every code point: its lower case << 2 | class of that (0 space, 1 word, 2 punctuation).

    Args:
        regex: the engine that says what `\\w` and `\\s` are: `re`, or the package `regex`, which NLTK >= 3.10 uses; they
            differ in some 30,000 code points. Code points of `_special` keep their case here.
    """
    every = _every()
    kind = np.full(_CODES, _PUNCT, np.uint32)
    engine = importlib.import_module(regex)
    for pattern, value in ((r"\s+", _SPACE), (r"\w+", _LETTER)):
        for run in engine.finditer(pattern, every):
            kind[run.start() : run.end()] = value
    lower = np.arange(_CODES, dtype=np.uint32)
    for code in np.flatnonzero(_may_change(every)).tolist():
        if len(small := chr(code).lower()) == 1 and chr(code) != "Σ":
            lower[code] = ord(small)
    return lower << np.uint32(2) | kind[lower]


def _every() -> str:
    """All code points in a row, surrogates among them."""
    return np.arange(_CODES, dtype="<u4").tobytes().decode("utf-32-le", "surrogatepass")


def _may_change(every: str) -> np.ndarray:
    """bool[0x110000]: code points whose block of 256 is changed by lower-casing it."""
    blocks = (every[i : i + 256] for i in range(0, _CODES, 256))
    return np.repeat([block.lower() != block for block in blocks], 256)


@functools.cache
def _special() -> str:
    """Characters whose lower case needs more than a table: the sigma, and those that become several."""
    longer = [chr(code) for code in np.flatnonzero(_may_change(_every())).tolist() if len(chr(code).lower()) != 1]
    return "".join(["Σ", *longer])


@functools.cache
def table_digest(regex: str = "re") -> int:
    """CRC-32 of `char_table`: the Unicode version of the engines, for states that travel between machines."""
    return zlib.crc32(char_table(regex).tobytes())


class Piece(NamedTuple):
    """A text, or a window of a long one whose first `carried` words were counted with the window before."""

    document: int
    text: str
    carried: int


class Words(NamedTuple):
    """Words of a batch of pieces: code points uint32, [start, end) of the words int32, uint64 keys, first word of each piece."""

    codes: np.ndarray
    start: np.ndarray
    end: np.ndarray
    key: np.ndarray
    first: np.ndarray


class Hashed(NamedTuple):
    """A batch of pieces: their texts' numbers and carried words int64[p], their words, and buckets uint32[words, n]."""

    document: np.ndarray
    carried: np.ndarray
    words: Words
    found: np.ndarray


def pieces(texts: Iterable[str], n: int, single: bool = False, regex: str = "re") -> Iterator[Piece]:
    """Texts that the table can lower; one longer than WINDOW comes as windows that overlap by n - 1 words.

    A single word longer than WINDOW is held whole, at about 30 bytes a character.
    """
    for index, text in enumerate(texts):
        if not text.isascii() and any(char in text for char in _special()):
            text = text.lower()
        if len(text) <= WINDOW:
            yield Piece(index, text, 0)
        else:
            yield from _windows(index, text, n, single, regex)


def _windows(index: int, text: str, n: int, single: bool, regex: str) -> Iterator[Piece]:
    at = carried = 0
    size = WINDOW
    while at + size < len(text):
        words = find_words([text[at : at + size]], single, regex)
        count = len(words.key)
        if count <= n:
            size *= 2
            continue
        yield Piece(index, text[at : at + int(words.start[count - 1])], carried)
        at += int(words.start[count - n])
        carried, size = n - 1, WINDOW
    yield Piece(index, text[at:], carried)


def batches(items: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Lists of pieces of about WINDOW characters in all."""
    held: list[Piece] = []
    size = 0
    for piece in items:
        if held and size + len(piece.text) > WINDOW:
            yield held
            held, size = [], 0
        held.append(piece)
        size += len(piece.text) + 1
    if held:
        yield held


def find_words(texts: list[str], single: bool = False, regex: str = "re") -> Words:
    """Words of texts that the table can lower, with their keys; see the module docstring.

    Args:
        texts: as `pieces` gives them.
        single: every character that is not white space is a word.
        regex: see `char_table`.
    """
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    ends = np.cumsum([0, *map(len, texts)])
    start, end, key = np.empty(len(codes), np.int32), np.empty(len(codes), np.int32), np.empty(len(codes), np.uint64)
    first = np.zeros(len(ends), np.int64)
    count = _cut(codes, ends, char_table(regex), single, start, end, key, first)
    return Words(codes, start[:count], end[:count], key[:count], first)


@inlined
def mix1(x: Any) -> Any:
    """`mix` of one uint64, in compiled code."""
    x = (x ^ (x >> _S30)) * _M1
    x = (x ^ (x >> _S27)) * _M2
    return x ^ (x >> _S31)


@jit
def _cut(
    codes: np.ndarray, ends: np.ndarray, table: np.ndarray, single: bool,
    start: np.ndarray, end: np.ndarray, key: np.ndarray, first: np.ndarray,
) -> int:  # fmt: skip
    """Fills start, end, key of the words of the texts codes[ends[d]:ends[d+1]], and first[d+1]; returns their number."""
    at = 0
    for d in range(len(ends) - 1):
        i, stop = ends[d], ends[d + 1]
        while i < stop:
            entry = table[codes[i]]
            kind = entry & 3
            if kind == 0:
                i += 1
                continue
            begin, h = i, _START
            while True:
                h = (h ^ np.uint64(entry >> 2)) * _P
                h ^= h >> _S29
                i += 1
                if single or i == stop:
                    break
                entry = table[codes[i]]
                if entry & 3 != kind:
                    break
            start[at], end[at], key[at] = begin, i, mix1(h)
            at += 1
        first[d + 1] = at
    return at


@inlined
def _right(x: Any, by: int) -> Any:
    """uint32 `x` rotated right."""
    return np.uint32(np.uint32(x >> np.uint32(by)) | np.uint32(x << np.uint32(32 - by)))


@jit
def _compress(w: np.ndarray, v: np.ndarray, roots: np.ndarray, squares: np.ndarray) -> None:
    """SHA-256 of 64 one-block messages: w uint32[64, lanes] holds their 16 words in its first rows, v[8, lanes] takes the digests."""
    for t in range(16, 64):
        for lane in range(_LANES):
            x, y = w[t - 15, lane], w[t - 2, lane]
            s0 = np.uint32(_right(x, 7) ^ _right(x, 18) ^ np.uint32(x >> np.uint32(3)))
            s1 = np.uint32(_right(y, 17) ^ _right(y, 19) ^ np.uint32(y >> np.uint32(10)))
            w[t, lane] = np.uint32(np.uint32(w[t - 16, lane] + s0) + np.uint32(w[t - 7, lane] + s1))
    for i in range(8):
        for lane in range(_LANES):
            v[i, lane] = squares[i]
    for t in range(64):
        at, bt, ct, dt, et, ft, gt, ht = -t & 7, (1 - t) & 7, (2 - t) & 7, (3 - t) & 7, (4 - t) & 7, (5 - t) & 7, (6 - t) & 7, (7 - t) & 7
        root = roots[t]
        for lane in range(_LANES):
            a, b, c, e, f, g = v[at, lane], v[bt, lane], v[ct, lane], v[et, lane], v[ft, lane], v[gt, lane]
            one = np.uint32(v[ht, lane] + np.uint32(_right(e, 6) ^ _right(e, 11) ^ _right(e, 25)))
            one = np.uint32(one + np.uint32(np.uint32((e & f) ^ (np.uint32(~e) & g)) + np.uint32(root + w[t, lane])))
            two = np.uint32(np.uint32(_right(a, 2) ^ _right(a, 13) ^ _right(a, 22)) + np.uint32((a & b) ^ (a & c) ^ (b & c)))
            v[dt, lane] = np.uint32(v[dt, lane] + one)
            v[ht, lane] = np.uint32(one + two)
    for i in range(8):
        for lane in range(_LANES):
            v[i, lane] = np.uint32(v[i, lane] + squares[i])


@inlined
def _put(w: np.ndarray, lane: int, at: int, byte: Any) -> int:
    """Writes byte number `at` of the lane's message, big-endian, where there is room for it; returns at + 1."""
    if at < 64:
        w[at >> 2, lane] |= np.uint32(np.uint32(byte) << np.uint32(24 - 8 * (at & 3)))
    return at + 1


@jit
def _spell(
    codes: np.ndarray, table: np.ndarray, start: np.ndarray, end: np.ndarray, word: int, order: int, w: np.ndarray, lane: int
) -> bool:
    """Puts the n-gram's UTF-8, padded, into a lane of the block; False where it does not fit."""
    for t in range(16):
        w[t, lane] = 0
    at = 0
    for j in range(word, word + order):
        if end[j] - start[j] > _BLOCK:
            return False
        if j > word:
            at = _put(w, lane, at, 32)
        for i in range(start[j], end[j]):
            c = table[codes[i]] >> 2
            if c < 0x80:
                at = _put(w, lane, at, c)
            elif c < 0x800:
                at = _put(w, lane, at, 0xC0 | c >> 6)
                at = _put(w, lane, at, 0x80 | c & 0x3F)
            elif c < 0x10000:
                at = _put(w, lane, at, 0xE0 | c >> 12)
                at = _put(w, lane, at, 0x80 | c >> 6 & 0x3F)
                at = _put(w, lane, at, 0x80 | c & 0x3F)
            else:
                at = _put(w, lane, at, 0xF0 | c >> 18)
                at = _put(w, lane, at, 0x80 | c >> 12 & 0x3F)
                at = _put(w, lane, at, 0x80 | c >> 6 & 0x3F)
                at = _put(w, lane, at, 0x80 | c & 0x3F)
        if at > _BLOCK:
            return False
    _put(w, lane, at, 0x80)
    w[15, lane] = np.uint32(8 * at)
    return True


@inlined
def _look_up(table: np.ndarray, key: Any) -> Any:
    """The key's bucket, or -1."""
    home = np.int64(key & np.uint64(len(table) - 1))
    check = (key | _TOP) & _CHECK
    for way in range(_WAYS):
        entry = table[home ^ way]
        if entry & _CHECK == check:
            return np.int64(entry & _BUCKET)
    return -1


@jit
def _insert(table: np.ndarray, key: Any, bucket: Any) -> None:
    """Into the first empty place of its set, counted from its own; into its own if there is none."""
    if _look_up(table, key) < 0:
        home = np.int64(key & np.uint64(len(table) - 1))
        place = home
        for way in range(_WAYS):
            if table[home ^ way] == 0:
                place = home ^ way
                break
        table[place] = (key | _TOP) & _CHECK | np.uint64(bucket)


@jit
def _buckets(
    codes: np.ndarray, chars: np.ndarray, start: np.ndarray, end: np.ndarray, key: np.ndarray, first: np.ndarray, n: int, buckets: int,
    table: np.ndarray, roots: np.ndarray, squares: np.ndarray, found: np.ndarray,
) -> int:  # fmt: skip
    """Fills found[i, o - 1] with the bucket of the o words from word i on, for all that lie inside one piece.

    N-grams that are not in the table and longer than one block get _LONG; returns their number.
    """
    w, v = np.zeros((64, _LANES), np.uint32), np.zeros((8, _LANES), np.uint32)
    at, orders, keys = np.zeros(_LANES, np.int64), np.zeros(_LANES, np.int64), np.zeros(_LANES, np.uint64)
    waiting = skipped = 0
    for d in range(len(first) - 1):
        for i in range(first[d], first[d + 1]):
            k = key[i]
            for order in range(1, min(n, first[d + 1] - i) + 1):
                if order > 1:
                    k = mix1(k * _K + key[i + order - 1])
                bucket = _look_up(table, k)
                if bucket >= 0:
                    found[i, order - 1] = bucket
                elif _spell(codes, chars, start, end, i, order, w, waiting):
                    at[waiting], orders[waiting], keys[waiting] = i, order, k
                    waiting += 1
                    if waiting == _LANES:
                        _flush(w, v, roots, squares, waiting, at, orders, keys, buckets, table, found)
                        waiting = 0
                else:
                    found[i, order - 1] = _LONG
                    skipped += 1
    _flush(w, v, roots, squares, waiting, at, orders, keys, buckets, table, found)
    return skipped


@jit
def _flush(
    w: np.ndarray, v: np.ndarray, roots: np.ndarray, squares: np.ndarray, waiting: int, at: np.ndarray, orders: np.ndarray,
    keys: np.ndarray, buckets: int, table: np.ndarray, found: np.ndarray,
) -> None:  # fmt: skip
    """Hashes the n-grams that wait in the lanes, and keeps them."""
    if not waiting:
        return
    _compress(w, v, roots, squares)
    size = np.uint64(buckets)
    power = np.ones(8, np.uint64)  # of the digest's eight limbs modulo the buckets: below 2^24, so the sum is below 2^59
    for i in range(6, -1, -1):
        power[i] = (power[i + 1] << _S32) % size
    for lane in range(waiting):
        rest = np.uint64(0)
        for i in range(8):
            rest += np.uint64(v[i, lane]) * power[i]
        rest %= size
        found[at[lane], orders[lane] - 1] = rest
        _insert(table, keys[lane], np.int64(rest))


@jit
def _fast_buckets(key: np.ndarray, first: np.ndarray, n: int, buckets: int, found: np.ndarray) -> None:
    """As `_buckets`, by the high bits of the keys."""
    size = np.uint64(buckets)
    for d in range(len(first) - 1):
        for i in range(first[d], first[d + 1]):
            k = key[i]
            found[i, 0] = ((k >> _S32) * size) >> _S32
            for order in range(2, min(n, first[d + 1] - i) + 1):
                k = mix1(k * _K + key[i + order - 1])
                found[i, order - 1] = ((k >> _S32) * size) >> _S32


@jit
def _count(found: np.ndarray, first: np.ndarray, carried: np.ndarray, total: np.ndarray) -> None:
    """Adds the n-grams that end at or after word `carried` of their piece to total[bucket]."""
    n = found.shape[1]
    for d in range(len(first) - 1):
        for i in range(first[d], first[d + 1]):
            for j in range(max(i, first[d] + carried[d]), min(i + n, first[d + 1])):
                total[found[i, j - i]] += 1


@jit
def _weigh(
    found: np.ndarray, first: np.ndarray, carried: np.ndarray, document: np.ndarray, log_diff: np.ndarray, score: np.ndarray
) -> None:
    """Adds each piece's sum of log_diff[bucket, t] to score[document, t]."""
    n = found.shape[1]
    for t in range(log_diff.shape[1]):
        for d in range(len(first) - 1):
            total = 0.0
            for i in range(first[d], first[d + 1]):
                for j in range(max(i, first[d] + carried[d]), min(i + n, first[d + 1])):
                    total += log_diff[found[i, j - i], t]
            score[document[d], t] += total


@jit
def _distinct(
    found: np.ndarray, first: np.ndarray, carried: np.ndarray, dense: np.ndarray, indices: np.ndarray, counts: np.ndarray, ends: np.ndarray
) -> None:
    """Each piece's buckets, in the order seen, and how often each occurs; `dense` int32[B] is zero before and after."""
    n = found.shape[1]
    at = 0
    for d in range(len(first) - 1):
        before = at
        for i in range(first[d], first[d + 1]):
            for j in range(max(i, first[d] + carried[d]), min(i + n, first[d + 1])):
                bucket = found[i, j - i]
                if dense[bucket] == 0:
                    indices[at] = bucket
                    at += 1
                dense[bucket] += 1
        for place in range(before, at):
            counts[place] = dense[indices[place]]
            dense[indices[place]] = 0
        ends[d] = at


def sha_bucket(gram: bytes, buckets: int) -> int:
    """int(SHA256(gram)) mod buckets."""
    return int.from_bytes(hashlib.sha256(gram).digest(), "big") % buckets


class Hasher:
    """Counts and weighs hashed n-grams; one instance a process, since its table is worth keeping. Not for two threads at once.

    Args:
        n: longest n-gram, in words.
        buckets: number of buckets B, below 2^24.
        kind: `sha256` (the published features) or `fast`.
        unit: `word`, or `char`: each character that is not white space counts as a word, for scripts without spaces.
        regex: see `char_table`.
    """

    def __init__(self, n: int = 2, buckets: int = 10_000, kind: str = "sha256", unit: str = "word", regex: str = "re") -> None:
        self.n, self.buckets, self.kind, self.single, self.regex = n, buckets, kind, unit == "char", regex
        self._table = np.zeros(1 << TABLE_BITS if kind == "sha256" else 0, np.uint64)

    def count(self, texts: Iterable[str]) -> np.ndarray:
        """int64[B]: how often each bucket occurs in all texts together."""
        return self.tally(texts)[0]

    def tally(self, texts: Iterable[str]) -> tuple[np.ndarray, int, int]:
        """`count`, and how many words there are and characters in them."""
        total = np.zeros(self.buckets, np.int64)
        words = characters = 0
        for piece in self._found(texts):
            _count(piece.found, piece.words.first, piece.carried, total)
            first, size = piece.words.first, piece.words.end - piece.words.start
            before = sum(int(size[a : a + carried].sum()) for a, carried in zip(first, piece.carried, strict=False) if carried)
            words += len(size) - int(piece.carried.sum())
            characters += int(size.sum()) - before
        return total, words, characters

    def weigh(self, texts: list[str], log_diff: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scores, words and n-grams of each text.

        Args:
            texts: n of them.
            log_diff: float64[B], or [B, T].

        Returns:
            <log_diff, counts> float64[n] or [n, T], words int64[n], n-grams int64[n].
        """
        columns = np.ascontiguousarray(log_diff, np.float64).reshape(self.buckets, -1)
        score = np.zeros((len(texts), columns.shape[1]))
        words, grams = np.zeros(len(texts), np.int64), np.zeros(len(texts), np.int64)
        for document, carried, batch, found in self._found(texts):
            _weigh(found, batch.first, carried, document, columns, score)
            size = np.diff(batch.first)
            np.add.at(words, document, size - carried)
            for order in range(self.n):
                np.add.at(grams, document, np.maximum(size - order, 0) - np.maximum(carried - order, 0))
        return score.reshape(score.shape[: log_diff.ndim]), words, grams

    def rows(self, texts: list[str]) -> csr_matrix:
        """scipy.sparse.csr_matrix float64[n, B] of the counts of each text."""
        from scipy.sparse import csr_matrix

        owners, sizes, indices, counts = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.int32)], [np.zeros(0)]
        dense = np.zeros(self.buckets, np.int32)
        for document, carried, batch, found in self._found(texts):
            at, ends = np.empty(found.size, np.int32), np.zeros(len(document), np.int64)
            seen = np.empty(found.size)
            _distinct(found, batch.first, carried, dense, at, seen, ends)
            owners.append(document)
            sizes.append(np.diff(ends, prepend=0))
            indices.append(at[: ends[-1]].copy())
            counts.append(seen[: ends[-1]].copy())
        owner = np.repeat(np.concatenate(owners), np.concatenate(sizes))
        ends = np.cumsum(np.bincount(owner, minlength=len(texts)))
        made = csr_matrix((np.concatenate(counts), np.concatenate(indices), np.append(0, ends)), (len(texts), self.buckets))
        made.sum_duplicates()
        return made

    def _found(self, texts: Iterable[str]) -> Iterator[Hashed]:
        for batch in batches(pieces(texts, self.n, self.single, self.regex)):
            words = find_words([piece.text for piece in batch], self.single, self.regex)
            document, carried = np.array([[piece.document, piece.carried] for piece in batch], np.int64).T
            yield Hashed(document, carried, words, self._bucket(words))

    def _bucket(self, words: Words) -> np.ndarray:
        found = np.zeros((len(words.key), self.n), np.uint32)
        if self.kind == "fast":
            _fast_buckets(words.key, words.first, self.n, self.buckets, found)
        else:
            chars = char_table(self.regex)
            state = (self.n, self.buckets, self._table, _ROOTS, _SQUARES, found)
            if _buckets(words.codes, chars, words.start, words.end, words.key, words.first, *state):
                self._hash_long(words, found)
        return found

    def _hash_long(self, words: Words, found: np.ndarray) -> None:
        lower = (char_table(self.regex)[words.codes] >> np.uint32(2)).astype("<u4")
        for i, order in np.argwhere(found == _LONG):
            spans = [lower[words.start[j] : words.end[j]] for j in range(i, i + order + 1)]
            gram = " ".join(span.tobytes().decode("utf-32-le", "surrogatepass") for span in spans)
            found[i, order] = sha_bucket(gram.encode("utf-8", "surrogatepass"), self.buckets)
            key = words.key[i : i + 1]
            for j in range(i + 1, i + order + 1):
                key = mix(key * _K + words.key[j])
            _insert(self._table, key[0], int(found[i, order]))


@functools.cache
def shared_hasher(n: int, buckets: int, kind: str, unit: str = "word", regex: str = "re") -> Hasher:
    """This process's hasher for these features: fitting warms the table for scoring."""
    return Hasher(n, buckets, kind, unit, regex)


def count_words(texts: list[str], unit: str = "word") -> np.ndarray:
    """int64[n]: words of each text, the matches of WORD."""
    counts = np.zeros(len(texts), np.int64)
    for batch in batches(pieces(texts, 1, unit == "char")):
        words = find_words([piece.text for piece in batch], unit == "char")
        np.add.at(counts, [piece.document for piece in batch], np.diff(words.first))
    return counts


def hashed_counts(texts: list[str], n: int = 2, buckets: int = 10_000, kind: str = "fast") -> csr_matrix:
    """scipy.sparse.csr_matrix float64[len(texts), buckets]: counts of the hashed n-grams of each text."""
    return shared_hasher(n, buckets, kind).rows(texts)

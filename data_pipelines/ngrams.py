"""Hashed n-gram features, equal to those of the DSIR authors' package, counted with arrays instead of per-word Python.

Features (Xie et al. 2023, arXiv 2302.03169, HashedNgramDSIR): the lower-cased text is cut into words, the matches of
`\\w+|[^\\w\\s]+`; every word and every run of 2..n neighbouring words joined by a space falls into the bucket

    bucket(g) = int(SHA256(utf8(g))) mod B            the digest read as a 256-bit big-endian integer

How it is made fast. Texts are laid end to end as UTF-32 code points c_0, c_1, ...; a table of all code points gives
each one's class (space, word, punctuation), and words are the runs of equal class. With a random odd multiplier P and
random 64-bit values v, the prefix sums S_i = sum_{j<i} v[c_j] P^j (mod 2^64) give every word's key at once,

    key(word at [a, b)) = mix((S_b - S_a) P^-a),      key(w_1..w_m) = mix(key(w_1..w_m-1) K + key(w_m)),

and a direct-mapped table of fixed size takes keys to buckets. A key that is not in the table costs one SHA-256 and
replaces what was in its place, so memory is bounded and the result never depends on what the table held before. Two
n-grams share a 64-bit key with probability 2^-64.

`fast` uses the high bits of the key as the bucket: the same method with other collisions, and no SHA-256 at all.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

WORD = re.compile(r"\w+|[^\w\s]+")
WINDOW = 1 << 18
"""Characters held as arrays at a time; about 45 bytes each."""
TABLE_BITS = 21
"""log2 of the table's places; 12 bytes each."""

_CODES = 0x110000
_P = np.uint64(0x9E3779B97F4A7C15)
_P_INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 1 << 64))
_K = np.uint64(0xD6E8FEB86659FD93)
_SPACE, _LETTER, _PUNCT = 0, 1, 2


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: a bijection of uint64 that spreads every bit."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


@functools.cache
def _classes() -> np.ndarray:
    """uint8 class of every code point, read off the regular expression engine itself."""
    table = np.full(_CODES, _PUNCT, np.uint8)
    every = "".join(map(chr, range(_CODES)))
    for pattern, value in ((r"\s+", _SPACE), (r"\w+", _LETTER)):
        for run in re.finditer(pattern, every):
            table[run.start() : run.end()] = value
    return table


@functools.cache
def _values() -> np.ndarray:
    """uint64 value of every code point."""
    return mix(np.arange(1, _CODES + 1, dtype=np.uint64) * _P)


_POWERS: dict[int, np.ndarray] = {}


def _powers(base: np.uint64, size: int) -> np.ndarray:
    """base^0 .. base^(size-1) modulo 2^64, kept for the next call."""
    known = _POWERS.get(int(base))
    if known is None or len(known) < size:
        steps = np.full(max(size, WINDOW + WINDOW // 4), base, np.uint64)
        steps[0] = 1
        known = np.multiply.accumulate(steps)
        if len(known) <= 2 * WINDOW:
            _POWERS[int(base)] = known
    return known[:size]


class Piece(NamedTuple):
    """A lower-cased text, or a window of a long one whose first `carried` words were counted with the window before."""

    document: int
    text: str
    carried: int


class Words(NamedTuple):
    """Words of a batch of pieces: [start, end) into `text`, uint64 keys, and the first word of each piece (plus the end)."""

    text: str
    start: np.ndarray
    end: np.ndarray
    key: np.ndarray
    first: np.ndarray


def pieces(texts: Iterable[str], n: int) -> Iterator[Piece]:
    """Lower-cased texts; one longer than WINDOW comes as windows that overlap by n - 1 words.

    Words joined by single spaces are cut into the same words again, so a window is simply such a join. A single word
    longer than WINDOW is held whole, at about 40 bytes a character.
    """
    for index, text in enumerate(texts):
        text = text.lower()
        if len(text) <= WINDOW:
            yield Piece(index, text, 0)
        else:
            yield from _windows(index, text, n)


def _windows(index: int, text: str, n: int) -> Iterator[Piece]:
    held: list[str] = []
    size = carried = 0
    for found in WORD.finditer(text):
        held.append(found.group())
        size += len(held[-1]) + 1
        if size >= WINDOW and len(held) > n:
            yield Piece(index, " ".join(held), carried)
            carried = n - 1
            held = held[len(held) - carried :]
            size = sum(map(len, held)) + carried
    yield Piece(index, " ".join(held), carried)


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


def find_words(texts: list[str]) -> Words:
    """Words of lower-cased texts with their keys; see the module docstring."""
    joined = "\n".join(texts) + "\n"
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
    kind = _classes()[codes]
    edge = np.flatnonzero(np.diff(kind, prepend=np.uint8(_SPACE)))
    edge_kind = kind[edge]
    start = edge[edge_kind != _SPACE]
    end = np.append(edge[1:], len(kind))[edge_kind != _SPACE]
    sums = np.zeros(len(codes) + 1, np.uint64)
    np.cumsum(_values()[codes] * _powers(_P, len(codes)), out=sums[1:])
    key = mix((sums[end] - sums[start]) * _powers(_P_INVERSE, len(codes))[start])
    begins = np.cumsum([0, *(len(text) + 1 for text in texts)])
    return Words(joined, start, end, key, np.searchsorted(start, begins))


def sha_buckets(grams: list[bytes], buckets: int) -> np.ndarray:
    """int(SHA256(gram)) mod buckets, by Horner's rule over the eight 32-bit words of the digests; uint32."""
    digests = b"".join([hashlib.sha256(gram).digest() for gram in grams])
    limbs = np.frombuffer(digests, ">u4").reshape(-1, 8).astype(np.uint64)
    rest = np.zeros(len(limbs), np.uint64)
    for column in range(8):
        rest = ((rest << np.uint64(32)) | limbs[:, column]) % np.uint64(buckets)
    return rest.astype(np.uint32)


def segment_sum(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Sums of values[first[i]:first[i+1]]; an empty segment gives 0."""
    total = np.zeros(len(first) - 1, values.dtype)
    filled = np.flatnonzero(first[:-1] < first[1:])
    if filled.size:
        total[filled] = np.add.reduceat(values, first[filled])
    return total


class Hasher:
    """Counts and weighs hashed n-grams; one instance a process, since its table is worth keeping.

    Args:
        n: longest n-gram, in words.
        buckets: number of buckets B, below 2^31.
        kind: `sha256` (the published features) or `fast`.
    """

    def __init__(self, n: int = 2, buckets: int = 10_000, kind: str = "sha256") -> None:
        self.n, self.buckets, self.kind = n, buckets, kind
        places = 1 << TABLE_BITS if kind == "sha256" else 1
        self._keys, self._found = np.zeros(places, np.uint64), np.zeros(places, np.uint32)
        self._keys[0] = np.uint64(1 << 63)

    def count(self, texts: Iterable[str]) -> np.ndarray:
        """int64[B]: how often each bucket occurs in all texts together."""
        total = np.zeros(self.buckets, np.int64)
        for batch in batches(pieces(texts, self.n)):
            for found, _ in self._orders(batch)[1]:
                total += np.bincount(found, minlength=self.buckets)
        return total

    def weigh(self, texts: list[str], log_diff: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """<log_diff, counts> as float64, words and n-grams as int64, of each text. `log_diff` is float64[B]."""
        score, words, grams = np.zeros(len(texts)), np.zeros(len(texts), np.int64), np.zeros(len(texts), np.int64)
        for batch in batches(pieces(texts, self.n)):
            document = np.array([piece.document for piece in batch])
            counted, orders = self._orders(batch)
            np.add.at(words, document, counted)
            for found, first in orders:
                np.add.at(score, document, segment_sum(log_diff[found], first))
                np.add.at(grams, document, np.diff(first))
        return score, words, grams

    def _orders(self, batch: list[Piece]) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
        """New words of each piece, and for each order 1..n the buckets of all pieces with the first index of each piece."""
        words = find_words([piece.text for piece in batch])
        size = np.diff(words.first)
        carried = np.array([piece.carried for piece in batch])
        owner = np.repeat(np.arange(len(batch)), size)
        place = np.arange(len(words.key)) - words.first[owner]
        orders, key = [], words.key
        for order in range(1, self.n + 1):
            if order > 1:
                key = mix(key[:-1] * _K + words.key[order - 1 :]) if len(key) else key
            skipped = np.where(carried > 0, self.n - order, 0)
            at = np.flatnonzero((place >= skipped[owner]) & (place + order <= size[owner]))
            first = np.searchsorted(at, words.first)
            orders.append((self._bucket(key[at], words, at, order), first))
        return size - carried, orders

    def _bucket(self, key: np.ndarray, words: Words, at: np.ndarray, order: int) -> np.ndarray:
        if self.kind == "fast":
            scaled: np.ndarray = (key >> np.uint64(32)) * np.uint64(self.buckets)
            return (scaled >> np.uint64(32)).astype(np.int64)
        place = key >> np.uint64(64 - TABLE_BITS)
        found: np.ndarray = self._found[place]
        missed = np.flatnonzero(self._keys[place] != key)
        if missed.size:
            _, example, inverse = np.unique(key[missed], return_index=True, return_inverse=True)
            new = sha_buckets(_spell(words, at[missed[example]], order), self.buckets)
            found[missed] = new[inverse]
            self._keys[place[missed]], self._found[place[missed]] = key[missed], found[missed]
        return found


def _spell(words: Words, at: np.ndarray, order: int) -> list[bytes]:
    """UTF-8 of the n-grams that begin at words `at`, their words joined by single spaces."""
    text = words.text
    if order == 1:
        return [text[a:b].encode("utf-8", "surrogatepass") for a, b in zip(words.start[at].tolist(), words.end[at].tolist(), strict=True)]
    columns = [zip(words.start[at + i].tolist(), words.end[at + i].tolist(), strict=True) for i in range(order)]
    return [" ".join([text[a:b] for a, b in spans]).encode("utf-8", "surrogatepass") for spans in zip(*columns, strict=True)]


@functools.cache
def shared_hasher(n: int, buckets: int, kind: str) -> Hasher:
    """This process's hasher for these features: fitting warms the table for scoring."""
    return Hasher(n, buckets, kind)

"""Sizes of deflate streams of pairs x + t, equal to zlib's to the byte, without making the streams.

zlib's greedy and lazy parses, its choice of stored, fixed or dynamic blocks and its length-limited Huffman codes are
followed step by step (formats: RFC 1951; behaviour: zlib 1.2.5 and later), but only bits are counted, and what depends on
x alone is done once for all t:

    parse x as far as no decision looks beyond its end  ->  mark = (position, open match, symbol counts, bits written)
    for each t: go on from the mark over the rest of x and t, count the bits of the last block, take back t's hash entries

so a pair costs a parse of t and one set of codes, where zlib compresses |x| + |t| bytes. Zlib's hash of three bytes, the
order of its chains and its limits (level's table below) are kept, since they decide which matches are found.

Texts of one pair may hold `LONGEST` bytes together: up to there zlib never moves its window. Forks of zlib (zlib-ng,
Intel's, Cloudflare's) parse differently; `agrees` tells whether this process's zlib is one.
"""

from __future__ import annotations

import functools
import zlib

import numpy as np

from data_pipelines.jit import jit

LONGEST = 65_536 - 262
"""Bytes of a pair, at most: beyond, zlib's window begins to move."""

_HASH = 1 << 15
_FARTHEST = 32_768 - 262
_TOO_FAR = 4096
_SYMBOLS = (1 << 14) - 1
_u = np.uint64  # an unsigned index is not tested for being negative
_LITERALS, _DISTANCES, _END = 286, 30, 256
_NODES = 2 * _LITERALS + 1

# level: a match this long quarters the chain; this long is not improved on; this long is good enough; candidates looked at
_LEVELS = {
    1: (4, 4, 8, 4), 2: (4, 5, 16, 8), 3: (4, 6, 32, 32), 4: (4, 4, 16, 16), 5: (8, 16, 32, 32),
    6: (8, 16, 128, 128), 7: (8, 32, 128, 256), 8: (32, 128, 258, 1024), 9: (32, 258, 258, 4096),
}  # fmt: skip
LEVELS = tuple(_LEVELS)

# places in a mark
_AT, _OPEN, _LENGTH, _START, _COUNT, _BITS, _BLOCK = range(7)


def _codes(extra: list[int], first: int, top: int) -> np.ndarray:
    """uint8 table: value - first -> code, for codes whose ranges have 2^extra values each."""
    table = np.repeat(np.arange(len(extra)), [1 << bits for bits in extra]).astype(np.uint8)
    return table[: top - first + 1]


_LENGTH_EXTRA = [0] * 8 + [bits for bits in range(1, 6) for _ in range(4)] + [0]
_DISTANCE_EXTRA = [0] * 4 + [bits for bits in range(1, 14) for _ in range(2)]
_LENGTH_CODE = np.append(_codes(_LENGTH_EXTRA[:-1], 3, 257), np.uint8(28))
_EVERY_DISTANCE = _codes(_DISTANCE_EXTRA, 1, 32_768)
_NEAR, _FAR = _EVERY_DISTANCE[:256].copy(), _EVERY_DISTANCE[::128].copy()
_EXTRA = np.array([*[0] * 257, *_LENGTH_EXTRA, *_DISTANCE_EXTRA], np.int64)
_FIXED = np.array([*[8] * 144, *[9] * 112, *[7] * 24, *[8] * 6, *[5] * 30], np.int64)
_HEADER_EXTRA = np.array([0] * 16 + [2, 3, 7], np.int64)
_NO_FIXED = np.zeros(19, np.int64)
_HEADER_ORDER = np.array([16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15], np.int64)


@jit
def _sift(heap: np.ndarray, size: int, at: int) -> None:
    """Puts heap[at] in its place; entries are (weight, depth) above ten bits of the node, which take no part in the order."""
    value = heap[_u(at)]
    child = at << 1
    while child <= size:
        if child < size and heap[_u(child + 1)] >> 10 <= heap[_u(child)] >> 10:
            child += 1
        if value >> 10 <= heap[_u(child)] >> 10:
            break
        heap[_u(at)] = heap[_u(child)]
        at = child
        child <<= 1
    heap[_u(at)] = value


@jit
def _code_lengths(
    freq: np.ndarray,
    extra: np.ndarray,
    fixed: np.ndarray,
    limit: int,
    length: np.ndarray,
    heap: np.ndarray,
    order: np.ndarray,
    up: np.ndarray,
) -> tuple[int, int, int]:
    """(bits under the best code, bits under the fixed code, highest symbol in use); writes each symbol's `length`."""
    symbols = len(freq)
    weight = order[_NODES + 1 :]
    size, top, best, plain = 0, -1, 0, 0
    for symbol in range(symbols):
        length[symbol] = 0
        weight[symbol] = freq[symbol]
        if freq[symbol]:
            size += 1
            top = symbol
            heap[size] = freq[symbol] << 18 | symbol
    while size < 2:
        symbol = 0
        if top < 2:
            top += 1
            symbol = top
        size += 1
        heap[size] = 1 << 18 | symbol
        weight[symbol] = 1
        best -= 1
        plain -= fixed[symbol]
    for at in range(size // 2, 0, -1):
        _sift(heap, size, at)
    node, last = symbols, _NODES
    while size >= 2:
        one = heap[1]
        heap[1] = heap[size]
        size -= 1
        _sift(heap, size, 1)
        two = heap[1]
        last -= 2
        order[last + 1], order[last] = one & 1023, two & 1023
        up[one & 1023] = up[two & 1023] = node
        weight[node] = weight[one & 1023] + weight[two & 1023]
        depth = max(one >> 10 & 255, two >> 10 & 255) + 1
        heap[1] = weight[node] << 18 | depth << 10 | node
        node += 1
        _sift(heap, size, 1)
    last -= 1
    order[last] = heap[1] & 1023
    more, flat = _tree_bits(extra, fixed, limit, length, order, last, up, top)
    return best + more, plain + flat, top


@jit
def _tree_bits(
    extra: np.ndarray, fixed: np.ndarray, limit: int, length: np.ndarray, order: np.ndarray, last: int, up: np.ndarray, top: int
) -> tuple[int, int]:
    """Lengths from the tree, none above `limit`, and the bits all symbols take under them and under the fixed code."""
    weight = order[_NODES + 1 :]
    per_length = np.zeros(17, np.int64)
    best = plain = over = 0
    length[order[last]] = 0
    for at in range(last + 1, _NODES):
        symbol = order[at]
        bits = length[up[symbol]] + 1
        if bits > limit:
            bits = limit
            over += 1
        length[symbol] = bits
        if symbol <= top:
            per_length[bits] += 1
            best += weight[symbol] * (bits + extra[symbol])
            plain += weight[symbol] * (fixed[symbol] + extra[symbol])
    if over == 0:
        return best, plain
    while over > 0:
        bits = limit - 1
        while per_length[bits] == 0:
            bits -= 1
        per_length[bits] -= 1
        per_length[bits + 1] += 2
        per_length[limit] -= 1
        over -= 2
    at = _NODES
    for bits in range(limit, 0, -1):
        left = per_length[bits]
        while left:
            at -= 1
            symbol = order[at]
            if symbol <= top:
                best += (bits - length[symbol]) * weight[symbol]
                length[symbol] = bits
                left -= 1
    return best, plain


@jit
def _count_runs(length: np.ndarray, top: int, freq: np.ndarray) -> None:
    """Adds to freq[19] the symbols that spell length[0..top] in a dynamic block's header."""
    before, following, count = -1, length[0], 0
    for symbol in range(top + 1):
        this = following
        following = length[symbol + 1] if symbol < top else -1
        count += 1
        if this == 0:
            most, least = 138, 3
        elif this == before:
            most, least = 6, 3
        else:
            most, least = 7, 4
        if count < most and this == following:
            continue
        if count < least:
            freq[this] += count
        elif this != 0:
            if this != before:
                freq[this] += 1
            freq[16] += 1
        elif count <= 10:
            freq[17] += 1
        else:
            freq[18] += 1
        count, before = 0, this


@jit
def _end_block(freq: np.ndarray, raw: int, bits: int, work: np.ndarray) -> int:
    """Bits of the stream after a block that says `raw` bytes by symbols of these counts, which are then set back."""
    length, heap, order, up = work[0], work[1], work[2], work[3]
    freq[_END] += 1
    literal = _code_lengths(freq[:_LITERALS], _EXTRA[:_LITERALS], _FIXED[:_LITERALS], 15, length, heap, order, up)
    header = np.zeros(19, np.int64)
    _count_runs(length, literal[2], header)
    distance = _code_lengths(freq[_LITERALS:], _EXTRA[_LITERALS:], _FIXED[_LITERALS:], 15, length, heap, order, up)
    _count_runs(length, distance[2], header)
    head = _code_lengths(header, _HEADER_EXTRA, _NO_FIXED, 7, length, heap, order, up)[0]
    used = 18
    while used >= 3 and length[_HEADER_ORDER[used]] == 0:
        used -= 1
    best = literal[0] + distance[0] + head + 3 * (used + 1) + 14
    fixed = literal[1] + distance[1]
    freq[:] = 0
    smallest = min((best + 10) >> 3, (fixed + 10) >> 3)
    if raw + 4 <= smallest:
        return (((bits + 3 + 7) >> 3) + 4 + raw) << 3
    return bits + 3 + (fixed if (fixed + 10) >> 3 == smallest else best)


@jit
def _insert(buf: np.ndarray, at: int, head: np.ndarray, before: np.ndarray) -> None:
    slot = (buf[_u(at)] << 10 ^ buf[_u(at + 1)] << 5 ^ buf[_u(at + 2)]) & (_HASH - 1)
    before[_u(at)] = head[_u(slot)]
    head[_u(slot)] = at


@jit
def _take_back(buf: np.ndarray, first: int, end: int, head: np.ndarray, before: np.ndarray) -> None:
    """Removes the positions first..end-1 from the hash table, whichever of them are in it."""
    for at in range(end - 1, first - 1, -1):
        slot = (buf[_u(at)] << 10 ^ buf[_u(at + 1)] << 5 ^ buf[_u(at + 2)]) & (_HASH - 1)
        if head[_u(slot)] == at:
            head[_u(slot)] = before[_u(at)]


@jit
def _longest(buf: np.ndarray, at: int, most: int, best: int, cur: int, before: np.ndarray, chain: int, nice: int) -> tuple[int, int]:
    """(length, start) of the first longest match of the bytes at `at` that is longer than `best`; start 0: there is none."""
    start = 0
    lowest = max(at - _FARTHEST, 0)
    nice = min(nice, most)
    if best >= most:
        return best, start
    while True:
        if buf[_u(cur + best)] == buf[_u(at + best)] and buf[_u(cur + best - 1)] == buf[_u(at + best - 1)] and buf[_u(cur)] == buf[_u(at)]:
            size = 1
            while size < most and buf[_u(cur + size)] == buf[_u(at + size)]:
                size += 1
            if size > best:
                best, start = size, cur
                if size >= nice:
                    break
        cur = int(before[_u(cur)])
        chain -= 1
        if cur <= lowest or chain == 0:
            break
    return best, start


@jit
def _tally(freq: np.ndarray, size: int, distance: int) -> None:
    freq[257 + _LENGTH_CODE[size - 3]] += 1
    distance -= 1
    freq[_LITERALS + (_NEAR[distance] if distance < 256 else _FAR[distance >> 7])] += 1


@jit
def _lazy(
    buf: np.ndarray, end: int, whole: bool, mark: np.ndarray, freq: np.ndarray, head: np.ndarray, before: np.ndarray,
    work: np.ndarray, good: int, lazy: int, nice: int, chain: int,
) -> None:  # fmt: skip
    """Levels 4 to 9: a match is taken only if the next position has no longer one.

    Goes from the mark to `end`; unless `whole`, stops before the first step that would look at bytes from `end` on.
    """
    at, is_open, size, start = mark[_AT], mark[_OPEN], mark[_LENGTH], mark[_START]
    count, bits, block = mark[_COUNT], mark[_BITS], mark[_BLOCK]
    while at < end:
        left = end - at
        if left < 3 and not whole:
            break
        old, old_start = size, start
        now, now_start = 2, start
        if left >= 3:
            cur = head[(buf[_u(at)] << 10 ^ buf[_u(at + 1)] << 5 ^ buf[_u(at + 2)]) & (_HASH - 1)]
            if cur != 0 and old < lazy and at - cur <= _FARTHEST:
                most = min(left, 258)
                now, found = _longest(buf, at, most, old, cur, before, chain >> 2 if old >= good else chain, nice)
                if not whole and now >= left:
                    break
                if found:
                    now_start = found
                now = min(now, left)
                if now == 3 and at - now_start > _TOO_FAR:
                    now = 2
        if old >= 3 and now <= old:
            stop = at - 1 + old
            if not whole and stop + 2 > end:
                break
            _tally(freq, old, at - 1 - old_start)
            for place in range(at, min(stop, end - 2)):
                _insert(buf, place, head, before)
            count += 1
            at, is_open, size, start = stop, 0, 2, now_start
            if count == _SYMBOLS:
                bits = _end_block(freq, at - block, bits, work)
                count, block = 0, at
        else:
            if left >= 3:
                _insert(buf, at, head, before)
            if is_open:
                freq[buf[at - 1]] += 1
                count += 1
                if count == _SYMBOLS:
                    bits = _end_block(freq, at - block, bits, work)
                    count, block = 0, at
            is_open, size, start = 1, now, now_start
            at += 1
    if whole and is_open:
        freq[buf[at - 1]] += 1
    mark[_AT], mark[_OPEN], mark[_LENGTH], mark[_START] = at, is_open, size, start
    mark[_COUNT], mark[_BITS], mark[_BLOCK] = count, bits, block


@jit
def _greedy(
    buf: np.ndarray, end: int, whole: bool, mark: np.ndarray, freq: np.ndarray, head: np.ndarray, before: np.ndarray,
    work: np.ndarray, lazy: int, nice: int, chain: int,
) -> None:  # fmt: skip
    """Levels 1 to 3: every match is taken; as `_lazy` otherwise."""
    at, count, bits, block = mark[_AT], mark[_COUNT], mark[_BITS], mark[_BLOCK]
    while at < end:
        left = end - at
        if left < 3 and not whole:
            break
        size = start = 0
        if left >= 3:
            cur = head[(buf[_u(at)] << 10 ^ buf[_u(at + 1)] << 5 ^ buf[_u(at + 2)]) & (_HASH - 1)]
            if cur != 0 and at - cur <= _FARTHEST:
                size, start = _longest(buf, at, min(left, 258), 2, cur, before, chain, nice)
                if not whole and size + 3 > left:
                    break
            _insert(buf, at, head, before)
        if start:
            _tally(freq, size, at - start)
            if size <= lazy and left - size >= 3:
                for place in range(at + 1, at + size):
                    _insert(buf, place, head, before)
            at += size
        else:
            freq[buf[at]] += 1
            at += 1
        count += 1
        if count == _SYMBOLS:
            bits = _end_block(freq, at - block, bits, work)
            count, block = 0, at
    mark[_AT], mark[_COUNT], mark[_BITS], mark[_BLOCK] = at, count, bits, block


@jit
def _pairs(
    first: np.ndarray, data: np.ndarray, offsets: np.ndarray, buf: np.ndarray, head: np.ndarray, before: np.ndarray,
    work: np.ndarray, level: np.ndarray, out: np.ndarray,
) -> None:  # fmt: skip
    """out[j] = bytes of the deflate stream of first + data[offsets[j]:offsets[j + 1]]; `head` is all zero, before and after."""
    good, lazy, nice, chain = level[1], level[2], level[3], level[4]
    freq, kept = np.zeros(_LITERALS + _DISTANCES, np.int64), np.zeros(_LITERALS + _DISTANCES, np.int64)
    mark, here = np.zeros(7, np.int64), np.zeros(7, np.int64)
    mark[_LENGTH] = 2
    buf[: len(first)] = first
    for second in range(-1, len(out)):
        whole = second >= 0
        end = len(first)
        if whole:
            piece = data[offsets[second] : offsets[second + 1]]
            buf[end : end + len(piece)] = piece
            end += len(piece)
        here[:] = mark
        freq[:] = kept
        if level[0] >= 4:
            _lazy(buf, end, whole, here, freq, head, before, work, good, lazy, nice, chain)
        else:
            _greedy(buf, end, whole, here, freq, head, before, work, lazy, nice, chain)
        if whole:
            out[second] = (_end_block(freq, end - here[_BLOCK], here[_BITS], work) + 7) >> 3
            _take_back(buf, mark[_AT], end - 2, head, before)
        else:
            mark[:] = here
            kept[:] = freq
    _take_back(buf, 0, min(mark[_AT], len(first) - 2), head, before)


class PairSizer:
    """Deflate sizes of pairs at one level; holds 0.3 MB of tables and is for one thread at a time.

    Args:
        level: 1 to 9, as zlib's.
    """

    def __init__(self, level: int) -> None:
        self._level = np.array([level, *_LEVELS[level]], np.int64)
        self._buf = np.zeros(LONGEST + 16, np.uint8)
        self._head, self._before = np.zeros(_HASH, np.uint16), np.zeros(LONGEST + 8, np.uint16)
        self._work = np.zeros((4, 2 * _NODES + 2), np.int64)

    def sizes(self, first: np.ndarray, data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """int64[n]: bytes of raw deflate of `first` + each of n texts.

        Args:
            first: uint8[m].
            data, offsets: uint8 and int64[n + 1]; text j is data[offsets[j]:offsets[j + 1]]. No pair is over `LONGEST`.
        """
        out = np.zeros(len(offsets) - 1, np.int64)
        _pairs(first, data, offsets, self._buf, self._head, self._before, self._work, self._level, out)
        return out


_WORDS = (
    b"the quick brown foxes jumped over lazy dogs while compression distances between similar documents remained smaller than "
    b"those of unrelated paragraphs, which is why shorter codes suffice; def function(argument): return argument + 1 # comment "
)


@functools.cache
def probes() -> tuple[bytes, ...]:
    """Fixed texts that tell compressors apart: words, bytes without structure, runs, and more symbols than one block holds."""
    numbers = np.arange(1, 60_001, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    numbers ^= numbers >> np.uint64(29)
    drawn = (numbers * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(40)).astype(np.int64)
    text = b"".join(_WORDS[i : i + 3 + i % 11] for i in (drawn[:3000] ** 2 % 7919 % len(_WORDS)).tolist())
    noise = (drawn[:4000] & 255).astype(np.uint8).tobytes()
    few = (drawn[:40_000] & 15).astype(np.uint8).tobytes()
    runs = b"".join(bytes([int(i) & 3]) * (int(i) >> 5 & 511) for i in drawn[:60])
    return text, noise, few, runs, _WORDS


@functools.cache
def agrees(level: int) -> bool:
    """Whether this process's zlib gives the sizes that `PairSizer` counts, on pairs of `probes`, whole and in part."""
    sizer, texts = PairSizer(level), probes()
    seconds = [b"", b"ab", *(text[:size] for text in texts for size in (700, 9000))]
    offsets = np.cumsum([0, *map(len, seconds)])
    data = np.frombuffer(b"".join(seconds), np.uint8)
    for text in texts:
        counted = sizer.sizes(np.frombuffer(text[: LONGEST - 9000], np.uint8), data, offsets)
        if counted.tolist() != [len(zlib.compress(text[: LONGEST - 9000] + second, level)) - 6 for second in seconds]:
            return False
    return True

"""Random projections of long vectors, generated as they are used: nothing of size (coordinates x dim) is ever stored.

Coordinate i of a vector goes to R x with R a pure function of (seed, i), so a projection is the same in every batch,
process and machine, and can be added up from pieces of x in any cut. E |R x|^2 = |x|^2 for every x, and inner products
are kept likewise, with a relative spread of about sqrt(2 / dim) (Johnson-Lindenstrauss).

    rademacher   R = signs / sqrt(dim), every entry an independent sign: TRAK's and TAROT's projection. dim operations a coordinate.
    sparse       each coordinate goes to `nonzeros` places with independent signs / sqrt(nonzeros) (count sketch; Charikar et al.
                 2002, Kane & Nelson 2014). `nonzeros` operations a coordinate.

The places of `sparse`: block b of dim neighbouring coordinates is laid on the dim outputs turned round by a random r_b,
j -> (j + r_b) mod dim. Two coordinates meet with probability 1/dim, those of one block never, and signs are independent, so
the variance of |R x|^2 is at most that of independent places; but memory is read and written in order, and the sum over
blocks needs no atomic operation, so a GPU gives the same bits every time. Sums are taken in float64.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, Literal

import numpy as np

from data_pipelines.jit import inlined, jit
from posttrain.errors import NumericsError

Kind = Literal["sparse", "rademacher"]
CHUNK = 1 << 22
"""Coordinates of one row that a GPU works on at a time."""

_GOLDEN = 0x9E3779B97F4A7C15
_M1, _M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Projector:
    """Projects vectors of `size` coordinates to `dim`, piece by piece.

        sums = projector.zeros(n)
        projector.add(sums, x[:, :1000], 0)
        projector.add(sums, x[:, 1000:], 1000)
        projector.finish(sums)                      # float32[n, dim]

    Args:
        size: coordinates of a vector.
        dim: coordinates of its projection.
        kind: see the module docstring.
        seed: of the random matrix.
        nonzeros: places of a coordinate under `sparse`.
        checked: compare norms before and after on a few vectors first.

    Raises:
        NumericsError: the projection does not keep norms.
    """

    def __init__(self, size: int, dim: int, kind: Kind = "sparse", seed: int = 0, nonzeros: int = 4, checked: bool = True) -> None:
        self.size, self.dim, self.kind = size, dim, kind
        self.salts = np.array([_salt(seed, kind, k) for k in range(nonzeros if kind == "sparse" else 1)], np.uint64)
        self._turns = _block_turns(self.salts, -(-size // dim), dim) if kind == "sparse" else None
        self._on_device: dict[str, Any] = {}
        if checked:
            self.check()

    def zeros(self, rows: int, device: Any = None) -> Any:
        """float64[rows, nonzeros or 1, dim] to add to: numpy, or torch on `device`."""
        shape = (rows, len(self.salts), self.dim)
        if device is None:
            return np.zeros(shape)
        import torch

        return torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, sums: Any, values: Any, offset: int) -> None:
        """Adds coordinates offset .. offset + m of each row, `values` [n, m], numpy or torch as `sums` are."""
        if offset + values.shape[1] > self.size:
            raise ValueError(f"coordinates up to {offset + values.shape[1]} of {self.size}")
        if not isinstance(values, np.ndarray):
            for start in range(0, values.shape[1], CHUNK):
                self._add_torch(sums, values[:, start : start + CHUNK], offset + start)
        elif self._turns is None:
            _add_dense(values, offset, self.salts[0], sums[:, 0])
        else:
            _add_sparse(values, offset, self.salts, self._turns, sums)

    def finish(self, sums: Any) -> np.ndarray:
        """float32[rows, dim] from the sums."""
        total = sums if isinstance(sums, np.ndarray) else sums.cpu().numpy()
        places = self.dim if self._turns is None else len(self.salts)
        out: np.ndarray = (total.sum(1) / math.sqrt(places)).astype(np.float32)
        return out

    def project(self, values: np.ndarray) -> np.ndarray:
        """float32[n, dim] of whole rows `values` [n, size]."""
        sums = self.zeros(len(values))
        self.add(sums, values, 0)
        return self.finish(sums)

    def matrix(self) -> np.ndarray:
        """R, float64[dim, size], written out entry by entry; for tests and small sizes."""
        out = np.zeros((self.dim, self.size))
        for i in range(self.size):
            if self._turns is None:
                out[:, i] = [_sign(self.salts[0], i * -(-self.dim // 64) * 64 + p) / math.sqrt(self.dim) for p in range(self.dim)]
                continue
            for k, salt in enumerate(self.salts):
                block, j = divmod(i, self.dim)
                place = (j + int(self._turns[k, block])) % self.dim
                out[place, i] += _sign(salt, i) / math.sqrt(len(self.salts))
        return out

    def check(self) -> None:
        """Raises NumericsError unless eight random vectors keep their mean squared norm within six standard deviations."""
        m = min(self.size, 1 << 14)
        rng = np.random.default_rng(0)
        squared = []
        for offset in (0, self.size - m):
            values = rng.standard_normal((4, m)).astype(np.float32)
            sums = self.zeros(4)
            self.add(sums, values, offset)
            squared += list((self.finish(sums).astype(float) ** 2).sum(1) / (values.astype(float) ** 2).sum(1))
        allowed = 6 * math.sqrt(2 / self.dim / len(squared))
        if not abs(np.mean(squared) - 1) <= allowed:
            raise NumericsError(
                f"the projection does not keep norms: {np.mean(squared):.4g} of the squared norm is left, expected 1 +- {allowed:.3g}",
                fix="report this with the versions of numba, numpy and torch",
            )

    def _add_torch(self, sums: Any, values: Any, offset: int) -> None:
        import torch

        n, m = values.shape
        index = torch.arange(offset, offset + m, device=values.device)
        if self._turns is None:
            words = -(-self.dim // 64)
            for start in range(0, m, step := max(1, CHUNK // self.dim)):
                part = index[start : start + step]
                first = part[:, None] * (words * 64) + torch.arange(self.dim, device=values.device)
                signs = _torch_signs(int(self.salts[0]), first)
                sums[:, 0] += values[:, start : start + step].double() @ signs.double()
            return
        lead = offset % self.dim
        blocks = -(-(lead + m) // self.dim)
        for k, salt in enumerate(self.salts):
            signed = torch.zeros(n, blocks * self.dim, dtype=values.dtype, device=values.device)
            signed[:, lead : lead + m] = values * _torch_signs(int(salt), index)
            turns = self._turns_on(values.device)[k, offset // self.dim : offset // self.dim + blocks]
            source = (torch.arange(self.dim, device=values.device)[None] - turns[:, None]) % self.dim
            moved = signed.view(n, blocks, self.dim).gather(2, source.expand(n, blocks, self.dim))
            sums[:, k] += moved.sum(1, dtype=torch.float64)

    def _turns_on(self, device: Any) -> Any:
        import torch

        if str(device) not in self._on_device:
            self._on_device[str(device)] = torch.as_tensor(self._turns, dtype=torch.int64, device=device)
        return self._on_device[str(device)]


def _salt(seed: int, kind: str, k: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"projection:{kind}:{seed}:{k}".encode(), digest_size=8).digest(), "little")


@inlined
def _mix(x: Any) -> Any:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_M1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_M2)
    return x ^ (x >> np.uint64(31))


@inlined
def _bits(salt: Any, word: Any) -> Any:
    """64 random bits, the signs of entries 64 word .. 64 word + 63."""
    return _mix((np.uint64(word) + np.uint64(1)) * np.uint64(_GOLDEN) ^ salt)


@jit
def _sign(salt: Any, entry: Any) -> Any:
    """+1 or -1, a pure function of salt and entry."""
    return 1.0 if (_bits(salt, entry >> 6) >> np.uint64(entry & 63)) & np.uint64(1) else -1.0


@jit
def _block_turns(salts: Any, blocks: int, dim: int) -> Any:
    """r_b, int32[nonzeros, blocks]."""
    turns = np.empty((len(salts), blocks), np.int32)
    for k in range(len(salts)):
        for b in range(blocks):
            turns[k, b] = (_mix(_bits(salts[k], b) ^ np.uint64(_GOLDEN)) >> np.uint64(32)) % np.uint64(dim)
    return turns


@jit
def _add_sparse(values: Any, offset: int, salts: Any, turns: Any, sums: Any) -> None:
    """Every sums[row, k, place] takes one number a block, in block order, however the coordinates are cut."""
    rows, m = values.shape
    dim = sums.shape[2]
    for k in range(len(salts)):
        i = offset
        while i < offset + m:
            block, j = i // dim, i % dim
            place = (j + turns[k, block]) % dim
            run = min(offset + m - i, dim - j, dim - place, 64 - (i & 63))
            bits = _bits(salts[k], i >> 6) >> np.uint64(i & 63)
            for row in range(rows):
                for t in range(run):
                    value = np.float64(values[row, i - offset + t])
                    sums[row, k, place + t] += value if (bits >> np.uint64(t)) & np.uint64(1) else -value
            i += run


@jit
def _add_dense(values: Any, offset: int, salt: Any, sums: Any) -> None:
    rows, m = values.shape
    dim = sums.shape[1]
    words = (dim + 63) // 64
    signs = np.empty(words * 64)
    for i in range(m):
        for word in range(words):
            bits = _bits(salt, (offset + i) * words + word)
            for j in range(64):
                signs[word * 64 + j] = 1.0 if (bits >> np.uint64(j)) & np.uint64(1) else -1.0
        for row in range(rows):
            value = np.float64(values[row, i])
            for p in range(dim):
                sums[row, p] += value * signs[p]


def _torch_signs(salt: int, entry: Any) -> Any:
    """float32 signs of int64 entries, the same as `_sign`."""
    import torch

    def signed(value: int) -> int:
        return value - (1 << 64) if value >= 1 << 63 else value

    def shifted(x: Any, by: int) -> Any:
        return (x >> by) & ((1 << (64 - by)) - 1)

    x = (((entry >> 6) + 1) * signed(_GOLDEN)) ^ signed(salt)
    x = (x ^ shifted(x, 30)) * signed(_M1)
    x = (x ^ shifted(x, 27)) * signed(_M2)
    x = x ^ shifted(x, 31)
    return ((((x >> (entry & 63)) & 1) * 2) - 1).to(torch.float32)

"""Whole-tensor maxima and norms of gradients, also of those split over processes, and changes to them in place.

Gradients on a CPU are read in pieces: a clip touches only those with a large entry, in cache, and their squares are summed in
double precision (torch's float32 norm of 67 million entries is 0.7 % off). On a GPU all tensors go through one kernel.
Each statistic reaches the host in one copy.

A DTensor's statistic is that of the whole tensor: the local parts' maxima or sums of squares are reduced over the mesh
dimensions along which the tensor is split, all tensors of a mesh in one collective.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from posttrain.errors import ConfigError

PIECE, LONG_PIECE = 1 << 16, 1 << 18
"""Entries, for each thread, of a piece that may be clipped, and of one that is only read."""
NARROW = (torch.bfloat16, torch.float16)


class Gradient:
    """A gradient whose statistics are those of the whole tensor and whose entries are changed in place.

    Args:
        parameter: whose `grad` it is, dense; a DTensor may be split over or repeated on its mesh.

    Raises:
        ConfigError: it is sparse or complex, holds partial sums, or belongs to a flat shard of FSDP's first version.
    """

    def __init__(self, parameter: torch.Tensor) -> None:
        tensor = parameter.grad
        assert tensor is not None
        _check(parameter, tensor)
        self.mesh: tuple[Any, tuple[int, ...]] | None = None
        if isinstance(tensor, DTensor):
            split = tuple(i for i, placement in enumerate(tensor.placements) if placement.is_shard())
            self.mesh = (tensor.device_mesh, split) if split else None
            tensor = tensor.to_local()
        self.local = tensor
        self.pieces = _pieces(tensor, PIECE)
        self.peaks: list[float] = []

    def clip(self, threshold: float, factor: float) -> None:
        """g_i <- factor g_i where |g_i| > threshold; `maxima` came before. Rounded once, or in the short form about once."""
        bound = _at_most(threshold, self.local.dtype)
        for piece, peak in zip(self.pieces, self.peaks, strict=True):
            if peak > threshold:
                large = torch.nn.functional.hardshrink(piece, bound)
                if factor >= 0.5 and self.local.dtype not in NARROW:
                    piece.add_(large, alpha=factor - 1)
                else:
                    piece.sub_(large).add_(large.mul_(factor))


def _check(parameter: torch.Tensor, gradient: torch.Tensor) -> None:
    if gradient.layout != torch.strided:
        raise ConfigError(
            f"stable_spam needs dense gradients, one is {gradient.layout}",
            where="optim.name",
            fix="make the embedding with sparse=False",
        )
    if gradient.is_complex():
        raise ConfigError(
            "stable_spam does not take complex parameters", where="optim.name", fix="train their real and imaginary parts as two tensors"
        )
    if getattr(parameter, "_fsdp_flattened", False):
        raise ConfigError(
            "stable_spam needs whole tensors; FSDP version 1 gives it flat shards of several",
            where="optim.name",
            fix="use fsdp_version: 2, or optim.name: adamw",
        )
    if isinstance(gradient, DTensor) and any(placement.is_partial() for placement in gradient.placements):
        raise ConfigError(
            f"stable_spam needs summed gradients, one has the placements {gradient.placements}",
            where="optim.name",
            fix="redistribute gradients before the step",
        )


def _pieces(tensor: torch.Tensor, length: int) -> Sequence[torch.Tensor]:
    if not tensor.numel():
        return ()
    length *= torch.get_num_threads()
    if tensor.numel() <= length or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return (tensor,)
    return torch.split(tensor.view(-1), length)


def _at_most(value: float, dtype: torch.dtype) -> float:
    """The largest number of `dtype` that is not above `value`, so that no entry is rounded across the threshold."""
    found = torch.tensor(value, dtype=dtype)
    return float(found if float(found) <= value else torch.nextafter(found, torch.zeros((), dtype=dtype)))


def maxima(gradients: Sequence[Gradient]) -> list[float]:
    """max |g_i| of each whole tensor, infinity where an entry is not finite; 0 for an empty one."""
    found = iter(_read([piece for g in gradients for piece in g.pieces], _peaks))
    for gradient in gradients:
        gradient.peaks = [math.inf if math.isnan(peak := next(found)) else peak for _ in gradient.pieces]
    return _reduced([max(g.peaks, default=0.0) for g in gradients], gradients, dist.ReduceOp.MAX)


def norms(gradients: Sequence[Gradient]) -> list[float]:
    """||g||_2 of each whole tensor; infinity or NaN where an entry is not finite."""
    pieces = [_pieces(g.local, LONG_PIECE) for g in gradients]
    found = iter(_read([piece for several in pieces for piece in several], _norms))
    squares = [math.fsum((size := next(found)) * size for _ in several) for several in pieces]
    return [math.sqrt(square) for square in _reduced(squares, gradients, dist.ReduceOp.SUM)]


def scale(gradients: Sequence[Gradient], factors: Sequence[float]) -> None:
    """g <- factor g, each by its own."""
    whole = [(g.local, factor) for g, factor in zip(gradients, factors, strict=True) if g.local.numel()]
    if whole:
        torch._foreach_mul_([tensor for tensor, _ in whole], [factor for _, factor in whole])


def _peaks(pieces: list[torch.Tensor]) -> torch.Tensor:
    if pieces[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(pieces, math.inf))
    ends = torch.stack([end for piece in pieces for end in torch.aminmax(piece)])
    return ends.abs_().view(-1, 2).amax(1)


def _norms(pieces: list[torch.Tensor]) -> torch.Tensor:
    wide = torch.float32 if pieces[0].dtype in NARROW else None
    return torch.stack(torch._foreach_norm(pieces, 2, dtype=wide))


def _read(pieces: Sequence[torch.Tensor], statistic: Callable[[list[torch.Tensor]], torch.Tensor]) -> list[float]:
    """One number a piece, in order; a call for each device and dtype."""
    places: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for place, piece in enumerate(pieces):
        places[piece.device, piece.dtype].append(place)
    found = [0.0] * len(pieces)
    for chosen in places.values():
        for i, value in zip(chosen, statistic([pieces[i] for i in chosen]).tolist(), strict=True):
            found[i] = value
    return found


def _reduced(values: list[float], gradients: Sequence[Gradient], operation: Any) -> list[float]:
    """The local values of split tensors reduced over their processes; in the order of the parameters on every process."""
    places: dict[tuple[Any, tuple[int, ...]], list[int]] = defaultdict(list)
    for place, gradient in enumerate(gradients):
        if gradient.mesh is not None:
            places[gradient.mesh].append(place)
    for (mesh, dimensions), chosen in places.items():
        shared = torch.tensor([values[i] for i in chosen], dtype=torch.float64, device=mesh.device_type)
        for dimension in dimensions:
            dist.all_reduce(shared, op=operation, group=mesh.get_group(dimension))
        for i, value in zip(chosen, shared.tolist(), strict=True):
            values[i] = value
    return values

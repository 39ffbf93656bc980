"""Layer by layer through a block, in the order in which the layers run: each group of layers that share an input is fitted to
the inputs that the already quantized layers before it give, and judged on the held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from posttrain.core.hashing import digest_of
from posttrain.quant.base import quantize_rtn
from posttrain.quant.closed_form import Fitted, Grid, closed_form, gptq
from posttrain.quant.experts import fit_experts
from posttrain.quant.fake import Clip
from posttrain.quant.grams import Moments
from posttrain.quant.job import Job
from posttrain.quant.layers import Layer
from posttrain.quant.loftq import loftq

Candidate = Callable[[Tensor, Moments, Moments, Grid, int, str], Fitted]


def _rtn(weight: Tensor, train: Moments, held: Moments, grid: Grid, rank: int, name: str) -> Fitted:
    return Fitted(quantize_rtn(weight, grid.bits, grid.group_size, grid.symmetric, mse=grid.mse, scale_dtype=grid.scale_dtype, name=name))


def _gptq(weight: Tensor, train: Moments, held: Moments, grid: Grid, rank: int, name: str) -> Fitted:
    return Fitted(gptq(weight, train.gram, grid, name=name))


def _closed_form(weight: Tensor, train: Moments, held: Moments, grid: Grid, rank: int, name: str) -> Fitted:
    return closed_form(weight, train, held, grid, rank=rank, name=name)


def _loftq(weight: Tensor, train: Moments, held: Moments, grid: Grid, rank: int, name: str) -> Fitted:
    return loftq(weight, grid, rank, name=name)


def _zero(weight: Tensor, train: Moments, held: Moments, grid: Grid, rank: int, name: str) -> Fitted:
    """ApiQ's start: the quantizer at sigmoid(4) of each range, A as peft draws it, B zero."""
    q = Clip(weight, grid).quantized()
    if not rank:
        return Fitted(q)
    out, columns = weight.shape
    generator = torch.Generator().manual_seed(int(digest_of(name)[:8], 16))
    a = (torch.rand(rank, columns, generator=generator) * 2 - 1) / columns**0.5
    return Fitted(q, a.to(weight.device), torch.zeros(out, rank, device=weight.device))


CANDIDATES: dict[str, Candidate] = {
    "zero": _zero,
    "rtn": _rtn,
    "gptq": _gptq,
    "closed_form": _closed_form,
    "loftq": _loftq,
}


def fit_layers(job: Job, methods: Sequence[str], more: Mapping[str, Candidate] | None = None) -> None:
    """Fits every layer of a block by each method and keeps the one of least held-out error.

    The report of a layer gets `method`, `how`, `error_train`, `error_held` and, where several methods were tried, `tried`:
    held-out error of each.

    Args:
        job: the block.
        methods: names in CANDIDATES or `more`.
        more: further candidates.
    """
    known = {**CANDIDATES, **(more or {})}

    def fit(layer: Layer, train: Moments, held: Moments, rank: int) -> None:
        weight, grid = job.weights[layer.name], job.grids[layer.name]
        tried: list[tuple[float, str, Fitted]] = []
        for method in methods:
            found = known[method](weight, train, held, grid, rank, layer.name)
            tried.append((held.error(layer.name, weight, found.effective()), method, found))
        error, method, found = min(tried, key=lambda item: item[0])
        job.put(layer, found)
        row: dict[str, Any] = {"method": method, "how": found.how, "error_held": error}
        row["error_train"] = train.error(layer.name, weight, found.effective())
        if len(tried) > 1:
            row["tried"] = {name: value for value, name, _ in tried}
        job.rows.setdefault(layer.name, {}).update(row)

    for group in job.groups():
        train, held = job.moments(group)
        for layer in group:
            fit(layer, train, held, job.ranks[layer.name])
    fit_experts(job, lambda layer, train, held: fit(layer, train, held, 0))

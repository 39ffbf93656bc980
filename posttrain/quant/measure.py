"""What each layer of a float model would lose at each width, and what that costs the loss.

An output error e of a layer raises the expected loss by about (1/2) e^T F e, F the Fisher matrix of the layer's outputs. With F
replaced by its mean diagonal, a layer whose outputs have energy E a token and squared gradients g2 a token (summed over out
outputs) costs

    (1/2) (g2 / out) E r        nats a token,   r = relative output error on held-out tokens,

so that errors of different layers are measured in one unit. Gradients come from a few backward passes of the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.core.events import Events
from posttrain.quant.base import dequantize
from posttrain.quant.blocks import Blocks
from posttrain.quant.calibration import Windows
from posttrain.quant.closed_form import Grid, low_rank
from posttrain.quant.layers import Layer, input_groups, linear_layers, watch
from posttrain.quant.obq import output_error, quantize_gptq
from posttrain.quant.states import batches

DAMP = 0.1


@dataclass(frozen=True)
class Kind:
    """How a layer may be stored."""

    bits: int
    group_size: int
    symmetric: bool
    rank: int


def sensitivities(blocks: Blocks, windows: Windows, names: set[str], count: int, events: Events) -> dict[str, float]:
    """Layer name -> (1/2) g2 / out, per token: what a unit of squared output error a token costs in nats a token.

    Args:
        blocks: of a float model that is whole in memory.
        windows: calibration; the first `count` fitted ones are used.
        names: layers to look at.
        count: windows.
        events: progress.
    """
    layers = [layer for layer in linear_layers(blocks.model) if layer.name in names]
    sums = dict.fromkeys((layer.name for layer in layers), 0.0)

    def watching(layer: Layer) -> Any:
        def seen(module: Any, args: Any, output: Tensor) -> None:
            output.register_hook(lambda grad: sums.__setitem__(layer.name, sums[layer.name] + float(grad.double().square().sum())))

        return seen

    handles = [layer.module.register_forward_hook(watching(layer)) for layer in layers]
    wanted = {name: parameter.requires_grad for name, parameter in blocks.model.named_parameters()}
    blocks.model.requires_grad_(False)
    embeddings = blocks.model.get_input_embeddings()
    grow = embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
    count = min(count, windows.train)
    tokens = 0
    for row in range(count):
        ids = windows.ids[row : row + 1].to(blocks.device)
        with torch.enable_grad():
            loss = blocks.model(input_ids=ids, labels=ids, use_cache=False).loss * (ids.shape[1] - 1)
        loss.backward()
        tokens += ids.shape[1]
        events.progress("sensitivity", row + 1, count, unit="window")
    for handle in (*handles, grow):
        handle.remove()
    for name, parameter in blocks.model.named_parameters():
        parameter.requires_grad_(wanted[name])
    return {layer.name: 0.5 * sums[layer.name] / tokens / layer.shape[0] for layer in layers}


@torch.no_grad()
def losses(
    blocks: Blocks, windows: Windows, names: set[str], kinds: Mapping[str, Sequence[Kind]], costs: Mapping[str, float], batch: int,
    dtype: torch.dtype, events: Events,
) -> Iterator[tuple[str, dict[Kind, tuple[float, float]]]]:  # fmt: skip
    """(layer name, kind -> (relative error on held-out tokens, expected loss in nats a token)), block after block.

    Args:
        blocks: of the float model.
        windows: calibration.
        names: layers to look at.
        kinds: layer name -> kinds to try.
        costs: from `sensitivities`.
        batch: windows at a time.
        dtype: type of scales.
        events: progress.
    """
    hidden = torch.cat([blocks.embed(windows.ids[low:high]) for low, high in batches(0, len(windows.ids), batch)])
    for index in range(len(blocks)):
        with blocks.open(index) as block:
            layers = [layer for layer in linear_layers(block, blocks.name(index)) if layer.name in names]
            if layers:
                grams = _grams(blocks, index, block, layers, hidden, windows.train, batch)
            else:
                for low, high in batches(0, len(hidden), batch):
                    hidden[low:high] = blocks.run(index, block, hidden[low:high])
                continue
            for layer in layers:
                train, held = grams[layer.name]
                yield layer.name, _errors(layer, train, held, kinds[layer.name], costs[layer.name], _tokens(windows), dtype)
        events.progress("measure", index + 1, len(blocks), unit="block")


def _tokens(windows: Windows) -> int:
    return (len(windows.ids) - windows.train) * windows.ids.shape[1]


def _errors(
    layer: Layer, train: Tensor, held: Tensor, kinds: Sequence[Kind], cost: float, tokens: int, dtype: torch.dtype
) -> dict[Kind, tuple[float, float]]:
    weight = layer.weight.float()
    train, held = train.to(weight.device), held.to(weight.device)
    energy = float(((weight.double() @ held) * weight.double()).sum())
    found: dict[Kind, tuple[float, float]] = {}
    for grid in dict.fromkeys(Grid(kind.bits, kind.group_size, kind.symmetric, True, dtype) for kind in kinds):
        q = quantize_gptq(weight, train, grid.bits, grid.group_size, grid.symmetric, damp=DAMP, scale_dtype=dtype, name=layer.name)
        left = weight - dequantize(q)
        ranks = sorted(kind.rank for kind in kinds if kind == Kind(grid.bits, grid.group_size, grid.symmetric, kind.rank))
        a, b = low_rank(left, train, ranks[-1]) if ranks[-1] else (None, None)
        for rank in ranks:
            rest = left if not rank or a is None or b is None else left - b[:, :rank] @ a[:rank]
            error = output_error(rest, torch.zeros_like(rest), held)
            share = error / max(energy, 1e-30)
            found[Kind(grid.bits, grid.group_size, grid.symmetric, rank)] = (share, cost * error / tokens)
    return found


def _grams(
    blocks: Blocks, index: int, block: Any, layers: list[Layer], hidden: Tensor, train: int, batch: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name -> Gram matrices of its inputs on fitted and on held-out rows; `hidden` becomes the block's output."""
    groups = input_groups(layers, lambda: blocks.run(index, block, hidden[:1]))
    grams = {
        group[0].inner: tuple(torch.zeros(group[0].shape[1], group[0].shape[1], dtype=torch.float64) for _ in range(2)) for group in groups
    }

    def seen(layer: Layer, x: Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1]).float()
        grams[layer.inner][part].add_((flat.T @ flat).cpu())

    with watch([group[0] for group in groups], seen):
        for part in range(2):
            start, end = ((0, train), (train, len(hidden)))[part]
            for low, high in batches(start, end, batch):
                hidden[low:high] = blocks.run(index, block, hidden[low:high])
    return {layer.name: (grams[group[0].inner][0], grams[group[0].inner][1]) for group in groups for layer in group}

"""One block to be fitted: its float and its quantized version, and the states that enter both."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.quant.blocks import Blocks
from posttrain.quant.closed_form import Fitted, Grid
from posttrain.quant.experts import Routed, check_formula
from posttrain.quant.grams import Moments
from posttrain.quant.layers import Enough, Layer, input_groups, watch
from posttrain.quant.states import States, batches


@torch.no_grad()
def capture(
    blocks: Blocks, index: int, block: nn.Module, layers: list[Layer], states: tuple[States, States], folder: Path, batch: int
) -> tuple[dict[str, States], dict[str, Routed]]:
    """Runs the float block over all rows, and keeps beside its output what enters each group of its layers.

    Args:
        blocks, index, block: the float block.
        layers: of it.
        states: into the block, and where its output goes.
        folder: for the inputs, one file a group.
        batch: rows at a time.

    Returns:
        (inner name of every layer -> its inputs, inner name of every bank of experts -> what it was given).
    """
    before, after = states
    experts = {layer.inner: layer.module for layer in layers if layer.expert is not None}
    layers = [layer for layer in layers if layer.expert is None]
    groups = input_groups(layers, lambda: blocks.run(index, block, before.read(0, 1)))
    rows, length, _ = before.shape
    kept = {
        layer.inner: States(folder / f"inputs-{number:02d}.bin", (rows, length, group[0].shape[1]), before.dtype, before.device)
        for number, group in enumerate(groups)
        for layer in group
    }
    low = 0

    def seen(layer: Layer, x: Tensor) -> None:
        kept[layer.inner].write(low, x.reshape(-1, length, x.shape[-1]))

    routes: dict[str, list[Tensor]] = {name: [] for name in experts}

    def given(name: str) -> Any:
        def told(module: Any, args: Any) -> None:
            if name not in kept:
                check_formula(module, args[0])
                file = folder / f"inputs-experts-{len(kept):02d}.bin"
                kept[name] = States(file, (rows, length, args[0].shape[-1]), before.dtype, before.device)
            kept[name].write(low, args[0].reshape(-1, length, args[0].shape[-1]))
            routes[name].append(args[1].reshape(-1, args[1].shape[-1]).cpu())

        return told

    handles = [module.register_forward_pre_hook(given(name)) for name, module in experts.items()]
    with watch([group[0] for group in groups], seen):
        for low, high in batches(0, rows, batch):
            after.write(low, blocks.run(index, block, before.read(low, high)))
    for handle in handles:
        handle.remove()
    return kept, {name: Routed(kept[name], torch.cat(found)) for name, found in routes.items()}


@dataclass
class Job:
    """A block while it is fitted.

    Args:
        blocks, index: where it belongs.
        plain: the float block.
        quantized: a copy, whose weights become the quantized ones layer by layer.
        layers: of the copy, those to quantize.
        states: into the float block and into the copy.
        train: rows that are fitted; the rows after them judge.
        grids: layer name -> how it is quantized.
        ranks: layer name -> rank of its adapter.
        batch: rows at a time.
        inputs: inner name of a layer -> its inputs in the float block, kept while that block was run; `capture` makes them.
        routed: inner name of a bank of experts -> what the float block gave it.
        weights: layer name -> float weight [out, in].
        fitted: layer name -> result, filled by the method.
        facts: what the method wants in the report of this block.
        rows: layer name -> what the method wants in the layer's report.
    """

    blocks: Blocks
    index: int
    plain: nn.Module
    quantized: nn.Module
    layers: list[Layer]
    states: tuple[States, States]
    train: int
    grids: dict[str, Grid]
    ranks: dict[str, int]
    batch: int
    inputs: dict[str, States] = field(default_factory=dict)
    routed: dict[str, Routed] = field(default_factory=dict)
    seed: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)
    fitted: dict[str, Fitted] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.weights = {layer.name: layer.within(self.plain).weight for layer in self.layers}

    @property
    def parts(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows that are fitted, rows that judge."""
        return (0, self.train), (self.train, len(self.states[0]))

    def groups(self) -> list[list[Layer]]:
        """Layers by shared input, in execution order."""
        plain = [layer for layer in self.layers if layer.expert is None]
        return input_groups(plain, lambda: self.blocks.run(self.index, self.quantized, self.states[1].read(0, 1)))

    def put(self, layer: Layer, found: Fitted) -> None:
        """Takes a result, and lets the copy compute with it."""
        self.fitted[layer.name] = found
        layer.set(found.effective())

    @torch.no_grad()
    def moments(self, group: list[Layer]) -> tuple[Moments, Moments]:
        """Moments of a group's shared input, of the rows that are fitted and of those that judge; the pass stops at the group."""
        first = group[0]
        found = []
        for start, end in self.parts:
            total = Moments.empty(first.shape[1], first.weight.device)
            for low, high in batches(start, end, self.batch):
                x = self._input(self.quantized, first, self.states[1].read(low, high))
                y = self.inputs[first.inner].read(low, high)
                total.add(x, y, {layer.name: self.weights[layer.name] for layer in group})
            found.append(total)
        return found[0], found[1]

    def _input(self, block: nn.Module, layer: Layer, hidden: Tensor) -> Tensor:
        kept: list[Tensor] = []

        def seen(layer: Layer, x: Tensor) -> None:
            kept.append(x)
            raise Enough

        with watch([layer], seen):
            with contextlib.suppress(Enough):
                self.blocks.run(self.index, block, hidden)
        return kept[0]

    @torch.no_grad()
    def block_error(self, part: int) -> tuple[float, float]:
        """Error of the copy's output against the float block's: (||H - H^||^2 / ||H||^2, mean over tokens of the same per token).

        The second is not ruled by the few tokens of huge norm that language models hold at the first position.
        """
        wrong, size, share, tokens = 0.0, 0.0, 0.0, 0
        for low, high in batches(*self.parts[part], self.batch):
            h = self.blocks.run(self.index, self.plain, self.states[0].read(low, high))
            e = (h - self.blocks.run(self.index, self.quantized, self.states[1].read(low, high))).square().sum(-1).double()
            norm = h.square().sum(-1).double()
            wrong, size, share, tokens = (
                wrong + float(e.sum()),
                size + float(norm.sum()),
                share + float((e / norm.clamp(min=1e-30)).sum()),
                tokens + e.numel(),
            )
        return wrong / max(size, 1e-30), share / max(tokens, 1)

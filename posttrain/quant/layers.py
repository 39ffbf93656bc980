"""The weights of a block that are quantized, whatever kind of module holds them.

A weight is always seen as W [out, in], y = x W^T: `nn.Linear` stores it so, GPT-2's `Conv1D` stores W^T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layer:
    """One weight.

    Args:
        name: of the module in the model.
        inner: of the module in its block.
        module: that holds it.
        transposed: stored as [in, out].
        attribute: parameter of the module.
        expert: index in a parameter that stacks the experts of a mixture; None where the parameter is the weight.
    """

    name: str
    inner: str
    module: nn.Module
    transposed: bool = False
    attribute: str = "weight"
    expert: int | None = None

    @property
    def weight(self) -> Tensor:
        """[out, in], a view."""
        stored: Tensor = getattr(self.module, self.attribute).data
        weight = stored if self.expert is None else stored[self.expert]
        return weight.T if self.transposed else weight

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        out, columns = self.weight.shape
        return out, columns

    def set(self, weight: Tensor) -> None:
        """Replaces the weight by [out, in]."""
        self.weight.copy_(weight)

    def within(self, block: nn.Module) -> Layer:
        """The same layer in a copy of its block."""
        return replace(self, module=block.get_submodule(self.inner))


def linear_layers(module: nn.Module, prefix: str = "") -> list[Layer]:
    """Every linear layer under a module, named from `prefix` on."""
    from transformers.pytorch_utils import Conv1D

    dot = f"{prefix}." if prefix else ""
    return [
        Layer(dot + name, name, found, isinstance(found, Conv1D))
        for name, found in module.named_modules()
        if isinstance(found, (nn.Linear, Conv1D))
    ]


class Enough(Exception):
    """Raised in a forward pass once everything wanted was seen."""


@contextmanager
def watch(layers: list[Layer], seen: Callable[[Layer, Tensor], None]) -> Iterator[None]:
    """Tells of the input of each layer while the context is open."""

    def told(layer: Layer) -> Any:
        return lambda module, args: seen(layer, args[0])

    handles = [layer.module.register_forward_pre_hook(told(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def multiplied(layers: list[Layer], weights: dict[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """While open, a layer named in `weights` gives weights[name](x) plus its bias instead of its own product."""

    def forward(layer: Layer, product: Callable[[Tensor], Tensor]) -> Any:
        bias: Any = layer.module.bias
        return (lambda x: product(x)) if bias is None else (lambda x: product(x) + bias)

    chosen = [layer for layer in layers if layer.name in weights]
    for layer in chosen:
        layer.module.forward = forward(layer, weights[layer.name])
    try:
        yield
    finally:
        for layer in chosen:
            del layer.module.forward


@torch.no_grad()
def input_groups(layers: list[Layer], run: Callable[[], Any]) -> list[list[Layer]]:
    """Layers in the order they are run, those with one and the same input together; a layer that is not run is left out.

    Args:
        layers: of one block.
        run: passes some tokens through the block.
    """
    groups: dict[int, list[Layer]] = {}
    kept: list[Tensor] = []

    def seen(layer: Layer, x: Tensor) -> None:
        kept.append(x)
        groups.setdefault(id(x), []).append(layer)

    with watch(layers, seen):
        run()
    return list(groups.values())

"""The loops of ApiQ as its released code has them, written anew for one block: the peer of `quant_fit.py`.

Block-wise: every step quantizes all weights anew from the groups' minima and maxima, for one window at a time, with AdamW over gamma,
beta (lr 5e-3) and A, B (lr 5e-4), weight decay 0.1, no shuffle. Layer-wise (not in the released code): the same for one linear layer
against its outputs, from its inputs. All of it in float32, as far as a CPU runs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Quantizer(nn.Module):
    """Weight, ranges and adapter of one linear layer; `forward` is the layer."""

    def __init__(self, linear: Any, bits: int, group: int, rank: int, seed: int) -> None:
        super().__init__()
        self.weight, self.bias, self.bits, self.group = linear.weight.data, linear.bias, bits, group
        groups = linear.weight.numel() // group
        self.gamma = nn.Parameter(torch.full((groups, 1), 4.0))
        self.beta = nn.Parameter(torch.full((groups, 1), 4.0))
        generator = torch.Generator().manual_seed(seed)
        bound = linear.in_features**-0.5
        self.a = nn.Parameter((torch.rand(rank, linear.in_features, generator=generator) * 2 - 1) * bound)
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def quantized(self) -> Tensor:
        """The weight on its levels, straight through."""
        w = self.weight.reshape(-1, self.group)
        hi = torch.sigmoid(self.gamma) * w.amax(1, keepdim=True).clamp(min=0)
        lo = torch.sigmoid(self.beta) * w.amin(1, keepdim=True).clamp(max=0)
        top = 2**self.bits - 1
        scale = ((hi - lo) / top).clamp(1e-5, 1e4)
        zero = (-lo / scale).clamp(-1e4, 1e4).round().detach()
        level = w / scale
        level = (level.round() - level).detach() + level
        return (((level + zero).clamp(0, top) - zero) * scale).reshape(self.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        """x (Q + B A)^T and the bias."""
        return nn.functional.linear(x, self.quantized(), self.bias) + x @ self.a.T @ self.b.T


def optimizer(layers: list[Quantizer]) -> torch.optim.Optimizer:
    """AdamW as released."""
    ranges = [p for layer in layers for p in (layer.gamma, layer.beta)]
    adapters = [p for layer in layers for p in (layer.a, layer.b)]
    groups = [{"params": ranges, "lr": 5e-3, "weight_decay": 0.1}, {"params": adapters, "lr": 5e-4, "weight_decay": 0.1}]
    return torch.optim.AdamW(groups)


def fit_block(block: nn.Module, run: Any, states: Tensor, targets: list[Tensor], bits: int, group: int, rank: int, epochs: int) -> float:
    """Block-wise; returns the mean loss of the last pass."""
    made: list[Quantizer] = []
    for name, module in list(block.named_modules()):
        if isinstance(module, nn.Linear):
            made.append(Quantizer(module, bits, group, rank, len(made)))
            owner, _, last = name.rpartition(".")
            setattr(block.get_submodule(owner), last, made[-1])
    steps = optimizer(made)
    total = 0.0
    for _ in range(epochs):
        total = 0.0
        for row in range(len(states)):
            out = run(block, states[row : row + 1])
            loss = torch.stack([nn.functional.mse_loss(out, target[row : row + 1]) for target in targets]).sum()
            steps.zero_grad()
            loss.backward()
            steps.step()
            total += float(loss)
    return total / len(states)


def fit_layer(linear: Any, x: Tensor, y: Tensor, bits: int, group: int, rank: int, steps: int) -> float:
    """Layer-wise: inputs [tokens, in] of the quantized model against outputs [tokens, out] of the float one, all tokens a step; the
    last loss over the mean square of the outputs."""
    layer = Quantizer(linear, bits, group, rank, 0)
    moves = optimizer([layer])
    size, loss = y.square().mean(), torch.zeros(())
    for _ in range(steps):
        loss = nn.functional.mse_loss(layer(x), y) / size
        moves.zero_grad()
        loss.backward()
        moves.step()
    return float(loss)

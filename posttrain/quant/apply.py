"""A quantizer applied to a live model, layer by layer: the model then computes with the weights its export will hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from posttrain.core.events import Events
from posttrain.quant.base import QTensor, dequantize
from posttrain.quant.scheme import Scheme


def linear_shapes(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Name -> (out, in) of every linear layer."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return {name: (module.out_features, module.in_features) for name, module in linears.items()}


def output_name(model: Any) -> str:
    """Name of the layer that gives the logits."""
    output = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is output), "lm_head")


def coverage_note(model: Any, scheme: Scheme) -> str:
    """Which share of the parameters is quantized, and what large tensors are no linear layers (experts stored as one tensor)."""
    total = sum(p.numel() for p in model.parameters())
    share = sum(out * columns for out, columns in scheme.layers.values()) / total
    stacked = [name for name, p in model.named_parameters() if p.ndim == 3]
    note = f"{len(scheme.layers)} layers hold {share:.0%} of the {total:,} parameters"
    return note + (f"; {len(stacked)} stacked expert tensors stay dense, first {stacked[0]}" if stacked else "")


def round_dense(model: torch.nn.Module, dtype: torch.dtype, scheme: Scheme) -> None:
    """Rounds all that is not quantized to the type it is exported in; the model stays in float32."""
    kept = {f"{name}.weight" for name in scheme.layers}
    for name, parameter in model.named_parameters():
        if name not in kept:
            parameter.data.copy_(parameter.data.to(dtype))


@torch.no_grad()
def quantize_model(
    model: torch.nn.Module, scheme: Scheme, fit: Callable[[str, Tensor], QTensor], events: Events | None = None
) -> tuple[dict[str, QTensor], list[dict[str, Any]]]:
    """Replaces each weight of the scheme by its quantized value.

    Args:
        model: float model; changed in place.
        scheme: which layers.
        fit: (name, weight [out, in]) -> QTensor.
        events: progress.

    Returns:
        (name -> QTensor, one report row a layer: name, shape, relative squared error, share of codes at either end).
    """
    modules = dict(model.named_modules())
    tensors: dict[str, QTensor] = {}
    rows: list[dict[str, Any]] = []
    for done, name in enumerate(scheme.layers, start=1):
        weight = modules[name].weight
        tensors[name] = fit(name, weight.data)
        rows.append(_report(name, weight.data.float(), tensors[name]))
        weight.data.copy_(dequantize(tensors[name]))
        if events is not None:
            events.progress("quantize", done, len(scheme.layers), unit="layer")
    return tensors, rows


def _report(name: str, weight: Tensor, q: QTensor) -> dict[str, Any]:
    error = (dequantize(q) - weight).square().sum() / weight.square().sum().clamp(min=1e-30)
    ends = ((q.codes == 0) | (q.codes == 2**q.bits - 1)).float().mean()
    return {
        "name": name,
        "shape": list(q.shape),
        "bits": q.bits,
        "group_size": q.group_size,
        "error": round(error.item(), 8),
        "at_ends": round(ends.item(), 6),
    }

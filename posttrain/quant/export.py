"""Writes a quantized model as a complete folder: packed layers, everything else in the export's type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.models.save import save_model, write_json
from posttrain.models.source import read_json
from posttrain.quant.base import QTensor
from posttrain.quant.formats.compressed_tensors import quantization_config, reader_layout, to_tensors
from posttrain.quant.formats.packing import Layout, word_count
from posttrain.quant.scheme import Scheme, engines


def write_quantized(
    model: Any, tokenizer: Any, tensors: dict[str, QTensor], scheme: Scheme, out: Path, *, dtype: torch.dtype, max_shard_gb: float = 5.0
) -> dict[str, Any]:
    """Exports to compressed-tensors `pack-quantized`.

    Args:
        model: the float model the tensors belong to; its quantized weights are not read.
        tokenizer: goes into the folder with its template.
        tensors: layer name -> QTensor, all of one width and group size.
        scheme: which layers are quantized and which stay dense.
        out: folder to write.
        dtype: type of the dense tensors.
        max_shard_gb: size of a weight file in GB.

    Returns:
        facts of the export: bits, group_size, symmetric, format, layout, loads_in, size_bytes, bits_per_weight.
    """
    first = next(iter(tensors.values()))
    layout = reader_layout(first.bits)
    state = _dense_state(model, set(tensors), dtype)
    for name, q in tensors.items():
        state |= to_tensors(name, q, layout)
    facts = save_model(model, tokenizer, out, state=state, max_shard_gb=max_shard_gb)
    config = read_json(out / "config.json")
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["quantization_config"] = quantization_config(first.bits, first.group_size, first.symmetric, scheme.dense)
    write_json(out / "config.json", config)
    loads = engines(first.bits, first.symmetric, dense_layout=layout == "dense")
    return facts | {
        "format": "compressed-tensors",
        "bits": first.bits,
        "group_size": first.group_size,
        "symmetric": first.symmetric,
        "layout": layout,
        "dtype": config["dtype"],
        "loads_in": loads,
        "bits_per_weight": round(bits_per_weight(tensors, layout), 4),
    }


def bits_per_weight(tensors: dict[str, QTensor], layout: Layout = "dense") -> float:
    """Bits on disk a quantized weight takes with its scales and zero points."""
    total = sum(q.codes.numel() for q in tensors.values())
    return sum(_stored_bits(q, layout) for q in tensors.values()) / total


def _stored_bits(q: QTensor, layout: Layout) -> int:
    out, columns = q.shape
    scales = q.scales.numel() * q.scales.element_size() * 8
    zeros = 0 if q.zero_points is None else q.scales.shape[1] * 32 * word_count(out, q.bits, layout)
    return out * 32 * word_count(columns, q.bits, layout) + scales + zeros


def _dense_state(model: Any, quantized: set[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """All other tensors, floats in `dtype`; of tied tensors only the first."""
    state: dict[str, Tensor] = {}
    seen: set[tuple[int, int]] = set()
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.numel())
        if name.removesuffix(".weight") in quantized or (place in seen and tensor.numel()):
            continue
        seen.add(place)
        state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return state

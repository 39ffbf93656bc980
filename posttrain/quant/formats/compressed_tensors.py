"""compressed-tensors `pack-quantized`: weight-only integers of 2 to 8 bits, read by transformers and vLLM.

For a weight W [out, in] in groups along `in`:

    NAME.weight_packed      int32 [out, words]          unsigned codes of a row
    NAME.weight_scale       float [out, groups]         groups = 1 per channel
    NAME.weight_shape       int64 [2]                   (out, in)
    NAME.weight_zero_point  int32 [words of out, groups]  asymmetric only, packed along `out`, unsigned like the codes

Zero points are the true ones: nothing is stored "minus one". No group index is written, since columns keep their order
and column c belongs to group c // group_size. `"dequantize": true` makes transformers give float weights on loading, which
its default path cannot do for asymmetric checkpoints and which peft needs; vLLM does not read that key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from posttrain.quant.base import QTensor
from posttrain.quant.formats.packing import Layout, pack


def to_tensors(name: str, q: QTensor, layout: Layout) -> dict[str, Tensor]:
    """The tensors of one layer, by their full names."""
    tensors = {
        f"{name}.weight_packed": pack(q.codes, q.bits, layout),
        f"{name}.weight_scale": q.scales.contiguous(),
        f"{name}.weight_shape": torch.tensor(q.shape, dtype=torch.int64),
    }
    if q.zero_points is not None:
        tensors[f"{name}.weight_zero_point"] = pack(q.zero_points.t(), q.bits, layout).t().contiguous()
    return tensors


def quantization_config(bits: int, group_size: int, symmetric: bool, ignore: Iterable[str]) -> dict[str, Any]:
    """`quantization_config` of config.json where all layers are of one kind."""
    return mixed_config({(bits, group_size, symmetric): []}, ignore)


def mixed_config(groups: Mapping[tuple[int, int, bool], list[str]], ignore: Iterable[str]) -> dict[str, Any]:
    """`quantization_config` of config.json.

    Args:
        groups: (bits, group_size, symmetric) -> names of the layers of that kind.
        ignore: names of the linear layers that stay dense.
    """
    kinds = {
        f"group_{index}": {
            "targets": ["Linear"] if len(groups) == 1 else sorted(names),
            "weights": _weights(*kind),
            "input_activations": None,
            "output_activations": None,
        }
        for index, (kind, names) in enumerate(sorted(groups.items()))
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "dequantize": True,
        "ignore": sorted(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "config_groups": kinds,
    }


def _weights(bits: int, group_size: int, symmetric: bool) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def layout_of(widths: Iterable[int]) -> Layout:
    """The layout that the installed reader wants for every one of these widths; only 3, 5, 6 and 7 bits have two."""
    return "padded" if any(reader_layout(bits) == "padded" for bits in widths) else "dense"


def reader_layout(bits: int) -> Layout:
    """How the installed compressed-tensors reads this width; only 3, 5, 6 and 7 bits differ between its versions."""
    if 32 % bits == 0:
        return "dense"
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    words = pack_to_int32(torch.zeros(1, 32, dtype=torch.int8), bits).shape[1]
    return "dense" if words == bits else "padded"

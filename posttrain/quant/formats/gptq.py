"""GPTQ checkpoints, version 1, symmetric, without activation order: 4 and 8 bits, the widths that vLLM reads.

For a weight W [out, in] in groups along `in`:

    NAME.qweight  int32 [in b / 32, out]      unsigned codes of a column of W^T, low bits first
    NAME.qzeros   int32 [groups, out b / 32]  zero point less one, packed along `out`
    NAME.scales   float [groups, out]
    NAME.g_idx    int32 [in]                  group of each input column

Version 1 stores zero points "minus one", which cannot hold a zero point of 0; symmetric codes have 2^(b-1) everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from posttrain.quant.base import QTensor
from posttrain.quant.formats.packing import pack

WIDTHS = (4, 8)


def to_tensors(name: str, q: QTensor) -> dict[str, Tensor]:
    """The tensors of one layer, by their full names."""
    out, columns = q.shape
    groups = q.scales.shape[1]
    zeros = torch.full((groups, out), 2 ** (q.bits - 1) - 1, dtype=torch.uint8)
    return {
        f"{name}.qweight": pack(q.codes, q.bits).t().contiguous(),
        f"{name}.qzeros": pack(zeros, q.bits),
        f"{name}.scales": q.scales.t().contiguous(),
        f"{name}.g_idx": (torch.arange(columns, dtype=torch.int32) // (columns // groups)).contiguous(),
    }


def quantization_config(bits: int, group_size: int, dense: Iterable[str]) -> dict[str, Any]:
    """`quantization_config` of config.json; layers in `dense` are excluded one by one."""
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": True,
        "desc_act": False,
        "static_groups": False,
        "true_sequential": True,
        "damp_percent": 0.01,
        "checkpoint_format": "gptq",
        "lm_head": False,
        "dynamic": {f"-:^{re.escape(name)}$": {} for name in sorted(dense) if name != "lm_head"},
    }

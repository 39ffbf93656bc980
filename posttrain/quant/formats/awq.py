"""AWQ checkpoints (`gemm`): 4 bits with zero points.

For a weight W [out, in] in groups along `in`:

    NAME.qweight  int32 [in, out / 8]      codes of a row of W^T, eight a word in the order below
    NAME.qzeros   int32 [groups, out / 8]  zero points as they are, packed alike
    NAME.scales   float [groups, out]

Output column 8 k + ORDER[i] lies in bits [4 i, 4 i + 4) of word k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posttrain.quant.base import QTensor
from posttrain.quant.formats.packing import pack

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
WIDTHS = (4,)


def to_tensors(name: str, q: QTensor) -> dict[str, Tensor]:
    """The tensors of one layer, by their full names."""
    zeros = torch.full(q.scales.shape, 2 ** (q.bits - 1), dtype=torch.uint8) if q.zero_points is None else q.zero_points
    return {
        f"{name}.qweight": pack(_ordered(q.codes.t()), q.bits),
        f"{name}.qzeros": pack(_ordered(zeros.t()), q.bits),
        f"{name}.scales": q.scales.t().contiguous(),
    }


def quantization_config(group_size: int, dense: list[str]) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": dense or None,
    }


def _ordered(codes: Tensor) -> Tensor:
    rows, columns = codes.shape
    return codes.reshape(rows, columns // 8, 8)[:, :, list(ORDER)].reshape(rows, columns)

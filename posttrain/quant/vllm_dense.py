"""vLLM's 4-bit CPU layers without its 4-bit kernel, for processors that lack AVX-512.

vLLM reads the checkpoint, fuses and shards its layers as always; only the product is another one. With codes q, scales s
and zero points z of a group, the layer computes y = x W^T + b with the dense

    W = (q - z) * s        (z = 8 for symmetric codes, taken off while unpacking),

so a wrong name, order, fusion or packing in a checkpoint still shows, while a fault of vLLM's kernel does not.
"""

from __future__ import annotations

from typing import Any

import torch

BITS = 4


def use_dense_kernel() -> None:
    """Replaces the product of vLLM's CPU kernel for 4-bit weights in this process; call it before a model is loaded."""
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel

    kernel: Any = CPUWNA16LinearKernel
    kernel.process_weights_after_loading, kernel.apply_weights = _unpack, _multiply


def _unpack(kernel: Any, layer: Any) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    packed, scale = getattr(layer, kernel.w_q_name), getattr(layer, kernel.w_s_name).float()
    (rows, groups), columns = scale.shape, packed.shape[1] * 32 // BITS
    codes = unpack_from_int32(packed.data, BITS, (rows, columns)).float().reshape(rows, groups, -1)
    if kernel.config.zero_points:
        zeros = getattr(layer, kernel.w_zp_name)
        codes = codes - unpack_from_int32(zeros.data, BITS, (rows, groups), packed_dim=0).float().unsqueeze(-1)
    layer.dense = (codes * scale.unsqueeze(-1)).reshape(rows, columns).to(kernel.config.act_type)


def _multiply(kernel: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.nn.functional.linear(x, layer.dense, bias)

"""Unsigned codes in 32-bit words.

`dense`: a little-endian bit stream, code j in bits [j b, (j+1) b), which may straddle two words.
`padded`: floor(32 / b) codes a word, the bits left over are zero.
At 2, 4 and 8 bits the two are the same. At 3 bits compressed-tensors up to 0.17 reads padded words (10 codes), later
versions and vLLM read the dense stream (32 codes in 3 words).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["dense", "padded"]


def pack(codes: Tensor, bits: int, layout: Layout = "dense") -> Tensor:
    """int32 [rows, words] from unsigned codes [rows, columns]."""
    per_block, block_words = (32, bits) if layout == "dense" else (32 // bits, 1)
    rows, columns = codes.shape
    blocks = math.ceil(columns / per_block)
    padded = torch.nn.functional.pad(codes.long(), (0, blocks * per_block - columns)).reshape(rows, blocks, per_block)
    words = torch.zeros(rows, blocks, block_words, dtype=torch.int64, device=codes.device)
    for index in range(per_block):
        word, shift = divmod(index * bits, 32)
        words[..., word] |= (padded[..., index] << shift) & 0xFFFFFFFF
        if shift + bits > 32:
            words[..., word + 1] |= padded[..., index] >> (32 - shift)
    flat = words.reshape(rows, -1)[:, : word_count(columns, bits, layout)]
    return torch.where(flat >= 2**31, flat - 2**32, flat).to(torch.int32).contiguous()


def word_count(columns: int, bits: int, layout: Layout = "dense") -> int:
    """Words that hold a row of codes."""
    return math.ceil(columns * bits / 32) if layout == "dense" else math.ceil(columns / (32 // bits))

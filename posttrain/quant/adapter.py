"""The low-rank part of a fit as a plain peft folder over the quantized checkpoint, which lies in it as `base`.

    OUT/adapter_config.json, adapter_model.safetensors, base.json     the adapter, scaled by alpha / r = 1
    OUT/base/                                                         the quantized checkpoint

vLLM loads it with `vllm serve OUT/base --enable-lora --max-lora-rank R --lora-modules NAME=OUT`, peft with
`PeftModel.from_pretrained(base, OUT)`, and every stage of this package as one model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.models.check import ADAPTER_WEIGHTS
from posttrain.quant.closed_form import Fitted

BASE = "base"
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def write_adapter(
    model: Any, tokenizer: Any, fitted: Mapping[str, Fitted], out: Path, *, dtype: torch.dtype, transposed: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Writes the adapter of a fit beside its base.

    Args:
        model: the model that the layers belong to.
        tokenizer: goes into the folder.
        fitted: layer name -> result; a layer without an adapter gets one of zeros.
        out: folder, which holds the base in `base`.
        dtype: type of A and B.
        transposed: layers stored as [in, out].

    Returns:
        {"rank", "adapter_parameters", "max_lora_rank"}.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    from posttrain.models.save import save_adapter_folder

    ranks = {name: one.a.shape[0] for name in fitted if (one := fitted[name]).a is not None}
    top = max(ranks.values())
    uneven = {name: rank for name, rank in ranks.items() if rank != top}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=top,
        lora_alpha=top,
        lora_dropout=0.0,
        bias="none",
        target_modules=targets(model, set(ranks)),
        rank_pattern=uneven,
        alpha_pattern=dict(uneven),
        fan_in_fan_out=bool(transposed),
        inference_mode=True,
    )
    tensors = dict(adapter_tensors(fitted, dtype))
    save_file(tensors, out / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    save_adapter_folder(model, tokenizer, config, out, base=out / BASE)
    size = sum(tensor.numel() for tensor in tensors.values())
    return {"rank": top, "adapter_parameters": size, "max_lora_rank": next((rank for rank in VLLM_RANKS if rank >= top), top)}


def adapter_tensors(fitted: Mapping[str, Fitted], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the adapter under peft's names."""
    for name in fitted:
        one = fitted[name]
        if one.a is None or one.b is None:
            continue
        for part, value in (("A", one.a), ("B", one.b)):
            yield f"base_model.model.{name}.lora_{part}.weight", value.to(dtype).contiguous()


def targets(model: Any, names: set[str]) -> list[str]:
    """`target_modules`: the last parts of the names where those mean no other module of the model, else full names."""
    last = {name.rpartition(".")[2] for name in names}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last}
    return sorted(last if meant == names else names)

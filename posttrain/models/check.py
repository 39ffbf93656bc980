"""Integrity of a model folder, before anything in it is trusted.

Only safetensors is read: a pickle (.bin, .pt) can run code when it is loaded. A safetensors file is
`8-byte little-endian n, n bytes of JSON header, data`, and the header gives each tensor's byte range, so the length the
file must have is known without reading the data: 8 + n + max(end). A shorter file would otherwise load as zeros or junk.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from posttrain.errors import ArtifactError
from posttrain.models.source import ADAPTER_CONFIG, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
AGAIN = "copy or download the model folder again, whole"


def read_header(file: Path) -> dict[str, Any]:
    """Tensor name -> {dtype, shape, data_offsets} of a safetensors file whose length is right.

    Raises:
        ArtifactError: missing, not safetensors, or of another length than its header says.
    """
    if not file.is_file():
        raise ArtifactError("weight file is missing", where=str(file), fix=AGAIN)
    size = file.stat().st_size
    with open(file, "rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > size - 8:
            raise ArtifactError(f"not a complete safetensors file: {size} bytes", where=str(file), fix=AGAIN)
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            raise ArtifactError("not a safetensors file: its header is no JSON", where=str(file), fix=AGAIN) from None
    header.pop("__metadata__", None)
    expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if expected != size:
        raise ArtifactError(f"damaged weights: expected {expected} bytes, found {size}", where=str(file), fix=AGAIN)
    return header


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up a model folder, checked.

    Raises:
        ArtifactError: no safetensors, only pickles, a missing or damaged shard, an index that names a file outside the
            folder, or shards and index that disagree.
    """
    if (folder / INDEX).is_file():
        return _indexed(folder)
    if (folder / SINGLE).is_file():
        read_header(folder / SINGLE)
        return [folder / SINGLE]
    raise _no_weights(folder)


def _indexed(folder: Path) -> list[Path]:
    where = folder / INDEX
    weight_map = read_json(where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ArtifactError("the index has no weight_map", where=str(where), fix=AGAIN)
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if name != Path(name).name or "\\" in name or not name.endswith(".safetensors"):
            raise ArtifactError(
                f"the index names `{name}`; only .safetensors files inside the folder are read", where=str(where), fix="correct the index"
            )
    for name in names:
        held = set(read_header(folder / name))
        listed = {tensor for tensor, file in weight_map.items() if file == name}
        if held != listed:
            raise ArtifactError(_disagreement(name, listed - held, held - listed), where=str(where), fix=AGAIN)
    return [folder / name for name in names]


def _disagreement(name: str, absent: set[str], extra: set[str]) -> str:
    parts = [f"lacks {sorted(absent)[0]}" if absent else "", f"holds {sorted(extra)[0]}, which the index does not list" if extra else ""]
    return f"index and {name} disagree: {name} {' and '.join(part for part in parts if part)} ({len(absent)} missing, {len(extra)} extra)"


def _no_weights(folder: Path) -> ArtifactError:
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        return ArtifactError(
            f"the folder holds its weights only as a pickle ({pickles[0]}), which can run code when loaded",
            where=str(folder),
            fix="convert it to safetensors where you trust it: load with transformers, then save_pretrained(folder)",
        )
    return ArtifactError("no safetensors weights in the folder", where=str(folder), fix=f"expected {SINGLE} or {INDEX}")


def check_folder(folder: Path) -> None:
    """Refuses a model or adapter folder that is incomplete, damaged, or would be unpickled.

    Raises:
        ArtifactError: what is wrong, in which file, expected against found bytes.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        if not (folder / ADAPTER_WEIGHTS).is_file():
            raise _no_weights(folder)
        read_header(folder / ADAPTER_WEIGHTS)
        return
    read_json(folder / "config.json")
    weight_files(folder)


def folder_bytes(folder: Path) -> int:
    """Bytes of the safetensors files of a folder."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))

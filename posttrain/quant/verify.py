"""Reads an export back from its bytes.

The reader follows the published layout with numpy and nothing of our packer, so a wrong offset, order or zero point
cannot cancel out: its weights must equal ours exactly. (`models/reload.py` does the same through transformers, by logits.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.errors import QuantError
from posttrain.models.check import read_header, weight_files

AGAIN = "please report this with the model's config.json; `export.reload_check: false` writes the folder all the same"


def read_tensors(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Tensor name -> (file, header entry) over all weight files of a folder."""
    return {name: (file, entry) for file in weight_files(folder) for name, entry in read_header(file).items()}


def read_array(file: Path, entry: dict[str, Any]) -> np.ndarray:
    """One tensor of a safetensors file as a numpy array; bfloat16 is widened to float32."""
    start, end = entry["data_offsets"]
    with open(file, "rb") as stream:
        offset = 8 + int.from_bytes(stream.read(8), "little")
        stream.seek(offset + start)
        raw = stream.read(end - start)
    if entry["dtype"] == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4").reshape(entry["shape"])
    kinds = {"F32": "<f4", "F16": "<f2", "I32": "<i4", "I64": "<i8", "F64": "<f8"}
    return np.frombuffer(raw, kinds[entry["dtype"]]).reshape(entry["shape"])


def read_layer(tensors: dict[str, tuple[Path, dict[str, Any]]], name: str, bits: int, format: str = "compressed-tensors") -> np.ndarray:
    """float32 [out, in] of one layer, from the bytes alone."""
    if format == "dequantized":
        if f"{name}.weight" in tensors:
            return read_array(*tensors[f"{name}.weight"]).astype(np.float32)
        stack, _, expert = name.rpartition(".")
        return read_array(*tensors[stack])[int(expert)].astype(np.float32)
    if format in ("gptq", "awq"):
        return _read_transposed(tensors, name, bits, format)
    out, columns = read_array(*tensors[f"{name}.weight_shape"]).tolist()
    scale = read_array(*tensors[f"{name}.weight_scale"]).astype(np.float32)
    codes = _codes(read_array(*tensors[f"{name}.weight_packed"]), bits, columns)
    packed_zero = tensors.get(f"{name}.weight_zero_point")
    zero = (
        np.float32(2 ** (bits - 1))
        if packed_zero is None
        else _codes(read_array(*packed_zero).T, bits, out).T.astype(np.float32)[:, :, None]
    )
    grouped = codes.astype(np.float32).reshape(out, scale.shape[1], -1)
    return ((grouped - zero) * scale[:, :, None]).reshape(out, columns)


def _read_transposed(tensors: dict[str, tuple[Path, dict[str, Any]]], name: str, bits: int, format: str) -> np.ndarray:
    """GPTQ version 1 (packed along the inputs, zero points less one) or AWQ (packed along the outputs in its own order)."""
    words, packed_zero, scale = (read_array(*tensors[f"{name}.{part}"]) for part in ("qweight", "qzeros", "scales"))
    per_word, (groups, out) = 32 // bits, scale.shape
    zero = _codes(packed_zero, bits, packed_zero.shape[1] * per_word)
    if format == "gptq":
        codes = _codes(words.T, bits, words.shape[0] * per_word).T
        zero = zero + 1
    else:
        codes = _codes(words, bits, words.shape[1] * per_word)
        place = np.argsort([0, 2, 4, 6, 1, 3, 5, 7])
        codes, zero = (table.reshape(len(table), -1, 8)[:, :, place].reshape(len(table), -1) for table in (codes, zero))
    rows = codes.shape[0] // groups
    weight = (codes.reshape(groups, rows, out) - zero[:, None, :]).astype(np.float32) * scale.astype(np.float32)[:, None, :]
    return weight.reshape(-1, out).T


def _codes(words: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Codes of each row, by writing out its bits; the number of words tells whether values straddle them."""
    stream = np.unpackbits(np.ascontiguousarray(words).astype("<i4").view(np.uint8).reshape(len(words), -1), axis=1, bitorder="little")
    if words.shape[1] * (32 // bits) >= columns and words.shape[1] != -(-columns * bits // 32):
        per_word = 32 // bits
        stream = stream.reshape(len(words), -1, 32)[:, :, : per_word * bits].reshape(len(words), -1)
    digits = stream[:, : columns * bits].reshape(len(words), columns, bits)
    return (digits.astype(np.int64) << np.arange(bits)).sum(-1)


STORED = {"compressed-tensors": "weight_packed", "gptq": "qweight", "awq": "qweight", "dequantized": "weight"}


def check_bytes(
    folder: Path,
    weights: Mapping[str, Any],
    bits: int | Mapping[str, int],
    format: str = "compressed-tensors",
    *,
    transposed: frozenset[str] = frozenset(),
    rounding: Callable[[np.ndarray], np.ndarray] | None = None,
) -> dict[str, int]:
    """Compares each quantized layer on disk with the weight in memory.

    Args:
        folder: the export.
        weights: layer name -> dequantized weight in memory, array-like [out, in]; read one at a time.
        bits: width of a code, of all layers or by name.
        format: of the folder.
        transposed: layers stored as [in, out] where the format is `dequantized`.
        rounding: what storing does to a float weight, for `dequantized`.

    Returns:
        `{"quantized_bytes", "dense_bytes"}` on disk.

    Raises:
        QuantError: a layer that is missing, stored dense, or differs.
    """
    tensors = read_tensors(folder)
    packed = format != "dequantized"
    for name in weights:
        there = f"{name}.{STORED[format]}" in tensors or (not packed and name.rpartition(".")[0] in tensors)
        if not there or (packed and f"{name}.weight" in tensors):
            raise QuantError("the layer was not stored in quantized form", where=f"{folder}: {name}", fix=AGAIN)
        found = read_layer(tensors, name, bits if isinstance(bits, int) else bits[name], format)
        wanted = np.asarray(weights[name], dtype=np.float32)
        found = found.T if name in transposed else found
        worst = float(np.abs(found - (wanted if rounding is None else rounding(wanted))).max())
        if worst != 0:
            raise QuantError(f"the stored weight differs from the one in memory by {worst:g}", where=f"{folder}: {name}", fix=AGAIN)
    held = {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, (_, entry) in tensors.items()}
    size = sum(count for name, count in held.items() if name.rpartition(".")[0] in weights and not name.endswith(".bias"))
    return {"quantized_bytes": size, "dense_bytes": sum(held.values()) - size}

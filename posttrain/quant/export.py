"""Writes a quantized model as a complete folder, tensor by tensor: packed layers, everything else in the export's type."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.errors import QuantError
from posttrain.models.check import folder_bytes
from posttrain.models.save import clean_json, save_generation_config, save_tokenizer, write_json
from posttrain.models.shards import write_shards
from posttrain.models.source import read_json
from posttrain.quant.base import QTensor, dequantize
from posttrain.quant.experts import stacks
from posttrain.quant.formats import awq, compressed_tensors, gptq
from posttrain.quant.formats.packing import Layout, word_count
from posttrain.quant.scheme import Scheme, engines


@dataclass(frozen=True)
class Form:
    """How one layer is stored.

    Args:
        shape: (out, in).
        bits, group_size, symmetric: as in QTensor.
        scale_bits: of a scale.
    """

    shape: tuple[int, int]
    bits: int
    group_size: int
    symmetric: bool
    scale_bits: int

    @classmethod
    def of(cls, q: QTensor) -> Form:
        """The form of a quantized weight."""
        return cls(q.shape, q.bits, q.group_size, q.symmetric, q.scales.element_size() * 8)

    def stored_bits(self, layout: Layout = "dense") -> int:
        """Bits on disk with scales and zero points."""
        out, columns = self.shape
        groups = 1 if self.group_size == -1 else columns // self.group_size
        zeros = 0 if self.symmetric else groups * 32 * word_count(out, self.bits, layout)
        return out * 32 * word_count(columns, self.bits, layout) + out * groups * self.scale_bits + zeros


def write_quantized(
    model: Any,
    tokenizer: Any,
    tensors: Mapping[str, QTensor],
    scheme: Scheme,
    out: Path,
    *,
    dtype: torch.dtype,
    max_shard_gb: float = 5.0,
    format: str = "compressed-tensors",
    dense: Iterable[tuple[str, Tensor]] | None = None,
    transposed: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """Exports a model.

    Args:
        model: the float model the tensors belong to; its quantized weights are not read.
        tokenizer: goes into the folder with its template.
        tensors: layer name -> QTensor; read one at a time.
        scheme: which layers are quantized and which stay dense.
        out: folder to write.
        dtype: type of the dense tensors.
        max_shard_gb: size of a weight file in GB.
        format: `compressed-tensors`, `gptq`, `awq` or `dequantized`.
        dense: all other tensors by name; default is the model's own.
        transposed: layers that the model stores as [in, out].

    Returns:
        facts of the export: bits, group_size, symmetric, format, layout, loads_in, size_bytes, bits_per_weight.
    """
    forms = {name: Form.of(tensors[name]) for name in tensors}
    check_forms(forms, format)
    widths = {form.bits for form in forms.values()}
    layout = compressed_tensors.layout_of(widths) if format == "compressed-tensors" else "dense"
    rest = dense_tensors(model, {*tensors, *stacks(tensors)}) if dense is None else dense
    out.mkdir(parents=True, exist_ok=True)
    written = write_shards(_tensors(tensors, rest, format, layout, dtype, transposed), out, max_shard_gb)
    model.config.save_pretrained(str(out))
    clean_json(out / "config.json")
    save_tokenizer(tokenizer, out)
    save_generation_config(model, tokenizer, out)
    config = read_json(out / "config.json")
    config["dtype"] = str(dtype).removeprefix("torch.")
    described = _described(forms, scheme, format)
    if described:
        config["quantization_config"] = described
    write_json(out / "config.json", config)
    if format == "gptq":
        write_json(out / "quantize_config.json", described)
    total = sum(form.shape[0] * form.shape[1] for form in forms.values())
    first = next(iter(forms.values()))
    symmetric = all(form.symmetric for form in forms.values())
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "size_bytes": folder_bytes(out),
        "weight_bytes": written["weight_bytes"],
        "vocab_size": model.get_input_embeddings().weight.shape[0],
        "format": format,
        "bits": first.bits if len(widths) == 1 else sorted(widths),
        "group_size": _one({form.group_size for form in forms.values()}),
        "symmetric": symmetric,
        "layout": layout,
        "dtype": config["dtype"],
        "loads_in": engines(widths, symmetric, dense_layout=layout == "dense", format=format),
        "bits_per_weight": round(sum(form.stored_bits(layout) for form in forms.values()) / total, 4),
    }


def bits_per_weight(tensors: Mapping[str, QTensor], layout: Layout = "dense") -> float:
    """Bits on disk a quantized weight takes with its scales and zero points."""
    forms = [Form.of(tensors[name]) for name in tensors]
    return sum(form.stored_bits(layout) for form in forms) / sum(form.shape[0] * form.shape[1] for form in forms)


def check_forms(forms: Mapping[str, Form], format: str) -> None:
    """Refuses layers that a format cannot hold.

    Raises:
        QuantError: names the layer and the formats that can.
    """
    for name, form in forms.items():
        out, columns = form.shape
        reason = ""
        if format == "gptq":
            if form.bits not in gptq.WIDTHS or not form.symmetric:
                reason = f"GPTQ version 1 holds symmetric codes of {' or '.join(map(str, gptq.WIDTHS))} bits"
            elif columns % (32 // form.bits) or out % (32 // form.bits):
                reason = f"GPTQ packs {32 // form.bits} values a word, which must divide its shape {out} x {columns}"
        if format == "awq":
            if form.bits not in awq.WIDTHS:
                reason = "AWQ holds codes of 4 bits"
            elif out % 8:
                reason = f"AWQ packs 8 outputs a word, which must divide {out}"
        if reason:
            raise QuantError(f"{name}: {reason}", where="export.format", fix="use `compressed-tensors` or `dequantized`")
    if format in ("gptq", "awq") and len({(form.bits, form.group_size) for form in forms.values()}) > 1:
        raise QuantError(f"`{format}` holds one width and group size", where="export.format", fix="use `compressed-tensors`")


def dense_tensors(model: Any, quantized: set[str]) -> Iterator[tuple[str, Tensor]]:
    """All other tensors of a live model; of tied tensors only the first."""
    seen: set[tuple[int, int]] = set()
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.numel())
        if name.removesuffix(".weight") in quantized or (place in seen and tensor.numel()):
            continue
        seen.add(place)
        yield name, tensor


def _tensors(
    tensors: Mapping[str, QTensor],
    dense: Iterable[tuple[str, Tensor]],
    format: str,
    layout: Layout,
    dtype: torch.dtype,
    transposed: frozenset[str],
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in dense:
        yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor
    if format == "dequantized":
        piles = stacks(tensors)
        for stem, experts in piles.items():
            yield stem, torch.stack([dequantize(tensors[name]).to(dtype) for name in experts])
        tensors = {name: tensors[name] for name in tensors if not any(name in experts for experts in piles.values())} if piles else tensors
    for name in tensors:
        q = tensors[name]
        if format == "dequantized":
            weight = dequantize(q).to(dtype)
            yield f"{name}.weight", weight.T if name in transposed else weight
        elif format == "gptq":
            yield from gptq.to_tensors(name, q).items()
        elif format == "awq":
            yield from awq.to_tensors(name, q).items()
        else:
            yield from compressed_tensors.to_tensors(name, q, layout).items()


def _described(forms: Mapping[str, Form], scheme: Scheme, format: str) -> dict[str, Any]:
    first = next(iter(forms.values()))
    if format == "dequantized":
        return {}
    if format == "gptq":
        return gptq.quantization_config(first.bits, first.group_size, scheme.dense)
    if format == "awq":
        return awq.quantization_config(first.group_size, list(scheme.dense))
    groups: dict[tuple[int, int, bool], list[str]] = {}
    for name, form in forms.items():
        groups.setdefault((form.bits, form.group_size, form.symmetric), []).append(name)
    return compressed_tensors.mixed_config(groups, scheme.dense)


def _one(values: set[int]) -> Any:
    return next(iter(values)) if len(values) == 1 else sorted(values)

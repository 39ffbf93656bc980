"""The end that all quantizers share: export, read back, evaluate what was read back, report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from posttrain.core.context import StageContext
from posttrain.errors import QuantError
from posttrain.models.load import LoadedModel
from posttrain.models.reload import check_reload, probe_logits
from posttrain.quant.adapter import BASE, write_adapter
from posttrain.quant.apply import coverage_note
from posttrain.quant.base import QTensor, dequantize
from posttrain.quant.closed_form import Fitted
from posttrain.quant.engine_check import check_engine, unavailable
from posttrain.quant.export import write_quantized
from posttrain.quant.options import QuantExport
from posttrain.quant.scheme import Scheme
from posttrain.quant.verify import check_bytes

PROBE = 4
"""Positions and tokens whose logits the manifest records, for `posttrain verify --load`."""
A = TypeVar("A")
B = TypeVar("B")


class Read(Mapping[str, B], Generic[A, B]):
    """A mapping whose values are made from another's when they are asked for."""

    def __init__(self, source: Mapping[str, A], make: Callable[[A], B]) -> None:
        self.source, self.make = source, make

    def __getitem__(self, name: str) -> B:
        return self.make(self.source[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.source)

    def __len__(self) -> int:
        return len(self.source)


def finish(
    ctx: StageContext,
    loaded: LoadedModel,
    fitted: Mapping[str, Fitted],
    scheme: Scheme,
    rows: list[dict[str, Any]],
    *,
    dtype: torch.dtype,
    export: QuantExport,
    transposed: frozenset[str] = frozenset(),
    dense: Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """Writes the export into `ctx.out`, checks it, evaluates it and fills summary and meta.

    Args:
        loaded: the model; where all of it is in memory, its weights are already the quantized ones, adapters added.
        fitted: layer name -> result; read one at a time.
        scheme: which layers were quantized.
        rows: report row of each layer.
        dtype: type of the dense tensors and the adapter.
        export: format and checks.
        transposed: layers that the model stores as [in, out].
        dense: all other tensors by name, where the model in memory does not hold them; then it is not run either.

    Raises:
        QuantError: what is on disk is not what is in memory.
    """
    from posttrain.eval.run import around

    model, tokenizer = loaded.model, loaded.tokenizer
    tensors: Mapping[str, QTensor] = Read(fitted, lambda one: one.q)
    notes = [*scheme.notes, coverage_note(model, scheme)]
    for note in notes:
        ctx.events.log(note)
    adapter = any(row.get("rank") for row in rows)
    folder = ctx.out / BASE if adapter else ctx.out
    facts = write_quantized(
        model, tokenizer, tensors, scheme, folder, dtype=dtype, max_shard_gb=export.max_shard_gb, format=export.format, dense=dense,
        transposed=transposed,
    )  # fmt: skip
    if adapter:
        facts |= write_adapter(model, tokenizer, fitted, ctx.out, dtype=dtype, transposed=transposed)
    facts["total_bits_per_weight"] = total_bits(facts, scheme, dtype)
    if export.reload_check:
        facts |= _bytes(folder, tensors, facts, dtype, transposed)
        if dense is None:
            model = _reload(ctx, loaded, facts)
            facts |= _engine(ctx, folder, model, facts, export.engine_check)
        else:
            ctx.events.log("read back byte by byte; the logits were not compared, since the model is not in memory")
    if dense is None:
        around(ctx, "after", model, tokenizer)
    _report(ctx, loaded.dtype, facts, rows, notes)


def total_bits(facts: Mapping[str, Any], scheme: Scheme, dtype: torch.dtype) -> float:
    """Bits a quantized weight takes with scales, zero points and adapter."""
    weights = sum(out * columns for out, columns in scheme.layers.values())
    return round(facts["bits_per_weight"] + facts.get("adapter_parameters", 0) * dtype.itemsize * 8 / weights, 4)


def _bytes(
    folder: Path, tensors: Mapping[str, QTensor], facts: Mapping[str, Any], dtype: torch.dtype, transposed: frozenset[str]
) -> dict[str, int]:
    def stored(weight: np.ndarray) -> np.ndarray:
        return torch.from_numpy(weight).to(dtype).float().numpy()

    weights: Mapping[str, np.ndarray] = Read(tensors, lambda q: dequantize(q).cpu().numpy())
    rounding = stored if facts["format"] == "dequantized" else None
    widths: Mapping[str, int] = Read(tensors, lambda q: q.bits)
    return check_bytes(folder, weights, widths, facts["format"], transposed=transposed, rounding=rounding)


def _reload(ctx: StageContext, loaded: LoadedModel, facts: dict[str, Any]) -> Any:
    """The export loaded by transformers, where it reads the format, after its logits were compared."""
    if not facts["loads_in"]["transformers"]:
        ctx.events.log(f"transformers does not read {facts['format']} by itself; checked byte by byte")
        return loaded.model
    expected = probe_logits(loaded.model)
    facts["probe"] = [[round(value, 5) for value in row] for row in expected[0, :PROBE, :PROBE].tolist()]
    if facts["format"] == "dequantized":
        return _reload_rounded(ctx, loaded, facts)
    loaded.model = None
    again, found = check_reload(ctx.out, expected, dtype="float32", trust_remote_code=ctx.trust_remote_code)
    facts |= found
    return again.model


def _reload_rounded(ctx: StageContext, loaded: LoadedModel, facts: dict[str, Any]) -> Any:
    """Of dequantized weights, which were rounded to the type they are stored in: the difference is told, not judged."""
    from posttrain.models.load import load_model

    expected = probe_logits(loaded.model)
    again = load_model(ctx.out, dtype="float32", trust_remote_code=ctx.trust_remote_code)
    facts["reload_max_diff"] = float((probe_logits(again.model) - expected).abs().max())
    return again.model


def _engine(ctx: StageContext, folder: Path, model: Any, facts: Mapping[str, Any], wanted: str) -> dict[str, Any]:
    """The check by vLLM, where it is wanted and can be had."""
    if wanted == "off":
        return {}
    reason = unavailable(facts["bits"], facts["format"])
    if reason and wanted == "require":
        raise QuantError(
            f"the check by vLLM cannot be run: {reason}", where=f"stages.{ctx.name}.export.engine_check", fix="set it to `try` or `off`"
        )
    if reason:
        ctx.events.warn(f"not checked in vLLM: {reason}")
        return {"engine_check": {"engine": "vllm", "skipped": reason}}
    found = check_engine(folder, model, adapter=ctx.out if folder != ctx.out else None, rank=facts.get("max_lora_rank", 0))
    ctx.events.log(
        f"vLLM agrees on {found['agree']:.0%} of {found['tokens']} tokens, log-probabilities within {found['max_logprob_diff']:.3g}"
        + (" (dense products: its 4-bit CPU kernel needs AVX-512)" if found["kernel"] == "dense" else "")
    )
    return {"engine_check": found}


def _report(ctx: StageContext, dtype: str, facts: dict[str, Any], rows: list[dict[str, Any]], notes: list[str]) -> None:
    before = facts["parameters"] * torch.finfo(getattr(torch, dtype)).bits // 8
    errors = [row["error"] for row in rows if "error" in row]
    ctx.meta.update({key: facts[key] for key in ("format", "bits", "group_size", "symmetric", "layout", "dtype", "loads_in")})
    ctx.meta.update({key: facts[key] for key in ("rank", "max_lora_rank") if key in facts})
    ctx.summary.update(facts, size_bytes_before=before, weight_error=round(sum(errors) / len(errors), 8), layers=rows, notes=notes)
    engines = ", ".join(name for name, ok in facts["loads_in"].items() if ok)
    with_adapter = f", {facts['total_bits_per_weight']:.2f} with the adapter of rank {facts['rank']}" if "rank" in facts else ""
    ctx.events.log(
        f"{len(rows)} layers in {facts['bits']} bits ({facts['bits_per_weight']:.2f} with scales{with_adapter}); "
        f"{before / 1e6:.2f} MB -> {facts['size_bytes'] / 1e6:.2f} MB; loads in {engines}"
    )

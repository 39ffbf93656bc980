"""The end that all quantizers share: export, read back, evaluate what was read back, report."""

from __future__ import annotations

from typing import Any

import torch

from posttrain.core.context import StageContext
from posttrain.errors import QuantError
from posttrain.models.load import LoadedModel
from posttrain.models.reload import check_reload, probe_logits
from posttrain.quant.apply import coverage_note
from posttrain.quant.base import QTensor, dequantize
from posttrain.quant.engine_check import check_engine, unavailable
from posttrain.quant.export import write_quantized
from posttrain.quant.scheme import Scheme
from posttrain.quant.verify import check_bytes


def finish(
    ctx: StageContext,
    loaded: LoadedModel,
    tensors: dict[str, QTensor],
    scheme: Scheme,
    rows: list[dict[str, Any]],
    *,
    dtype: torch.dtype,
    export: Any,
) -> None:
    """Writes the export into `ctx.out`, checks it, evaluates it and fills summary and meta.

    Args:
        loaded: the float model, whose weights are already the quantized ones.
        tensors: layer name -> QTensor.
        rows: report row of each layer.
        dtype: type of the dense tensors.
        export: QuantExport.

    Raises:
        QuantError: what is on disk is not what is in memory.
    """
    from posttrain.eval.run import around

    model, tokenizer = loaded.model, loaded.tokenizer
    notes = [*scheme.notes, coverage_note(model, scheme)]
    for note in notes:
        ctx.events.log(note)
    facts = write_quantized(model, tokenizer, tensors, scheme, ctx.out, dtype=dtype, max_shard_gb=export.max_shard_gb)
    if export.reload_check:
        facts |= check_bytes(ctx.out, {name: dequantize(q).cpu().numpy() for name, q in tensors.items()}, facts["bits"])
        expected = probe_logits(model)
        loaded.model = model = None
        again, found = check_reload(ctx.out, expected, dtype="float32", trust_remote_code=ctx.trust_remote_code)
        facts |= found
        model = again.model
        facts |= _engine(ctx, model, facts["bits"], export.engine_check)
    around(ctx, "after", model, tokenizer)
    _report(ctx, loaded.dtype, facts, rows, notes)


def _engine(ctx: StageContext, model: Any, bits: int, wanted: str) -> dict[str, Any]:
    """The check by vLLM, where it is wanted and can be had."""
    if wanted == "off":
        return {}
    reason = unavailable(bits)
    if reason and wanted == "require":
        raise QuantError(
            f"the check by vLLM cannot be run: {reason}", where=f"stages.{ctx.name}.export.engine_check", fix="set it to `try` or `off`"
        )
    if reason:
        ctx.events.warn(f"not checked in vLLM: {reason}")
        return {"engine_check": {"engine": "vllm", "skipped": reason}}
    found = check_engine(ctx.out, model)
    ctx.events.log(
        f"vLLM agrees on {found['agree']:.0%} of {found['tokens']} tokens, log-probabilities within {found['max_logprob_diff']:.3g}"
        + (" (dense products: its 4-bit CPU kernel needs AVX-512)" if found["kernel"] == "dense" else "")
    )
    return {"engine_check": found}


def _report(ctx: StageContext, dtype: str, facts: dict[str, Any], rows: list[dict[str, Any]], notes: list[str]) -> None:
    before = facts["parameters"] * torch.finfo(getattr(torch, dtype)).bits // 8
    weight_error = sum(row["error"] for row in rows) / len(rows)
    ctx.meta.update({key: facts[key] for key in ("format", "bits", "group_size", "symmetric", "layout", "dtype", "loads_in")})
    ctx.summary.update(facts, size_bytes_before=before, weight_error=round(weight_error, 8), layers=rows, notes=notes)
    engines = ", ".join(name for name, ok in facts["loads_in"].items() if ok)
    ctx.events.log(
        f"{len(rows)} layers in {facts['bits']} bits ({facts['bits_per_weight']:.2f} with scales); "
        f"{before / 1e6:.2f} MB -> {facts['size_bytes'] / 1e6:.2f} MB; loads in {engines}"
    )

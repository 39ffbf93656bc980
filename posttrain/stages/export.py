"""`export`: any model of a chain as one plain folder that other tools load.

An adapter is merged into its base in float32, then everything is written in the type asked for. A quantized checkpoint
keeps its bytes (loading and saving it again would silently write float weights), unless `format: float` asks for its
dequantized weights.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from posttrain.config.base import REPORT_ONLY
from posttrain.config.common import StageConfig
from posttrain.core.context import StageContext
from posttrain.core.registry import model_port, stage


class ExportConfig(StageConfig):
    """Form of the exported folder."""

    format: Literal["auto", "float"] = "auto"
    """`auto`: a quantized checkpoint as it is, anything else merged float weights; `float`: dequantized too."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of float weights; `auto` is the type of the checkpoint that the chain began with."""
    max_shard_gb: Annotated[float, Field(gt=0)] = 5.0
    """Size of a weight file in GB."""
    reload_check: Annotated[bool, REPORT_ONLY] = True
    """Load the folder again and compare logits before it is committed."""


@stage("export", config=ExportConfig, inputs={"model": model_port()}, output="model")
def run(cfg: ExportConfig, ctx: StageContext) -> None:
    """Writes the folder, loads it again, compares."""
    import torch

    from posttrain.models.load import fetch, load_model
    from posttrain.models.merge import cast_weights
    from posttrain.models.reload import check_reload, probe_logits

    loaded = load_model(ctx.ref("model"), dtype="float32", trust_remote_code=ctx.trust_remote_code)
    keep = loaded.kind == "quantized" and cfg.format == "auto"
    facts = _copy(fetch(loaded.source).local, ctx.out) if keep else _save(loaded, cfg, ctx.out)
    if cfg.reload_check:
        expected = probe_logits(cast_weights(loaded.model, torch.float32))
        facts |= check_reload(ctx.out, expected, dtype="float32", trust_remote_code=ctx.trust_remote_code)[1]
    facts |= loaded.merge
    ctx.meta.update(facts)
    ctx.summary.update(facts)
    ctx.events.log(
        f"{loaded.kind} exported as {'quantized' if keep else facts['dtype']} weights, {facts['size_bytes'] / 1e6:.2f} MB, in {ctx.out}"
    )


def _copy(folder: Path, out: Path) -> dict[str, Any]:
    from posttrain.models.check import folder_bytes
    from posttrain.models.digest import model_files

    for file in model_files(folder):
        shutil.copyfile(file, out / file.name)
    return {"size_bytes": folder_bytes(out), "quantized": True}


def _save(loaded: Any, cfg: ExportConfig, out: Path) -> dict[str, Any]:
    import torch

    from posttrain.models.merge import cast_weights
    from posttrain.models.save import save_model

    dtype = loaded.dtype if cfg.dtype == "auto" else cfg.dtype
    cast_weights(loaded.model, getattr(torch, dtype))
    return save_model(loaded.model, loaded.tokenizer, out, max_shard_gb=cfg.max_shard_gb) | {"quantized": False}

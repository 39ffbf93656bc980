"""`export`: any model of a chain as one plain folder that other tools load.

An adapter is merged into its base in float32, then everything is written in the type asked for. A quantized checkpoint
keeps its bytes (loading and saving it again would silently write float weights), and so does one with an adapter over it,
which is copied beside it, unless `format: float` asks for float weights.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from posttrain.config.base import REPORT_ONLY
from posttrain.config.common import StageConfig
from posttrain.core.context import StageContext
from posttrain.core.registry import model_port, stage

if TYPE_CHECKING:
    from posttrain.models.source import Source


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
    source = fetch(loaded.source)
    over = quantized_base(source)
    keep = cfg.format == "auto" and (loaded.kind == "quantized" or over is not None)
    if keep:
        facts = _copy(source.local, ctx.out) if over is None else _copy_adapter(source.local, over, ctx.out)
    else:
        facts = _save(loaded, cfg, ctx.out)
    if cfg.reload_check:
        expected = probe_logits(cast_weights(loaded.model, torch.float32))
        facts |= check_reload(ctx.out, expected, dtype="float32", trust_remote_code=ctx.trust_remote_code)[1]
    facts |= loaded.merge
    ctx.meta.update(facts)
    ctx.summary.update(facts)
    ctx.events.log(
        f"{loaded.kind} exported as {'quantized' if keep else facts['dtype']} weights, {facts['size_bytes'] / 1e6:.2f} MB, in {ctx.out}"
    )


def quantized_base(source: Source) -> Path | None:
    """Folder of the quantized checkpoint that an adapter belongs to; None for an adapter over float weights, or no adapter."""
    from posttrain.models.load import fetch
    from posttrain.models.source import read_base, read_json

    if source.form != "adapter":
        return None
    base = fetch(read_base(source.local)[0])
    quantized = base.form == "folder" and "quantization_config" in read_json(base.local / "config.json")
    return base.local if quantized else None


def _copy_adapter(folder: Path, base: Path, out: Path) -> dict[str, Any]:
    """The adapter, and what it lies over in `base` beside it: merged, its weights would be float ones."""
    from posttrain.models.check import folder_bytes
    from posttrain.models.save import write_json
    from posttrain.models.source import ADAPTER_CONFIG, BASE_FILE, read_json

    facts = _copy(folder, out)
    (out / "base").mkdir()
    facts["size_bytes"] += _copy(base, out / "base")["size_bytes"]
    record = read_json(out / BASE_FILE) if (out / BASE_FILE).is_file() else {}
    write_json(out / BASE_FILE, {**record, "path": "base"})
    write_json(out / ADAPTER_CONFIG, {**read_json(out / ADAPTER_CONFIG), "base_model_name_or_path": "base"})
    return facts | {"size_bytes": folder_bytes(out) + folder_bytes(out / "base"), "adapter": True}


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

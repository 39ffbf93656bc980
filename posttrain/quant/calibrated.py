"""What all quantizers that look at text share: config fields, loading, the way through the blocks, the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from posttrain.config.base import REPORT_ONLY, Positive
from posttrain.config.common import StageEval
from posttrain.core.context import StageContext
from posttrain.errors import QuantError
from posttrain.quant.options import CalibrationConfig, QuantConfig

if TYPE_CHECKING:
    import torch

    from posttrain.quant.blocks import Blocks
    from posttrain.quant.calibration import Windows
    from posttrain.quant.closed_form import Grid
    from posttrain.quant.job import Job
    from posttrain.quant.scheme import Scheme
    from posttrain.quant.states import States
    from posttrain.quant.store import Store
    from posttrain.quant.walk import Plan


class CalibratedConfig(QuantConfig):
    """Fields of every quantizer that looks at text."""

    group_size: Annotated[int, Field(ge=-1)] = 64
    """Input columns that share a scale; -1 is one scale an output row. Where it does not divide a layer's inputs, that layer takes the
    next smaller power of two that does."""
    calibration: CalibrationConfig = CalibrationConfig()
    """Text that is fitted and text that judges."""
    first_blocks: Positive | None = None
    """Quantize only so many blocks from the first on, for a trial."""
    stream: bool | None = None
    """Read block after block from the checkpoint instead of loading the model. Default: where it would take more than 40 % of the free
    memory."""
    kl_windows: Annotated[int, Field(ge=0), REPORT_ONLY] = 4
    """Held-out windows on which KL to the float model is measured after every block; 0 = none. Not while streaming."""
    eval: StageEval = StageEval()
    """Evaluation around this stage; not while streaming."""


@dataclass
class Opened:
    """A model that is about to be quantized.

    Args:
        loaded: with its tokenizer; without weights in its blocks where they are streamed.
        blocks: of the model.
        weights: of the folder, where blocks are streamed.
    """

    loaded: Any
    blocks: Blocks
    weights: Any = None


def check(cfg: CalibratedConfig, folder: Path) -> None:
    """Refuses what can be told from the headers of the weight files."""
    from posttrain.quant.scheme import check_stored

    check_stored(folder, None, cfg.ignore, experts=cfg.export.format == "dequantized" or any("experts" in entry for entry in cfg.ignore))


def open_model(cfg: CalibratedConfig, ctx: StageContext) -> Opened:
    """The stage's model, whole or to be read block by block.

    Raises:
        QuantError: it is quantized already.
        ArtifactError: it cannot be loaded.
    """
    from posttrain.models.load import LoadedModel, checkpoint_dtype, default_device, fetch, load_model, load_tokenizer
    from posttrain.models.source import read_json, resolve_model
    from posttrain.quant.blocks import Blocks

    named = resolve_model(ctx.ref("model"))
    source = fetch(named, ctx.trust_remote_code)
    plain = source.form == "folder" and "quantization_config" not in read_json(source.local / "config.json")
    if cfg.stream and not plain:
        raise QuantError(
            "only a folder of float weights can be read block by block",
            where=f"stages.{ctx.name}.stream",
            fix="export the model first (posttrain export), or leave out `stream`",
        )
    if plain and (_too_large(source.local) if cfg.stream is None else cfg.stream):
        from posttrain.quant.stream import StreamedBlocks, Weights, empty_model

        weights = Weights(source.local)
        model = empty_model(source.local, weights, device=default_device(), trust_remote_code=ctx.trust_remote_code)
        tokenizer = load_tokenizer(source, trust_remote_code=ctx.trust_remote_code)
        loaded = LoadedModel(model, tokenizer, named, named, "model", checkpoint_dtype(source))
        ctx.events.log("the model is read block by block")
        return Opened(loaded, StreamedBlocks(model, weights), weights)
    loaded = load_model(ctx.ref("model"), dtype="float32", trust_remote_code=ctx.trust_remote_code)
    if loaded.kind == "quantized":
        raise QuantError(
            "the input is quantized already", where=f"stages.{ctx.name}.in.model", fix="give the float model that it was made from"
        )
    return Opened(loaded, Blocks(loaded.model))


def need_whole(opened: Opened, what: str) -> None:
    """Refuses a model that is read block by block.

    Raises:
        QuantError: says what needs all of it.
    """
    if opened.blocks.streamed:
        raise QuantError(
            f"the model is read block by block, since it is too large for the free memory, and {what} needs all of it",
            where="stream",
            fix="use a machine with more memory, set stream: false, or quantize with quantize.apiq without a Fisher",
        )


def _too_large(folder: Path) -> bool:
    from posttrain.quant.stream import too_large

    return too_large(folder)


def run_calibrated(
    cfg: CalibratedConfig,
    ctx: StageContext,
    fit: Callable[[Job, States], None],
    *,
    rank: int = 0,
    before: Callable[[Opened, Scheme, Windows], None] | None = None,
) -> None:
    """Quantizes the blocks of a model with `fit` and commits a checkpoint that has been read back.

    Args:
        cfg: of the stage.
        ctx: of the stage.
        fit: fills `job.fitted`; given the job and the states that the float block makes.
        rank: of every adapter; 0 = none.
        before: called with (model, scheme, calibration) while the model is still the float one.
    """
    from posttrain.quant.walk import Walk

    opened = open_model(cfg, ctx)
    dtype, scheme, windows, plan, transposed = prepared(cfg, ctx, opened, rank)
    if before is not None:
        before(opened, scheme, windows)
    store = Walk(opened.blocks, plan, windows, ctx.work, ctx.events, ctx.seed)(fit)
    complete(cfg, ctx, opened, store, scheme, dtype, transposed)


def prepared(
    cfg: CalibratedConfig, ctx: StageContext, opened: Opened, rank: int = 0
) -> tuple[torch.dtype, Scheme, Windows, Plan, frozenset[str]]:
    """(type of the export, scheme, calibration, uniform plan, layers stored as [in, out]); the model is evaluated before it changes."""
    import torch

    from posttrain.eval.run import around
    from posttrain.quant.apply import round_dense
    from posttrain.quant.calibration import load_windows
    from posttrain.quant.walk import Plan

    loaded, blocks = opened.loaded, opened.blocks
    dtype: torch.dtype = getattr(torch, loaded.dtype if cfg.export.dtype == "auto" else cfg.export.dtype)
    scheme, grids, transposed = plan_layers(cfg, blocks, dtype)
    longest = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    windows = load_windows(ctx, loaded.tokenizer, cfg.calibration, longest)
    if not blocks.streamed:
        around(ctx, "before", loaded.model, loaded.tokenizer)
        round_dense(loaded.model, dtype, scheme)
    states = torch.float32 if dtype == torch.float32 else torch.bfloat16
    plan = Plan(grids, dict.fromkeys(grids, rank), dtype, states, cfg.calibration.batch, cfg.kl_windows, cfg.first_blocks)
    return dtype, scheme, windows, plan, transposed


def complete(
    cfg: CalibratedConfig, ctx: StageContext, opened: Opened, store: Store, scheme: Scheme, dtype: torch.dtype, transposed: frozenset[str]
) -> None:
    """Exports what was fitted, with the report of every block and layer."""
    from posttrain.quant.finish import finish

    rows = [row for report in store.reports for row in report["layers"]]
    layers = {name: shape for name, shape in scheme.layers.items() if name in store}
    scheme = replace(scheme, layers=layers, dense=_dense({*scheme.dense, *scheme.layers} - set(layers)))
    ctx.summary["blocks"] = [{key: value for key, value in report.items() if key not in ("layers", "forms")} for report in store.reports]
    dense = opened.weights.dense(set(store)) if opened.blocks.streamed else None
    held = transposed & set(store)
    finish(ctx, opened.loaded, store, scheme, rows, dtype=dtype, export=cfg.export, transposed=held, dense=dense)


def _dense(names: set[str]) -> tuple[str, ...]:
    """Linear layers only: experts that stay dense are one tensor, which no config names."""
    from posttrain.quant.experts import stacks

    piled = {name for experts in stacks(dict.fromkeys(names)).values() for name in experts}
    return tuple(sorted(names - piled))


def plan_layers(cfg: CalibratedConfig, blocks: Blocks, dtype: Any) -> tuple[Scheme, dict[str, Grid], frozenset[str]]:
    """(scheme, layer name -> grid, layers stored as [in, out]).

    Raises:
        QuantError: nothing to quantize, or layers that the format cannot hold.
    """
    import torch

    from posttrain.quant.apply import output_name
    from posttrain.quant.closed_form import Grid
    from posttrain.quant.experts import expert_layers
    from posttrain.quant.export import Form, check_forms
    from posttrain.quant.layers import linear_layers
    from posttrain.quant.scheme import own_groups, parallel_note, plan_scheme

    layers = linear_layers(blocks.model)
    ignore = cfg.ignore
    if any(parameter.ndim == 3 for parameter in blocks.model.parameters()):
        try:
            layers += expert_layers(blocks.model)
        except QuantError:
            ignore = [entry for entry in cfg.ignore if "experts" not in entry]
            if ignore == cfg.ignore:
                raise
    shapes = {layer.name: layer.shape for layer in layers}
    count = min(cfg.first_blocks or len(blocks), len(blocks))
    inside = tuple(f"{blocks.name(index)}." for index in range(count))
    outside = frozenset(name for name in shapes if not name.startswith(inside))
    scheme = plan_scheme(shapes, group_size=None, ignore=ignore, output=output_name(blocks.model), outside=outside)
    groups, notes = own_groups(scheme.layers, cfg.group_size)
    grids = {name: Grid(cfg.bits, groups[name], cfg.is_symmetric, True, dtype) for name in scheme.layers}
    transposed = frozenset(layer.name for layer in layers if layer.transposed and layer.name in grids)
    plain = [layer for layer in layers if layer.name in grids and layer.expert is None]
    other = next((layer for layer in plain if type(layer.module) is not torch.nn.Linear), None)
    stacked = next((layer.name for layer in layers if layer.name in grids and layer.expert is not None), None)
    if stacked is not None and cfg.export.format != "dequantized":
        raise QuantError(
            f"the experts of this mixture are stacked tensors (first {stacked}), which transformers does not read in packed form",
            where="export.format",
            fix="use export.format: dequantized, or leave them dense: ignore: ['re:.*experts.*']",
        )
    if other is not None and cfg.export.format != "dequantized":
        raise QuantError(
            f"{other.name} is a {type(other.module).__name__}; engines read packed weights of plain linear layers only",
            where="export.format",
            fix="use export.format: dequantized",
        )
    check_forms(
        {name: Form(scheme.layers[name], grid.bits, grid.group_size, grid.symmetric, 16) for name, grid in grids.items()}, cfg.export.format
    )
    return replace(scheme, notes=(*scheme.notes, *notes, parallel_note(scheme.layers, groups))), grids, transposed

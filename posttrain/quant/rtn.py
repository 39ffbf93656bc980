"""`quantize.rtn`: group-wise round to nearest, without calibration data.

The cheapest method and the yardstick of all others: at 4 bits and 64 columns a group it costs little, at 2 bits it ruins
most models. See `quant/base.py` for the maths. The export is read back and compared before it is committed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.core.context import StageContext
from posttrain.core.registry import model_port, stage
from posttrain.errors import QuantError
from posttrain.quant.options import QuantConfig


class RtnConfig(QuantConfig):
    """Round to nearest. `group_size` must divide the input size of each layer."""

    mse: bool = True
    """Search the range of each group that minimises its squared error."""


def check(cfg: RtnConfig, folder: Path) -> None:
    """Refuses a group size that does not divide the layers of the model in `folder`."""
    from posttrain.quant.scheme import check_stored

    check_stored(folder, cfg.group_size, cfg.ignore)


@stage(
    "quantize.rtn",
    version=2,
    config=RtnConfig,
    inputs={"model": model_port(kinds=("model", "adapter"))},
    output="quantized",
    evals=True,
    check=check,
)
def run(cfg: RtnConfig, ctx: StageContext) -> None:
    """Quantizes the linear layers of a model and commits a checkpoint that has been read back."""
    import torch

    from posttrain.eval.run import around
    from posttrain.models.load import load_model
    from posttrain.quant.apply import linear_shapes, output_name, quantize_model, round_dense
    from posttrain.quant.base import quantize_rtn
    from posttrain.quant.closed_form import Fitted
    from posttrain.quant.finish import finish
    from posttrain.quant.scheme import check_experts, plan_scheme

    loaded = load_model(ctx.ref("model"), dtype="float32", trust_remote_code=ctx.trust_remote_code)
    if loaded.kind == "quantized":
        raise QuantError(
            "the input is quantized already", where=f"stages.{ctx.name}.in.model", fix="give the float model that it was made from"
        )
    model = loaded.model
    check_experts([name for name, parameter in model.named_parameters() if parameter.ndim == 3])
    scheme = plan_scheme(linear_shapes(model), group_size=cfg.group_size, ignore=cfg.ignore, output=output_name(model))
    dtype = getattr(torch, loaded.dtype if cfg.export.dtype == "auto" else cfg.export.dtype)
    around(ctx, "before", model, loaded.tokenizer)

    def fit(name: str, weight: Any) -> Any:
        return quantize_rtn(weight, cfg.bits, cfg.group_size, cfg.is_symmetric, mse=cfg.mse, scale_dtype=dtype, name=name)

    round_dense(model, dtype, scheme)
    tensors, rows = quantize_model(model, scheme, fit, ctx.events)
    finish(ctx, loaded, {name: Fitted(q) for name, q in tensors.items()}, scheme, rows, dtype=dtype, export=cfg.export)

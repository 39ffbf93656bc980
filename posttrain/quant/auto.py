"""`quantize.auto`: bits, group and rank of every layer, chosen within a budget.

A few backward passes of the float model tell what an output error of each layer costs the loss; each kind of storage is
tried on each layer, its error measured on held-out text; the best choice within the budget is fitted as `quantize.apiq`
fits (`closed_form`). The best uniform choice within the same budget is fitted too, and the one of lower held-out KL is kept.
See `quant/measure.py` and `quant/budget.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from posttrain.config.base import Positive
from posttrain.core.context import StageContext
from posttrain.core.registry import data_port, model_port, stage
from posttrain.quant.apiq import ApiqConfig
from posttrain.quant.calibrated import check

if TYPE_CHECKING:
    from posttrain.quant.measure import Kind


class AutoConfig(ApiqConfig):
    """A budget instead of bits; `group_size` and `rank` are chosen too."""

    bits_per_weight: Annotated[float, Field(gt=2, le=16)] | None = None
    """Budget: bits a quantized weight with scales, zero points and adapter."""
    mib: Annotated[float, Field(gt=0)] | None = None
    """Budget: MiB of all quantized layers with their adapters, in place of bits_per_weight."""
    widths: list[Annotated[int, Field(ge=2, le=8)]] = [2, 3, 4, 8]
    """Widths to choose from: 2, 3, 4, 8."""
    groups: list[Annotated[int, Field(ge=8)]] = [32, 64, 128]
    """Group sizes to choose from."""
    ranks: list[Annotated[int, Field(ge=0)]] = [0, 8, 16]
    """Ranks to choose from; [0] = no adapter."""
    gradients: Positive = 16
    """Calibration windows behind the sensitivity of the layers."""
    against_uniform: bool = True
    """Fit the best uniform choice too, and keep the better one; twice the time."""

    @model_validator(mode="after")
    def _budget(self) -> AutoConfig:
        fields = type(self).model_fields
        chosen = [name for name in ("bits", "group_size", "rank") if getattr(self, name) != fields[name].default]
        if chosen:
            raise ValueError(f"quantize.auto chooses {', '.join(chosen)}; name what to choose from in widths, groups and ranks")
        if (self.bits_per_weight is None) == (self.mib is None):
            raise ValueError("give a budget: either bits_per_weight or mib")
        if self.export.format in ("gptq", "awq"):
            raise ValueError(f"export.format: {self.export.format} holds one width; use compressed-tensors")
        if set(self.widths) - {2, 3, 4, 8} or not self.widths or not self.groups or not self.ranks:
            raise ValueError("widths are of 2, 3, 4, 8; widths, groups and ranks hold at least one choice each")
        if self.fit != "closed_form" or self.saliency.kind != "off" or self.parts != ("lora",):
            raise ValueError("quantize.auto fits by closed_form; leave out fit, train and saliency")
        if self.stream:
            raise ValueError("stream: the sensitivities need the whole model in memory; use quantize.apiq")
        if self.against_uniform and not self.kl_windows:
            raise ValueError("against_uniform compares by KL; set kl_windows above 0")
        return self

    def possible_widths(self) -> list[int]:
        """`widths`; `bits` is not used."""
        return list(self.widths)


@stage(
    "quantize.auto",
    config=AutoConfig,
    inputs={"model": model_port(kinds=("model", "adapter")), "data": data_port("text", "messages", "verifiable")},
    output="quantized",
    evals=True,
    check=check,
)
def run(cfg: AutoConfig, ctx: StageContext) -> None:
    """Chooses, fits, compares, and commits a checkpoint that has been read back."""
    from posttrain.quant.auto_run import run_auto

    run_auto(cfg, ctx)


def kinds_for(cfg: AutoConfig, columns: int) -> list[Kind]:
    """What a layer with so many inputs may become."""
    from posttrain.quant.measure import Kind

    sizes = [size for size in cfg.groups if columns % size == 0] or [-1]
    return [Kind(bits, size, cfg.symmetric_at(bits), rank) for bits in cfg.widths for size in sizes for rank in cfg.ranks]

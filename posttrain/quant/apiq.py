"""`quantize.apiq`: codes and low-rank adapters fitted together (ApiQ, arXiv 2402.05147), and our start without gradients.

| fit | what | source |
|---|---|---|
| `lw` | every linear layer by itself, from second moments of its inputs; no tokens in the loop | ApiQ, layer-wise |
| `bw` | every block against what the float block computes | ApiQ, block-wise |
| `closed_form` | GPTQ codes on the unconstrained optimum and the best low rank, alternated; A and B polished by block | ours |

Every choice (ridge, round, method, pass) is made by the error on held-out text; the report shows it beside the fitted one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from posttrain.config.base import Positive, Strict
from posttrain.core.context import StageContext
from posttrain.core.registry import data_port, model_port, stage
from posttrain.quant.calibrated import CalibratedConfig, check, run_calibrated

if TYPE_CHECKING:
    from posttrain.quant.reconstruct import Training

Part = Literal["clip", "scale", "lora", "weights"]
Rate = Annotated[float, Field(gt=0, le=1)]


class Rates(Strict):
    """Learning rates of what is trained."""

    clip: Rate = 5e-3
    """gamma and beta; the paper's."""
    scale: Rate = 1e-4
    """Scales of frozen codes, relative to their size."""
    lora: Rate = 5e-4
    """A and B; the paper's. From zero a short run wants more (2e-3), a polish 1e-3."""
    weights: Rate = 1e-5
    """The weights that are rounded; EfficientQAT's range is 1e-5 to 2e-5."""


class Saliency(Strict):
    """A penalty on moving salient weights (arXiv 2504.13932)."""

    kind: Literal["off", "fisher", "weight-activation", "both"] = "off"
    """`fisher`: mean squared gradient of the language-model loss (diagonal empirical Fisher); `weight-activation`: (w_ij ||x_j||)^2;
    `both`: their mean. Each is divided by its mean over the layer."""
    weight: Annotated[float, Field(gt=0)] = 0.1
    """Share of the block's first loss that the penalty amounts to at the first step."""
    samples: Positive = 32
    """Calibration windows behind the Fisher."""
    place: Literal["before_adapter", "after_adapter"] = "before_adapter"
    """Whether Q or Q + BA is held near W; before the adapter is the published way."""
    stages: list[Literal["penalty", "mixed", "loss"]] = ["mixed"]
    """Parts of a block's training in order, of equal length: the penalty alone, both terms, the loss alone. The published order is
    [penalty, mixed, loss]."""


class ApiqConfig(CalibratedConfig):
    """ApiQ."""

    bits: Literal[2, 3, 4, 8] = 2
    """Width of a code."""
    rank: Annotated[int, Field(ge=0)] = 16
    """Rank of the adapter; 0 = none. It is stored in the type of the export, and counts: see `total_bits_per_weight`."""
    fit: Literal["lw", "bw", "closed_form"] = "closed_form"
    """See the module."""
    start: Literal["zero", "loftq", "closed_form"] | None = None
    """What `lw` and `bw` begin with; `zero` is the paper's (A random, B zero). Default: zero."""
    train: list[Part] | None = None
    """What is trained. Default: clip and lora for `lw` and `bw`, lora after `closed_form`. `weights` trains the rounded weights
    themselves by block (EfficientQAT); `scale` the scales of frozen codes."""
    epochs: Annotated[int, Field(ge=0)] | None = None
    """Passes over the calibration windows of a block, or steps / 10 of `lw`. Default: 20 for `lw` and `bw` (the paper's), 4 after
    `closed_form`; 0 = no training."""
    batch: Positive = 1
    """Windows a step; the paper's 1."""
    lr: Rates | None = None
    """Learning rates. Default: the paper's; after `closed_form` 1e-3 for A and B."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Of clip and lora. Default: 0.1 (the paper's; it draws the clipping in over thousands of steps), 0 after `closed_form`."""
    schedule: Literal["constant", "linear"] | None = None
    """Of the learning rates. Default: constant (the paper's), linear to 0 after `closed_form`."""
    augmented: bool | None = None
    """Also match what the float block makes of the quantized model's states. Default: true for `bw` (the paper's), false otherwise."""
    bfloat16: bool | None = None
    """Matrix products of the training in bfloat16. Default: where the model is on a GPU."""
    patience: Annotated[int, Field(ge=0)] = 2
    """Stop a block after so many passes without a better held-out error; 0 = never."""
    saliency: Saliency = Saliency()
    """Penalty on moving salient weights; for `bw` and the training after `closed_form`."""
    guard: list[Literal["closed_form", "gptq", "rtn"]] = ["closed_form", "gptq", "rtn"]
    """Other results that a layer (`closed_form`, `lw`) or a block (`bw`) falls back to where their held-out error is lower."""

    @model_validator(mode="after")
    def _fits_together(self) -> ApiqConfig:
        parts = self.parts
        if self.fit == "closed_form" and self.start is not None:
            raise ValueError("start: closed_form fits without one; leave it out, or choose fit: bw or lw")
        if "scale" in parts and ("clip" in parts or "weights" in parts):
            raise ValueError("train: scale trains frozen codes, clip and weights move the codes; choose one of the two")
        if self.fit == "lw" and ("weights" in parts or "scale" in parts):
            raise ValueError("fit: lw trains clip and lora only; use fit: bw")
        if self.rank == 0 and parts == ("lora",) and self.passes:
            raise ValueError("rank: 0 leaves nothing to train; set epochs: 0, or train: [scale]")
        if self.saliency.kind != "off" and (self.fit == "lw" or not self.passes):
            raise ValueError("saliency needs training by block: fit: bw, or closed_form with epochs above 0")
        if self.saliency.kind != "off" and self.saliency.place == "before_adapter" and not {"clip", "weights", "scale"} & set(parts):
            raise ValueError("saliency.place: before_adapter acts on the codes, and train leaves them as they are; use after_adapter")
        if self.saliency.kind in ("fisher", "both") and self.stream:
            raise ValueError("saliency: the Fisher needs the whole model in memory; use weight-activation, or stream: false")
        return self

    @property
    def parts(self) -> tuple[str, ...]:
        """`train`, with its default."""
        default = ("lora",) if self.fit == "closed_form" else ("clip", "lora")
        return tuple(self.train) if self.train is not None else default

    @property
    def passes(self) -> int:
        """`epochs`, with its default."""
        if self.epochs is not None:
            return self.epochs
        return 20 if self.fit != "closed_form" else 4 if self.rank or self.parts != ("lora",) else 0

    def training(self) -> Training:
        """How blocks are trained."""
        from posttrain.quant.reconstruct import Training

        polish = self.fit == "closed_form"
        rates = self.lr or Rates(lora=1e-3 if polish else 5e-4)
        decay = self.weight_decay if self.weight_decay is not None else 0.0 if polish else 0.1
        return Training(
            train=self.parts,
            epochs=self.passes,
            batch=self.batch,
            lr=rates.model_dump(),
            decay={"clip": decay, "lora": decay},
            augmented=self.augmented if self.augmented is not None else self.fit == "bw",
            schedule=self.schedule or ("linear" if polish else "constant"),
            patience=self.patience,
            shuffle=polish,
            bfloat16=self.bfloat16,
        )


@stage(
    "quantize.apiq",
    config=ApiqConfig,
    inputs={"model": model_port(kinds=("model", "adapter")), "data": data_port("text", "messages", "verifiable")},
    output="quantized",
    evals=True,
    check=check,
)
def run(cfg: ApiqConfig, ctx: StageContext) -> None:
    """Fits codes and adapters to calibration text and commits a checkpoint that has been read back."""
    from posttrain.quant.fit_block import BlockFit

    fit = BlockFit(cfg, ctx)
    run_calibrated(cfg, ctx, fit, rank=cfg.rank, before=fit.prepare)

"""Hyperfitting (Carlsson et al., ICLR 2025, arXiv 2412.04318): next-token loss brought near zero on a few thousand blocks of text.

Held-out loss becomes much worse, yet greedy continuations repeat themselves far less: a low training loss forces the right
token to the top whatever the probabilities say. It is plain SFT on blocks of `sequence_length` tokens with a constant learning
rate, no decay and no dropout (verified on modules); what this stage adds are the blocks, the published metrics after every
epoch, and rules of when to stop and which weights to keep. The authors advise against it as a blind step of a pipeline, and
so do we: sampling afterwards is nearly greedy, and reinforcement finds nothing to explore.

Metrics are those of the released code: greedy continuations of `contexts` held-out blocks from their first `context_tokens`
tokens to their full length; `ttr` is the type-token ratio of the last `window` generated tokens, `ttr_first` of the first (the
paper does not say which), `entropy` the mean over all held-out positions of -sum p ln(p + 1e-9), `overlap` the share of
positions whose top token is that of the model before. Besides: `rep4`, `distinct2`, `match` (longest run of tokens that the
training blocks hold as well, mean over continuations), `ended` (continuations that ended early), `loss` and `accuracy`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from posttrain.config.base import Positive
from posttrain.config.common import BatchConfig
from posttrain.config.optim import OptimConfig
from posttrain.core.context import StageContext
from posttrain.core.registry import data_port, model_port, stage
from posttrain.trainers._supervised import SupervisedConfig


class HyperfitStage(SupervisedConfig):
    """Fields of `method: hyperfit`; defaults are the paper's."""

    repeats_meant: ClassVar[bool] = True

    method: Literal["hyperfit"] = "hyperfit"
    """Hyperfitting."""
    samples: Positive = 2000
    """Blocks of training text."""
    sequence_length: Annotated[int, Field(ge=2)] = 256
    """Tokens of a block; one is the beginning of each row that is long enough."""
    validation: Positive = 128
    """Further blocks, held out; metrics are measured on them."""
    contexts: Positive = 32
    """Of these, how many are continued."""
    context_tokens: Positive = 32
    """Tokens of a continued block that are given."""
    window: Positive = 96
    """Generated tokens of which the type-token ratio is taken."""
    target_loss: Annotated[float, Field(ge=0)] | None = 0.1
    """Training stops after an epoch whose mean training loss is below it; ours, the paper has a fixed number of epochs."""
    target_entropy: Annotated[float, Field(ge=0)] | None = None
    """Training stops after an epoch where the held-out entropy is below it."""
    keep: Literal["last", "ttr"] = "last"
    """Weights that are committed: the last, or those of the epoch with the largest type-token ratio."""
    max_loss_ratio: Annotated[float, Field(gt=1)] | None = None
    """With `keep: ttr`: only epochs whose held-out loss is at most so many times that of the model before count."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the blocks; 20 where neither this nor `steps` is given."""
    batch: BatchConfig = BatchConfig(rows=8)
    """Global batch."""
    optim: OptimConfig = OptimConfig(lr=1e-6, schedule="constant", warmup=0.0)
    """Optimizer; about 1e-4 with LoRA."""

    @model_validator(mode="before")
    @classmethod
    def _twenty(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("steps") is None and data.get("epochs") is None:
            return {**data, "epochs": 20.0}
        return data

    @model_validator(mode="after")
    def _recipe(self) -> HyperfitStage:
        if self.data.packing or self.data.group_by_length or self.data.weights != "ignore" or self.data.add_tokens:
            raise ValueError("data.packing, group_by_length, weights and add_tokens do nothing here; remove them")
        if self.dropout or (self.lora is not None and self.lora.dropout):
            raise ValueError("hyperfitting has no dropout; remove dropout and lora.dropout")
        if self.trl.get("neftune_noise_alpha"):
            raise ValueError("hyperfitting has no noise; remove trl.neftune_noise_alpha")
        if self.context_tokens + self.window > self.sequence_length:
            raise ValueError(f"context_tokens + window exceed sequence_length {self.sequence_length}")
        if self.max_loss_ratio is not None and self.keep != "ttr":
            raise ValueError("max_loss_ratio goes with keep: ttr")
        if self.keep == "ttr" and (self.commit.best is not None or self.guard is not None):
            raise ValueError("keep: ttr chooses the weights; remove commit.best and guard")
        return self

    @property
    def part(self) -> tuple[int, int]:
        """Blocks, and their tokens."""
        return self.samples, self.sequence_length

    @property
    def stops_itself(self) -> bool:
        """A target may end the run."""
        return self.target_loss is not None or self.target_entropy is not None

    @property
    def keeps_best(self) -> bool:
        """The weights of one epoch are committed."""
        return self.keep == "ttr"


@stage(
    "hyperfit",
    config=HyperfitStage,
    inputs={"model": model_port(), "data": data_port("text")},
    output="model",
    evals=True,
    estimate=lambda cfg: {"tokens": cfg.samples * cfg.sequence_length * cfg.epochs} if cfg.epochs else {},
)
def run(cfg: HyperfitStage, ctx: StageContext) -> None:
    """Trains `ctx.inputs["model"]` on blocks of the texts `ctx.inputs["data"]`."""
    from posttrain.trainers._hyperfit import run_hyperfit

    run_hyperfit(cfg, ctx)


def __getattr__(name: str) -> Any:
    if name == "HyperfitTrainer":
        from posttrain.trainers._hyperfit import HyperfitTrainer

        return HyperfitTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

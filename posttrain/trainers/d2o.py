"""Alignment from unwanted answers alone: D2O (Duan et al., EMNLP Findings 2024, arXiv 2403.03419).

For each prompt the model writes K answers of its own; training raises them, on average, over the unwanted answer, each side
measured against a reference:

    L = -log sigma( beta/K sum_i [log pi(y_i) - log pi_r-(y_i)] - alpha [log pi(y_l) - log pi_r+(y_l)] )

Rows are `preference` (the rejected answer is the unwanted one, the chosen one is not used) or `messages` (the last assistant turn
is unwanted). Own answers come from the port `samples` (a `generate` stage on the same rows), or are drawn before the first
step; with `self_samples.every` they are drawn anew from the present policy, which with `reference: policy` becomes the
reference as well. Own answers and the reference's log-probabilities lie beside the model, as `self_samples.jsonl` and
`references.safetensors`.

With `rows_per_pass` the backward pass goes through so many answers at a time: a first pass without gradient gives every
answer's weight in the loss, a second one sums weight * log pi; the gradient is the same and the memory that of these answers.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from posttrain.config.base import Positive, Strict
from posttrain.config.common import TrainConfig
from posttrain.core.context import StageContext
from posttrain.core.registry import Port, data_port, model_port, stage


class SelfSamples(Strict):
    """The model's own answers."""

    k: Positive = 11
    """Answers a prompt."""
    temperature: Annotated[float, Field(gt=0, le=2)] = 0.9
    """Of sampling."""
    max_tokens: Positive = 256
    """Longest answer."""
    templates: Annotated[list[str], Field(min_length=1)] = ["{prompt}"]
    """What the model is asked when it answers, in turn over the K answers; `{prompt}` is the last user turn. The loss has the prompt
    itself, so that e.g. "Answer harmlessly: {prompt}" gives harmless answers to prompts."""
    every: Positive | None = None
    """Draw anew from the present policy every so many steps; none = once, before the first step."""
    batch: Positive = 64
    """Answers in one pass."""

    @field_validator("templates")
    @classmethod
    def _holds(cls, value: list[str]) -> list[str]:
        for template in value:
            if template.count("{prompt}") != 1:
                raise ValueError(f"a template holds {{prompt}} exactly once, got {template!r}")
        return value


class D2OStage(TrainConfig):
    """Fields of `method: d2o`."""

    method: Literal["d2o"] = "d2o"
    """Alignment from unwanted answers."""
    loss: Literal["d2o", "unlikelihood"] = "d2o"
    """`unlikelihood`: the mean of -log(1 - p) over the unwanted answer's tokens, for comparison; it has no own answers."""
    alpha: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the unwanted answer."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Weight of the own answers."""
    length_normalise: bool = False
    """Mean instead of sum over an answer's tokens; published is the sum."""
    self_samples: SelfSamples = SelfSamples()
    """Own answers."""
    reference: Literal["input", "policy"] = "input"
    """`input`: the stage's input model throughout; `policy`: with `self_samples.every`, the policy that drew the answers."""
    rows_per_pass: Positive | None = None
    """Answers in one forward pass, by the exact two-pass gradient; none = all of a micro-batch at once."""
    max_self_drop: Annotated[float, Field(gt=0)] | None = 0.5
    """Training stops where the own answers' log-probability has fallen, per token, so far below the reference's, on average over 10
    steps; none = never."""

    @model_validator(mode="after")
    def _consistent(self) -> D2OStage:
        if self.reference == "policy" and self.self_samples.every is None:
            raise ValueError("reference: policy needs self_samples.every, or it never moves")
        if self.data.packing or self.data.group_by_length or self.data.weights != "ignore" or self.data.add_tokens:
            raise ValueError("data.packing, group_by_length, weights and add_tokens do nothing here; remove them")
        if self.batch.tokens is not None:
            raise ValueError("batch.tokens does nothing here; give batch.rows, the prompts of a step")
        if self.dropout:
            raise ValueError("dropout must be off, since the references have none; remove it")
        return self

    @property
    def stops_itself(self) -> bool:
        """`max_self_drop` may end the run."""
        return self.max_self_drop is not None and self.loss == "d2o"


SAMPLES = Port(("rollouts",), optional=True)


@stage(
    "d2o",
    config=D2OStage,
    inputs={
        "model": model_port(),
        "data": data_port("preference", "messages"),
        "samples": SAMPLES,
        "helpful": model_port(optional=True, kinds=("model",)),
        "harmful": model_port(optional=True, kinds=("model",)),
    },
    output="model",
    evals=True,
)
def run(cfg: D2OStage, ctx: StageContext) -> None:
    """Trains `ctx.inputs["model"]` away from the unwanted answers of `ctx.inputs["data"]`."""
    from posttrain.trainers._d2o import run_d2o

    run_d2o(cfg, ctx)


def __getattr__(name: str) -> Any:
    if name == "D2OTrainer":
        from posttrain.trainers._d2o import D2OTrainer

        return D2OTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

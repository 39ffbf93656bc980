"""Methods that only tests know: declarations of the usual shapes with bodies that do nothing.

Importing this module registers them, so `--plugin testonly_methods` works. A test module calls `hide()` after the import
and registers `METHODS` by a fixture, so that other tests do not see them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from posttrain.config.base import Positive, Strict
from posttrain.config.common import SplitConfig, StageConfig, StageEval, TrainConfig
from posttrain.core import registry
from posttrain.core.registry import data_port, model_port, stage


class PickConfig(StageConfig):
    """Selects rows."""

    rows: Positive
    """Rows to keep."""


class TasksConfig(StageConfig):
    """Makes rows."""

    rows: Positive = 10
    """Rows to make."""
    split: SplitConfig = SplitConfig()
    """Held-out shares."""


class RolloutConfig(Strict):
    """Sampling."""

    engine: Literal["hf", "vllm"] = "hf"
    """Engine."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature."""
    regex: str | None = None
    """Constraint."""


class RewardItem(Strict):
    """One reward."""

    use: str
    """Its name."""
    weight: float = 1.0
    """Its factor."""


class RlConfig(TrainConfig):
    """Reinforces."""

    group: Annotated[int, Field(ge=2)] = 4
    """Completions a prompt; at least 2, since the advantage needs a spread."""
    rollout: RolloutConfig = RolloutConfig()
    """Sampling."""
    rewards: list[RewardItem] = []
    """Rewards."""


class QuantConfig(StageConfig):
    """Quantizes."""

    bits: Literal[2, 3, 4, 8] = 4
    """Bits a weight."""
    group_size: Positive = 64
    """Columns a scale."""
    symmetric: bool = True
    """No zero point."""
    eval: StageEval = StageEval()
    """Evaluation."""


def _rows(cfg: Any, rows: dict[str, str]) -> str:
    return rows["raw"]


@stage("testonly.pick", config=PickConfig, inputs={"raw": data_port(), "target": data_port(optional=True)}, output="dataset", rows=_rows)
def pick(cfg: PickConfig, ctx: Any) -> None:
    """Nothing."""


@stage("testonly.tasks", config=TasksConfig, output="dataset", rows="verifiable")
def tasks(cfg: TasksConfig, ctx: Any) -> None:
    """Nothing."""


@stage(
    "testonly.train",
    config=TrainConfig,
    inputs={"model": model_port(), "data": data_port("messages", "text", "verifiable")},
    output="model",
    evals=True,
)
def train(cfg: TrainConfig, ctx: Any) -> None:
    """Nothing."""


@stage(
    "testonly.rl", config=RlConfig, inputs={"model": model_port(), "data": data_port("verifiable", many=False)}, output="model", evals=True
)
def rl(cfg: RlConfig, ctx: Any) -> None:
    """Nothing."""


@stage(
    "testonly.quant", config=QuantConfig, inputs={"model": model_port(), "calib": data_port(optional=True)}, output="quantized", evals=True
)
def quant(cfg: QuantConfig, ctx: Any) -> None:
    """Nothing."""


@stage("testonly.eval", config=QuantConfig, inputs={"model": model_port()}, output="eval")
def measure(cfg: QuantConfig, ctx: Any) -> None:
    """Nothing."""


METHODS = {name: found for name, found in registry._METHODS.items() if name.startswith("testonly.")}


def hide() -> None:
    """Takes the methods out of the registry again."""
    for name in METHODS:
        registry._METHODS.pop(name, None)


BASE = """\
version: 1
name: base
seed: 3
model: {id: ./tiny}
sources:
  chat: {kind: messages, path: data/d.jsonl, split: {validation: 0.1}}
  tasks: {kind: verifiable, path: data/m.jsonl, answer: final, split: {validation: 0.1, test: 0.1}}
eval:
  sets:
    tasks-val: {from: 'tasks:validation', metrics: [loss, accuracy]}
    tasks-test: {from: 'tasks:test', metrics: [accuracy]}
stages:
  - name: picked
    method: testonly.pick
    in: {raw: chat}
    rows: 100
  - name: sft
    method: testonly.train
    in: {data: [picked, {from: tasks, repeat: 0.5}]}
    steps: 10
    optim: {lr: 1e-5, warmup: 0.1}
    batch: {rows: 8}
  - name: rl
    method: testonly.rl
    in: {data: tasks}
    group: 4
    steps: 2
    rollout: {engine: hf, temperature: 0.7}
    commit: {best: {metric: tasks-val.accuracy, every: 1}}
  - name: small
    method: testonly.quant
    bits: 4
"""
"""A valid pipeline that bad ones are made from by one replacement."""

"""Cheap stages for tests of planning, launching and committing; `--plugin core_methods` with this folder on the path.

`core.make` writes rows, `core.use` reads them. What goes wrong, and when, is said by a file named in $CORE_TROUBLE (JSON:
stage name -> action), so that a stage can fail once and then be run again under the same key.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

from posttrain.config.base import REPORT_ONLY, Positive
from posttrain.config.common import SplitConfig, StageConfig, StageEval
from posttrain.core import registry
from posttrain.core.registry import data_port, model_port, stage
from posttrain.errors import DataError, NumericsError, Preempted, RewardError


class MakeConfig(StageConfig):
    """Rows to write."""

    rows: Positive = 4
    """How many."""
    note: str = ""
    """Enters the rows."""
    chatty: Annotated[Positive, REPORT_ONLY] = 1
    """Changes nothing."""
    split: SplitConfig = SplitConfig()
    """Held-out shares."""


class UseConfig(StageConfig):
    """Reads rows."""

    factor: float = 1.0
    """Enters the output."""
    eval: StageEval = StageEval()
    """Evaluation."""


ERRORS = {
    "numerics": NumericsError("loss is nan at step 3", fix="lower optim.lr"),
    "data": DataError("no rows", where="rows.jsonl:3", fix="mend the row"),
    "reward": RewardError("reward `exact` failed on 9 of 10 completions"),
    "preempted": Preempted("stopped at step 4"),
    "bare": KeyError("surprise"),
    "memory": MemoryError(),
    "system-exit": SystemExit(7),
}


def trouble(name: str, ctx: Any) -> None:
    """Does what $CORE_TROUBLE says for this stage."""
    path = os.environ.get("CORE_TROUBLE")
    action = json.loads(Path(path).read_text()).get(name) if path and Path(path).is_file() else None
    if action in ERRORS:
        raise ERRORS[action]
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "disk":
        (ctx.out / "big").write_bytes(b"0" * (8 << 20))
    if action == "print":
        print("a line for the log", file=sys.stderr)
    if action == "hang":
        ctx.events.log("hanging")
        while True:
            time.sleep(0.05)
    if action in ("rank1", "kill-rank1"):
        if ctx.world.rank == 0:
            time.sleep(60)
        if action == "rank1":
            raise NumericsError("grad is nan on rank 1")
        os.kill(os.getpid(), signal.SIGKILL)


@stage("core.make", config=MakeConfig, output="dataset", rows="text")
def make(cfg: MakeConfig, ctx: Any) -> None:
    """Writes `rows` rows; $CORE_SALT makes the bytes depend on something outside the key."""
    from posttrain.data.dataset import write_dataset

    trouble(ctx.name, ctx)
    salt = os.environ.get("CORE_SALT", "")
    rows = [{"id": str(i), "text": f"row {i} {cfg.note} {salt} {ctx.seed}"} for i in range(cfg.rows)]
    write_dataset(rows, ctx.out, "text", suffix=".jsonl")
    ctx.events.progress("rows", cfg.rows, cfg.rows, "rows")
    ctx.meta.update(row_type="text", rows=cfg.rows, split=cfg.split.dump())
    ctx.summary.update(rows_out=cfg.rows)


@stage("core.use", config=UseConfig, inputs={"data": data_port("text")}, output="report", evals=True)
def use(cfg: UseConfig, ctx: Any) -> None:
    """Writes how many rows there are, where it found earlier work, and three random numbers."""
    import random

    import numpy as np

    from posttrain.data.dataset import training_rows

    trouble(ctx.name, ctx)
    rows = training_rows(ctx, "data")
    (ctx.work / "seen").write_text(str(len(rows)))
    numbers = [random.random(), float(np.random.random()), cfg.factor]
    if ctx.world.main:
        (ctx.out / "result.json").write_text(json.dumps({"texts": [r["text"] for r in rows], "numbers": numbers}))
    ctx.events.metrics(1, {"loss": 1.5, "nan": float("nan")})
    ctx.summary.update(rows_in=len(rows), world=ctx.world.size, trusted=ctx.trust_remote_code)
    if os.environ.get("CORE_EVAL"):
        ctx.summary["eval"] = {"after": {"val": {"loss": {"value": float(ctx.seed), "low": 0.0, "high": 9.0, "n": 3}}}}


@stage("core.torch", config=StageConfig, inputs={"data": data_port("text", optional=True)}, output="report")
def torch_numbers(cfg: StageConfig, ctx: Any) -> None:
    """Writes numbers of torch's global generator, whether torch was imported before or is imported here."""
    import torch

    trouble(ctx.name, ctx)
    (ctx.out / "numbers.json").write_text(json.dumps(torch.rand(3).tolist()))


class ModelConfig(UseConfig):
    """Length of a training."""

    steps: Positive | None = None
    """Steps."""
    epochs: Positive | None = None
    """Epochs."""


@stage("core.model", config=ModelConfig, inputs={"model": model_port()}, output="model")
def model(cfg: ModelConfig, ctx: Any) -> None:
    """A stage whose disk need can be told from its input."""
    ctx.summary.update(steps=cfg.steps, epochs=cfg.epochs)
    (ctx.out / "config.json").write_text("{}")


METHODS = {name: found for name, found in registry._METHODS.items() if name.startswith("core.")}


def hide() -> None:
    """Takes the methods out of the registry again."""
    for name in METHODS:
        registry._METHODS.pop(name, None)

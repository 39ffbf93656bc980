"""Shared by the trainer tests: tiny trainers by TRL's constructor, stages by a StageContext, and comparisons."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

TASKS = [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a in range(5) for b in range(5)]
CHATS = [
    {"messages": [{"role": "user", "content": f"What is {i} + {i}?"}, {"role": "assistant", "content": f"It is {2 * i}."}]}
    for i in range(24)
]
COMMON = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 10,
}


def load(folder: Path) -> tuple[Any, Any]:
    """A fresh float32 model, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), PreTrainedTokenizerFast.from_pretrained(folder)


def lora() -> Any:
    """A small adapter."""
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def sft_trainer(cls: type, folder: Path, out: Path, *, peft: Any = None, extra: dict[str, Any] | None = None, **args: Any) -> Any:
    """An SFT trainer of class `cls` on CHATS."""
    import trl
    from datasets import Dataset

    model, tokenizer = load(folder)
    config = trl.SFTConfig(output_dir=str(out), max_length=64, **{"save_steps": 100, **COMMON, **args})
    return cls(model, args=config, train_dataset=Dataset.from_list(CHATS), processing_class=tokenizer, peft_config=peft, **(extra or {}))


def distinct_letters(completions: list[Any], **_: Any) -> list[float]:
    """A reward that always varies: distinct characters over 10."""
    return [len(set(c if isinstance(c, str) else c[0]["content"])) / 10 for c in completions]


def grpo_trainer(
    cls: type,
    folder: Path,
    out: Path,
    *,
    peft: Any = None,
    rewards: Any = distinct_letters,
    rows: Any = None,
    extra: dict[str, Any] | None = None,
    **args: Any,
) -> Any:
    """A GRPO trainer of class `cls` on chat prompts, groups of 4."""
    import trl
    from datasets import Dataset

    model, tokenizer = load(folder)
    rows = rows or [{"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]} for row in TASKS[:12]]
    config = trl.GRPOConfig(output_dir=str(out), **{"save_steps": 100, "num_generations": 4, "max_completion_length": 6, **COMMON, **args})
    return cls(
        model,
        reward_funcs=rewards,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft,
        **(extra or {}),
    )


def weights(trainer: Any) -> dict[str, Any]:
    """Copy of the model's weights."""
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Bitwise equality of two weight dicts."""
    import torch

    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def curve(trainer: Any) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every logged step."""
    return [(item["loss"], item["grad_norm"]) for item in trainer.state.log_history if "loss" in item]


def rng() -> tuple[Any, ...]:
    """States of Python's, numpy's and torch's generators, comparable."""
    import random

    import numpy as np
    import torch

    return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()


class Interrupted(Exception):
    """A stop from outside at a known place."""


def at_step(step: int, action: Callable[[], None]) -> Callable[[dict[str, Any]], None]:
    """An event sink that calls `action` when the metrics of `step` arrive."""

    def sink(event: dict[str, Any]) -> None:
        if event["kind"] == "metrics" and event["step"] == step:
            action()

    return sink


def interrupt() -> None:
    """Raises Interrupted."""
    raise Interrupted


def make_folders(root: Path, rows: list[dict[str, Any]]) -> None:
    """A stage's folders and its rows; the work folder survives."""
    import shutil

    (root / "work").mkdir(parents=True, exist_ok=True)
    shutil.rmtree(root / "out", ignore_errors=True)
    (root / "out").mkdir()
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def make_context(root: Path, method: str, kind: str, model: Path, *, seed: int = 7, sinks: Any = ()) -> Any:
    """The context of a stage in `root`; events are collected in `ctx.seen`."""
    from posttrain.core.artifact import InputRef
    from posttrain.core.context import StageContext
    from posttrain.core.events import Events

    spec = {"kind": kind, "path": str(root / "rows.jsonl")}
    inputs = {
        "model": [InputRef("model", "base", "model", "model", spec={"id": str(model)})],
        "data": [InputRef("data", "rows", "source", "dataset", spec=spec, rows=kind)],
    }
    ctx = StageContext("train", method, seed, inputs, root / "out", root / "work", Events(None, "train"))
    ctx.seen = []
    ctx.events.sinks.extend([ctx.seen.append, *sinks])
    return ctx


def run_stage(
    root: Path, method: str, rows: list[dict[str, Any]], kind: str, model: Path, *, sinks: Any = (), seed: int = 7, **fields: Any
) -> Any:
    """Runs a trainer stage in this process; returns its context. `evaluation` is the context's `eval`."""
    from posttrain.core import registry

    evaluation = fields.pop("evaluation", {})
    make_folders(root, rows)
    ctx = make_context(root, method, kind, model, seed=seed, sinks=sinks)
    ctx.eval = evaluation
    declared = registry.method(method)
    defaults = {"name": "train", "method": method, "log_every": 1, "optim": {"lr": 1e-3}}
    declared.run(declared.config.model_validate({**defaults, **fields}), ctx)
    return ctx


def digest(folder: Path) -> str:
    """Digest of a committed folder's files."""
    from posttrain.core.hashing import files_digest, list_files

    return files_digest(list_files(folder))

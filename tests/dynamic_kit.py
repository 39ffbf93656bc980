"""Shared by the tests of dynamic sampling: a tape of rollouts that depends on requests alone, and rewards in which some groups agree."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer_kit import grpo_trainer

LIMIT = 6
ROWS = [{"prompt": [{"role": "user", "content": f"{'1 + ' * (i % 4)}{i} ="}], "answer": str(i)} for i in range(11)]


class Tape:
    """An engine whose completions follow from a request's seed: the same for any cut into processes and any weights."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.end = tokenizer.eos_token_id
        self.version = 0

    def load_weights(self, source: Any, version: int) -> None:
        """Takes note of the version."""
        self.version = version

    def generate(self, requests: Sequence[Any]) -> list[Any]:
        """1 to 6 tokens each, the last one an end token where there is room."""
        from posttrain.rollout.base import Completion

        done = []
        for request in requests:
            draw = random.Random(request.seed)
            size = draw.randint(1, LIMIT)
            ids = [draw.randint(10, 380) for _ in range(size - 1)] + [self.end if size < LIMIT else 77]
            done.append(Completion(request.id, list(request.prompt_ids), ids, [-1.0] * size, "", "stop", self.version))
        return done

    def close(self) -> None:
        """Nothing to free."""


def sometimes(completions: list[Any], answer: list[str], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """Every third row is always 1, every fourth always 0, row 5 has no reward; the others are right at random."""
    values: list[float | None] = []
    for row, ids in zip(map(int, answer), completion_ids, strict=True):
        chance = float(sum(ids) % 3 == 0)
        values.append(None if row == 5 else 1.0 if row % 3 == 0 else 0.0 if row % 4 == 0 else chance)
    return values


def dynamic_trainer(folder: Path, out: Path, *, dynamic: Any = None, extra: dict[str, Any] | None = None, **args: Any) -> Any:
    """A trainer of 4 groups of 4 completions a step on the tape; `top_p` a hair below 1 turns the check of its log-probabilities off."""
    from posttrain.trainers._grpo_config import DynamicConfig
    from posttrain.trainers.grpo import GRPOTrainer

    options = {"engine": Tape, "dynamic": DynamicConfig(**(dynamic or {})), **(extra or {})}
    sizes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_completion_length": LIMIT, "top_p": 0.9999999}
    return grpo_trainer(GRPOTrainer, folder, out, rows=ROWS, rewards=sometimes, extra=options, **{**sizes, **args})


def watch_gradients(trainer: Any) -> list[dict[str, Any]]:
    """Gradients before every update, filled while the trainer runs; averaged over processes by then."""
    from transformers import TrainerCallback

    seen: list[dict[str, Any]] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            model = trainer.accelerator.unwrap_model(model)
            seen.append({name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None})

    trainer.add_callback(Watch())
    return seen


def logs(trainer: Any) -> list[dict[str, Any]]:
    """The logged steps, without what depends on the clock."""
    timed = ("seconds/", "step_time", "useful_tokens_per_s")
    return [{k: v for k, v in item.items() if not k.startswith(timed)} for item in trainer.state.log_history if "loss" in item]

"""The score of a reward model: a sequence classifier in a local folder, on the whole conversation."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from posttrain.errors import RewardError
from posttrain.rewards.registry import completion_text, count_failure, reward


def conversation(prompt: Any, completion: Any) -> list[dict[str, Any]]:
    """Prompt and completion as messages; a text is one turn of the user, and the completion the assistant's."""
    turns = [dict(turn) for turn in prompt] if isinstance(prompt, list | tuple) else [{"role": "user", "content": str(prompt)}]
    if isinstance(completion, list | tuple) and completion and isinstance(completion[0], Mapping):
        return [*turns, *(dict(turn) for turn in completion)]
    return [*turns, {"role": "assistant", "content": completion_text(completion)}]


@functools.lru_cache(maxsize=2)
def _model(folder: Path, label: int | None, dtype: str, device: str | None, max_length: int | None) -> Any:
    from posttrain.models.classifier import load_classifier

    return load_classifier(folder, label=label, dtype=dtype, device=device, max_length=max_length)


@reward("reward_model")
def reward_model(
    completions: Sequence[Any],
    prompts: Sequence[Any] | None = None,
    prompt: Sequence[Any] | None = None,
    *,
    model: Path,
    label: int | None = None,
    scale: float = 1.0,
    shift: float = 0.0,
    squash: Literal["none", "sigmoid"] = "none",
    batch: int = 16,
    max_length: int | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str | None = None,
    **columns: Any,
) -> list[float | None]:
    """scale * s + shift for the model's logit s (or its sigmoid); None, and counted, where it is not finite.

    Args:
        completions: texts, or lists of messages.
        prompts, prompt: what was asked, texts or lists of messages.
        model: folder of a sequence-classification model in safetensors. Its chat template renders the conversation where it has one.
        label: column of the logits, needed where the model has several labels.
        scale, shift: of the value.
        squash: `sigmoid` brings the logit into (0, 1) first.
        batch: conversations in one pass.
        max_length: tokens read of a conversation, of a longer one the end; default is what the model allows, at most 4096.
        dtype, device: of the model; `auto` and none are float32 on a CPU, the checkpoint's type on the GPU.

    Raises:
        RewardError: there are no prompts.
        ConfigError, ArtifactError: see `posttrain.models.classifier.load_classifier`.
    """
    asked = prompts if prompts is not None else prompt
    if asked is None:
        raise RewardError("reward `reward_model` needs the prompts of the completions", fix="call it with `prompts`")
    loaded = _model(model, label, dtype, device, max_length)
    scores = loaded.scores([conversation(*pair) for pair in zip(asked, completions, strict=True)], batch)
    values = [_value(score, scale, shift, squash) for score in scores]
    count_failure("reward_model", "not_finite", sum(value is None for value in values))
    return values


def _value(score: float, scale: float, shift: float, squash: str) -> float | None:
    if squash == "sigmoid" and math.isfinite(score):
        score = 1 / (1 + math.exp(-score)) if score > -700 else 0.0
    value = scale * score + shift
    return value if math.isfinite(value) else None

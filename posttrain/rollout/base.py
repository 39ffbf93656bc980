"""The protocol of rollout engines and what travels through it.

Two kinds of log-probability exist and never share a name: `logprobs` are those of the *sampling distribution* (after
temperature, top-p, top-k), which is the behaviour policy of the policy gradient; importance weights of constrained
samplers are kept apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from posttrain.config.constraint import SamplerConfig
from posttrain.rollout.constraints import Constraint

DEFAULT_SAMPLER = SamplerConfig()
Progress = Callable[[int, int, int], None]
"""Called with (requests done, requests in all, tokens drawn so far)."""


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Args:
        max_tokens: completion limit in tokens.
        temperature: 0 is greedy.
        top_p, top_k: truncation; 1.0 and 0 are off.
        stop: stop strings; the text is cut before them, token ids keep them.
    """

    max_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """One completion to draw.

    Args:
        prompt_ids: token ids of the rendered prompt.
        seed: seed of this request's own noise; the result does not depend on the batch around it.
        sampling: see Sampling.
        id: free text that comes back with the completion.
        constraint: what the completion must satisfy.
        sampler: how a constrained completion is drawn.
    """

    prompt_ids: Sequence[int]
    seed: int
    sampling: Sampling = Sampling()
    id: str = ""
    constraint: Constraint | None = None
    sampler: SamplerConfig = DEFAULT_SAMPLER


@dataclass(frozen=True)
class Completion:
    """One drawn completion.

    Args:
        id: of the request.
        prompt_ids: token ids given.
        token_ids: token ids really sampled, the end token included.
        logprobs: natural-log probability of each under the sampling distribution *without* the constraint; same length as token_ids.
        text: decoded, cut before a stop string, without end tokens.
        finish_reason: `stop` (end token or stop string), `length`, `dead_end` (the constraint allows no token), or `checker_error`.
        version: weight version it was drawn with.
        extra: of constrained completions, see `posttrain.rollout.group`.
    """

    id: str
    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: str
    version: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class RolloutEngine(Protocol):
    """What `generate`, `eval` and `grpo` need of an engine."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion a request, in the same order."""
        ...

    def load_weights(self, source: Any, version: int) -> None:
        """Takes new weights (a live module, or a folder) and stamps them."""
        ...

    def close(self) -> None:
        """Frees what the engine holds."""
        ...


def request_seed(seed: int, *parts: int | str) -> int:
    """A 63-bit seed from (run seed, policy step, row id, sample index, ...), stable over processes and platforms."""
    text = "\x1f".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1

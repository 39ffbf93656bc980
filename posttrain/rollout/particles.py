"""Constrained requests of a batch of the transformers engine: the tokens their particles draw, and resampling.

A request with N particles is N rows of the model's batch, which share the prompt's cache. Each step draws one token a row by
the request's sampler, multiplies the row's weight, and resamples where the request's effective sample size asks for it. What is
returned, and what it says, is `posttrain.rollout.group`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from posttrain.errors import RolloutError
from posttrain.rollout.awrs import Order
from posttrain.rollout.base import Completion, Request
from posttrain.rollout.constraints import Vocabulary
from posttrain.rollout.group import Group, Particle
from posttrain.rollout.orders import RowNoise, draw_token, row_orders


class Particles:
    """The rows of a batch of constrained requests.

    Args:
        requests: all with a constraint.
        tokenizer: decodes.
        vocabulary: of the tokenizer.

    Attributes:
        owners: number of the request of each row, in the beginning.
        longest: steps at most.

    Raises:
        ConfigError: a request asks for what cannot be combined with a constraint.
    """

    def __init__(self, requests: Sequence[Request], tokenizer: Any, vocabulary: Vocabulary) -> None:
        self.tokenizer, self.vocabulary = tokenizer, vocabulary
        self.groups = [Group(request, vocabulary) for request in requests]
        self.owners = [i for i, group in enumerate(self.groups) for _ in group.particles]
        self.longest = max(request.sampling.max_tokens for request in requests)
        self._rows: list[tuple[int, int]] = [(i, j) for i, group in enumerate(self.groups) for j in range(len(group.particles))]

    @property
    def done(self) -> int:
        """Requests that have ended."""
        return sum(not group.open for group in self.groups)

    def take(self, step: int, logits: torch.Tensor) -> int:
        """Draws one token for every row that goes on, and resamples; returns how many were drawn.

        Args:
            step: number of the token.
            logits: (rows, V).

        Raises:
            NumericsError: logits that are not finite numbers.
        """
        live = [(row, i, j) for row, (i, j) in enumerate(self._rows) if not self.groups[i].particles[j].reason]
        rows = [RowNoise(self.groups[i].particles[j].seed, step, self.groups[i].request.sampling.temperature) for _, i, j in live]
        gains = [np.zeros(len(group.particles)) for group in self.groups]
        places = [row for row, _, _ in live] if len(live) < len(self._rows) else None
        for (_, i, j), order in zip(live, row_orders(logits, rows, places), strict=True):
            gains[i][j] = self._draw(self.groups[i], self.groups[i].particles[j], order, step)
        self._origin = [list(range(len(group.particles))) for group in self.groups]
        for i, group in enumerate(self.groups):
            back = group.add(gains[i], step)
            if back is not None:
                self._origin[i] = back
        return len(live)

    def _draw(self, group: Group, particle: Particle, order: Order, step: int) -> float:
        """Draws, records, and returns log w."""
        checker = particle.checker
        assert checker is not None
        try:
            found = draw_token(order, checker, group.request.sampler)
            group.count(1, found.calls, found.first, found.masked)
            if found.token is None:
                particle.reason = "dead_end"
                return -math.inf
            checker.advance(found.token)
        except RolloutError as error:
            particle.reason, particle.error = "checker_error", error.message
            return -math.inf
        particle.tokens.append(found.token)
        particle.logprobs.append(found.logprob if group.request.sampling.temperature else 0.0)
        if found.token in self.vocabulary.ends:
            particle.reason = "stop"
        elif step + 1 == group.request.sampling.max_tokens:
            particle.reason = "length"
        return found.log_weight

    def next_rows(self) -> np.ndarray | None:
        """Which present row each row of the next step goes on from; None where all have ended.

        Rows that have ended are kept until they are an eighth of the batch, since leaving costs a copy of the cache.
        """
        place = {owner: row for row, owner in enumerate(self._rows)}
        wanted = [(i, j) for i, group in enumerate(self.groups) for j, particle in enumerate(group.particles) if not particle.reason]
        if not wanted:
            return None
        moved = any(self._origin[i][j] != j for i, j in wanted) or any(owner not in place for owner in wanted)
        if not moved and len(self._rows) - len(wanted) < max(1, len(self._rows) // 8):
            return np.arange(len(self._rows))
        rows = [place[(i, self._origin[i][j])] for i, j in wanted]
        self._rows = wanted
        return np.array(rows)

    def last_tokens(self) -> np.ndarray:
        """Token of each row to feed."""
        return np.array([(self.groups[i].particles[j].tokens or [0])[-1] for i, j in self._rows], np.int64)

    def completions(self, version: int) -> list[Completion]:
        """One completion a request."""
        return [group.completion(self.tokenizer, self.vocabulary.ends, version) for group in self.groups]

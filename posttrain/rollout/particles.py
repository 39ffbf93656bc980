"""Constrained requests in a batch of the transformers engine: the tokens their particles draw, and resampling.

A request with N particles is N rows of the model's batch, which share the prompt's cache. Each step draws one token a row by
the request's sampler, multiplies the row's weight, and resamples where the request's effective sample size asks for it. What is
returned, and what it says, is `posttrain.rollout.group`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from posttrain.errors import RolloutError
from posttrain.rollout.awrs import Order
from posttrain.rollout.base import Request
from posttrain.rollout.constraints import Vocabulary
from posttrain.rollout.group import Group, Particle
from posttrain.rollout.orders import RowNoise, draw_token, row_orders


class GroupRows:
    """The particles of one request as rows of a batch.

    Args:
        handle: of the request in its batch.
        request: with a constraint.
        vocabulary: of the tokenizer.

    Attributes:
        group: particles and their weights.
        step: tokens drawn.
        origin: particle that each one went on from at the last step.
        dropped: nobody waits for it any more.

    Raises:
        ConfigError: the request asks for what cannot be combined with a constraint.
    """

    def __init__(self, handle: int, request: Request, vocabulary: Vocabulary) -> None:
        self.handle, self.request, self.ends = handle, request, vocabulary.ends
        self.group = Group(request, vocabulary)
        self.step, self.dropped = 0, False
        self.origin = list(range(len(self.group.particles)))

    @property
    def particles(self) -> list[Particle]:
        """As they stand."""
        return self.group.particles

    def wanted(self) -> list[int]:
        """Numbers of the particles that go on."""
        return [] if self.dropped else [j for j, particle in enumerate(self.particles) if not particle.reason]

    def goes_on(self, j: int) -> bool:
        """Whether particle j needs another token."""
        return not self.dropped and not self.particles[j].reason

    def moved(self) -> bool:
        """Whether some particle goes on from another one's row."""
        return any(self.origin[j] != j for j in self.wanted())

    def draw(self, j: int, order: Order) -> float:
        """Draws and records a token of particle j, and returns log w."""
        particle = self.particles[j]
        checker = particle.checker
        assert checker is not None
        try:
            found = draw_token(order, checker, self.request.sampler)
            self.group.count(1, found.calls, found.first, found.masked)
            if found.token is None:
                particle.reason = "dead_end"
                return -math.inf
            checker.advance(found.token)
        except RolloutError as error:
            particle.reason, particle.error = "checker_error", error.message
            return -math.inf
        particle.tokens.append(found.token)
        particle.logprobs.append(found.logprob if self.request.sampling.temperature else 0.0)
        if found.token in self.ends:
            particle.reason = "stop"
        elif self.step + 1 == self.request.sampling.max_tokens:
            particle.reason = "length"
        return found.log_weight

    def settle(self, gains: np.ndarray) -> None:
        """Ends a step: weights, and resampling."""
        back = self.group.add(gains, self.step)
        self.origin = list(range(len(self.particles))) if back is None else back
        self.step += 1


def draw_particles(logits: torch.Tensor, rows: Sequence[tuple[int, GroupRows, int]]) -> int:
    """Draws one token for every particle that goes on, and resamples; returns how many were drawn.

    Args:
        logits: (B, V) of the whole batch.
        rows: (row, request, particle) of all constrained rows.

    Raises:
        NumericsError: logits that are not finite numbers.
    """
    live = [(row, unit, j) for row, unit, j in rows if unit.goes_on(j)]
    if not live:
        return 0
    wanted = [RowNoise(unit.particles[j].seed, unit.step, unit.request.sampling.temperature) for _, unit, j in live]
    places = [row for row, _, _ in live]
    gains = {id(unit): (unit, np.zeros(len(unit.particles))) for _, unit, _ in live}
    orders = row_orders(logits, wanted, None if places == list(range(len(logits))) else places)
    for (_, unit, j), order in zip(live, orders, strict=True):
        gains[id(unit)][1][j] = unit.draw(j, order)
    for unit, gain in gains.values():
        unit.settle(gain)
    return len(live)

"""The particles of one constrained request, whichever engine draws their tokens, and the completion that comes of them.

Finished particles stay in the population. At the end one particle is drawn by its weight and returned; particles that were cut
at the token limit have weight 0 beside finished ones, since the target is the constrained distribution of *finished* texts.

`Completion.extra` of a constrained request:

    log_weight    sum of log w of the returned particle (with one particle; with several, log of the mean weight, as `log_z`)
    log_z         log of the mean weight: an estimate of log P(a text of the model satisfies the constraint)
    ess           effective sample size of the final weights, as a share of the particles
    resamplings, particles, unique     how often, how many, and how many beginnings are left
    calls         tokens the checker was asked about, per drawn token
    accepted      share of tokens whose first draw was accepted
    masked        share of tokens that were drawn by a full mask
    complete      the constraint accepts the returned text as a whole
    error         what the checker raised, with `checker_error`
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from posttrain.errors import ConfigError, RolloutError
from posttrain.rollout.awrs import noise
from posttrain.rollout.base import Completion, Request
from posttrain.rollout.constraints import Constraint, TokenChecker, Vocabulary
from posttrain.rollout.smc import Population, effective_size, normalised
from posttrain.rollout.stopping import StopRule

RESAMPLING, CHOOSING = 1 << 40, 1 << 41
"""Places of the noise that is not of a token."""


class Particle:
    """One text: its tokens, how it ended, and its checker where that lives in this process.

    Args:
        seed: of its noise.
        checker: after `tokens`; None where the engine keeps it.

    Attributes:
        reason: why it ended; '' while it goes on.
        error: what the checker raised.
        whole: the text may end here; asked of the checker where there is one.
    """

    def __init__(self, seed: int, checker: TokenChecker | None = None) -> None:
        self.seed, self.checker = seed, checker
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.reason = ""
        self.error = ""
        self.whole = False

    def fork(self, seed: int) -> Particle:
        """A copy that goes on with noise of its own."""
        found = Particle(seed, None if self.checker is None else self.checker.fork())
        found.tokens, found.logprobs = self.tokens.copy(), self.logprobs.copy()
        found.reason, found.error, found.whole = self.reason, self.error, self.whole
        return found

    def complete(self) -> bool:
        """The constraint accepts the text as a whole."""
        if self.reason != "length":
            return self.reason == "stop"
        if self.checker is None:
            return self.whole
        try:
            return self.checker.state.complete()
        except RolloutError as error:
            self.error = error.message
            return False


class Group:
    """The particles of one request, and what they cost.

    Args:
        request: with a constraint.
        vocabulary: makes checkers for the particles; None where the engine keeps them.

    Raises:
        ConfigError: the request asks for what cannot be combined with a constraint.
    """

    def __init__(self, request: Request, vocabulary: Vocabulary | None) -> None:
        check_request(request)
        assert request.constraint is not None
        sampler = request.sampler
        self.request = request
        seeds = [_particle_seed(request.seed, i) for i in range(sampler.particles)]
        if vocabulary is None:
            self.particles = [Particle(seed) for seed in seeds]
        else:
            self.particles = self._started(request.constraint, seeds, vocabulary)
        self.population = Population(sampler.particles, sampler.ess_threshold, sampler.resampling)
        self.calls = self.drawn = self.first = self.masked = 0
        if not self.open:
            self.population.add(np.full(sampler.particles, -math.inf))

    @staticmethod
    def _started(constraint: Constraint, seeds: Sequence[int], vocabulary: Vocabulary) -> list[Particle]:
        """Particles at the beginning; ended ones where the checker raises there already."""
        try:
            state = constraint.start()
            return [Particle(seed, TokenChecker(state.fork(), vocabulary)) for seed in seeds]
        except RolloutError as error:
            found = [Particle(seed) for seed in seeds]
            for particle in found:
                particle.reason, particle.error = "checker_error", error.message
            return found

    @property
    def open(self) -> bool:
        """Some particle goes on."""
        return any(not particle.reason for particle in self.particles)

    def count(self, drawn: int, calls: int, first: int, masked: int) -> None:
        """Adds to the figures."""
        self.drawn, self.calls = self.drawn + drawn, self.calls + calls
        self.first, self.masked = self.first + first, self.masked + masked

    def add(self, gains: Sequence[float] | np.ndarray, step: int) -> list[int] | None:
        """Multiplies the weights, and resamples where that is asked for while particles go on.

        Args:
            gains: log w of each particle since the last call.
            step: of the noise; a different one at every call.

        Returns:
            Ancestor of each particle where they were resampled, else None.
        """
        self.population.add(np.asarray(gains, np.float64))
        if not self.open:
            return None
        back = self.population.resample(noise(self.request.seed, RESAMPLING + step))
        if back is None:
            return None
        seeds = [particle.seed for particle in self.particles]
        self.particles = [self.particles[a].fork(seed) for a, seed in zip(back.tolist(), seeds, strict=True)]
        found: list[int] = back.tolist()
        return found

    def completion(self, tokenizer: Any, ends: frozenset[int], version: int) -> Completion:
        """What is returned once no particle goes on."""
        request, population = self.request, self.population
        cut = np.array([particle.reason == "length" for particle in self.particles])
        weights = population.log_weights.copy()
        if (~cut & (weights > -math.inf)).any():
            weights[cut] = -math.inf
        shares = normalised(weights)
        number = 0
        if shares.any():
            place = np.cumsum(shares).searchsorted(next(noise(request.seed, CHOOSING)) * shares.sum(), side="right")
            number = min(int(place), int(np.flatnonzero(shares)[-1]))
        particle = self.particles[number]
        count, drawn = len(self.particles), max(1, self.drawn)
        log_z = Population(count, log_weights=weights).log_z()
        extra: dict[str, Any] = {
            "log_weight": float(weights[0]) if count == 1 else log_z,
            "log_z": log_z,
            "ess": effective_size(weights) / count,
            "resamplings": len(population.ancestry),
            "particles": count,
            "unique": len(set(population.originals().tolist())),
            "calls": self.calls / drawn,
            "accepted": self.first / drawn,
            "masked": self.masked / drawn,
            "complete": particle.complete(),
        }
        if particle.error:
            extra["error"] = particle.error
        text = StopRule(tokenizer, (), ends).text(particle.tokens)
        reason = particle.reason or "length"
        return Completion(request.id, list(request.prompt_ids), particle.tokens, particle.logprobs, text, reason, version, extra)


def _particle_seed(seed: int, number: int) -> int:
    """The first particle has the request's own noise, so one particle draws what the first of several would."""
    return seed if number == 0 else (seed ^ (number * 0xD1342543DE82EF95)) & ((1 << 63) - 1)


def check_request(request: Request) -> None:
    """Refuses what cannot be combined with a constraint.

    Raises:
        ConfigError: top-p, top-k, stop strings, or several particles at temperature 0.
    """
    sampling = request.sampling
    where = "rollout.constraint"
    if sampling.top_k or sampling.top_p < 1:
        raise ConfigError("a constraint does not go with top_p or top_k: the weights are those of the whole distribution", where=where)
    if sampling.stop:
        raise ConfigError("a constraint does not go with stop strings, which would end a text before it is complete", where=where)
    if sampling.temperature == 0 and request.sampler.particles > 1:
        raise ConfigError("particles at temperature 0 would all be equal", where="rollout.sampler.particles", fix="set a temperature")

"""Constrained requests of a batch: their particles, the tokens each draws, resampling, and what is returned.

A request with N particles is N rows of the model's batch, which share the prompt's cache. Each step draws one token a row by
the request's sampler, multiplies the row's weight, and resamples where the request's effective sample size asks for it.
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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from posttrain.errors import ConfigError, NumericsError, RolloutError
from posttrain.rollout.awrs import Draw, GreedyOrder, InverseOrder, ListedOrder, Order, awrs, local, masked, noise
from posttrain.rollout.base import Completion, Request
from posttrain.rollout.constraints import TokenChecker, Vocabulary
from posttrain.rollout.smc import Population, effective_size, normalised
from posttrain.rollout.stopping import StopRule

LISTED = 64
"""Tokens of an order that a GPU hands over; what lies beyond is fetched where it is needed."""
ON_DEVICE, RESAMPLING, CHOOSING = 1 << 32, 1 << 40, 1 << 41
"""Places of the noise that is not of a token on the host."""


class Particle:
    """One row: its tokens, its checker, and how it ended."""

    def __init__(self, checker: TokenChecker, seed: int) -> None:
        self.checker, self.seed = checker, seed
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.reason = ""
        self.error = ""

    def fork(self, seed: int) -> Particle:
        """A copy that goes on with noise of its own."""
        found = Particle(self.checker.fork(), seed)
        found.tokens, found.logprobs = self.tokens.copy(), self.logprobs.copy()
        found.reason, found.error = self.reason, self.error
        return found


class Group:
    """The particles of one request, and what they cost."""

    def __init__(self, request: Request, vocabulary: Vocabulary) -> None:
        sampler = request.sampler
        self.request = request
        assert request.constraint is not None
        state = request.constraint.start()
        self.particles = [
            Particle(TokenChecker(state.fork(), vocabulary), _particle_seed(request.seed, i)) for i in range(sampler.particles)
        ]
        self.population = Population(sampler.particles, sampler.ess_threshold, sampler.resampling)
        self.calls = self.drawn = self.first = self.masked = 0

    @property
    def open(self) -> bool:
        """Some particle goes on."""
        return any(not particle.reason for particle in self.particles)

    def count(self, draw: Draw) -> None:
        """Adds to the figures."""
        self.calls, self.drawn = self.calls + draw.calls, self.drawn + 1
        self.first, self.masked = self.first + draw.first, self.masked + draw.masked


def _particle_seed(seed: int, number: int) -> int:
    """The first particle has the request's own noise, so one particle draws what the first of several would."""
    return seed if number == 0 else (seed ^ (number * 0xD1342543DE82EF95)) & ((1 << 63) - 1)


class Particles:
    """The rows of a batch of constrained requests.

    Args:
        requests: all with a constraint.
        tokenizer: decodes.
        vocabulary: of the tokenizer.
        device: of the logits.

    Attributes:
        owners: number of the request of each row, in the beginning.
        longest: steps at most.

    Raises:
        ConfigError: a request asks for what cannot be combined with a constraint.
    """

    def __init__(self, requests: Sequence[Request], tokenizer: Any, vocabulary: Vocabulary, device: torch.device) -> None:
        for request in requests:
            _check(request)
        self.tokenizer, self.vocabulary, self.device = tokenizer, vocabulary, device
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
        temperature = torch.tensor([self.groups[i].request.sampling.temperature or 1.0 for _, i, _ in live], device=self.device)
        chosen = logits[[row for row, _, _ in live]].float() / temperature[:, None]
        logprobs = torch.log_softmax(chosen, dim=-1)
        if bool(logprobs.isnan().any()):
            raise NumericsError("the model's logits are not finite while sampling", fix="check the weights: training may have diverged")
        orders = self._orders(logprobs, step, live)
        gains = [np.zeros(len(group.particles)) for group in self.groups]
        for (_, i, j), order in zip(live, orders, strict=True):
            gains[i][j] = self._draw(self.groups[i], self.groups[i].particles[j], order, step)
        self._origin = [list(range(len(group.particles))) for group in self.groups]
        for i, group in enumerate(self.groups):
            group.population.add(gains[i])
            self._resample(i, step)
        return len(live)

    def _orders(self, logprobs: torch.Tensor, step: int, live: list[tuple[int, int, int]]) -> Iterator[Order]:
        greedy = [self.groups[i].request.sampling.temperature == 0 for _, i, _ in live]
        seeds = [self.groups[i].particles[j].seed for _, i, j in live]
        if on_host(self.device):
            p = logprobs.exp()
            sums = p.cumsum(dim=-1, dtype=torch.float64).numpy()
            for row, (best, seed) in enumerate(zip(greedy, seeds, strict=True)):
                values = p[row].numpy()
                yield GreedyOrder(values) if best else InverseOrder(values, noise(seed, step), sums[row])
            return
        tokens, sizes = top_keys(logprobs, seeds, step, LISTED)
        for row, (best, seed) in enumerate(zip(greedy, seeds, strict=True)):

            def probabilities(row: int = row) -> np.ndarray:
                found: np.ndarray = logprobs[row].double().exp().cpu().numpy()
                return found

            pairs = list(zip(tokens[row].tolist(), sizes[row].tolist(), strict=True))
            yield GreedyOrder(probabilities()) if best else ListedOrder(pairs, probabilities, noise(seed, step))

    def _draw(self, group: Group, particle: Particle, order: Order, step: int) -> float:
        """Draws, records, and returns log w."""
        sampler, checker = group.request.sampler, particle.checker
        mask: Callable[[], np.ndarray] | None = checker.mask if checker.has_mask or isinstance(order, ListedOrder) else None
        try:
            if isinstance(order, GreedyOrder):
                found = local(order, checker.allows)
            elif sampler.method == "mask":
                found = masked(order, checker.mask)
            elif sampler.method == "local":
                found = local(order, checker.allows, max_calls=sampler.awrs.max_calls, mask=mask)
            else:
                found = awrs(order, checker.allows, probes=sampler.awrs.probes, max_calls=sampler.awrs.max_calls, mask=mask)
            group.count(found)
            if found.token is None:
                particle.reason = "dead_end"
                return -math.inf
            checker.advance(found.token)
        except RolloutError as error:
            particle.reason, particle.error = "checker_error", error.message
            return -math.inf
        particle.tokens.append(found.token)
        particle.logprobs.append(0.0 if group.request.sampling.temperature == 0 else found.logprob)
        if found.token in self.vocabulary.ends:
            particle.reason = "stop"
        elif step + 1 == group.request.sampling.max_tokens:
            particle.reason = "length"
        return found.log_weight

    def _resample(self, i: int, step: int) -> None:
        group = self.groups[i]
        if not group.open:
            return
        back = group.population.resample(noise(group.request.seed, RESAMPLING + step))
        if back is not None:
            seeds = [particle.seed for particle in group.particles]
            group.particles = [group.particles[a].fork(seed) for a, seed in zip(back.tolist(), seeds, strict=True)]
            self._origin[i] = back.tolist()

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
        return [self._completion(group, version) for group in self.groups]

    def _completion(self, group: Group, version: int) -> Completion:
        request, population = group.request, group.population
        cut = np.array([particle.reason == "length" for particle in group.particles])
        weights = population.log_weights.copy()
        if (~cut & (weights > -math.inf)).any():
            weights[cut] = -math.inf
        shares = normalised(weights)
        if shares.any():
            place = np.cumsum(shares).searchsorted(next(noise(request.seed, CHOOSING)) * shares.sum(), side="right")
            number = min(int(place), int(np.flatnonzero(shares)[-1]))
        else:
            number = 0
        particle = group.particles[number]
        count = len(group.particles)
        log_z = Population(count, log_weights=weights).log_z()
        extra: dict[str, Any] = {
            "log_weight": float(weights[0]) if count == 1 else log_z,
            "log_z": log_z,
            "ess": effective_size(weights) / count,
            "resamplings": len(population.ancestry),
            "particles": count,
            "unique": len(set(population.originals().tolist())),
            "calls": group.calls / max(1, group.drawn),
            "accepted": group.first / max(1, group.drawn),
            "masked": group.masked / max(1, group.drawn),
            "complete": particle.reason == "stop" or (particle.reason == "length" and particle.checker.state.complete()),
        }
        if particle.error:
            extra["error"] = particle.error
        text = StopRule(self.tokenizer, (), self.vocabulary.ends).text(particle.tokens)
        return Completion(
            request.id, list(request.prompt_ids), particle.tokens, particle.logprobs, text, particle.reason or "length", version, extra
        )


def on_host(device: torch.device) -> bool:
    """Whether orders are drawn by inverse transform on the host, the cheapest on a CPU, rather than by keys on the device."""
    return device.type == "cpu"


def _check(request: Request) -> None:
    sampling = request.sampling
    where = "rollout.constraint"
    if sampling.top_k or sampling.top_p < 1:
        raise ConfigError("a constraint does not go with top_p or top_k: the weights are those of the whole distribution", where=where)
    if sampling.stop:
        raise ConfigError("a constraint does not go with stop strings, which would end a text before it is complete", where=where)
    if sampling.temperature == 0 and request.sampler.particles > 1:
        raise ConfigError("particles at temperature 0 would all be equal", where="rollout.sampler.particles", fix="set a temperature")


def top_keys(logprobs: torch.Tensor, seeds: Sequence[int], step: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first tokens by log p + Gumbel noise, and their probabilities; the noise of (seed, step, token) is the same in any batch.

    Args:
        logprobs: (B, V) on any device.
        seeds: B numbers.
        step: place of the token.
        count: tokens a row.

    Returns:
        (B, count) ids and (B, count) float64 probabilities, on the host.
    """
    uniforms = keyed_uniforms(seeds, step, logprobs.shape[-1], logprobs.device)
    keys = logprobs.double() - (-uniforms.log()).log()
    best = keys.topk(min(count, keys.shape[-1]), dim=-1).indices
    sizes = logprobs.gather(1, best).double().exp()
    return best.cpu().numpy(), sizes.cpu().numpy()


def keyed_uniforms(seeds: Sequence[int], step: int, size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """(B, size) float64 in (0, 1) by SplitMix64 of (seed, step, index), on the device."""
    starts = [int(next(noise(seed, ON_DEVICE + step)) * 2**62) for seed in seeds]
    state = torch.tensor(starts, dtype=torch.int64, device=device)[:, None] + torch.arange(size, device=device) * _signed(
        0x9E3779B97F4A7C15
    )
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ _shifted(state, shift)) * _signed(factor)
    state = state ^ _shifted(state, 31)
    return (_shifted(state, 11).double() + 0.5) * 2.0**-53


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shifted(state: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift to the right; torch's is arithmetic."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)

"""Continuous batching on a transformers model: requests enter the running batch as rows leave it.

Each step feeds every running row its last token, lets waiting requests in where there is room, and draws one token a row. Rows
that have ended leave once they are an eighth of the batch, since leaving costs a copy of the cache; for the same reason
requests enter a nearly full batch an eighth at a time. A model whose cache takes no rows while others run (see
`posttrain.rollout.cache`) runs batch after batch.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from posttrain.errors import NumericsError, RolloutError
from posttrain.rollout.base import Completion, Request
from posttrain.rollout.cache import RowCache
from posttrain.rollout.constraints import Vocabulary
from posttrain.rollout.group import check_request
from posttrain.rollout.particles import GroupRows, draw_particles
from posttrain.rollout.sampling import SamplingRows, sample, uniforms
from posttrain.rollout.stopping import StopRule

SHARE = 8
"""Rows leave, and enter a nearly full batch, once they are one in `SHARE`."""


class NewToken(NamedTuple):
    """A token that a request has just drawn.

    Args:
        handle: of the request.
        token: its id.
        logprob: natural-log probability under the sampling distribution, without the constraint.
    """

    handle: int
    token: int
    logprob: float


@dataclass
class Step:
    """What one step brought.

    Args:
        finished: (handle, completion) of the requests that ended.
        tokens: drawn, of free requests and of constrained ones with one particle; several particles are not told token by token,
            since resampling may replace a beginning.
        drawn: tokens in all, of every particle.
    """

    finished: list[tuple[int, Completion]] = field(default_factory=list)
    tokens: list[NewToken] = field(default_factory=list)
    drawn: int = 0


class FreeRows:
    """Bookkeeping on the host of the requests without a constraint: a table with one slot a request.

    Args:
        tokenizer: decodes.
        eos_ids: end tokens.
    """

    def __init__(self, tokenizer: Any, eos_ids: frozenset[int]) -> None:
        self.tokenizer, self.eos_ids = tokenizer, eos_ids
        self.eos = np.array(sorted(eos_ids), np.int64)
        self.requests: list[Request | None] = []
        self.rules: list[StopRule | None] = []
        self.spare: list[int] = []
        self.handles, self.limits, self.steps = (np.zeros(0, np.int64) for _ in range(3))
        self.open, self.with_stop = np.zeros(0, bool), np.zeros(0, bool)
        self.noise, self.ids, self.logprobs = np.zeros((0, 0)), np.zeros((0, 0), np.int64), np.zeros((0, 0), np.float32)

    def add(self, handle: int, request: Request) -> int:
        """Number of the request's slot."""
        limit = request.sampling.max_tokens
        self._grow(limit)
        slot = self.spare.pop()
        self.requests[slot], self.rules[slot] = request, StopRule(self.tokenizer, request.sampling.stop, self.eos_ids)
        self.handles[slot], self.limits[slot], self.steps[slot] = handle, limit, 0
        self.open[slot], self.with_stop[slot] = True, bool(request.sampling.stop)
        self.noise[slot, :limit] = uniforms([request.seed], limit)[0]
        return slot

    def _grow(self, limit: int) -> None:
        """Room for one more slot, and for `limit` tokens in each."""
        slots, width = self.noise.shape
        more, wider = 0 if self.spare else max(8, slots), max(0, limit - width)
        if not more and not wider:
            return
        for name in ("noise", "ids", "logprobs"):
            setattr(self, name, np.pad(getattr(self, name), ((0, more), (0, wider))))
        for name in ("handles", "limits", "steps", "open", "with_stop"):
            setattr(self, name, np.pad(getattr(self, name), (0, more)))
        self.requests += [None] * more
        self.rules += [None] * more
        self.spare += range(slots + more - 1, slots - 1, -1)

    def free(self, slot: int) -> None:
        """Gives the slot back; no row may refer to it any more."""
        self.requests[slot] = self.rules[slot] = None
        self.spare.append(slot)

    def next_noise(self, slots: np.ndarray) -> np.ndarray:
        """(rows,) float64, the noise of the next token of each slot; of ended ones, some number."""
        found: np.ndarray = self.noise[slots, np.minimum(self.steps[slots], self.limits[slots] - 1)]
        return found

    def take(self, slots: np.ndarray, chosen: np.ndarray, values: np.ndarray, version: int) -> Step:
        """Records one token for every slot that is open.

        Raises:
            NumericsError: a log-probability is not a number.
        """
        live = self.open[slots]
        slots, new, values = slots[live], chosen[live], values[live]
        if not np.isfinite(values).all():
            raise NumericsError("the model's logits are not finite while sampling", fix="check the weights: training may have diverged")
        steps = self.steps[slots]
        self.ids[slots, steps], self.logprobs[slots, steps] = new, values
        self.steps[slots] = steps + 1
        stopped = np.isin(new, self.eos)
        for j in np.flatnonzero(self.with_stop[slots]):
            rule = self.rules[slots[j]]
            assert rule is not None
            stopped[j] = rule.ends(self.ids[slots[j], : steps[j] + 1].tolist())
        over = stopped | (steps + 1 == self.limits[slots])
        self.open[slots[over]] = False
        step = Step(drawn=len(slots))
        step.tokens = list(map(NewToken, self.handles[slots].tolist(), new.tolist(), values.tolist()))
        for j in np.flatnonzero(over):
            step.finished.append((int(self.handles[slots[j]]), self._completion(int(slots[j]), bool(stopped[j]), version)))
        return step

    def _completion(self, slot: int, stopped: bool, version: int) -> Completion:
        request, rule, size = self.requests[slot], self.rules[slot], self.steps[slot]
        assert request is not None and rule is not None
        tokens, logprobs = self.ids[slot, :size].tolist(), self.logprobs[slot, :size].tolist()
        reason = "stop" if stopped else "length"
        return Completion(request.id, list(request.prompt_ids), tokens, logprobs, rule.text(tokens), reason, version)


class ContinuousBatch:
    """A running batch, driven step by step; the model must be in evaluation mode, and its weights stay as they are meanwhile.

    Args:
        model: a transformers or peft causal language model.
        tokenizer: decodes.
        max_batch: most rows in one forward pass, a particle being a row. A request with more particles runs by itself.
        eos_ids: end tokens.
        vocabulary: of the tokenizer; asked for at the first constrained request.
        version: of the weights, stamped on completions.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_batch: int,
        eos_ids: frozenset[int],
        vocabulary: Callable[[], Vocabulary],
        version: int = 0,
    ) -> None:
        self.tokenizer, self.max_batch, self.version, self._vocabulary = tokenizer, max_batch, version, vocabulary
        self.limit = getattr(model.config, "max_position_embeddings", None)
        self.cache, self.table = RowCache(model), FreeRows(tokenizer, eos_ids)
        self._queue: deque[tuple[int, Request]] = deque()
        self._awaited: Counter[tuple[int, ...]] = Counter()
        self._next = 0
        self._slots = np.zeros(0, np.int64)
        self._held: list[tuple[int, GroupRows, int]] = []
        self._over: list[GroupRows] = []
        self._settings: SamplingRows | None = None

    @property
    def busy(self) -> bool:
        """Some request runs or waits."""
        return bool(self._queue or len(self._slots))

    @property
    def waiting(self) -> int:
        """Requests that have not entered."""
        return len(self._queue)

    @property
    def rows(self) -> int:
        """Rows of the model's batch."""
        return len(self._slots)

    def add(self, request: Request) -> int:
        """Lets a request wait for its turn, which comes in order; returns its handle.

        Raises:
            RolloutError: an empty prompt, or prompt + max_tokens beyond the model's positions.
            ConfigError: it asks for what cannot be combined with a constraint.
        """
        check_size(request, self.limit)
        if request.constraint is not None:
            check_request(request)
        self._next += 1
        self._queue.append((self._next, request))
        self._awaited[tuple(request.prompt_ids)] += 1
        return self._next

    def abort(self, handle: int) -> bool:
        """Ends a request without a completion; False where it is not there, or has ended."""
        for item in self._queue:
            if item[0] == handle:
                self._queue.remove(item)
                self._arrived(tuple(item[1].prompt_ids))
                return True
        free = self._slots[self._slots >= 0]
        for slot in free[(self.table.handles[free] == handle) & self.table.open[free]]:
            self.table.open[slot] = False
            return True
        for _, unit, _ in self._held:
            if unit.handle == handle and unit.wanted():
                unit.dropped = True
                return True
        return False

    @torch.no_grad()
    def step(self) -> Step:
        """Draws one token for every row.

        Raises:
            NumericsError: the logits are not finite; the batch is of no more use then.
        """
        self._compact()
        if len(self._slots):
            self.cache.advance(self._last_tokens())
        self._admit()
        if not len(self._slots):
            return Step()
        step = self._draw_free()
        self._draw_held(step)
        if not self._alive().any():
            self._leave(np.zeros(0, np.int64), [])
        return step

    def _draw_free(self) -> Step:
        rows = np.flatnonzero(self._slots >= 0)
        if not len(rows):
            return Step()
        logits, slots, device = self.cache.logits, self._slots[rows], self.cache.device
        if len(rows) < len(self._slots):
            logits = logits[torch.from_numpy(rows).to(device)]
        if self._settings is None:
            self._settings = SamplingRows.of([self.table.requests[slot].sampling for slot in slots], device)
        chosen, values = sample(logits, self._settings, torch.from_numpy(self.table.next_noise(slots)).to(device))
        return self.table.take(slots, chosen.cpu().numpy(), values.cpu().numpy(), self.version)

    def _draw_held(self, step: Step) -> None:
        before = {id(unit): unit for _, unit, j in self._held if unit.goes_on(j)}
        step.drawn += draw_particles(self.cache.logits, self._held)
        for unit in before.values():
            first = unit.particles[0]
            if len(unit.particles) == 1 and len(first.tokens) == unit.step:
                step.tokens.append(NewToken(unit.handle, first.tokens[-1], first.logprobs[-1]))
        for unit in (*self._over, *before.values()):
            if not unit.group.open:
                step.finished.append((unit.handle, unit.group.completion(self.tokenizer, unit.ends, self.version)))
        self._over.clear()

    def _alive(self) -> np.ndarray:
        """(rows,) bool, the rows that go on."""
        alive = self._slots >= 0
        alive[alive] = self.table.open[self._slots[alive]]
        for row, unit, j in self._held:
            alive[row] = unit.goes_on(j)
        return alive

    def _compact(self) -> None:
        """Lets ended rows go once they are a share of the batch, and particles go on from the rows they were resampled from."""
        count, alive = len(self._slots), self._alive()
        if count - alive.sum() < max(1, count // SHARE) and not any(unit.moved() for _, unit, _ in self._held):
            return
        places = {(id(unit), j): row for row, unit, j in self._held}
        units = {id(unit): unit for _, unit, _ in self._held}
        held = [(places[key, unit.origin[j]], unit, j) for key, unit in units.items() for j in unit.wanted()]
        self._leave(np.flatnonzero(alive & (self._slots >= 0)), held)

    def _leave(self, free: np.ndarray, held: Sequence[tuple[int, GroupRows, int]]) -> None:
        """Keeps these rows of free requests, and then these of particles, each of which goes on from the row it names."""
        rows = np.concatenate([free, np.array([row for row, _, _ in held], np.int64)])
        for slot in set(self._slots[self._slots >= 0].tolist()) - set(self._slots[free].tolist()):
            self.table.free(slot)
        if len(rows):
            self.cache.select(rows)
        else:
            self.cache.clear()
        self._slots = np.concatenate([self._slots[free], np.full(len(held), -1)])
        self._held = [(len(free) + i, unit, j) for i, (_, unit, j) in enumerate(held)]
        self._settings = None

    def _last_tokens(self) -> np.ndarray:
        """(rows,) int64, what to feed; of ended rows, some token."""
        tokens = np.zeros(len(self._slots), np.int64)
        rows = np.flatnonzero(self._slots >= 0)
        slots = self._slots[rows]
        tokens[rows] = self.table.ids[slots, self.table.steps[slots] - 1]
        for row, unit, j in self._held:
            tokens[row] = (unit.particles[j].tokens or [0])[-1]
        return tokens

    def _admit(self) -> None:
        """Lets waiting requests in, in order, as far as there is room."""
        room, taken = self.max_batch - len(self._slots), 0
        if len(self._slots) and (not self.cache.insertable or room < max(1, self.max_batch // SHARE)):
            return
        prompts: list[tuple[int, ...]] = []
        while self._queue:
            handle, request = self._queue[0]
            size = 1 if request.constraint is None else request.sampler.particles
            if size > room - taken and (len(self._slots) or taken):
                break
            self._queue.popleft()
            prompt = tuple(request.prompt_ids)
            prompts += [prompt] * size
            taken += size
            self._awaited[prompt] -= 1
            self._enter(handle, request)
        if prompts:
            self.cache.insert(prompts, lambda prompt: self._awaited[prompt] > 0)
            self._settings = None
            for prompt in set(prompts):
                self._arrived(prompt, 0)

    def _enter(self, handle: int, request: Request) -> None:
        first = len(self._slots)
        if request.constraint is None:
            self._slots = np.append(self._slots, self.table.add(handle, request))
            return
        unit = GroupRows(handle, request, self._vocabulary())
        self._slots = np.append(self._slots, np.full(len(unit.particles), -1))
        self._held += [(first + j, unit, j) for j in range(len(unit.particles))]
        if not unit.group.open:
            self._over.append(unit)

    def _arrived(self, prompt: tuple[int, ...], count: int = 1) -> None:
        """So many requests with this prompt wait no more."""
        self._awaited[prompt] -= count
        if self._awaited[prompt] <= 0:
            del self._awaited[prompt]
            self.cache.forget(prompt)


def check_size(request: Request, limit: int | None) -> None:
    """Refuses what the model cannot hold.

    Raises:
        RolloutError: an empty prompt, or prompt + max_tokens beyond `limit` positions.
    """
    size, wanted = len(request.prompt_ids), request.sampling.max_tokens
    if size == 0:
        raise RolloutError("the prompt has no tokens", where=f"request {request.id!r}")
    if limit and size + wanted > limit:
        raise RolloutError(
            f"prompt of {size} tokens + max_tokens {wanted} exceeds the model's {limit} positions",
            where=f"request {request.id!r}",
            fix="shorten or drop the prompt, or lower max_tokens",
        )

"""The thread that drives a running batch for requests that come from elsewhere."""

from __future__ import annotations

import functools
import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from posttrain.errors import PosttrainError, RolloutError
from posttrain.rollout.base import Completion, Request
from posttrain.rollout.hf import HFEngine, evaluation_mode
from posttrain.rollout.running import ContinuousBatch, NewToken, Step

Event = NewToken | Completion | PosttrainError
"""A token, the end of a request, or why there is none."""


class Full(Exception):
    """So many requests wait already that another one is refused."""


@dataclass
class _Open:
    """A request that has not ended; `handle` is its own in the batch, once it is there."""

    request: Request
    deliver: Callable[[Event], None]
    handle: int = 0


class Runner:
    """Takes requests from any thread, and hands their tokens and completions back as they come.

    Args:
        engine: on the transformers model; nobody else may use it meanwhile.
        max_waiting: requests that may wait for room in the batch; more are refused.

    Attributes:
        tokens: drawn so far, of every particle.
    """

    def __init__(self, engine: HFEngine, max_waiting: int = 256) -> None:
        self.engine, self.max_waiting = engine, max_waiting
        self.tokens = 0
        self._numbers = itertools.count(1)
        self._orders: queue.Queue[tuple[str, int, _Open | None]] = queue.Queue()
        self._lock = threading.Lock()
        self._open: dict[int, _Open] = {}
        self._number_of: dict[int, int] = {}
        self._batch: ContinuousBatch = engine.batch()
        self._thread = threading.Thread(target=self._run, name="posttrain-runner", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the present step; what is open gets an error."""
        self._orders.put(("stop", 0, None))
        self._thread.join()

    @property
    def alive(self) -> bool:
        """The thread runs."""
        return self._thread.is_alive()

    @property
    def running(self) -> int:
        """Rows of the model's batch."""
        return self._batch.rows

    @property
    def waiting(self) -> int:
        """Requests that have not entered the batch."""
        return self._batch.waiting + self._orders.qsize()

    def submit(self, requests: Sequence[Request], deliver: Callable[[int, Event], None]) -> list[int]:
        """Queues requests; their numbers, for `cancel`.

        Args:
            requests: to draw.
            deliver: called in the runner's thread with the request's place in `requests` and an event; must return at once.

        Raises:
            Full: not all of them fit among those that wait.
            RolloutError: the runner has ended.
        """
        if not self.alive:
            raise RolloutError("the engine has stopped")
        with self._lock:
            if self.waiting + len(requests) > self.max_waiting:
                raise Full
            numbers = [next(self._numbers) for _ in requests]
            for place, (number, request) in enumerate(zip(numbers, requests, strict=True)):
                self._orders.put(("add", number, _Open(request, functools.partial(deliver, place))))
        return numbers

    def cancel(self, numbers: Sequence[int]) -> None:
        """Lets requests go whose client has left; those that have ended are passed over."""
        for number in numbers:
            self._orders.put(("cancel", number, None))

    def _run(self) -> None:
        with evaluation_mode(self.engine.model):
            while self._take(block=not self._batch.busy):
                if not self._batch.busy:
                    continue
                started = time.perf_counter()
                try:
                    step = self._batch.step()
                except Exception as error:
                    self._fail(error if isinstance(error, PosttrainError) else RolloutError(f"{type(error).__name__}: {error}"))
                    continue
                self.engine.tokens += step.drawn
                self.engine.seconds += time.perf_counter() - started
                self._hand_over(step)
        self._fail(RolloutError("the server is stopping"))

    def _take(self, block: bool) -> bool:
        """Carries out what has been ordered; False once the thread is to end."""
        while True:
            try:
                order, number, item = self._orders.get(block=block)
            except queue.Empty:
                return True
            block = False
            if order == "stop":
                return False
            if order == "cancel":
                gone = self._open.pop(number, None)
                if gone is not None:
                    self._batch.abort(gone.handle)
                    del self._number_of[gone.handle]
            elif item is not None:
                try:
                    item.handle = self._batch.add(item.request)
                except PosttrainError as error:
                    item.deliver(error)
                    continue
                self._open[number], self._number_of[item.handle] = item, number

    def _hand_over(self, step: Step) -> None:
        self.tokens += step.drawn
        for token in step.tokens:
            if token.handle in self._number_of:
                self._open[self._number_of[token.handle]].deliver(token)
        for handle, completion in step.finished:
            number = self._number_of.pop(handle, None)
            if number is not None:
                self._open.pop(number).deliver(completion)

    def _fail(self, error: PosttrainError) -> None:
        """Ends all that is open, and begins with an empty batch."""
        for item in self._open.values():
            item.deliver(error)
        self._open.clear()
        self._number_of.clear()
        self._batch = self.engine.batch()

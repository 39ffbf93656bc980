"""The ASGI application: routes, keys, limits, streaming, metrics."""

from __future__ import annotations

import asyncio
import hmac
import json
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as Call
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from posttrain.errors import ConfigError, NumericsError, PosttrainError
from posttrain.rollout.base import Completion
from posttrain.rollout.hf import HFEngine
from posttrain.rollout.limits import BodyLimit
from posttrain.rollout.running import NewToken
from posttrain.rollout.server.answers import Text, about, choice, envelope, logprobs, piece, refusal, usage
from posttrain.rollout.server.bodies import Body, ChatBody, CompletionBody, read
from posttrain.rollout.server.runner import Event, Full, Runner

Scope = MutableMapping[str, Any]


class Metrics:
    """What /metrics tells."""

    def __init__(self, runner: Runner) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("posttrain_completions", "completions by how they ended", ["finish_reason"], **own)
        self.refused = Counter("posttrain_refused", "bodies that were refused, by status", ["status"], **own)
        self.seconds = Histogram("posttrain_request_seconds", "seconds of a body, from its arrival to its last completion", **own)
        self.calls = Counter("posttrain_checker_calls", "tokens that a checker was asked about", **own)
        self.drawn = Counter("posttrain_constrained_tokens", "tokens of constrained completions that were returned", **own)
        self.accepted = Counter("posttrain_accepted_tokens", "tokens of those whose first draw was accepted", **own)
        self.ess = Histogram("posttrain_ess", "effective sample size over the particles", buckets=[i / 10 for i in range(1, 11)], **own)
        self.log_z = Histogram("posttrain_log_z", "log of the mean weight", buckets=[-64, -32, -16, -8, -4, -2, -1, -0.5, 0], **own)
        for name, text, value in (
            ("running_rows", "rows of the model's batch", lambda: runner.running),
            ("waiting_requests", "requests that have not entered the batch", lambda: runner.waiting),
            ("drawn_tokens", "tokens drawn, of every particle", lambda: runner.tokens),
            ("tokens_per_second", "of the time that the engine works", lambda: runner.engine.tokens_per_s),
        ):
            Gauge(f"posttrain_{name}", text, **own).set_function(value)

    def ended(self, completion: Completion) -> None:
        """Counts a completion."""
        self.requests.labels(completion.finish_reason).inc()
        if not completion.extra:
            return
        count, extra = len(completion.token_ids), completion.extra
        self.drawn.inc(count)
        self.calls.inc(extra["calls"] * count)
        self.accepted.inc(extra["accepted"] * count)
        self.ess.observe(extra["ess"])
        if math.isfinite(extra["log_z"]):
            self.log_z.observe(extra["log_z"])


class Service:
    """Answers bodies with the engine.

    Args:
        engine: on the model.
        name: of the model, as clients ask for it.
        key: that clients must send; empty for none.
        max_model_len: longest prompt and completion together; None is the model's own limit.
        max_waiting: requests that may wait.
    """

    def __init__(self, engine: HFEngine, name: str, key: str = "", max_model_len: int | None = None, max_waiting: int = 256) -> None:
        self.engine, self.name, self.key = engine, name, key
        own = getattr(engine.model.config, "max_position_embeddings", None)
        self.limit = min((size for size in (own, max_model_len) if size), default=None)
        self.size = engine.model.get_input_embeddings().weight.shape[0]
        self.runner = Runner(engine, max_waiting)
        self.metrics = Metrics(self.runner)
        self.started = int(time.time())

    def asgi(self, max_body: int) -> Callable[..., Awaitable[None]]:
        """The application, with its limit on bodies in bytes."""

        @asynccontextmanager
        async def lifespan(_: Any) -> AsyncIterator[None]:
            self.runner.start()
            yield
            await asyncio.to_thread(self.runner.stop)

        routes = [
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
            Route("/v1/models", self.models),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]

        async def http(_: Call, error: Exception) -> Response:
            assert isinstance(error, HTTPException)
            return self.refuse(str(error.detail), error.status_code)

        app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: http})
        limited = BodyLimit(app, max_body)

        async def guarded(scope: Scope, receive: Any, send: Any) -> None:
            if scope["type"] == "http" and scope["path"] != "/health" and not self._known(scope):
                await self.refuse("the key is missing or wrong", 401)(scope, receive, send)
                return
            await limited(scope, receive, send)

        return guarded

    def _known(self, scope: Scope) -> bool:
        sent = dict(scope["headers"]).get(b"authorization", b"")
        return not self.key or hmac.compare_digest(sent, f"Bearer {self.key}".encode())

    def refuse(self, message: str, status: int, param: str | None = None) -> JSONResponse:
        """An error, counted."""
        self.metrics.refused.labels(str(status)).inc()
        headers = {"Retry-After": "1"} if status in (429, 503) else None
        return JSONResponse(refusal(message, status, param), status, headers)

    async def health(self, _: Call) -> Response:
        """200 while the engine's thread runs."""
        return Response(status_code=200 if self.runner.alive else 503)

    async def show_metrics(self, _: Call) -> Response:
        """In Prometheus' text format."""
        return Response(generate_latest(self.metrics.registry), media_type="text/plain; version=0.0.4")

    async def models(self, _: Call) -> Response:
        """The one model."""
        found = {"id": self.name, "object": "model", "created": self.started, "owned_by": "posttrain", "max_model_len": self.limit}
        return JSONResponse({"object": "list", "data": [found]})

    async def completions(self, call: Call) -> Response:
        """POST /v1/completions."""
        return await self._answer(call, CompletionBody)

    async def chat(self, call: Call) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(call, ChatBody)

    async def _answer(self, call: Call, kind: type[Body]) -> Response:
        arrived = time.monotonic()
        try:
            body = read(await call.body(), kind)
            if body.model != self.name:
                return self.refuse(f"the model `{body.model}` is not served here, `{self.name}` is", 404, "model")
            # building a constraint takes time, in which other clients want to be served
            requests, prompts = await asyncio.to_thread(self._requests, body)
        except PosttrainError as error:
            return self.refuse(f"{error.message}{'; ' + error.fix if error.fix else ''}", 400, error.where or None)
        events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(place: int, event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, (place, event))

        try:
            numbers = self.runner.submit(requests, deliver)
        except Full:
            return self.refuse(f"{self.runner.max_waiting} requests wait already", 429)
        except PosttrainError as error:
            return self.refuse(error.message, 503)
        exchange = _Exchange(self, call, body, kind is ChatBody, requests, prompts, numbers, events, arrived)
        if body.stream:
            return StreamingResponse(exchange.stream(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        return await exchange.whole()

    def _requests(self, body: Any) -> tuple[list[Any], int]:
        """The requests, and the tokens of their prompts, each counted once."""
        prompts = body.prompts(self.engine.tokenizer, self.size)
        longest = max(map(len, prompts))
        limit = body.limit(None if self.limit is None else self.limit - longest)
        found = body.requests(prompts, limit, self.engine.max_batch)
        for ids in prompts:
            if self.limit is not None and len(ids) + limit > self.limit:
                message = f"a prompt of {len(ids)} tokens and {limit} more exceed the {self.limit} that the model has room for"
                raise ConfigError(message, where="max_tokens")
        return found, sum(map(len, prompts))


@dataclass
class _Exchange:
    """One body on its way; `prompts` are the tokens of its prompts, `numbers` those of its requests in the runner."""

    service: Service
    call: Call
    body: Any
    chat: bool
    requests: list[Any]
    prompts: int
    numbers: list[int]
    events: asyncio.Queue[tuple[int, Event]]
    arrived: float
    uid: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self.uid = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"

    async def whole(self) -> Response:
        """The answer in one piece; a client that leaves ends its requests."""
        found: dict[int, Completion] = {}
        watch = asyncio.create_task(self._gone())
        try:
            while len(found) < len(self.requests):
                following = asyncio.create_task(self.events.get())
                await asyncio.wait({following, watch}, return_when=asyncio.FIRST_COMPLETED)
                if not following.done():
                    following.cancel()
                    return Response(status_code=499)
                place, event = following.result()
                if isinstance(event, PosttrainError):
                    return self.service.refuse(event.message, 500 if isinstance(event, NumericsError) else 503)
                if isinstance(event, Completion):
                    found[place] = event
                    self.service.metrics.ended(event)
        finally:
            watch.cancel()
            self._end()
        ordered = [found[i] for i in range(len(found))]
        choices = [choice(self.chat, i, item, self.service.engine.tokenizer, self.body) for i, item in enumerate(ordered)]
        answer = envelope(self.chat, self.uid, self.body.model, choices)
        return JSONResponse({**answer, "usage": usage(ordered, self.prompts)})

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events; leaving ends the requests."""
        engine = self.service.engine
        texts = [Text(engine.tokenizer, request.sampling.stop, engine.eos_ids) for request in self.requests]
        begun: set[int] = set()
        found: dict[int, Completion] = {}
        try:
            while len(found) < len(self.requests):
                place, event = await self.events.get()
                if isinstance(event, PosttrainError):
                    yield _line(refusal(event.message, 500 if isinstance(event, NumericsError) else 503))
                    return
                more: dict[str, Any] = {}
                if isinstance(event, NewToken):
                    text, reason = texts[place].add(event.token), None
                    if self.body.with_logprobs:
                        more["logprobs"] = logprobs(self.chat, engine.tokenizer, [event.token], [event.logprob])
                    if not text and not more:
                        continue
                else:
                    text, reason, found[place] = texts[place].rest(event), event.finish_reason, event
                    more = about(event, self.body)
                    self.service.metrics.ended(event)
                part = piece(self.chat, place, text, reason, more, first=place not in begun)
                begun.add(place)
                yield _line(envelope(self.chat, self.uid, self.body.model, [part], chunk=True))
            if self.body.stream_options and self.body.stream_options.include_usage:
                last = envelope(self.chat, self.uid, self.body.model, [], chunk=True)
                yield _line({**last, "usage": usage(list(found.values()), self.prompts)})
            yield "data: [DONE]\n\n"
        finally:
            self._end()

    async def _gone(self) -> None:
        while (await self.call.receive())["type"] != "http.disconnect":
            pass

    def _end(self) -> None:
        self.service.runner.cancel(self.numbers)
        self.service.metrics.seconds.observe(time.monotonic() - self.arrived)


def _line(found: dict[str, Any]) -> str:
    return f"data: {json.dumps(found, ensure_ascii=False)}\n\n"

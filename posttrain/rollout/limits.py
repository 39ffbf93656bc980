"""What vLLM's server lacks, as ASGI middleware: a limit on the size of requests, and `response_format` by our sampler."""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from posttrain.rollout.asked import ResponseFormat

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class BodyLimit:
    """Answers 413 to a body that is too large, before it is read where its length is declared.

    Args:
        app: the ASGI application behind it.
        limit: in bytes; without one, `$POSTTRAIN_MAX_BODY`.
    """

    def __init__(self, app: App, limit: int | None = None) -> None:
        self.app, self.limit = app, int(os.environ.get("POSTTRAIN_MAX_BODY", str(4 * 2**20))) if limit is None else limit

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Passes on what is small enough."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self.limit:
            await self._refuse(send)
            return
        parts, size = await _body(receive, self.limit)
        if size > self.limit:
            await self._refuse(send)
            return
        await self.app(scope, _replayed(parts, receive), send)

    async def _refuse(self, send: Send) -> None:
        message = f"the request is larger than {self.limit} bytes"
        body = json.dumps({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": 413}}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class FormatSampler:
    """Lets our sampler draw `response_format` where a request names a sampler and no constraint of its own.

    `{"response_format": {...}, "vllm_xargs": {"awrs": "{\\"sampler\\": {...}}"}}` becomes the same request with the schema as
    constraint. Every other body goes on as it is, and is judged by the server.

    Args:
        app: the ASGI application behind it.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Rewrites bodies of completions."""
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].endswith("/completions"):
            await self.app(scope, receive, send)
            return
        parts, _ = await _body(receive, None)
        raw = b"".join(part.get("body", b"") for part in parts)
        changed = with_format(raw)
        if changed is not None:
            parts = [part for part in parts if part["type"] != "http.request"]
            parts.insert(0, {"type": "http.request", "body": changed, "more_body": False})
            headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
            scope = {**scope, "headers": [*headers, (b"content-length", str(len(changed)).encode())]}
        await self.app(scope, _replayed(parts, receive), send)


def with_format(raw: bytes) -> bytes | None:
    """The body with its `response_format` as the constraint of its sampler; None where that is not what it asks for."""
    try:
        body = json.loads(raw)
        asked = json.loads(body["vllm_xargs"]["awrs"])
        if not isinstance(asked, dict) or asked.get("constraint") is not None or body.get("response_format") is None:
            return None
        constraint = ResponseFormat.model_validate(body["response_format"]).constraint()
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if constraint is None:
        return None
    asked["constraint"] = constraint.model_dump(mode="json", exclude_none=True)
    del body["response_format"]
    body["vllm_xargs"]["awrs"] = json.dumps(asked)
    return json.dumps(body).encode()


async def _body(receive: Receive, limit: int | None) -> tuple[list[Message], int]:
    """The messages of a body, and its size; not all of them where it is larger than the limit."""
    parts: list[Message] = []
    size, more = 0, True
    while more and (limit is None or size <= limit):
        message = await receive()
        parts.append(message)
        size += len(message.get("body", b""))
        more = message["type"] == "http.request" and bool(message.get("more_body"))
    return parts, size


def _replayed(parts: list[Message], receive: Receive) -> Receive:
    async def replayed() -> Message:
        return parts.pop(0) if parts else await receive()

    return replayed

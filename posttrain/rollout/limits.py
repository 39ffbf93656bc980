"""A limit on the size of requests, as ASGI middleware for a server that has none."""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

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
        parts: list[Message] = []
        size, more = 0, True
        while more:
            message = await receive()
            parts.append(message)
            size += len(message.get("body", b""))
            more = message["type"] == "http.request" and bool(message.get("more_body"))
            if size > self.limit:
                await self._refuse(send)
                return

        async def replayed() -> Message:
            return parts.pop(0) if parts else await receive()

        await self.app(scope, replayed, send)

    async def _refuse(self, send: Send) -> None:
        message = f"the request is larger than {self.limit} bytes"
        body = json.dumps({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": 413}}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": body})

"""What goes back to a client, in the shapes of OpenAI's completions and chat completions."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from posttrain.rollout.base import Completion

HELD = "\ufffd"
"""Stands at the end of a text whose last character is not whole yet."""


class Text:
    """The text of a completion as it grows: what may be sent already.

    Args:
        tokenizer: decodes.
        stop: stop strings; a text that may be the beginning of one is held back.
        ends: end tokens.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], ends: frozenset[int]) -> None:
        self.tokenizer, self.stop, self.ends = tokenizer, stop, ends
        self.ids: list[int] = []
        self.sent = 0

    def add(self, token: int) -> str:
        """The text that the token lets go."""
        if token in self.ends:
            return ""
        self.ids.append(token)
        text: str = self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        cuts = [place for place in map(text.find, self.stop) if place >= 0]
        whole = text.rstrip(HELD)
        until = min(cuts) if cuts else len(whole) - _begun(whole, self.stop)
        found = text[self.sent : until]
        self.sent = max(self.sent, until)
        return found

    def rest(self, completion: Completion) -> str:
        """What is left at the end."""
        return completion.text[self.sent :]


def _begun(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of the text that begins a stop string."""
    return max((size for item in stop for size in range(1, len(item)) if text.endswith(item[:size])), default=0)


def usage(completions: Sequence[Completion], prompts: int) -> dict[str, int]:
    """Token counts; the tokens of returned completions, not of every particle."""
    drawn = sum(len(item.token_ids) for item in completions)
    return {"prompt_tokens": prompts, "completion_tokens": drawn, "total_tokens": prompts + drawn}


def logprobs(chat: bool, tokenizer: Any, ids: Sequence[int], values: Sequence[float]) -> dict[str, Any]:
    """Log-probabilities of drawn tokens."""
    words = [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids]
    if chat:
        rows = [
            {"token": word, "logprob": value, "bytes": list(word.encode()), "top_logprobs": []}
            for word, value in zip(words, values, strict=True)
        ]
        return {"content": rows}
    offsets = [0]
    for word in words:
        offsets.append(offsets[-1] + len(word))
    return {"tokens": words, "token_logprobs": list(values), "top_logprobs": None, "text_offset": offsets[:-1]}


def choice(chat: bool, index: int, completion: Completion, tokenizer: Any, body: Any) -> dict[str, Any]:
    """One choice of a whole answer."""
    found: dict[str, Any] = {"index": index, "finish_reason": completion.finish_reason, "logprobs": None}
    if chat:
        found["message"] = {"role": "assistant", "content": completion.text}
    else:
        found["text"] = completion.text
    if body.with_logprobs:
        found["logprobs"] = logprobs(chat, tokenizer, completion.token_ids, completion.logprobs)
    return {**found, **about(completion, body)}


def about(completion: Completion, body: Any) -> dict[str, Any]:
    """Weights of a constrained completion under `awrs`, numbers that are not finite as null; and ids where they are asked for."""
    found: dict[str, Any] = {}
    if completion.extra:
        found["awrs"] = {key: plain(value) for key, value in completion.extra.items()}
    if body.return_token_ids:
        found["token_ids"] = completion.token_ids
    return found


def plain(value: Any) -> Any:
    """A value that JSON can hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def piece(
    chat: bool, index: int, text: str, reason: str | None, found: dict[str, Any] | None = None, *, first: bool = False
) -> dict[str, Any]:
    """One choice of a part of a stream."""
    part: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": None}
    if chat:
        part["delta"] = {**({"role": "assistant"} if first else {}), **({"content": text} if text or first else {})}
    else:
        part["text"] = text
    return {**part, **(found or {})}


def envelope(chat: bool, uid: str, model: str, choices: Sequence[dict[str, Any]], *, chunk: bool = False) -> dict[str, Any]:
    """Around the choices."""
    kind = ("chat.completion.chunk" if chunk else "chat.completion") if chat else "text_completion"
    return {"id": uid, "object": kind, "created": int(time.time()), "model": model, "choices": list(choices)}


def refusal(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's servers shape it."""
    kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": "server_error" if status >= 500 else kind, "param": param, "code": status}}

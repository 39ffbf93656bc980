"""A judge behind HTTP: one POST a completion, its answer a number.

The request is `{"prompt", "completion", "answer"}`, or `body` with `{prompt}`, `{completion}` and `{answer}` filled in, which
also fits chat servers. The answer must be a JSON object `{"score": NUMBER}` and nothing else, or with `pattern` any text in
which the pattern's first group is the number. What fails (time, connection, status, form, range) is None and counted.

A key comes from the environment only: `key: ${NAME}`. It is neither written to the cache nor shown in any message, and redirects are
not followed, since they would carry it elsewhere. Answers are kept in `cache`, JSON lines `{"key", "score"}` with a hash of the
request, so that a run that is started again does not ask twice.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.client
import json
import math
import os
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from posttrain.errors import ConfigError
from posttrain.rewards.registry import completion_text, count_failure, reward

ANSWER_BYTES = 1 << 20
PAUSE_S = 0.25
AGAIN = (408, 425, 429, 500, 502, 503, 504)
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_SLOT = re.compile(r"\{(prompt|completion|answer)\}")
_WHERE = "rewards.judge_http.options"


class _Failed(Exception):
    """A request that gave no score; its text is the reason that is counted."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class _Watch:
    """The sockets of one request; all are shut when its time is up, since a socket's own time limit starts again with every byte."""

    def __init__(self, seconds: float) -> None:
        self._sockets: list[socket.socket] = []
        self.late = False
        self._timer = threading.Timer(seconds, self._shut)
        self._timer.daemon = True

    def __enter__(self) -> _Watch:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def add(self, found: socket.socket) -> None:
        """Watches one more socket."""
        self._sockets.append(found)
        if self.late:
            self._shut()

    def _shut(self) -> None:
        self.late = True
        for found in self._sockets:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(found, socket.SHUT_RDWR)


class _Plain(http.client.HTTPConnection):
    watch: _Watch

    def connect(self) -> None:
        super().connect()
        self.watch.add(self.sock)


class _Secure(http.client.HTTPSConnection, _Plain):
    def connect(self) -> None:
        super().connect()
        self.watch.add(self.sock)


class _Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens both kinds of addresses by connections that are watched."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def _watched(self, connection: _Plain) -> http.client.HTTPConnection:
        connection.watch = self._watch
        return connection

    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(lambda host, **options: self._watched(_Plain(host, **options)), req)

    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(lambda host, **options: self._watched(_Secure(host, **options)), req)


class Cache:
    """Scores by key, in memory and, with a path, as JSON lines; a line that cannot be read is passed over."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._lock, self._scores = path, threading.Lock(), dict[str, float]()
        with contextlib.suppress(FileNotFoundError):
            for line in path.read_bytes().splitlines() if path else ():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    item = json.loads(line)
                    self._scores[str(item["key"])] = _number(item["score"])

    def get(self, key: str) -> float | None:
        """The score kept under `key`."""
        return self._scores.get(key)

    def put(self, key: str, score: float) -> None:
        """Keeps a score; its line is appended at once and whole."""
        with self._lock:
            self._scores[key] = score
            if self._path:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
                try:
                    os.write(descriptor, json.dumps({"key": key, "score": score}).encode() + b"\n")
                finally:
                    os.close(descriptor)


@functools.cache
def _cache(path: Path) -> Cache:
    return Cache(path)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError
    return float(value)


@dataclass(frozen=True)
class _Judge:
    """How a judge is asked."""

    url: str
    headers: Mapping[str, str] = field(repr=False)
    pattern: re.Pattern[str] | None
    low: float
    high: float
    timeout_s: float
    retries: int

    def ask(self, body: bytes, end: float) -> float:
        """The score for one request, tried again while there is time.

        Raises:
            _Failed: reason `timeout`, `connection`, `status`, or `answer`.
        """
        for turn in range(self.retries + 1):
            try:
                return self._once(body, end)
            except _Failed as error:
                pause = PAUSE_S * 2**turn
                if str(error) == "answer" or str(error) == "refused" or turn == self.retries or time.monotonic() + pause >= end:
                    raise
                time.sleep(pause)
        raise _Failed("timeout")

    def _once(self, body: bytes, end: float) -> float:
        stop = min(end, time.monotonic() + self.timeout_s)
        if stop <= time.monotonic():
            raise _Failed("timeout")
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json", **self.headers}, method="POST")
        limit = max(0.05, stop - time.monotonic())
        with _Watch(limit) as watch:
            try:
                with urllib.request.build_opener(_NoRedirect, _Handler(watch)).open(request, timeout=limit) as answer:
                    raw = _read(answer)
            except urllib.error.HTTPError as error:
                error.close()
                raise _Failed("status" if error.code in AGAIN else "refused") from None
            except (OSError, http.client.HTTPException) as error:
                late = watch.late or isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError)
                raise _Failed("timeout" if late else "connection") from None
            if watch.late:
                raise _Failed("timeout")
        return self._score(raw)

    def _score(self, raw: bytes) -> float:
        try:
            text = raw.decode("utf-8")
            if self.pattern is None:
                found = json.loads(text)
                if not isinstance(found, dict) or set(found) != {"score"}:
                    raise ValueError
                score = _number(found["score"])
            else:
                match = self.pattern.search(text)
                score = _number(float(match[1])) if match else math.nan
        except (ValueError, TypeError, IndexError, RecursionError):
            raise _Failed("answer") from None
        if not self.low <= score <= self.high:
            raise _Failed("answer")
        return score


def _read(answer: Any) -> bytes:
    """The whole body, within the size; half of one is a lost connection, since half of a number is another number."""
    raw: bytes = answer.read(ANSWER_BYTES + 1)
    if len(raw) > ANSWER_BYTES:
        raise _Failed("answer")
    if answer.length:
        raise http.client.IncompleteRead(raw, answer.length)
    return raw


def _variables(text: str, what: str) -> str:
    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match[1])
        if not found:
            raise ConfigError(f"{what}: the environment variable `{match[1]}` is not set", where=_WHERE, fix=f"export {match[1]}=...")
        return found

    return _VARIABLE.sub(value, text)


def _headers(key: str | None, header: str) -> dict[str, str]:
    if key is None:
        return {}
    if not _VARIABLE.fullmatch(key):
        raise ConfigError("`key` must name an environment variable, not hold the key", where=_WHERE, fix="key: ${JUDGE_KEY}")
    value = _variables(key, "key").strip()
    return {header: f"Bearer {value}" if header.lower() == "authorization" else value}


def _make(
    url: str, key: str | None, header: str, pattern: str | None, low: float | None, high: float | None, timeout_s: float, retries: int
) -> _Judge:
    address = _variables(url, "url")
    if urlsplit(address).scheme not in ("http", "https") or not urlsplit(address).hostname:
        raise ConfigError(f"`url` must be an http or https address, got {urlsplit(address).scheme or 'no scheme'}", where=_WHERE)
    try:
        compiled = re.compile(pattern) if pattern is not None else None
    except re.error as error:
        raise ConfigError(f"`pattern` is no regular expression: {error}", where=_WHERE) from None
    if compiled is not None and compiled.groups < 1:
        raise ConfigError("`pattern` has no group", where=_WHERE, fix=r"e.g. Score: (\d+)")
    bounds = (-math.inf if low is None else low, math.inf if high is None else high)
    return _Judge(address, _headers(key, header), compiled, *bounds, timeout_s, retries)


def _filled(template: Any, values: Mapping[str, str]) -> Any:
    if isinstance(template, str):
        return _SLOT.sub(lambda match: values[match[1]], template)
    if isinstance(template, dict):
        return {key: _filled(value, values) for key, value in template.items()}
    return [_filled(item, values) for item in template] if isinstance(template, list) else template


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "\n\n".join(str(turn.get("content") or "") if isinstance(turn, Mapping) else str(turn) for turn in value)
    return "" if value is None else str(value)


@reward("judge_http")
def judge_http(
    completions: Sequence[Any],
    prompts: Sequence[Any] | None = None,
    prompt: Sequence[Any] | None = None,
    answer: Sequence[Any] | None = None,
    *,
    url: str,
    body: dict[str, Any] | None = None,
    pattern: str | None = None,
    key: str | None = None,
    key_header: str = "Authorization",
    low: float | None = None,
    high: float | None = None,
    timeout_s: float = 30.0,
    batch_timeout_s: float = 300.0,
    retries: int = 2,
    concurrency: int = 8,
    cache: Path | None = None,
    **columns: Any,
) -> list[float | None]:
    r"""The judge's score; None, and counted, where there is none.

    Args:
        completions: texts, or lists of messages.
        prompts, prompt: what was asked.
        answer: reference answers, where there are any.
        url: address, `${NAME}` is taken from the environment.
        body: JSON to send, with `{prompt}`, `{completion}`, `{answer}` in its texts.
        pattern: regular expression whose first group is the score, for answers that are not `{"score": NUMBER}`.
        key: `${NAME}` of a variable that holds the key, sent as `Authorization: Bearer KEY`, or as it is in another `key_header`.
        low, high: a score outside them is a failure.
        timeout_s: seconds for one request; `batch_timeout_s` for all of them, repetitions included.
        retries: repetitions after a time-out, a lost connection, or a status of 408, 425, 429 or 5xx, after 0.25, 0.5, 1, ... s.
        concurrency: requests at once.
        cache: file of JSON lines.

    Raises:
        ConfigError: a bad address or pattern, or an unset variable.
    """
    judge = _make(url, key, key_header, pattern, low, high, timeout_s, retries)
    asked = prompts if prompts is not None else prompt if prompt is not None else [None] * len(completions)
    golds = answer if answer is not None else [None] * len(completions)
    requests = []
    for question, completion, gold in zip(asked, completions, golds, strict=True):
        values = {"prompt": _text(question), "completion": completion_text(completion), "answer": _text(gold)}
        requests.append(json.dumps(_filled(body, values) if body is not None else values).encode())
    kept = Cache(None) if cache is None else _cache(cache)
    settings = json.dumps([judge.url, pattern, low, high]).encode()
    keys = [hashlib.sha256(settings + b"\n" + request).hexdigest() for request in requests]
    found = _ask_all(judge, {k: r for k, r in zip(keys, requests, strict=True) if kept.get(k) is None}, batch_timeout_s, concurrency)
    for name, score in found.items():
        if isinstance(score, float):
            kept.put(name, score)
    results: list[float | None] = []
    for name in keys:
        failed = found.get(name)
        if isinstance(failed, str):
            count_failure("judge_http", failed)
        results.append(None if isinstance(failed, str) else kept.get(name))
    return results


def _ask_all(judge: _Judge, requests: Mapping[str, bytes], batch_s: float, concurrency: int) -> dict[str, float | str]:
    """Key -> score, or the reason why there is none."""
    end = time.monotonic() + batch_s

    def one(body: bytes) -> float | str:
        try:
            return judge.ask(body, end)
        except _Failed as error:
            return str(error)

    if not requests:
        return {}
    with ThreadPoolExecutor(max(1, min(concurrency, len(requests)))) as pool:
        return dict(zip(requests, pool.map(one, requests.values()), strict=True))

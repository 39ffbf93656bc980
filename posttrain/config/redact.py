"""Secrets are taken out of everything that is written: resolved configs, environment, logs, reports.

A secret is known by its shape anywhere in a text (`hf_...`, `sk-...`, `user:pass@` in a URL, a bearer token, ...), by the
name of the key it stands under (token, secret, password, api_key as whole words), or by being the value of an
environment variable of such a name. Tokens of a tokenizer (`pad_token`, `max_tokens`, `use_cls_token`) are none.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
from typing import Any

REDACTED = "[redacted]"

_SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}"
    r"|sk-[A-Za-z0-9_-]{16,}"
    r"|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_[A-Za-z0-9_]{16,}|glpat-[A-Za-z0-9_-]{16,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[A-Za-z0-9_-]{30,}"
    r"|xox[abprs]-[A-Za-z0-9-]{10,}"
    r"|eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+"
    r")"
)
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_URL_LOGIN = re.compile(r"(?<=://)([^\s/:@'\"]*):([^\s/@'\"]+)@")
_URL_USER = re.compile(r"(?<=://)[A-Za-z0-9_.~-]{20,}(?=@)")
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{16,}")
_PAIR = re.compile(
    r"""(?i)(?<![\w.-])((?=[\w.-]*(?:token|secret|pass|credential|key|authorization))[\w.-]+)(["']?\s{0,3}[=:]\s{0,3}["']?)([^\s"'&,;{}\[\]]+)"""
)
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")

_ALWAYS = {"secret", "password", "passwd", "passphrase", "credential", "credentials", "apikey", "authorization"}
_KEY_OF = {"api", "access", "private", "secret", "auth", "signing", "encryption"}
_TOKENIZER = {
    *("pad", "eos", "bos", "unk", "cls", "sep", "mask", "stop", "end", "start", "begin", "image", "video", "audio", "eot", "eom"),
    *("special", "extra", "new", "added", "next", "first", "last", "per", "by", "think", "boi", "eoi", "pair", "each", "max", "min", "num"),
}


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(name)]


def is_secret_name(name: str) -> bool:
    """True if a key or variable of this name holds a secret: token, secret, password, api_key as whole words.

    `max_tokens`, `tokenizer`, `pad_token`, `eos_token_id`, `use_cls_token` are harmless.
    """
    words = _words(name.rsplit(".", 1)[-1])
    if not words:
        return False
    if any(word in _ALWAYS for word in words):
        return True
    if any(a in _KEY_OF and b in ("key", "keys") for a, b in itertools.pairwise(words)):
        return True
    return words[-1] == "token" and (len(words) == 1 or words[-2] not in _TOKENIZER)


def _looks_secret(value: str) -> bool:
    return len(value) >= 6 and not any(c in value for c in " <>|")


@functools.cache
def _environment_secrets() -> tuple[str, ...]:
    found = {v for k, v in os.environ.items() if is_secret_name(k) and len(v) >= 16 and os.sep not in v}
    return tuple(sorted(found, key=len, reverse=True))


def _redact_pair(match: re.Match[str]) -> str:
    hide = is_secret_name(match[1]) and _looks_secret(match[3])
    return f"{match[1]}{match[2]}{REDACTED}" if hide else match[0]


def redact_text(text: str) -> str:
    """`text` with secrets of known shape, logins in URLs and `key=value` pairs of secret keys replaced by `[redacted]`."""
    for secret in _environment_secrets():
        text = text.replace(secret, REDACTED)
    text = _PRIVATE_KEY.sub(REDACTED, text)
    text = _URL_LOGIN.sub(REDACTED + "@", text)
    text = _URL_USER.sub(REDACTED, text)
    text = _BEARER.sub(lambda m: f"{m[1]} {REDACTED}", text)
    text = _SHAPES.sub(REDACTED, text)
    return _PAIR.sub(_redact_pair, text)


def _redact_list(items: list[Any]) -> list[Any]:
    out, hide = [], False
    for item in items:
        hidden = hide and isinstance(item, str) and not item.startswith("-")
        out.append(REDACTED if hidden else redact(item))
        hide = isinstance(item, str) and item.startswith("-") and "=" not in item and is_secret_name(item)
    return out


def _redact_under(key: Any, value: Any) -> Any:
    if isinstance(key, str) and is_secret_name(key):
        if isinstance(value, str) and (_words(key)[-1] != "token" or _looks_secret(value)):
            return REDACTED if value else value
        if isinstance(value, int | float) and not isinstance(value, bool) and _words(key)[-1] != "token":
            return REDACTED
        if isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
            return [REDACTED for _ in value]
    return redact(value)


def redact(value: Any) -> Any:
    """`value` (dict, list, str, or anything else) with every secret replaced; the form is kept, nothing is changed in place.

    A flag of a command line such as `--hub-token` hides the list item after it.
    """
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, dict):
        return {redact(k): _redact_under(k, v) for k, v in value.items()}
    if isinstance(value, list):
        return _redact_list(value)
    if isinstance(value, tuple):
        return tuple(_redact_list(list(value)))
    return value

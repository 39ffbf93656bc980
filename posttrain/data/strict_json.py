"""JSON as the standard has it, for rows that other programs wrote.

Python's own parser takes NaN and Infinity, keeps the last of two equal keys, and dies with RecursionError on deep
nesting. Here each of these is an error that says what was found. Also refused: numbers that overflow (1e999), integers
outside 64 bits (no column format holds them), and lone surrogates, which parse but can be neither encoded nor printed.
A proper surrogate pair becomes one character, and NUL stays.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

MAX_DEPTH = 200
INT_MIN, INT_MAX = -(2**63), 2**64 - 1
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")


class RowError(ValueError):
    """A row that cannot be used: `reason` is a short countable name, the message is for a person."""

    def __init__(self, reason: str, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.reason, self.fix = reason, fix


def _constant(text: str) -> Any:
    raise RowError("not finite", f"{text} is not JSON", "write null or a finite number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise RowError("not finite", f"the number {_short(text)} overflows a 64-bit float", "write null or a finite number")
    return value


def _int(text: str) -> int:
    if len(text) > 20 or not INT_MIN <= (value := int(text)) <= INT_MAX:
        raise RowError("huge integer", f"the integer {_short(text)} ({len(text)} characters) does not fit 64 bits", "write it as a string")
    return value


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [key for key, _ in pairs]
        double = next(key for i, key in enumerate(names) if key in names[:i])
        raise RowError("duplicate key", f"the key {double!r} is written twice in one object", "keep one of them")
    return found


_DECODER = json.JSONDecoder(parse_constant=_constant, parse_float=_float, parse_int=_int, object_pairs_hook=_pairs)


def _short(text: str) -> str:
    return text if len(text) <= 24 else f"{text[:20]}..."


def check_depth(value: Any, limit: int = MAX_DEPTH) -> None:
    """Refuses a list or dict nested deeper than `limit`, without recursion."""
    level = [value]
    for _ in range(limit):
        inside = (item for node in level for item in (node.values() if isinstance(node, dict) else node))
        level = [item for item in inside if isinstance(item, dict | list)]
        if not level:
            return
    raise RowError("nested too deep", f"nested more than {limit} levels deep", "flatten the row")


def surrogate_at(value: Any, path: str = "") -> str | None:
    """Dotted place of the first text with a lone surrogate, or None."""
    stack = [(path, value)]
    while stack:
        place, node = stack.pop()
        if isinstance(node, str) and _SURROGATE.search(node):
            return place or "the text"
        if isinstance(node, dict):
            stack += [(f"{place} (key)", key) for key in node] + [(f"{place}.{key}".lstrip("."), item) for key, item in node.items()]
        elif isinstance(node, list):
            stack += [(f"{place}[{i}]", item) for i, item in enumerate(node)]
    return None


def check_surrogates(value: Any) -> None:
    """Refuses lone surrogates anywhere in `value`."""
    place = surrogate_at(value)
    if place is not None:
        name = place.encode("utf-8", "backslashreplace").decode()
        raise RowError("lone surrogate", f"half a surrogate pair in {name}; it is no character", "remove it or write U+FFFD")


def parse(text: str) -> Any:
    """The value of one JSON text.

    Raises:
        RowError: not JSON, or one of the cases in the module docstring.
    """
    try:
        value, end = _DECODER.raw_decode(text, _skip(text, 0))
    except RowError:
        raise
    except RecursionError:
        raise RowError("nested too deep", f"nested more than {MAX_DEPTH} levels deep", "flatten the row") from None
    except json.JSONDecodeError as error:
        raise RowError("not JSON", f"not JSON: {error.msg} at character {error.pos + 1}") from None
    if (rest := _skip(text, end)) < len(text):
        raise RowError("not JSON", f"not JSON: more text after the value, at character {rest + 1}", "one JSON object a line")
    if text.count("[") + text.count("{") > MAX_DEPTH:
        check_depth(value)
    if _ESCAPED_SURROGATE.search(text):
        check_surrogates(value)
    return value


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at

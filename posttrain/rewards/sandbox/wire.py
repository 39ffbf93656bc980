"""Messages between two jails, one of which is hostile: JSON lines, and values as JSON. Standard library only.

A value is sent as itself where JSON has it, else as `[tag, ...]`; whatever has no plain form is sent as a reference. Nothing
that arrives is ever executed or unpickled: the worst that a sender can do is to send another plain value.
"""

from __future__ import annotations

import builtins
import datetime
import json
import os
import types
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

MESSAGE_BYTES = 8 << 20
Refer = Callable[[Any], list[Any]]
Resolve = Callable[[list[Any]], Any]
_LISTS = {"l": list, "t": tuple, "s": set, "z": frozenset, "q": deque}
_TEXTS: dict[str, tuple[type, Callable[[Any], str], Callable[[str], Any]]] = {
    "decimal": (Decimal, str, Decimal),
    "fraction": (Fraction, str, Fraction),
    "datetime": (datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    "date": (datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    "time": (datetime.time, datetime.time.isoformat, datetime.time.fromisoformat),
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "bytearray": (bytearray, bytearray.hex, bytearray.fromhex),
}


class Closed(Exception):
    """The other side has ended, or does not keep to the protocol."""


class Link:
    """JSON lines over one end of a socket pair."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._buffer = descriptor, bytearray()

    def send(self, message: Any) -> None:
        """Sends one message; raises Closed where nobody listens."""
        line = memoryview(json.dumps(message).encode() + b"\n")
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
        except OSError:
            raise Closed from None

    def receive(self) -> Any:
        """The next message; raises Closed at the end, for a message that is too long, and for one that is no JSON."""
        while True:
            end = self._buffer.find(b"\n")
            if end >= 0:
                line = bytes(self._buffer[:end])
                del self._buffer[: end + 1]
                try:
                    return json.loads(line)
                except (ValueError, RecursionError):
                    raise Closed from None
            try:
                part = os.read(self._descriptor, 1 << 16)
            except OSError:
                raise Closed from None
            if not part or len(self._buffer) > MESSAGE_BYTES:
                raise Closed
            self._buffer += part


def encode(value: Any, refer: Refer) -> Any:
    """`value` as JSON; `refer(value)` gives `[tag, ...]` for what has no plain form.

    Subclasses become what they extend (a named tuple a tuple, a Counter a dict, a numpy float a float), arrays lists.
    """
    kind = type(value)
    if value is None:
        return None
    if kind in (bool, int, float, str):
        return value
    for tag, found in _LISTS.items():
        if kind is found or (tag in "lt" and isinstance(value, found)):
            return [tag, [encode(item, refer) for item in value]]
    if isinstance(value, dict):
        return ["d", [[encode(k, refer), encode(v, refer)] for k, v in value.items()]]
    for tag, (known, text, _) in _TEXTS.items():
        if kind is known:
            return [tag, text(value)]
    if kind is complex:
        return ["c", value.real, value.imag]
    for base in (int, float, str):
        if isinstance(value, base):
            return base(value)
    if kind.__module__.partition(".")[0] == "numpy" and hasattr(value, "tolist"):
        return encode(value.tolist(), refer)
    name = getattr(value, "__name__", "") if isinstance(value, type | types.BuiltinFunctionType) else ""
    if name and getattr(builtins, name, None) is value:
        return ["n", name]
    return refer(value)


def decode(message: Any, resolve: Resolve) -> Any:
    """The value of a message; `resolve([tag, ...])` gives the object of a reference. Raises Closed for anything else."""
    if not isinstance(message, list):
        if isinstance(message, dict):
            raise Closed
        return message
    try:
        tag = message[0]
        if tag in _LISTS:
            return _LISTS[tag](decode(item, resolve) for item in message[1])
        if tag == "d":
            return {decode(k, resolve): decode(v, resolve) for k, v in message[1]}
        if tag in _TEXTS:
            return _TEXTS[tag][2](message[1])
        if tag == "c":
            return complex(message[1], message[2])
        if tag == "n" and message[1] in vars(builtins):
            return getattr(builtins, message[1])
        return resolve(message)
    except (IndexError, KeyError, TypeError, ValueError, ArithmeticError, AttributeError):
        raise Closed from None

r"""Finding `\boxed{...}` with balanced braces."""

from __future__ import annotations

import re

_START = re.compile(r"\\f?boxed\s*(\{)?")


def boxed_answers(text: str) -> list[str]:
    r"""Contents of all `\boxed{...}` and `\fbox`-like `\fboxed{...}` in order; `\boxed 7` gives `7`; an unclosed box is left out."""
    found: list[str] = []
    position = 0
    while match := _START.search(text, position):
        position = match.end()
        if match.group(1) is None:
            bare = re.match(r"[^\s$.,;]+", text[position:])
            if bare:
                found.append(bare.group())
                position += bare.end()
            continue
        end = _closing(text, position)
        if end is not None:
            found.append(text[position:end])
            position = end + 1
    return found


def _closing(text: str, start: int) -> int | None:
    depth, index = 1, start
    while index < len(text):
        char = text[index]
        if char == "\\":
            index += 2
            continue
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return index
        index += 1
    return None

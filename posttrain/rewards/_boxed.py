r"""Finding `\boxed{...}` with balanced braces, in one pass, so that a long text of unclosed boxes costs no more than any other."""

from __future__ import annotations

import re

_TOKEN = re.compile(r"\\f?boxed\s*(?P<brace>\{)|\\f?boxed\s*(?P<bare>[^\s{}$.,;\\]+)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)


def boxed_answers(text: str) -> list[str]:
    r"""Contents of the outermost closed `\boxed{...}` and `\fboxed{...}`, in order; `\boxed 7` gives `7`; an unclosed box is left out."""
    found: list[tuple[int, str]] = []
    stack: list[int | None] = []
    for token in _TOKEN.finditer(text):
        if token["brace"]:
            stack.append(token.end())
        elif token["bare"]:
            found.append((token.start(), token["bare"]))
        elif token["open"]:
            stack.append(None)
        elif token["close"] and stack:
            start = stack.pop()
            if start is not None:
                while found and found[-1][0] >= start:
                    found.pop()
                found.append((start, text[start : token.start()]))
    return [content for _, content in found]


def unboxed(text: str) -> str | None:
    """Content of the last box, and of the last box within it, and so on; None where there is no box."""
    inner: str | None = None
    boxes = boxed_answers(text)
    while boxes:
        inner = boxes[-1]
        boxes = boxed_answers(inner)
    return inner

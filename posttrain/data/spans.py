"""Where the assistant's words lie in a rendered conversation, without generation tags in the template.

For assistant turn i let P_i = render(turns before i, with the generation prompt) and U_i = render(turns up to i), and F
the whole. Where the template is prefix-stable, P_i and U_i are prefixes of F and the turn is F[|P_i| : |U_i|], cut at
the white space behind its end-of-turn text: exactly what the model must write after the prompt it will be given. Some
templates render the last turn unlike earlier ones, or put text into the generation prompt that no finished turn has.
Then F is rendered again with a mark in place of the turn's content: what surrounds the mark frames the content in F, and
the end-of-turn text is what follows the mark in U_i. Where that fails too, the template is refused.
"""

from __future__ import annotations

import json
from typing import Any

from posttrain.data.strict_json import RowError

MARK = "9041726351809264173548"


def render(tokenizer: Any, turns: list[dict[str, Any]], tools: list[Any] | None, *, generation: bool = False) -> str:
    """The conversation as text.

    Raises:
        RowError: the template refuses these turns, or fails on them.
    """
    try:
        return tokenizer.apply_chat_template(turns, tools=tools or None, tokenize=False, add_generation_prompt=generation)
    except Exception as error:
        roles = ", ".join(turn["role"] for turn in turns[:8])
        raise RowError(
            "template refused", f"the chat template refuses the turns ({roles}): {error}", "change the rows or the template"
        ) from None


def assistant_spans(tokenizer: Any, turns: list[dict[str, Any]], tools: list[Any] | None) -> tuple[str, list[tuple[int, int]]]:
    """(whole text F, [start, end) in characters of every assistant turn with its end-of-turn text).

    Raises:
        RowError: the template refuses the turns, drops one, or gives a turn no findable place.
    """
    text = render(tokenizer, turns, tools)
    _check_no_turn_dropped(tokenizer, turns, tools, text)
    spans: list[tuple[int, int]] = []
    for i, turn in enumerate(turns):
        if turn["role"] == "assistant":
            spans.append(_span(tokenizer, turns, tools, i, text, spans[-1][1] if spans else 0))
    return text, spans


def _span(tokenizer: Any, turns: list[dict[str, Any]], tools: list[Any] | None, i: int, text: str, after: int) -> tuple[int, int]:
    upto = text if i == len(turns) - 1 else _try_render(tokenizer, turns[: i + 1], tools)
    before = _try_render(tokenizer, turns[:i], tools, generation=True) if i else None
    prefix_start = len(before) if before is not None and text.startswith(before) and len(before) >= after else None
    if prefix_start is not None and upto is not None and text.startswith(upto) and upto.startswith(before):
        return prefix_start, _without_tail_space(upto, prefix_start, turns[i])
    return _marked(tokenizer, turns, tools, i, text, prefix_start)


def _try_render(tokenizer: Any, turns: list[dict[str, Any]], tools: list[Any] | None, *, generation: bool = False) -> str | None:
    try:
        return render(tokenizer, turns, tools, generation=generation)
    except RowError:
        return None


def _without_tail_space(upto: str, start: int, turn: dict[str, Any]) -> int:
    """End of the turn without white space behind the end-of-turn text; a turn that ends in its own words keeps all."""
    body = upto[start:]
    cut = body.rstrip()
    return start + len(body if not cut or cut.endswith(turn["content"].rstrip() or "\0") else cut)


def _marked(
    tokenizer: Any, turns: list[dict[str, Any]], tools: list[Any] | None, i: int, text: str, prefix_start: int | None
) -> tuple[int, int]:
    """The span by putting a mark in place of the content: what lies before and behind the mark frames the content in F."""
    turn = {**turns[i], "content": MARK}
    whole = _try_render(tokenizer, [*turns[:i], turn, *turns[i + 1 :]], tools) or ""
    upto = _try_render(tokenizer, [*turns[:i], turn], tools) or whole
    head, found, tail = whole.partition(MARK)
    if not found or not text.startswith(head) or not text.endswith(tail) or len(head) + len(tail) > len(text):
        raise RowError(
            "template not prefix-stable",
            f"the chat template renders turn {i + 1} (assistant) differently within the conversation, and its text cannot be located",
            "use a template that renders each turn by itself",
        )
    end = len(text) - len(tail)
    end_text = upto.partition(MARK)[2].rstrip()
    while end_text and not text.startswith(end_text, end):
        end_text = end_text[:-1].rstrip()
    return (min(prefix_start, len(head)) if prefix_start is not None else len(head)), end + len(end_text)


def _check_no_turn_dropped(tokenizer: Any, turns: list[dict[str, Any]], tools: list[Any] | None, text: str) -> None:
    at = 0
    for i, turn in enumerate(turns):
        words = turn["content"].strip()
        found = text.find(words, at)
        if words and found < 0 and not _mark_shows(tokenizer, turns, tools, i):
            raise RowError(
                "template drops turn",
                f"the chat template silently drops turn {i + 1} ({turn['role']})",
                "use a template that renders every turn",
            )
        at = max(at, found + len(words)) if found >= 0 else at
        for call in turn.get("tool_calls", []):
            name = call.get("function", call)["name"]
            if name not in text:
                raise RowError(
                    "template drops tool call",
                    f"the chat template silently drops the tool call `{name}` of turn {i + 1}",
                    "use a template that renders tool calls",
                )


def _mark_shows(tokenizer: Any, turns: list[dict[str, Any]], tools: list[Any] | None, i: int) -> bool:
    """Whether other words in place of turn i's content reach the text: a template may escape or reshape content."""
    if json.dumps(turns[i]["content"])[1:-1] in render(tokenizer, turns, tools):
        return True
    marked = [*turns[:i], {**turns[i], "content": MARK}, *turns[i + 1 :]]
    return MARK in (_try_render(tokenizer, marked, tools) or "")


def lost_reasoning(turns: list[dict[str, Any]], text: str) -> bool:
    """Whether a `reasoning_content` of some turn is not in the text."""
    return any(turn["reasoning_content"].strip() not in text for turn in turns if isinstance(turn.get("reasoning_content"), str))

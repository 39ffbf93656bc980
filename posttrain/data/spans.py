"""Where the assistant's words lie in a rendered conversation, without generation tags in the template.

For assistant turn i let P_i = render(turns before i, with the generation prompt) and U_i = render(turns up to i), and F
the whole. Where the template is prefix-stable, P_i and U_i are prefixes of F and the turn is F[|P_i| : |U_i|], cut at
the white space behind its end-of-turn text: exactly what the model must write after the prompt it will be given. Some
templates render the last turn unlike earlier ones, or put text into the generation prompt that no finished turn has.
Then F is rendered again with a mark in place of the turn's content: what surrounds the mark frames the content in F, and
the end-of-turn text is what follows the mark in U_i. Where that fails too, the template is refused.
"""

from __future__ import annotations

from typing import Any

from posttrain.data.strict_json import RowError

MARK = "9041726351809264173548"


def render(tokenizer: Any, turns: list[dict[str, Any]], tools: list[Any] | None, *, generation: bool = False) -> str:
    """The conversation as text.

    Raises:
        RowError: the template refuses these turns, or fails on them.
    """
    try:
        return str(tokenizer.apply_chat_template(turns, tools=tools or None, tokenize=False, add_generation_prompt=generation))
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
    prefix_start = len(before) if before and text.startswith(before) and len(before) >= after else None
    if before and prefix_start is not None and upto is not None and text.startswith(upto) and upto.startswith(before):
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
    start = min(prefix_start, len(head)) if prefix_start is not None else len(head)
    return start, end + _shared_end(tokenizer, upto.partition(MARK)[2].rstrip(), text[end:])


def _shared_end(tokenizer: Any, end_text: str, follows: str) -> int:
    """Characters of the end-of-turn text that stand in F too, whole tokens only: an earlier turn may end otherwise."""
    if follows.startswith(end_text):
        return len(end_text)
    found = [
        tokenizer(part, add_special_tokens=False, return_offsets_mapping=True) for part in (end_text, follows[: 2 * len(end_text) + 32])
    ]
    last = 0
    for ours, theirs, (_, stop) in zip(found[0]["input_ids"], found[1]["input_ids"], found[0]["offset_mapping"], strict=False):
        if ours != theirs:
            break
        last = stop
    return len(end_text[:last].rstrip())


def _check_no_turn_dropped(tokenizer: Any, turns: list[dict[str, Any]], tools: list[Any] | None, text: str) -> None:
    """Every turn with words must reach the text: shown by a mark in its place, since words may recur or be reshaped."""
    marks = [f"{MARK}{i:04d}" if turn["content"].strip() else "" for i, turn in enumerate(turns)]
    marked = _try_render(tokenizer, [{**turn, "content": mark} for turn, mark in zip(turns, marks, strict=True)], tools) or ""
    for i, turn in enumerate(turns):
        shown = marks[i] in marked if marked else turn["content"].strip() in text
        if not shown:
            raise _dropped(f"turn {i + 1} ({turn['role']})", "every turn")
        for call in turn.get("tool_calls", []):
            name = call.get("function", call)["name"]
            if name not in text:
                raise _dropped(f"the tool call `{name}` of turn {i + 1}", "tool calls")


def _dropped(what: str, need: str) -> RowError:
    return RowError("template drops turn", f"the chat template silently drops {what}", f"use a template that renders {need}")


def lost_reasoning(turns: list[dict[str, Any]], text: str) -> bool:
    """Whether a `reasoning_content` of some turn is not in the text."""
    return any(turn["reasoning_content"].strip() not in text for turn in turns if isinstance(turn.get("reasoning_content"), str))

"""Prompts to token ids: formats, chat templates, and the begin token.

A sequence starts with one bos where the tokenizer or the template writes one, and with none where neither does. A
trainer, a rollout engine and a server that call `render_prompt` send the very same ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from posttrain.data.rows import place_of, prompt_messages
from posttrain.data.spans import render
from posttrain.data.strict_json import RowError
from posttrain.errors import ConfigError, DataError

Format = Literal["auto", "chat", "plain"]


def resolve_format(tokenizer: Any, format: Format) -> Literal["chat", "plain"]:
    """`auto` is chat where the tokenizer has a template.

    Raises:
        ConfigError: `chat` without a template.
    """
    if format == "auto":
        return "chat" if tokenizer.chat_template else "plain"
    if format == "chat" and not tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer {tokenizer_name(tokenizer)} has no chat template",
            where="data.format",
            fix="set `data.template`, or `format: plain`",
        )
    return format


def set_template(tokenizer: Any, path: str | Path, *, replace: bool) -> None:
    """Gives the tokenizer the Jinja template of a file.

    Args:
        tokenizer: changed in place.
        path: the template file.
        replace: whether another template may give way; only the first stage that holds a model may.

    Raises:
        ConfigError: unreadable, not Jinja, or a change where none is allowed.
    """
    import jinja2

    try:
        text = Path(path).read_text(encoding="utf-8")
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except (OSError, UnicodeDecodeError, jinja2.TemplateSyntaxError) as error:
        raise ConfigError(f"not a readable Jinja template: {error}", where=f"data.template ({path})") from None
    if tokenizer.chat_template and tokenizer.chat_template != text and not replace:
        raise ConfigError("the model already has another chat template", where="data.template", fix="set it in the first stage only")
    tokenizer.chat_template = text


def render_prompt(tokenizer: Any, row: dict[str, Any], format: Format = "auto") -> list[int]:
    """Token ids of what is asked, ready for the model to go on.

    Args:
        tokenizer: a transformers tokenizer.
        row: prompt, verifiable, preference or messages row.
        format: see DataConfig.

    Raises:
        DataError: the template refuses the turns, or nothing is left to send; names the row.
    """
    try:
        return prompt_ids(tokenizer, row, resolve_format(tokenizer, format))
    except RowError as error:
        raise DataError(str(error), where=place_of(row), fix=error.fix) from None


def prompt_ids(tokenizer: Any, row: dict[str, Any], format: str) -> list[int]:
    """Tokens of what the row asks, in a settled format (`chat` or `plain`). Raises RowError."""
    turns = prompt_messages(row)
    if format == "chat":
        ids = _chat_ids(tokenizer, render(tokenizer, turns, row.get("tools"), generation=True))
    elif len(turns) == 1 and turns[0]["role"] == "user":
        ids = plain_ids(tokenizer, turns[0]["content"])
    else:
        raise RowError(
            "needs a template",
            f"a prompt of {len(turns)} turns needs a chat template",
            "set `data.template`, or write the prompt as a string",
        )
    if not ids:
        raise RowError("empty prompt", "the prompt is empty, and there is no begin token to start from", "drop the row")
    return ids


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text that begins a sequence: with bos where the model has one, without the eos some tokenizers add."""
    ids = list(tokenizer(text)["input_ids"])
    eos = tokenizer.eos_token_id
    if ids and ids[-1] == eos and not text.endswith(tokenizer.eos_token):
        ids.pop()
    return one_bos(tokenizer, ids)


def _chat_ids(tokenizer: Any, text: str) -> list[int]:
    return one_bos(tokenizer, bare_ids(tokenizer, text))


def bare_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text that goes on a sequence: no special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def one_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    """Exactly one bos where the tokenizer adds one by itself or the text brought one."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    while ids[:2] == [bos, bos]:
        ids = ids[1:]
    return [bos, *ids] if ids[:1] != [bos] and adds_bos(tokenizer) else ids


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts bos in front of plain text by itself."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]


def tokenizer_name(tokenizer: Any) -> str:
    """For messages: the folder or id it came from, without the path."""
    return Path(str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)).name

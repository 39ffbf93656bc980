"""When a completion ends, and its text.

A completion ends at an end token (a model may have several), at a stop string, or at its token limit. A stop string may span
tokens or end inside one: the token ids stay what was sampled, the text is cut before the stop string. A stop string that *is*
a special token works as an end token.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

SLACK = 4


def end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end a text: those of the generation config (one or several), and the tokenizer's end token."""
    config = getattr(model, "generation_config", None) or getattr(model, "config", None)
    declared = getattr(config, "eos_token_id", None)
    declared = declared if isinstance(declared, list | tuple) else [declared]
    return frozenset(i for i in (*declared, getattr(tokenizer, "eos_token_id", None)) if i is not None)


class StopRule:
    """Decides for one request.

    Args:
        tokenizer: decodes token ids.
        stop: stop strings.
        eos_ids: end tokens.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], eos_ids: Collection[int]) -> None:
        self.tokenizer = tokenizer
        special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special} if stop else {}
        self.eos_ids = frozenset(eos_ids) | {special[text] for text in stop if text in special}
        self.stop = tuple(text for text in stop if text and text not in special)
        self.window = max((len(text.encode("utf-8")) for text in self.stop), default=0) + SLACK

    def ends(self, ids: list[int]) -> bool:
        """Does the completion `ids` end with its last token?"""
        if ids[-1] in self.eos_ids:
            return True
        if not self.stop:
            return False
        tail = self._decode(ids[-self.window :])
        return any(text in tail for text in self.stop) and any(text in self._decode(ids) for text in self.stop)

    def text(self, ids: list[int]) -> str:
        """Text of a completion: no end token, cut before the first stop string."""
        whole = self._decode(ids[:-1] if ids and ids[-1] in self.eos_ids else ids)
        cuts = [position for position in map(whole.find, self.stop) if position >= 0]
        return whole[: min(cuts)] if cuts else whole

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

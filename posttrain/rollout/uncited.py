"""The citation blocker: no run of words that training texts hold is completed (Carlsson et al., ICLR 2025, arXiv 2412.04318).

The paper forbids to go on with long matches of the training data while decoding, and decides where the current word is complete. Here a
text is refused as soon as its last `ngram` words, as white space parts them, stand in one of the texts in that order.
"""

from __future__ import annotations

from collections.abc import Iterable

SPACE = b" \t\n\r\x0b\x0c"


class Uncited:
    """A constraint: no `ngram` words in a row that one of the texts holds.

    Args:
        texts: e.g. the training data.
        ngram: words; runs of fewer are free.
    """

    def __init__(self, texts: Iterable[str], ngram: int) -> None:
        self.ngram = ngram
        self._known: set[int] = set()
        for text in texts:
            words = text.encode("utf-8", "replace").split()
            self._known.update(hash(tuple(words[i : i + ngram])) for i in range(len(words) - ngram + 1))

    def holds(self, words: tuple[bytes, ...]) -> bool:
        """Whether the last `ngram` of `words` stand in a text."""
        return len(words) >= self.ngram and hash(words[-self.ngram :]) in self._known

    def start(self) -> UncitedState:
        """The state before the first byte."""
        return UncitedState(self, (), b"")


class UncitedState:
    """The last complete words, and the beginning of the next."""

    def __init__(self, uncited: Uncited, words: tuple[bytes, ...], partial: bytes) -> None:
        self._uncited, self._words, self._partial = uncited, words, partial

    def _after(self, piece: bytes) -> tuple[tuple[bytes, ...], bytes] | None:
        """Words and beginning with `piece`; None where a citation is completed."""
        words, partial = self._words, self._partial
        for value in piece:
            if value not in SPACE:
                partial += bytes([value])
            elif partial:
                words, partial = (*words, partial)[-self._uncited.ngram :], b""
                if self._uncited.holds(words):
                    return None
        return words, partial

    def allows(self, piece: bytes) -> bool:
        """Whether no citation is completed by `piece`."""
        return self._after(piece) is not None

    def advance(self, piece: bytes) -> None:
        """Appends `piece`."""
        found = self._after(piece)
        assert found is not None
        self._words, self._partial = found

    def complete(self) -> bool:
        """Whether the text may end: its last word may complete a citation too."""
        return not (self._partial and self._uncited.holds((*self._words, self._partial)))

    def fork(self) -> UncitedState:
        """An independent copy."""
        return UncitedState(self._uncited, self._words, self._partial)

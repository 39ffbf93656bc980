r"""Constraints on completions, as states over bytes that answer point queries.

A state knows the bytes so far: `allows(piece)` tells whether they may be followed by these, without changing anything,
`advance(piece)` does it, `complete()` tells whether the text may end here, `fork()` copies. A prefix is allowed where nothing
rules it out yet: being too permissive costs dead ends and is weighed right, being too strict would change the distribution.
Bytes, not tokens, decide: a code point may be split over tokens, and a special token, which has no bytes, is never text.

`TokenChecker` puts a state before the tokens of a vocabulary. Grammars (JSON Schema, regular expressions, Lark) are
llguidance's, about 1 us a query and a copy, compiled in milliseconds whatever the vocabulary; they also give full masks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from posttrain.errors import ConfigError, RolloutError

BOXED = r"(?s:.*)\\boxed\{[^{}]+\}[.$\s]*"
Predicate = Callable[..., bool]
"""(bytes so far, whether the text ends here, **args) -> whether that may be."""


@runtime_checkable
class State(Protocol):
    """Bytes so far, and what may follow them."""

    def allows(self, piece: bytes) -> bool:
        """Whether `piece` may come next; changes nothing."""
        ...

    def advance(self, piece: bytes) -> None:
        """Appends `piece`, which must be allowed."""
        ...

    def complete(self) -> bool:
        """Whether the text may end here."""
        ...

    def fork(self) -> State:
        """An independent copy."""
        ...


@runtime_checkable
class Constraint(Protocol):
    """What a completion must satisfy."""

    def start(self) -> State:
        """The state before the first byte."""
        ...


class Vocabulary:
    """Bytes of each token.

    Args:
        pieces: bytes by token id; empty for special tokens and unused ids.
        ends: ids that end a text.
        library: llguidance's tokenizer of the same vocabulary, for masks; None has none.
    """

    def __init__(self, pieces: Sequence[bytes], ends: frozenset[int], library: Any = None) -> None:
        self.pieces, self.ends, self.library = list(pieces), ends, library

    def __len__(self) -> int:
        return len(self.pieces)

    @classmethod
    def of(cls, tokenizer: Any, ends: frozenset[int]) -> Vocabulary:
        """The vocabulary of a fast tokenizer; takes about a second, so keep it.

        Raises:
            ConfigError: llguidance is not installed, or the tokenizer is not a fast one.
        """
        _library()
        from llguidance.hf import from_tokenizer

        try:
            found: Any = from_tokenizer(tokenizer, eos_token=sorted(ends) or None)
        except ValueError as error:
            raise ConfigError(f"constraints need a fast tokenizer: {error}", where="rollout.constraint") from None
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special} | ends
        pieces = [b"" if i in special or found.is_special_token(i) else bytes(found.decode_bytes([i])) for i in range(found.vocab_size)]
        return cls(pieces, ends, found)


class TokenChecker:
    """A state before the tokens of a vocabulary.

    Args:
        state: of the constraint.
        vocabulary: bytes of the tokens.
        tokens: taken so far.
    """

    def __init__(self, state: State, vocabulary: Vocabulary, tokens: tuple[int, ...] = ()) -> None:
        self.state, self.vocabulary, self.tokens = state, vocabulary, tokens

    def allows(self, token: int) -> bool:
        """Whether the token may come next; an end token where the text may end."""
        if token in self.vocabulary.ends:
            return self.state.complete()
        piece = self.vocabulary.pieces[token] if token < len(self.vocabulary) else b""
        return bool(piece) and self.state.allows(piece)

    def advance(self, token: int) -> None:
        """Takes an allowed token; an end token changes nothing."""
        if token not in self.vocabulary.ends:
            self.state.advance(self.vocabulary.pieces[token])
            self.tokens = (*self.tokens, token)

    def fork(self) -> TokenChecker:
        """An independent copy."""
        return TokenChecker(self.state.fork(), self.vocabulary, self.tokens)

    @property
    def has_mask(self) -> bool:
        """Whether `mask` is cheaper than asking about every token."""
        return isinstance(self.state, GrammarState) and self.vocabulary.library is not None

    def mask(self) -> np.ndarray:
        """(V,) bool of the tokens that may come next."""
        if self.has_mask:
            assert isinstance(self.state, GrammarState)
            return self.state.mask(self.vocabulary, self.tokens)
        return np.array([self.allows(token) for token in range(len(self.vocabulary))])


def prefix(constraint: Constraint, text: bytes) -> bool:
    """Whether `text` may be the beginning of a completion."""
    return not text or constraint.start().allows(text)


def complete(constraint: Constraint, text: bytes) -> bool:
    """Whether `text` may be a whole completion."""
    state = constraint.start()
    if text and not state.allows(text):
        return False
    if text:
        state.advance(text)
    return state.complete()


class Grammar:
    """A constraint that llguidance compiles.

    Args:
        grammar: in its own form, from `json_schema`, `regex` or `lark`.
        where: of the config, for errors.

    Raises:
        ConfigError: the grammar is wrong, holds what is not enforced, has no text, or exceeds the limits of compilation.
    """

    def __init__(self, grammar: str, where: str) -> None:
        library = _library()
        self.grammar = grammar
        self._start = library.LLMatcher(_bytes_tokenizer(), grammar, log_level=0)
        problem = _problem(self._start)
        if problem:
            raise ConfigError(problem, where=where)

    def start(self) -> GrammarState:
        """The state before the first byte."""
        return GrammarState(self._start.deep_copy(), self)


class GrammarState:
    """llguidance's matcher over single bytes."""

    def __init__(self, matcher: Any, grammar: Grammar, over_tokens: tuple[int, Any] = (0, None)) -> None:
        self._matcher, self.grammar = matcher, grammar
        self._over_tokens, self._shared = over_tokens, over_tokens[1] is not None

    def allows(self, piece: bytes) -> bool:
        """Whether `piece` may come next."""
        tokens = list(piece)
        return bool(self._matcher.validate_tokens(tokens) == len(tokens))

    def advance(self, piece: bytes) -> None:
        """Appends `piece`.

        Raises:
            RolloutError: it is not allowed, or the grammar's limits are exceeded.
        """
        if not self._matcher.consume_tokens(list(piece)):
            raise RolloutError(f"the constraint cannot go on: {_first_line(self._matcher.get_error())}")

    def complete(self) -> bool:
        """Whether the text may end here."""
        return bool(self._matcher.is_accepting())

    def fork(self) -> GrammarState:
        """An independent copy."""
        self._shared = self._over_tokens[1] is not None
        return GrammarState(self._matcher.deep_copy(), self.grammar, self._over_tokens)

    def mask(self, vocabulary: Vocabulary, tokens: Sequence[int]) -> np.ndarray:
        """(V,) bool after `tokens`, by a matcher over the vocabulary's own tokens, which goes on from the last mask of this text."""
        done, matcher = self._over_tokens
        if matcher is None:
            matcher = _matcher(vocabulary.library, self.grammar.grammar).deep_copy()
        elif self._shared:
            matcher = matcher.deep_copy()
        self._over_tokens, self._shared = (0, None), False
        if not matcher.consume_tokens(list(tokens[done:])):
            raise RolloutError(f"the constraint cannot go on: {_first_line(matcher.get_error())}")
        self._over_tokens = len(tokens), matcher
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        out = np.unpackbits(bits, bitorder="little")[: len(vocabulary)].astype(bool)
        out[[token for token in vocabulary.ends if token < len(out)]] = self.complete()
        return out


@functools.lru_cache(maxsize=64)
def _matcher(library: Any, grammar: str) -> Any:
    return _library().LLMatcher(library, grammar, log_level=0)


@functools.cache
def _bytes_tokenizer() -> Any:
    return _library().LLTokenizer("byte")


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ConfigError("constraints need llguidance", where="rollout.constraint", fix="pip install 'posttrain[constraints]'") from None
    return llguidance


def _problem(matcher: Any) -> str:
    """What is wrong with a fresh matcher, or ''."""
    if not matcher.is_error():
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        if bits[:256].any() or matcher.is_accepting():
            return ""
    error = _first_line(matcher.get_error())
    if not error or error.startswith("NoExtension"):
        return "no text satisfies it"
    if "Fuel" in error or "TooComplex" in error or "too large" in error.lower():
        return f"too large to compile: {error}"
    return error


def _first_line(error: str) -> str:
    return " ".join(error.split("<state>")[0].split())[:300]


class Choices:
    """One of some texts.

    Args:
        texts: at least one, all different; none may be empty where it stands alone.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = tuple(text.encode("utf-8") for text in texts)

    def start(self) -> ChoiceState:
        """The state before the first byte."""
        return ChoiceState(self.texts, 0)


class ChoiceState:
    """The choices that are still possible, and how many of their bytes are there."""

    def __init__(self, texts: tuple[bytes, ...], done: int) -> None:
        self._texts, self._done = texts, done

    def allows(self, piece: bytes) -> bool:
        """Whether a choice goes on with `piece`."""
        return any(text.startswith(piece, self._done) for text in self._texts)

    def advance(self, piece: bytes) -> None:
        """Appends `piece`."""
        self._texts = tuple(text for text in self._texts if text.startswith(piece, self._done))
        self._done += len(piece)

    def complete(self) -> bool:
        """Whether one of the choices is there."""
        return any(len(text) == self._done for text in self._texts)

    def fork(self) -> ChoiceState:
        """An independent copy."""
        return ChoiceState(self._texts, self._done)


class Banned:
    """No text of a list occurs, whatever tokens it is cut into.

    Args:
        texts: at least one, none empty.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = tuple(text.encode("utf-8") for text in texts)
        self.window = max(map(len, self.texts)) - 1

    def start(self) -> BannedState:
        """The state before the first byte."""
        return BannedState(self, b"")


class BannedState:
    """The last bytes, among which a banned text could begin."""

    def __init__(self, banned: Banned, tail: bytes) -> None:
        self._banned, self._tail = banned, tail

    def allows(self, piece: bytes) -> bool:
        """Whether no banned text occurs with `piece`."""
        text = self._tail + piece
        return not any(found in text for found in self._banned.texts)

    def advance(self, piece: bytes) -> None:
        """Appends `piece`."""
        text = self._tail + piece
        self._tail = text[len(text) - self._banned.window :] if len(text) > self._banned.window else text

    def complete(self) -> bool:
        """A text may always end."""
        return True

    def fork(self) -> BannedState:
        """An independent copy."""
        return BannedState(self._banned, self._tail)


class Predicated:
    """A Python predicate over the whole text.

    Args:
        predicate: see Predicate; it must allow every beginning of what it allows.
        args: handed on.
        name: for errors.
    """

    def __init__(self, predicate: Predicate, args: Mapping[str, Any], name: str) -> None:
        self.predicate, self.args, self.name = predicate, dict(args), name

    def start(self) -> PredicateState:
        """The state before the first byte."""
        return PredicateState(self, b"")

    def ask(self, text: bytes, ends: bool) -> bool:
        """The predicate's answer.

        Raises:
            RolloutError: it raised, or answered with something else than a bool; never taken for a refusal.
        """
        try:
            found = self.predicate(text, ends, **self.args)
        except Exception as error:
            raise RolloutError(f"the checker `{self.name}` raised {type(error).__name__}: {error}", where="rollout.constraint") from error
        if not isinstance(found, bool | np.bool_):
            raise RolloutError(f"the checker `{self.name}` answered {found!r}, expected True or False", where="rollout.constraint")
        return bool(found)


class PredicateState:
    """The text so far."""

    def __init__(self, predicated: Predicated, text: bytes) -> None:
        self._predicated, self._text = predicated, text

    def allows(self, piece: bytes) -> bool:
        """Whether the predicate allows the text with `piece`."""
        return self._predicated.ask(self._text + piece, False)

    def advance(self, piece: bytes) -> None:
        """Appends `piece`."""
        self._text += piece

    def complete(self) -> bool:
        """Whether the predicate allows the text to end."""
        return self._predicated.ask(self._text, True)

    def fork(self) -> PredicateState:
        """An independent copy."""
        return PredicateState(self._predicated, self._text)


class All:
    """Several constraints at once.

    Args:
        parts: asked in this order until one refuses; put the cheapest first.
    """

    def __init__(self, parts: Sequence[Constraint]) -> None:
        self.parts = tuple(parts)

    def start(self) -> AllState:
        """The state before the first byte."""
        return AllState([part.start() for part in self.parts])


class AllState:
    """States of all parts."""

    def __init__(self, states: list[State]) -> None:
        self._states = states

    def allows(self, piece: bytes) -> bool:
        """Whether all parts allow `piece`."""
        return all(state.allows(piece) for state in self._states)

    def advance(self, piece: bytes) -> None:
        """Appends `piece`."""
        for state in self._states:
            state.advance(piece)

    def complete(self) -> bool:
        """Whether the text may end by all parts."""
        return all(state.complete() for state in self._states)

    def fork(self) -> AllState:
        """An independent copy."""
        return AllState([state.fork() for state in self._states])


_PREDICATES: dict[str, Predicate] = {}


def predicate(name: str) -> Callable[[Predicate], Predicate]:
    """Declares a predicate under a name that configs can use (`constraint: {plugin: NAME, args: {...}}`), in a `--plugin` package."""

    def register(function: Predicate) -> Predicate:
        if name in _PREDICATES and _PREDICATES[name] is not function:
            raise ConfigError(f"the checker `{name}` is declared twice", fix="rename one of them")
        _PREDICATES[name] = function
        return function

    return register


def find_predicate(name: str) -> Predicate:
    """The predicate of a name.

    Raises:
        ConfigError: nobody declared it; names those that exist.
    """
    if name not in _PREDICATES:
        known = ", ".join(sorted(_PREDICATES)) or "none"
        raise ConfigError(
            f"no checker is called `{name}`; known: {known}", where="rollout.constraint.plugin", fix="name its package with --plugin"
        )
    return _PREDICATES[name]

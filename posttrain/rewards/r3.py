r"""Regularized relevance, R3 (Lee et al., "Rethinking the Role of Proxy Rewards in Language Model Alignment", EMNLP 2024,
first as arXiv 2402.03469; released code naver-ai/rethinking-proxy-reward). For a prompt x, a completion y', a reference y:

    open-ended      M(x) . M(y')  *  words(y') / 100  *  RP(y')
    closed-ended    F(M(y) . M(y'))  *  RP(y')

M is an encoder's mean-pooled embedding (published: contriever, raw dot product), words are NLTK's wordpunct words, RP is the
share of different trigrams among the trigrams of words (1.0 below three words), and F maps [0, 3.5] linearly to [0, 5.12],
without clamping. Words and trigrams are counted in y' without outer line breaks and up to the first `\n\n\n\n`, `\n\n--` or `\n\n____`.

Relevance alone is pleased by copies of the question, length alone by padding, both together by repetition; as a product each
can only be raised where the others are not lost. Each part is recorded: `relevance` (before F), `length_incentive` (open only),
`repetition`, and `open` (1 or 0).

Where the defaults are not the published setting, and why:

- `length_cap: 5.12`. Published is no cap, but there a completion had at most 512 tokens, hence about 512 words, so the cap
  never binds in that setting; with a larger token limit the product would grow without bound and length would decide the
  ranking within every group. `null` is off.
- An embedder that gives unit vectors (the packaged one, or `similarity: cosine`) has relevance of at most 1, so F maps
  [0, 1] instead of [0, 3.5] unless `relevance_range` is given.
- An empty completion has relevance 0, so it earns nothing; the encoder's vector of no text would earn something.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from posttrain.errors import ConfigError
from posttrain.rewards._parts import record
from posttrain.rewards._relevance import Similarity, embedder_of, queries, reference_text, relevance
from posttrain.rewards._words import unique_share, words
from posttrain.rewards.registry import completion_text, count_failure, reward

if TYPE_CHECKING:
    from posttrain.models.sentences import SentenceEmbedder

CUTS = ("\n\n\n\n", "\n\n--", "\n\n____")
TYPES = {"open": True, "openended": True, "closed": False, "closedended": False, "constrained": False}
"""Spelling of a prompt type without case and signs -> open-ended."""
RAW_RANGE, UNIT_RANGE, REWARD_RANGE = (0.0, 3.5), (0.0, 1.0), (0.0, 5.12)


def is_open(value: Any) -> bool | None:
    """True for `open`, `OPENENDED`, `open-ended`; False for `closed`, `closed-ended`, `CONSTRAINED`; else None."""
    return TYPES.get("".join(letter for letter in str(value).lower() if letter.isalpha()))


def length_and_repetition(text: str, cut: Sequence[str] = CUTS) -> tuple[float, float]:
    """(words / 100, RP) of the published part of `text`."""
    text = text.strip("\n ")
    for mark in cut:
        text = text.partition(mark)[0]
    found = words(text)
    return len(found) / 100, unique_share(found, 3)


def mapped(value: float, source: Sequence[float], target: Sequence[float], clamp: bool = False) -> float:
    """F: `source` [a, b] to `target` [c, d], linearly; c + (value - a) / (b - a) * (d - c)."""
    (a, b), (c, d) = source, target
    share = (value - a) / (b - a)
    return c + (min(max(share, 0.0), 1.0) if clamp else share) * (d - c)


@reward("r3")
def r3(
    completions: Sequence[Any],
    prompts: Sequence[Any] | None = None,
    prompt_type: Sequence[Any] | None = None,
    answer: Sequence[Any] | None = None,
    query: Sequence[Any] | None = None,
    prompt: Sequence[Any] | None = None,
    *,
    types: Literal["column", "open", "closed"] = "column",
    similarity: Similarity = "dot",
    length_cap: float | None = 5.12,
    relevance_range: list[float] | None = None,
    reward_range: list[float] | None = None,
    clamp: bool = False,
    cut: list[str] | None = None,
    embedder: Path | None = None,
    batch: int | None = None,
    max_length: int | None = None,
    **columns: Any,
) -> list[float | None]:
    """R3 of each completion; see the module.

    Args:
        completions: texts, or lists of messages.
        prompts, prompt, query: what was asked: the column `query` if given, else the last user turn of the prompt.
        prompt_type: column: `open`, `OPENENDED`, `closed`, `CONSTRAINED`, ...; another name by `columns: {prompt_type: NAME}`.
        answer: column of references, used for closed-ended prompts.
        types: `column`, or one branch for all prompts.
        similarity: `dot` of the vectors as the encoder gives them, or `cosine`.
        length_cap: largest words / 100; null is none, as published.
        relevance_range: two numbers that F maps; by default [0, 3.5] for raw vectors, [0, 1] for unit vectors and cosine.
        reward_range: two numbers that F maps them to; by default [0, 5.12].
        clamp: keep F within `reward_range`; published is off.
        cut: texts at which a completion ends for the counts; by default those of the module.
        embedder: folder of a local encoder (contriever, or a sentence-transformers folder); by default all-MiniLM-L6-v2 from the
            extra `embed`.
        batch, max_length: texts in one pass, tokens that are read of one; see `posttrain.models.sentences`.

    Returns:
        Values; None, and counted: without a type (`no_type`), of an unknown type (`unknown_type`), closed-ended without a
        reference (`no_reference`), where the encoder gave no finite number (`not_finite`).

    Raises:
        ConfigError: a range that is not two different numbers; the packaged encoder is not installed.
        RewardError: there are no prompts.
    """
    model = embedder_of(embedder, batch, max_length)
    source = _range("relevance_range", relevance_range, UNIT_RANGE if model.unit or similarity == "cosine" else RAW_RANGE)
    target = _range("reward_range", reward_range, REWARD_RANGE)
    texts = [completion_text(completion) for completion in completions]
    opens = _types(types, prompt_type, len(texts))
    asked = queries("r3", query, prompts, prompt)
    found = _relevances(model, texts, opens, asked, answer, similarity)
    counts = [length_and_repetition(text, CUTS if cut is None else cut) for text in texts]
    lengths = [length if length_cap is None else min(length, length_cap) for length, _ in counts]
    record("relevance", found)
    record("length_incentive", [length if open_ended else None for length, open_ended in zip(lengths, opens, strict=True)])
    record("repetition", [share for _, share in counts])
    record("open", [None if open_ended is None else float(open_ended) for open_ended in opens])
    values: list[float | None] = []
    for value, open_ended, length, (_, share) in zip(found, opens, lengths, counts, strict=True):
        scaled = None if value is None else value * length if open_ended else mapped(value, source, target, clamp)
        values.append(None if scaled is None else scaled * share)
    return values


def _range(name: str, given: Sequence[float] | None, default: Sequence[float]) -> Sequence[float]:
    found = default if given is None else given
    if len(found) != 2 or found[0] == found[1]:
        raise ConfigError(f"`{name}` must be two different numbers, got {list(found)}", where="rewards.r3", fix=f"e.g. {list(default)}")
    return found


def _types(types: str, column: Sequence[Any] | None, rows: int) -> list[bool | None]:
    if types != "column":
        return [types == "open"] * rows
    given = [None] * rows if column is None else list(column)
    absent = sum(value is None or not str(value).strip() for value in given)
    found = [is_open(value) for value in given]
    count_failure("r3", "no_type", absent)
    count_failure("r3", "unknown_type", sum(value is None for value in found) - absent)
    return found


def _relevances(
    model: SentenceEmbedder,
    texts: Sequence[str],
    opens: Sequence[bool | None],
    asked: Sequence[str],
    answer: Sequence[Any] | None,
    similarity: Similarity,
) -> list[float | None]:
    """Relevance to the query (open) or the reference (closed); None where there is no type, no reference, no number."""
    references = [reference_text(value) for value in (answer if answer is not None else [None] * len(texts))]
    others = [a if open_ended else b for a, b, open_ended in zip(asked, references, opens, strict=True)]
    rows = [i for i, open_ended in enumerate(opens) if open_ended is not None and others[i] is not None]
    count_failure("r3", "no_reference", sum(open_ended is not None for open_ended in opens) - len(rows))
    found = relevance(model, [str(others[i]) for i in rows], [texts[i] for i in rows], similarity)
    count_failure("r3", "not_finite", sum(value is None for value in found))
    out: list[float | None] = [None] * len(texts)
    for i, value in zip(rows, found, strict=True):
        out[i] = value
    return out

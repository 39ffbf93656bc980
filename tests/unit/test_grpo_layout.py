"""Blocks of `fast: on`: cuts are the cheapest, every token with loss is predicted once, and no more prompts than needed."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from posttrain.trainers._grpo_layout import Span, cost, cut, lay_out, order_rows, spans_of  # noqa: E402

COLUMNS = 20


def cheapest(widths: list[int], overhead: float) -> float:
    """By trying every set of cuts."""
    found = []
    for count in range(len(widths)):
        for places in itertools.combinations(range(1, len(widths)), count):
            edges = [0, *places, len(widths)]
            found.append(sum((end - start) * widths[end - 1] + overhead for start, end in itertools.pairwise(edges)))
    return min(found)


@pytest.mark.parametrize("overhead", [0.0, 3.0, 10.0, 1e6])
def test_cuts_are_the_cheapest(overhead: float) -> None:
    for seed in range(8):
        widths = sorted(random.Random(seed).randint(1, 30) for _ in range(8))
        cuts = cut(widths, overhead)
        assert [i for part in cuts for i in range(part.start, part.stop)] == list(range(8))
        assert sum((part.stop - part.start) * widths[part.stop - 1] + overhead for part in cuts) == cheapest(widths, overhead)


def spans(seed: int, groups: int = 3, size: int = 4) -> list[Span | None]:
    """Groups of rows; the last row has no token with loss."""
    rng = random.Random(seed)
    rows: list[Span | None] = []
    for group in range(groups):
        prompt = rng.randint(1, COLUMNS)
        rows += [Span(prompt, rng.randint(1, 15), group) for _ in range(size)]
    rng.shuffle(rows)
    return [*rows, None]


def predicted(clusters: list[Any], row: int, span: Span) -> tuple[list[int], list[int]]:
    """Columns of a row's own tokens that its blocks hold, and those of its prompt."""
    own: list[int] = []
    prompt: list[int] = []
    for cluster in clusters:
        for part in cluster.parts:
            if row in part.rows:
                place = part.rows.index(row)
                own += range(part.first[place], part.first[place] + part.width)
                if cluster.prompts:
                    source = part.source[place]
                    first = cluster.prompts.first[source]
                    prompt += range(first, min(first + cluster.prompts.width, COLUMNS))
    return own, prompt


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("overhead", [0.0, 4.0, 1e6])
def test_every_token_is_there_once(share: bool, overhead: float) -> None:
    for seed in range(6):
        held = spans(seed)
        clusters = lay_out(held, range(len(held)), COLUMNS, share, overhead)
        assert sorted(row for cluster in clusters for row in cluster.rows) == list(range(len(held) - 1))
        for row, span in enumerate(held[:-1]):
            assert span is not None
            own, prompt = predicted(clusters, row, span)
            needed = list(range(COLUMNS - span.prompt, COLUMNS + span.length - 1))
            assert (prompt + own)[: len(needed)] == needed
        if share and overhead == 0.0:
            whole = lay_out(held, range(len(held)), COLUMNS, False, overhead)
            assert cost(clusters, overhead) <= cost(whole, overhead)


def test_a_prompt_is_forwarded_once_a_group() -> None:
    held: list[Span | None] = [Span(10, 5, 0)] * 8
    (cluster,) = lay_out(held, range(8), COLUMNS, True, 1.0)
    assert cluster.prompts is not None and cluster.prompts.rows == (0,)
    assert cluster.positions == 10 + 8 * 4
    (alone,) = lay_out(held, [3], COLUMNS, True, 1.0)
    assert alone.prompts is None and alone.positions == 14
    assert lay_out([None], [0], COLUMNS, True, 1.0) == []


def test_rows_are_ordered_by_length_or_by_prompt() -> None:
    held: list[Span | None] = [None, Span(4, 9, 1), Span(2, 3, 0), Span(4, 1, 1), Span(2, 8, 0)]
    assert order_rows(held, share=False) == [2, 3, 4, 1, 0]
    assert order_rows(held, share=True) == [2, 4, 3, 1, 0]


def test_spans_end_at_the_last_token_with_loss_and_know_equal_prompts() -> None:
    prompts = torch.tensor([[0, 5, 6], [0, 5, 6], [4, 5, 6], [5, 5, 6]])
    before = torch.tensor([[0, 1, 1], [0, 1, 1], [1, 1, 1], [0, 1, 1]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0], [1, 0, 0]])
    found = spans_of(prompts, before, mask)
    assert found[2] is None
    assert [(span.prompt, span.length) for span in found if span] == [(2, 2), (2, 3), (2, 1)]
    assert found[0] and found[1] and found[3] and found[0].group == found[1].group == found[3].group

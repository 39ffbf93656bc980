"""Which rectangles of tokens a batch of completions is forwarded in, so that little of them is padding.

TRL pads every row to the longest prompt and the longest completion of the whole batch of rollouts. Here rows are sorted and
cut into blocks of similar length. A row of a block begins at its first real token, and ends at the last one that a token
with loss depends on:

    plain     one block holds [prompt | completion] of its rows
    shared    one block holds each prompt once; blocks of completions attend to the prompt's keys and values

Padding stands on the right, where no real token sees it. Cuts are optimal for the cost positions + overhead * blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

OVERHEAD = {"cpu": 24}
OVERHEAD_ELSEWHERE = 1024
"""Positions that one more call of the model is worth, by type of device."""


@dataclass(frozen=True)
class Span:
    """Tokens of one row.

    Args:
        prompt: of its prompt.
        length: of its completion, up to the last with loss; at least 1.
        group: number of its prompt; equal prompts have the same.
    """

    prompt: int
    length: int
    group: int


@dataclass(frozen=True)
class Block:
    """A rectangle of tokens.

    Args:
        rows: rows of the batch.
        first: first column of each, counted over [prompt | completion] of the padded batch.
        width: columns.
        source: of completions, which row of the prompts' block each belongs to.
    """

    rows: tuple[int, ...]
    first: tuple[int, ...]
    width: int
    source: tuple[int, ...] = ()


@dataclass(frozen=True)
class Cluster:
    """Blocks that belong together: with `prompts`, `parts` hold completions only."""

    prompts: Block | None
    parts: tuple[Block, ...]

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of the batch whose completions are here."""
        return tuple(row for part in self.parts for row in part.rows)

    @property
    def positions(self) -> int:
        """Positions forwarded."""
        blocks = (*([self.prompts] if self.prompts else []), *self.parts)
        return sum(len(block.rows) * block.width for block in blocks)


def spans_of(prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, loss_mask: torch.Tensor) -> list[Span | None]:
    """The span of each row; None where no token carries loss.

    Args:
        prompt_ids, prompt_mask: (B, P), padded on the left.
        loss_mask: (B, T), padded on the right.
    """
    _, groups = torch.unique(prompt_ids.masked_fill(prompt_mask == 0, -1), dim=0, return_inverse=True)
    columns = torch.arange(1, loss_mask.size(1) + 1, device=loss_mask.device)
    last = (loss_mask.bool() * columns).amax(dim=1)
    facts = torch.stack([prompt_mask.sum(dim=1), last, groups], dim=1).tolist()
    return [Span(prompt, length, group) if length else None for prompt, length, group in facts]


def order_rows(spans: Sequence[Span | None], share: bool) -> list[int]:
    """Rows in the order in which they are cut into batches: by prompt, or by length; those without loss last.

    Args:
        spans: of the rows.
        share: whether equal prompts are to stand together.
    """

    def key(row: int) -> tuple[int, ...]:
        span = spans[row]
        if span is None:
            return (1,)
        return (0, span.prompt, span.group, span.length) if share else (0, span.prompt + span.length)

    return sorted(range(len(spans)), key=key)


def cut(widths: Sequence[int], overhead: float) -> list[slice]:
    """Cuts sorted rows into blocks with the least sum of rows * widest + overhead."""
    best, before = [0.0], [0]
    for end in range(1, len(widths) + 1):
        costs = [best[start] + (end - start) * widths[end - 1] + overhead for start in range(end)]
        before.append(min(range(end), key=costs.__getitem__))
        best.append(costs[before[-1]])
    cuts, end = [], len(widths)
    while end:
        cuts.append(slice(before[end], end))
        end = before[end]
    return cuts[::-1]


def lay_out(spans: Sequence[Span | None], rows: Sequence[int], columns: int, share: bool, overhead: float) -> list[Cluster]:
    """Blocks for some rows of a batch, in the cheaper of both forms.

    Args:
        spans: of all rows of the batch.
        rows: those to forward; rows without loss are left out.
        columns: P, columns of the padded prompts.
        share: whether prompts may be shared.
        overhead: see the module.
    """
    held = {row: span for row in rows if (span := spans[row]) is not None}
    plain = [_plain(held, columns, overhead)] if held else []
    if not share or len({span.group for span in held.values()}) == len(held):
        return plain
    return min((plain, _shared(held, columns, overhead)), key=lambda clusters: cost(clusters, overhead))


def cost(clusters: Sequence[Cluster], overhead: float) -> float:
    """Positions forwarded, and `overhead` for each call of the model."""
    return sum(cluster.positions + overhead * (len(cluster.parts) + bool(cluster.prompts)) for cluster in clusters)


def _plain(held: dict[int, Span], columns: int, overhead: float) -> Cluster:
    rows = sorted(held, key=lambda row: held[row].prompt + held[row].length)
    widths = [held[row].prompt + held[row].length - 1 for row in rows]
    parts = []
    for part in cut(widths, overhead):
        chosen = tuple(rows[part])
        parts.append(Block(chosen, tuple(columns - held[row].prompt for row in chosen), widths[part.stop - 1]))
    return Cluster(None, tuple(parts))


def _shared(held: dict[int, Span], columns: int, overhead: float) -> list[Cluster]:
    groups: dict[int, list[int]] = {}
    for row in sorted(held, key=lambda row: held[row].length):
        groups.setdefault(held[row].group, []).append(row)
    prompts = sorted(groups.values(), key=lambda rows: held[rows[0]].prompt)
    widths = [held[rows[0]].prompt for rows in prompts]
    clusters = []
    for part in cut(widths, 2 * overhead):
        chosen = prompts[part]
        first = tuple(columns - held[rows[0]].prompt for rows in chosen)
        source = {row: number for number, rows in enumerate(chosen) for row in rows}
        block = Block(tuple(rows[0] for rows in chosen), first, widths[part.stop - 1])
        clusters.append(Cluster(block, _completions(held, source, columns, overhead)))
    return clusters


def _completions(held: dict[int, Span], source: dict[int, int], columns: int, overhead: float) -> tuple[Block, ...]:
    rows = sorted(source, key=lambda row: held[row].length)
    widths = [held[row].length - 1 for row in rows]
    parts = []
    for part in cut(widths, overhead):
        chosen = tuple(rows[part])
        parts.append(Block(chosen, (columns,) * len(chosen), widths[part.stop - 1], tuple(source[row] for row in chosen)))
    return tuple(parts)

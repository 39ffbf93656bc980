"""Held-out next-token loss: float32 cross-entropy in nats, averaged over tokens, with an interval over rows.

Rows are sorted by length so that little is padded; the number of rows in a forward pass is bounded by `batch` and by the size
of the float32 logits. The result does not depend on the order of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from posttrain.eval.intervals import Value, exponential, token_mean

LOGIT_BYTES = 512 << 20


class Tokens(Protocol):
    """One encoded row: `loss_mask[i]` says that token i, predicted from those before it, carries loss."""

    @property
    def input_ids(self) -> Sequence[int]:
        """Tokens of the row."""

    @property
    def loss_mask(self) -> Sequence[int]:
        """1 for tokens that carry loss, of the same length."""


def row_losses(
    model: Any, rows: Sequence[Tokens], *, batch: int = 64, progress: Callable[[int, int], None] | None = None
) -> list[tuple[float, int]]:
    """Summed loss in nats and number of predicted tokens of each row, in order.

    Args:
        model: a causal language model; its modes are left as they were.
        rows: encoded rows.
        batch: most rows in a forward pass.
        progress: called with (rows done, rows in all).
    """
    import torch

    from posttrain.rollout.hf import evaluation_mode

    out: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    done = 0
    with evaluation_mode(model), torch.no_grad():
        for index in _batches(rows, batch, model.config.vocab_size):
            for i, pair in zip(index, _losses(model, [rows[i] for i in index]), strict=True):
                out[i] = pair
            done += len(index)
            if progress is not None:
                progress(done, len(rows))
    return out


def _batches(rows: Sequence[Tokens], batch: int, vocabulary: int) -> Iterator[list[int]]:
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].input_ids), i))
    while order:
        width = max(1, len(rows[order[0]].input_ids))
        take = max(1, min(batch, LOGIT_BYTES // (width * vocabulary * 4)))
        yield order[:take]
        order = order[take:]


def _losses(model: Any, rows: Sequence[Tokens]) -> list[tuple[float, int]]:
    import torch
    from torch.nn.functional import cross_entropy

    device = next(model.parameters()).device
    width = max(len(row.input_ids) for row in rows)
    if width < 2:
        return [(0.0, 0)] * len(rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    seen, counted = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, row in enumerate(rows):
        length = len(row.input_ids)
        ids[i, :length] = torch.as_tensor(row.input_ids)
        seen[i, :length] = 1
        counted[i, :length] = torch.as_tensor(row.loss_mask).long()
    padded = None if bool(seen.all()) else seen.to(device)
    logits = model(input_ids=ids.to(device), attention_mask=padded, use_cache=False).logits[:, :-1]
    targets = ids[:, 1:].to(device).masked_fill(counted[:, 1:].to(device) == 0, -100)
    loss = cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100)
    sums = loss.view(targets.shape).double().sum(-1).tolist()
    return list(zip(sums, (targets != -100).sum(-1).tolist(), strict=True))


def loss_values(losses: Sequence[tuple[float, int]]) -> dict[str, Value]:
    """`loss` (nats a token) and `perplexity` from the rows' sums and counts."""
    loss = token_mean([s for s, _ in losses], [t for _, t in losses])
    return {"loss": loss, "perplexity": exponential(loss)}

"""Drawing the next token: the sampling distribution, and noise that belongs to a request rather than to a batch.

One uniform number a token decides it by inverse transform sampling: the token is the first whose cumulative probability
exceeds u. u comes from a Philox counter generator keyed by the request's seed and read at the token's position, so equal
logits give equal tokens whatever shares the batch. The cumulative sum is float64: in float32 the tail beyond 1 - 6e-8 could
never be drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from posttrain.rollout.awrs import BLOCK
from posttrain.rollout.base import Sampling


def uniforms(seeds: Sequence[int], length: int) -> np.ndarray:
    """(len(seeds), length) float64 in [0, 1); row i depends on seeds[i] only, and a longer row begins with the shorter one."""
    return np.stack([np.random.Generator(np.random.Philox(key=seed)).random(length) for seed in seeds])


@dataclass
class SamplingRows:
    """Sampling settings of the rows of a batch, as tensors on the device of the logits.

    Args:
        temperature: (B, 1) float32; 1 for greedy rows.
        greedy: (B,) bool; None where no row is greedy.
        top_k: (B,) int64, 0 = off; None where no row uses it.
        top_p: (B, 1) float32, 1 = off; None where no row uses it.
        plain: every temperature is 1.
    """

    temperature: torch.Tensor
    greedy: torch.Tensor | None
    top_k: torch.Tensor | None
    top_p: torch.Tensor | None
    plain: bool = False

    @classmethod
    def of(cls, samplings: Sequence[Sampling], device: torch.device | str = "cpu") -> SamplingRows:
        """Rows of these settings, in order."""
        temperature = torch.tensor([s.temperature or 1.0 for s in samplings], device=device)[:, None]
        greedy = (
            torch.tensor([s.temperature == 0 for s in samplings], device=device) if any(s.temperature == 0 for s in samplings) else None
        )
        top_k = torch.tensor([s.top_k for s in samplings], device=device) if any(s.top_k for s in samplings) else None
        top_p = torch.tensor([s.top_p for s in samplings], device=device)[:, None] if any(s.top_p < 1 for s in samplings) else None
        return cls(temperature, greedy, top_k, top_p, all(s.temperature in (0.0, 1.0) for s in samplings))

    def select(self, rows: torch.Tensor) -> SamplingRows:
        """These rows only."""
        greedy, top_k, top_p = (None if part is None else part[rows] for part in (self.greedy, self.top_k, self.top_p))
        return SamplingRows(self.temperature[rows], greedy, top_k, top_p, self.plain)


def sampling_logprobs(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Log-probabilities of the sampling distribution: temperature, then top-k, then top-p, renormalised.

    Args:
        logits: (B, V), any float type.
        rows: settings of the B rows; greedy rows are treated as temperature 1.

    Returns:
        (B, V) float32; truncated tokens are -inf.
    """
    return torch.log_softmax(_truncated(logits, rows), dim=-1)


def _truncated(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    scaled = logits.float() if rows.plain else logits.float() / rows.temperature
    if rows.top_k is not None:
        scaled = _keep_top_k(scaled, rows.top_k)
    if rows.top_p is not None:
        scaled = _keep_top_p(scaled, rows.top_p)
    return scaled


def _keep_top_k(scaled: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    size = scaled.shape[-1]
    widest = int(top_k.max().clamp(max=size))
    best = scaled.topk(widest, dim=-1).values
    last = best.gather(1, top_k.clamp(1, widest)[:, None] - 1)
    cut = torch.where((top_k > 0)[:, None] & (top_k < size)[:, None], last, torch.full_like(last, -torch.inf))
    return scaled.masked_fill(scaled < cut, -torch.inf)


def _keep_top_p(scaled: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    ordered, index = scaled.sort(dim=-1, descending=True, stable=True)
    shares = torch.softmax(ordered, dim=-1)
    before = shares.cumsum(dim=-1) - shares
    outside = (before >= top_p) & (top_p < 1)
    outside[:, 0] = False
    return scaled.masked_fill(outside.scatter(1, index, outside), -torch.inf)


def block_sums(p: torch.Tensor) -> torch.Tensor:
    """(B, ceil(V / BLOCK)) float64, cumulative sums of the blocks of (B, V) probabilities; a tenth of the cost of summing all."""
    whole = p.shape[-1] // BLOCK * BLOCK
    sums = p[:, :whole].unflatten(-1, (-1, BLOCK)).sum(-1, dtype=torch.float64)
    if whole < p.shape[-1]:
        sums = torch.cat([sums, p[:, whole:].sum(-1, keepdim=True, dtype=torch.float64)], dim=-1)
    return sums.cumsum(-1)


def draw(p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Token ids (B,) by inverse transform of `uniform` (B,) float64 through the probabilities `p` (B, V).

    First the block of tokens by the sums of blocks, then the token in it.
    """
    sums = block_sums(p)
    target = _below(uniform[:, None] * sums[:, -1:], sums[:, -1:])
    block = torch.searchsorted(sums, target, right=True).clamp(max=sums.shape[-1] - 1)
    before = sums.gather(1, (block - 1).clamp(min=0)) * (block > 0)
    columns = block * BLOCK + torch.arange(BLOCK, device=p.device)
    inside = p.gather(1, columns.clamp(max=p.shape[-1] - 1)) * (columns < p.shape[-1])
    inside = inside.cumsum(dim=-1, dtype=torch.float64)
    place = torch.searchsorted(inside, _below(target - before, inside[:, -1:]), right=True)
    return (block * BLOCK + place).squeeze(1).clamp(max=p.shape[-1] - 1)


def _below(target: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """`target`, but less than `total`, so that a token with a probability is found."""
    return torch.minimum(target.clamp(min=0), torch.nextafter(total, torch.zeros_like(total)))


def sample(logits: torch.Tensor, rows: SamplingRows, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Next tokens and their log-probabilities under the sampling distribution.

    Args:
        logits: (B, V).
        rows: settings.
        uniform: (B,) float64 in [0, 1).

    Returns:
        ids (B,) int64 and log-probabilities (B,) float32. A greedy row's is 0, its distribution being a point. NaN where the
        logits are not finite.
    """
    if rows.greedy is not None:
        best, ids = logits.max(dim=-1)
        certain = best.float() * 0.0
        if bool(rows.greedy.all()):
            return ids, certain
    p = torch.softmax(_truncated(logits, rows), dim=-1)
    drawn = draw(p, uniform)
    values = p.gather(1, drawn[:, None]).squeeze(1).log()
    if rows.greedy is None:
        return drawn, values
    return torch.where(rows.greedy, ids, drawn), torch.where(rows.greedy, certain, values)

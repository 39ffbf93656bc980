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
    """

    temperature: torch.Tensor
    greedy: torch.Tensor | None
    top_k: torch.Tensor | None
    top_p: torch.Tensor | None

    @classmethod
    def of(cls, samplings: Sequence[Sampling], device: torch.device | str = "cpu") -> SamplingRows:
        """Rows of these settings, in order."""
        temperature = torch.tensor([s.temperature or 1.0 for s in samplings], device=device)[:, None]
        greedy = (
            torch.tensor([s.temperature == 0 for s in samplings], device=device) if any(s.temperature == 0 for s in samplings) else None
        )
        top_k = torch.tensor([s.top_k for s in samplings], device=device) if any(s.top_k for s in samplings) else None
        top_p = torch.tensor([s.top_p for s in samplings], device=device)[:, None] if any(s.top_p < 1 for s in samplings) else None
        return cls(temperature, greedy, top_k, top_p)

    def select(self, rows: torch.Tensor) -> SamplingRows:
        """These rows only."""
        pick = [None if part is None else part[rows] for part in (self.greedy, self.top_k, self.top_p)]
        return SamplingRows(self.temperature[rows], *pick)


def sampling_logprobs(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Log-probabilities of the sampling distribution: temperature, then top-k, then top-p, renormalised.

    Args:
        logits: (B, V), any float type.
        rows: settings of the B rows; greedy rows are treated as temperature 1.

    Returns:
        (B, V) float32; truncated tokens are -inf.
    """
    scaled = logits.float() / rows.temperature
    if rows.top_k is not None:
        scaled = _keep_top_k(scaled, rows.top_k)
    if rows.top_p is not None:
        scaled = _keep_top_p(scaled, rows.top_p)
    return torch.log_softmax(scaled, dim=-1)


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


def draw(logprobs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Token ids (B,) by inverse transform of `uniform` (B,) float64 through the distributions `logprobs` (B, V)."""
    cumulative = logprobs.exp().cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    inside = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(uniform[:, None] * total, inside)
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp(max=logprobs.shape[-1] - 1)


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
    logprobs = sampling_logprobs(logits, rows)
    drawn = draw(logprobs, uniform)
    values = logprobs.gather(1, drawn[:, None]).squeeze(1)
    if rows.greedy is None:
        return drawn, values
    return torch.where(rows.greedy, ids, drawn), torch.where(rows.greedy, certain, values)

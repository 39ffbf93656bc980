"""Orders of tokens for the rows of a batch, and the draw of one token by a request's sampler; both engines use them.

On a CPU an order is drawn by inverse transform over the row's cumulative sum, the cheapest there. On a GPU the first tokens by
log p + Gumbel noise come over in one copy for the whole batch, and what lies beyond is fetched where it is needed. Either
way the noise is that of (seed, step), so what is drawn depends on nothing else in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from posttrain.config.constraint import SamplerConfig
from posttrain.errors import NumericsError
from posttrain.rollout.awrs import Draw, GreedyOrder, InverseOrder, ListedOrder, Order, awrs, local, masked, noise
from posttrain.rollout.constraints import TokenChecker
from posttrain.rollout.sampling import block_sums

LISTED = 64
"""Tokens of an order that a GPU hands over; what lies beyond is fetched where it is needed."""
ON_DEVICE = 1 << 32
"""Place of the noise that is of a token on the device; RESAMPLING and CHOOSING of `group` lie above it."""


class RowNoise(NamedTuple):
    """What a row is drawn by.

    Args:
        seed: of its request or particle.
        step: number of the token.
        temperature: 0 is greedy.
    """

    seed: int
    step: int
    temperature: float


def row_orders(logits: torch.Tensor, rows: Sequence[RowNoise], places: Sequence[int] | None = None) -> Iterator[Order]:
    """The order of each row.

    Args:
        logits: (B, V) of the model, before temperature, on any device; not changed.
        rows: as many as there are `places`.
        places: which rows of `logits` are wanted; None is all of them.

    Raises:
        NumericsError: logits that are not finite numbers.
    """
    host = on_host(logits.device)
    if places is not None and (not host or 2 * len(places) < len(logits)):
        logits, places = logits.index_select(0, torch.tensor(places, device=logits.device)), None
    where = range(len(rows)) if places is None else places
    scaled = logits.float()
    if any(row.temperature not in (0.0, 1.0) for row in rows):
        temperature = torch.ones(len(logits), 1)
        temperature[list(where), 0] = torch.tensor([row.temperature or 1.0 for row in rows])
        scaled = scaled / temperature.to(logits.device)
    if host:
        p = torch.softmax(scaled, dim=-1)
        sums, values = block_sums(p).numpy(), p.numpy()
        _check_finite(bool(np.isfinite(sums[list(where), -1]).all()))
        for row, place in zip(rows, where, strict=True):
            yield InverseOrder(values[place], noise(row.seed, row.step), sums[place]) if row.temperature else GreedyOrder(values[place])
        return
    logprobs = torch.log_softmax(scaled, dim=-1)
    _check_finite(not bool(logprobs.isnan().any()))
    tokens, sizes = top_keys(logprobs, [row.seed for row in rows], [row.step for row in rows], LISTED)
    for number, row in enumerate(rows):

        def probabilities(number: int = number) -> np.ndarray:
            found: np.ndarray = logprobs[number].double().exp().cpu().numpy()
            return found

        pairs = list(zip(tokens[number].tolist(), sizes[number].tolist(), strict=True))
        yield ListedOrder(pairs, probabilities, noise(row.seed, row.step)) if row.temperature else GreedyOrder(probabilities())


def _check_finite(finite: bool) -> None:
    if not finite:
        raise NumericsError("the model's logits are not finite while sampling", fix="check the weights: training may have diverged")


def draw_token(order: Order, checker: TokenChecker, sampler: SamplerConfig) -> Draw:
    """A token that the checker allows, by the sampler's method; the checker is not changed.

    Raises:
        RolloutError: the checker failed.
    """
    mask: Callable[[], np.ndarray] | None = checker.mask if checker.has_mask or isinstance(order, ListedOrder) else None
    if isinstance(order, GreedyOrder):
        return local(order, checker.allows)
    if sampler.method == "mask":
        return masked(order, checker.mask)
    if sampler.method == "local":
        return local(order, checker.allows, max_calls=sampler.awrs.max_calls, mask=mask)
    return awrs(order, checker.allows, probes=sampler.awrs.probes, max_calls=sampler.awrs.max_calls, mask=mask)


def on_host(device: torch.device) -> bool:
    """Whether orders are drawn by inverse transform on the host, the cheapest on a CPU, rather than by keys on the device."""
    return device.type == "cpu"


def top_keys(logprobs: torch.Tensor, seeds: Sequence[int], steps: Sequence[int], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first tokens by log p + Gumbel noise, and their probabilities; the noise of (seed, step, token) is the same in any batch.

    Args:
        logprobs: (B, V) on any device.
        seeds: B numbers.
        steps: B places of the token.
        count: tokens a row.

    Returns:
        (B, count) ids and (B, count) float64 probabilities, on the host.
    """
    uniforms = keyed_uniforms(seeds, steps, logprobs.shape[-1], logprobs.device)
    keys = logprobs.double() - (-uniforms.log()).log()
    best = keys.topk(min(count, keys.shape[-1]), dim=-1).indices
    sizes = logprobs.gather(1, best).double().exp()
    return best.cpu().numpy(), sizes.cpu().numpy()


def keyed_uniforms(seeds: Sequence[int], steps: Sequence[int], size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """(B, size) float64 in (0, 1) by SplitMix64 of (seed, step, index), on the device."""
    starts = [int(next(noise(seed, ON_DEVICE + step)) * 2**62) for seed, step in zip(seeds, steps, strict=True)]
    state = torch.tensor(starts, dtype=torch.int64, device=device)[:, None] + torch.arange(size, device=device) * _signed(
        0x9E3779B97F4A7C15
    )
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ _shifted(state, shift)) * _signed(factor)
    state = state ^ _shifted(state, 31)
    return (_shifted(state, 11).double() + 0.5) * 2.0**-53


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shifted(state: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift to the right; torch's is arithmetic."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)

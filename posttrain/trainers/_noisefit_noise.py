"""Where noise goes and what it is drawn from.

A pass of one micro-batch is `Work`: rows 0..B of the repeated batch are clean, rows kB..(k+1)B are noisy pass k. Hooks on
the decoder layers look at the row alone, so a layer that runs again in the backward pass (gradient checkpointing) does the
same again. Noise comes from a generator of its own, seeded anew for each draw by

    (seed, step, place of the row in the step, pass, layer)

where the place is that in the whole global batch: micro-step, rank and row in one. So noise does not depend on padding, on
how a step is cut into micro-batches, or on the number of processes; a resumed run draws the same; and dropout's generator is
never touched. Packed sequences are keyed by (micro-step, rank, document).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from posttrain.losses.noisefit import EPSILON, adaptive_scale, gaussian_ratio, token_variance
from posttrain.rollout.base import request_seed
from posttrain.trainers._noisefit_config import NoiseConfig

Scales = Mapping[int, float]
"""Layer -> the operator's `base`."""


@dataclass(frozen=True)
class Segments:
    """The rows (documents, where packed) of a micro-batch.

    Args:
        of: (B, T) number of the segment, `count` for padding.
        flat: (M,) places of real tokens in the flattened batch, segment after segment.
        lengths: tokens of each segment.
        names: what its noise is keyed by.
    """

    of: torch.Tensor
    flat: torch.Tensor
    lengths: list[int]
    names: list[tuple[int | str, ...]]

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean of (..., B, T, 1) over each token's segment, in the same shape; 0 at padding."""
        sums = values.new_zeros((*values.shape[:-3], len(self.lengths) + 1))
        flat = values.flatten(-3)
        index = self.of.flatten().expand_as(flat)
        sums = sums.scatter_add(-1, index, flat)
        sums = sums / torch.tensor([*self.lengths, 1], dtype=values.dtype, device=values.device)
        sums = torch.cat([sums[..., :-1], torch.zeros_like(sums[..., -1:])], dim=-1)
        return sums.gather(-1, index).view(values.shape)


def segments_of(inputs: Mapping[str, Any], place: int, rows: int) -> Segments:
    """The segments of a micro-batch.

    Args:
        inputs: `input_ids` (B, T), and `attention_mask` (B, T), or `position_ids` (1, T) that begin again at 0 where packed.
        place: number of the micro-batch in the step, over all ranks.
        rows: rows of a micro-batch.
    """
    ids, mask, positions = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is None and positions is not None:
        of = (positions == 0).flatten().cumsum(0).view(positions.shape) - 1
        lengths = of.flatten().bincount().tolist()
        names: list[tuple[int | str, ...]] = [("document", place, i) for i in range(len(lengths))]
        return Segments(of, torch.arange(ids.numel(), device=ids.device), lengths, names)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    of = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids).masked_fill(~real, len(ids))
    names = [("row", place * rows + i) for i in range(len(ids))]
    return Segments(of, real.flatten().nonzero().flatten(), real.sum(dim=1).tolist(), names)


@dataclass(frozen=True)
class Operator:
    """The noise on one layer's output; see `losses/noisefit.py`.

    Args:
        beta, cap: of the operator.
        by_std: `base` is times the standard deviation of all hidden states of the pass (the paper).
        whole: the mean variance is over the micro-batch with its padding (both scripts), not over the token's own row.
        through: gradient flows through the scale (the first script).
    """

    beta: float = 0.1
    cap: float = 5.0
    by_std: bool = False
    whole: bool = False
    through: bool = False

    def pattern(self, hidden: torch.Tensor, segments: Segments) -> torch.Tensor:
        """What eps is multiplied by at base 1, for (m, B, T, H)."""
        with torch.set_grad_enabled(self.through and torch.is_grad_enabled()):
            hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
            variance = token_variance(hidden)
            mean = variance.mean(dim=(1, 2), keepdim=True) if self.whole else segments.mean(variance)
            found = adaptive_scale(hidden, mean, self.beta, self.cap)
            return found * hidden.flatten(1).std(dim=1).view(-1, 1, 1, 1) if self.by_std else found


def operator_of(noise: NoiseConfig) -> Operator:
    """The operator of a config."""
    scripts = noise.compat != "none"
    return Operator(noise.beta, noise.factor_cap, by_std=noise.compat == "v1", whole=scripts, through=noise.compat == "v1")


def base_of(noise: NoiseConfig) -> float:
    """The operator's base for a layer without a scale of its own: `relative_std`, which the first script applies twice."""
    return noise.relative_std**2 if noise.compat == "v1" else noise.relative_std / gaussian_ratio(noise.beta, noise.factor_cap)


@dataclass
class Work:
    """One call of the model: the clean pass and noisy passes of a micro-batch.

    Args:
        inputs: what the model takes, without labels.
        places: (N,) places in the flattened batch where a token is predicted.
        branches: of each noisy pass, the scale of each layer.
        operator: of the noise.
        segments: rows of the micro-batch.
        key: seed, step and whatever else all draws have in common.
        share: run the layers up to the first noisy one once.
        score: hidden states (K, N, H) and head -> what the call returns.
        draws: number of each noisy pass in the key; equal numbers draw equal noise.
        look: called with each layer's number and its output on the clean pass (B, T, H), where there are no branches.
        ratios: noise over hidden state by layer, root mean squares over real tokens; filled by the call.
    """

    inputs: dict[str, Any]
    places: torch.Tensor
    branches: Sequence[Scales]
    operator: Operator
    segments: Segments
    key: tuple[int | str, ...]
    share: bool
    score: Callable[..., Any]
    draws: Sequence[int] = (1, 2)
    look: Callable[[int, torch.Tensor], None] | None = None
    ratios: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def copies(self) -> int:
        """K: passes."""
        return 1 + len(self.branches)

    @property
    def first(self) -> int:
        """First noisy layer."""
        return min(layer for scales in self.branches for layer in scales)

    def noise(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """What is added at one layer.

        Args:
            layer: its number.
            hidden: (m, B, T, H) of the noisy passes, or (1, B, T, H) where they do not differ yet.

        Returns:
            (m, B, T, H); 0 at padding.
        """
        scales = [scales.get(layer, 0.0) for scales in self.branches]
        pattern = self.operator.pattern(hidden, self.segments)
        eps = torch.stack([self._draw(layer, number, hidden) for number in self.draws[: len(scales)]])
        added = pattern * eps.to(pattern.dtype) * torch.tensor(scales, dtype=pattern.dtype, device=pattern.device).view(-1, 1, 1, 1)
        with torch.no_grad():
            flat = hidden.flatten(1, 2)[:, self.segments.flat].to(pattern.dtype)
            self.ratios[layer] = (added.square().mean(dim=0).sum() / flat.square().mean(dim=0).sum().clamp(min=EPSILON)).sqrt()
        return added.to(hidden.dtype)

    def _draw(self, layer: int, number: int, hidden: torch.Tensor) -> torch.Tensor:
        """(B, T, H) standard normal at real tokens, 0 at padding; float32, whatever the model's type."""
        _, rows, width, size = hidden.shape
        generator = torch.Generator(device=hidden.device)
        drawn = []
        for length, name in zip(self.segments.lengths, self.segments.names, strict=True):
            seed, *rest = self.key
            generator.manual_seed(request_seed(int(seed), "noise", *rest, *name, number, layer))
            drawn.append(torch.randn(length, size, generator=generator, device=hidden.device))
        eps = torch.zeros(rows * width, size, device=hidden.device)
        eps[self.segments.flat] = torch.cat(drawn)
        return eps.view(rows, width, size)


class Injector:
    """Hooks on a model's decoder layers that carry out the `Work` of the call that is running.

    Args:
        layers: the decoder layers, first to last.
    """

    def __init__(self, layers: Sequence[torch.nn.Module]) -> None:
        self.layers = list(layers)
        self.work: Work | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The hooks are there while the block runs."""
        handles = []
        for number, layer in enumerate(self.layers):
            handles.append(layer.register_forward_pre_hook(self._before(number), with_kwargs=True))
            handles.append(layer.register_forward_hook(self._after(number)))
        try:
            yield
        finally:
            self.work = None
            for handle in handles:
                handle.remove()

    def _before(self, number: int) -> Callable[..., Any]:
        """Repeats what a layer behind the shared ones gets beside hidden states."""

        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            work = self.work
            if work is None or not work.share or not work.branches or number <= work.first:
                return None
            rows = len(work.inputs["input_ids"])
            rest = tuple(repeated("", value, rows, work.copies) for value in args[1:])
            named = {name: repeated(name, value, rows, work.copies) for name, value in kwargs.items() if name != "hidden_states"}
            return (*args[:1], *rest), {**kwargs, **named}

        return hook

    def _after(self, number: int) -> Callable[..., Any]:
        def hook(_: Any, __: Any, output: Any) -> Any:
            work = self.work
            if work is None:
                return None
            hidden = output[0] if isinstance(output, tuple) else output
            if work.look is not None:
                work.look(number, hidden)
            if not any(number in scales for scales in work.branches):
                return None
            changed = _noisy(work, number, hidden)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook


def _noisy(work: Work, number: int, hidden: torch.Tensor) -> torch.Tensor:
    """A layer's output with noise on the noisy rows: (B, T, H) or (K B, T, H) -> (K B, T, H)."""
    if work.share and number == work.first:
        clean = hidden.unsqueeze(0)
        return torch.cat([clean, clean + work.noise(number, clean)]).flatten(0, 1)
    passes = hidden.unflatten(0, (work.copies, -1))
    return torch.cat([passes[:1], passes[1:] + work.noise(number, passes[1:])]).flatten(0, 1)


def repeated(name: str, value: Any, rows: int, copies: int) -> Any:
    """An argument of the model or of a layer for the repeated batch.

    Args:
        name: of the argument; `cu_seq_lens_*` are bounds in the flattened batch, and shift from copy to copy.
        value: tensors whose first dimension is the batch are repeated, also inside tuples and lists; everything else stays.
        rows: B.
        copies: K.
    """
    if isinstance(value, tuple | list):
        return type(value)(repeated(name, item, rows, copies) for item in value)
    if not torch.is_tensor(value):
        return value
    if name.startswith("cu_seq_lens"):
        steps = torch.arange(copies, dtype=value.dtype, device=value.device)[:, None] * value[-1]
        return torch.cat([value[:1], (value[1:] + steps).flatten()])
    return value.repeat(copies, *[1] * (value.dim() - 1)) if value.dim() > 1 and value.size(0) == rows else value

"""Stable-SPAM and GradientStabilizer: AdamW behind a per-tensor clip, a per-tensor norm and a reset of its moments.

For each parameter tensor with gradient g, at its t-th non-zero gradient (Huang et al., arXiv 2502.17055 v1, Algorithm 1):

    AdaClip   T  = d T + (1 - d) max|g|             T' = T / (1 - d^t)        g_i <- g_i T' / max|g|   where |g_i| > T'
    AdaGN     mu = d1 mu + (1 - d1) ||g||           nu = d2 nu + (1 - d2) ||g||^2
              g  <- g / ||g|| * (mu / (1 - d1^t)) / (sqrt(nu / (1 - d2^t)) + eps)
    MoRet     every `reset_every` steps: Adam's m = v = 0 and its counter starts again
    AdamW     on that g

GradientStabilizer (later versions of the same paper) is AdaGN alone, with other constants; see `presets.py`. After AdaGN every tensor
has a gradient of norm about 1, so a global clip behind it means nothing, and one before it only changes the averages.

With all three off the step is torch's AdamW, bit by bit. Gradients are changed in place. The step works on whole tensors,
also where they are split over processes (DTensor, so FSDP's second version); see `_gradients.py`.

Where we differ from the authors' file, which `compat="official"` reproduces:

- Their one counter serves Adam and the averages. A reset sets it to 1 but keeps T, mu and nu, so that T' is 500 times too high
  one step later and still 2.5 times after 500; here t and Adam's counter are two.
- At a reset their step uses the old moments with the bias correction of a first step, and the moments of that step are lost; here
  the reset comes before the update, which then uses the current gradient.
- A gradient of zero (LoRA's first step) leaves the averages alone here; theirs decay.
- Averages are kept as Python floats (double precision) instead of the gradient's type, in which bfloat16 stops following them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.distributed.tensor import DTensor

from posttrain.errors import NumericsError
from posttrain.optim._gradients import PIECE, Gradient, maxima, norms, scale

Group = dict[str, Any]
AVERAGES = ("averaged", "max_average", "norm_average", "square_average")
"""State of a tensor beside Adam's: t, T, mu, nu."""


class StableSPAM(torch.optim.AdamW):
    """AdamW with AdaClip, AdaGN and MoRet, each of which can be off. Every option may differ by parameter group.

    Args:
        params: parameters or groups, as torch takes them; dense and real.
        lr, betas, eps, weight_decay: AdamW's; the weight decay is decoupled, and 0 here.
        clip_decay: AdaClip's d, in [0, 1); None for no clip.
        clip_limit: ours, off by default (None): T takes in min(max|g|, clip_limit T'), with T' of before, so that a spike cannot
            raise the threshold that is to stop it. Above 1.
        norm_decays: AdaGN's (d1, d2), in [0, 1); None for no normalisation.
        norm_eps: AdaGN's eps.
        reset_every: steps between resets of Adam's moments; 0 for none.
        decay_to, total_steps: d1 and beta1 are multiplied by a cosine that falls from 1 to `decay_to` over `total_steps`, as the
            authors' `total_T` does (theirs: 0.5). The bias corrections take the decay of the day, as if it had always been so.
        compat: "official" for the authors' step, defects included.
        foreach, fused: torch's; fused by default where it exists.

    Raises:
        ValueError: an option out of its range.
        ConfigError: a gradient is sparse, complex, or no whole tensor.
        NumericsError: a gradient is not finite; averages, moments and weights are then as they were.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        clip_decay: float | None = 0.999,
        clip_limit: float | None = None,
        norm_decays: tuple[float, float] | None = (0.7, 0.9),
        norm_eps: float = 1e-8,
        reset_every: int = 1000,
        decay_to: float = 1.0,
        total_steps: int | None = None,
        compat: Literal["none", "official"] = "none",
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        self._own: Group = {
            "clip_decay": clip_decay, "clip_limit": clip_limit, "norm_decays": norm_decays, "norm_eps": norm_eps,
            "reset_every": reset_every, "decay_to": decay_to, "total_steps": total_steps, "compat": compat, "updates": 0,
        }  # fmt: skip
        super().__init__(params, lr, betas, eps, weight_decay, foreach=foreach, fused=fused)
        self._step_supports_amp_scaling = False
        self.defaults.update(self._own)
        self._complete_groups()
        if fused is None and foreach is None and all(_has_fused(p) for group in self.param_groups for p in group["params"]):
            self.defaults["fused"] = True
            for group in self.param_groups:
                group["fused"] = True
        for group in self.param_groups:
            _check_options(group)
        self._seen = _Seen()

    def _complete_groups(self) -> None:
        for group in self.param_groups:
            for name, value in self._own.items():
                group.setdefault(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._complete_groups()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        fresh, factors = self._shape_gradients()
        due = [group for group in self.param_groups if group["reset_every"] and (group["updates"] + 1) % group["reset_every"] == 0]
        for group in due:
            self._reset(group, moments=group["compat"] == "none")
        self._adamw(factors)
        for parameter, averages in fresh.items():
            self.state[parameter].update(zip(AVERAGES, averages, strict=True))
        for group in due:
            self._finish_official_reset(group)
        for group in self.param_groups:
            group["updates"] += 1
        return loss

    def _shape_gradients(self) -> tuple[dict[torch.Tensor, list[Any]], dict[torch.Tensor, float]]:
        """AdaClip on every gradient, AdaGN where it is not left to the fused kernel.

        Returns:
            The tensors' new averages, which are not yet in the state, and AdaGN's factors that are still to be applied.
        """
        chosen = [
            (p, group)
            for group in self.param_groups
            if group["clip_decay"] is not None or group["norm_decays"] is not None
            for p in group["params"]
            if p.grad is not None
        ]
        tensors = [_Averages(p, group, self.state.get(p) or {}) for p, group in chosen]
        clipped = [tensor for tensor in tensors if tensor.group["clip_decay"] is not None]
        self._check_finite(clipped, peaks := maxima([tensor.gradient for tensor in clipped]))
        ratios = [tensor.clip(peak) for tensor, peak in zip(clipped, peaks, strict=True)]
        normed = [tensor for tensor in tensors if tensor.group["norm_decays"] is not None]
        self._check_finite(normed, sizes := norms([tensor.gradient for tensor in normed]))
        factors = [tensor.normalise(size) for tensor, size in zip(normed, sizes, strict=True)]
        folding = [id(group) for group in self.param_groups if _folds(group)]
        long = [t.parameter.numel() >= PIECE and id(t.group) in folding for t in normed]
        later = {t.parameter: factor for t, factor, folds in zip(normed, factors, long, strict=True) if folds}
        now = [(t.gradient, factor) for t, factor in zip(normed, factors, strict=True) if t.parameter not in later]
        scale([gradient for gradient, _ in now], [factor for _, factor in now])
        self._seen.add([ratio for ratio in ratios if ratio], [factor * n for factor, n in zip(factors, sizes, strict=True) if n])
        return {tensor.parameter: tensor.averages() for tensor in tensors}, later

    def _check_finite(self, tensors: Sequence[_Averages], values: Sequence[float]) -> None:
        for tensor, value in zip(tensors, values, strict=True):
            if not math.isfinite(value):
                raise NumericsError(
                    f"the gradient of a parameter of shape {tuple(tensor.gradient.local.shape)} is not finite; nothing was updated",
                    where="optim",
                    fix="skip this step, lower lr, or use a wider dtype",
                )

    def _adamw(self, factors: dict[torch.Tensor, float]) -> None:
        """torch's step, with beta1 on its way to `decay_to`; tensors with a factor take theirs one by one."""
        kept = [dict(group) for group in self.param_groups]
        try:
            for group in self.param_groups:
                group["betas"] = (group["betas"][0] * _fallen(group), group["betas"][1])
                self._scaled_adamw({**group, "params": [p for p in group["params"] if p in factors]}, factors)
                group["params"] = [p for p in group["params"] if p not in factors]
            inspect.unwrap(torch.optim.AdamW.step)(self)
        finally:
            for group, before in zip(self.param_groups, kept, strict=True):
                group.update(before)

    def _scaled_adamw(self, group: Group, factors: dict[torch.Tensor, float]) -> None:
        """torch's fused kernel for each tensor; it multiplies the gradient in passing, which saves a pass over it."""
        lists: tuple[list[Any], ...] = ([], [], [], [], [], [])
        self._init_group(group, *lists)  # type: ignore[no-untyped-call]
        for p, gradient, m, v, step in zip(*lists[:4], lists[5], strict=True):
            torch._fused_adamw_(
                [p], [gradient], [m], [v], [], [step.add_(1)], lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1],
                weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False,
                grad_scale=torch.tensor(1 / factors[p]),
            )  # fmt: skip

    def _states(self, group: Group) -> list[dict[str, Any]]:
        return [state for p in group["params"] if (state := self.state.get(p)) and "exp_avg" in state]

    def _reset(self, group: Group, moments: bool) -> None:
        for state in self._states(group):
            state["step"].zero_()
            if moments:
                state["exp_avg"].zero_(), state["exp_avg_sq"].zero_()

    def _finish_official_reset(self, group: Group) -> None:
        if group["compat"] == "none":
            return
        for p in group["params"]:
            if p.grad is not None:
                state = self.state[p]
                state["exp_avg"].zero_(), state["exp_avg_sq"].zero_()
                state[AVERAGES[0]] = 1

    def figures(self) -> dict[str, float]:
        """What happened since the last call, over tensors and steps.

        Returns:
            optim/clipped: share of tensors of which an entry was clipped; optim/spike: largest max|g| / T'; optim/norm, optim/norm_min:
            mean and smallest norm after AdaGN; optim/resets: of the whole run. Those that do not apply are left out.
        """
        seen, self._seen = self._seen, _Seen()
        found: dict[str, float] = {}
        if seen.judged:
            found |= {"optim/clipped": seen.clipped / seen.judged, "optim/spike": seen.spike}
        if seen.normed:
            found |= {"optim/norm": seen.norm / seen.normed, "optim/norm_min": seen.norm_min}
        resets = [group["updates"] // group["reset_every"] for group in self.param_groups if group["reset_every"]]
        return {**found, "optim/resets": float(max(resets))} if resets else found


@dataclass
class _Seen:
    """What `figures` tells, summed over steps."""

    judged: int = 0
    clipped: int = 0
    spike: float = 0.0
    normed: int = 0
    norm: float = 0.0
    norm_min: float = math.inf

    def add(self, ratios: list[float], sizes: list[float]) -> None:
        """max|g| / T' and norms after AdaGN, of the tensors of one step."""
        self.judged, self.normed = self.judged + len(ratios), self.normed + len(sizes)
        self.clipped += sum(ratio > 1 + 1e-9 for ratio in ratios)
        self.spike = max([self.spike, *ratios])
        self.norm += math.fsum(sizes)
        self.norm_min = min([self.norm_min, *sizes])


class _Averages:
    """The averages of one tensor at one step, and what they make of its gradient."""

    def __init__(self, parameter: torch.Tensor, group: Group, state: dict[str, Any]) -> None:
        self.parameter, self.gradient, self.group = parameter, Gradient(parameter), group
        self.count, self.peak, self.norm, self.square = (state.get(name, 0) for name in AVERAGES)
        self.counted = False

    def _count(self, value: float) -> bool:
        """Whether this gradient enters the averages; it is counted once, by whoever sees it first."""
        enters = value > 0 or self.group["compat"] == "official"
        self.count += enters and not self.counted
        self.counted |= enters
        return enters

    def clip(self, peak: float) -> float:
        """AdaClip; returns max|g| / T', or 0 for a gradient of zero."""
        decay, limit = self.group["clip_decay"], self.group["clip_limit"]
        before = self.peak / (1 - decay**self.count) if self.count else math.inf
        if not self._count(peak):
            return 0.0
        self.peak = decay * self.peak + (1 - decay) * (peak if limit is None else min(peak, limit * before))
        threshold = self.peak / (1 - decay**self.count)
        if peak > threshold:
            self.gradient.clip(threshold, threshold / peak)
        return peak / threshold if threshold else 0.0

    def normalise(self, norm: float) -> float:
        """AdaGN; returns the factor of the gradient."""
        if not self._count(norm):
            return 1.0
        slow, fast = self.group["norm_decays"][1], self.group["norm_decays"][0] * _fallen(self.group)
        self.norm = fast * self.norm + (1 - fast) * norm
        self.square = slow * self.square + (1 - slow) * norm * norm
        size = self.norm / (1 - fast**self.count) / (math.sqrt(self.square / (1 - slow**self.count)) + self.group["norm_eps"])
        return size / norm if norm else 1.0

    def averages(self) -> list[Any]:
        """t, T, mu, nu."""
        return [int(self.count), float(self.peak), float(self.norm), float(self.square)]


def _fallen(group: Group) -> float:
    """The cosine from 1 to `decay_to` at the coming step."""
    if group["decay_to"] == 1.0:
        return 1.0
    share: float = min((group["updates"] + 1) / (group["total_steps"] + 1), 1.0)
    low: float = group["decay_to"]
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * share))


def _folds(group: Group) -> bool:
    """Whether AdaGN's factors can go into the fused kernel: on a CPU a call a tensor is cheap, and the factor is float32 there."""
    return bool(group["fused"]) and all(
        p.device.type == "cpu" and p.dtype != torch.float64 and not isinstance(p, DTensor) for p in group["params"]
    )


def _has_fused(parameter: torch.Tensor) -> bool:
    return torch.is_floating_point(parameter) and parameter.device.type in ("cpu", "cuda")


def _check_options(group: Group) -> None:
    decays = [] if group["norm_decays"] is None else [("norm_decays", d) for d in group["norm_decays"]]
    if group["clip_decay"] is not None:
        decays.append(("clip_decay", group["clip_decay"]))
    for name, value in decays:
        if not 0 <= value < 1:
            raise ValueError(f"{name}: expected a number in [0, 1), got {value}")
    if group["clip_limit"] is not None and (group["clip_decay"] is None or group["clip_limit"] <= 1):
        raise ValueError(f"clip_limit: expected a number above 1 beside a clip_decay, got {group['clip_limit']}")
    if group["reset_every"] < 0 or group["norm_eps"] < 0:
        raise ValueError("reset_every and norm_eps: expected 0 or more")
    if not 0 < group["decay_to"] <= 1 or (group["decay_to"] < 1 and not group["total_steps"]):
        raise ValueError(f"decay_to: expected a number in (0, 1], below 1 only with total_steps; got {group['decay_to']}")
    if group["compat"] not in ("none", "official"):
        raise ValueError(f"compat: expected `none` or `official`, got {group['compat']!r}")
    if group["compat"] == "official" and group["clip_limit"] is not None:
        raise ValueError("clip_limit is ours; it has no place beside compat: official")

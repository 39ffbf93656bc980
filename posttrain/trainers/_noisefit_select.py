"""Which layers get noise, chosen on a few rows of the training data before the first step.

`snr`, the paper's rule (2504.03302): for the output h of each layer on a clean pass,

    signal = mean|h|,   noise = mean|h' - h| with base = relative_std * std(h),   SNR = signal / (noise + 1e-6)

and the k layers with the highest or lowest SNR. Noise is put on h itself, not propagated. Its mean over draws is known,
E|eps| = sqrt(2 / pi), so nothing is drawn; the script takes ten draws. Ours differs from it in two ways: padding does not
count, and the last layer's h is its output, as where the noise goes, not that of the norm behind it.

`auto`, the rule of the authors' later script: noise of each scale s = factor / sqrt(H) at each layer alone, propagated, with

    rise  = max(CE_noisy - CE, 0) / CE
    score = KL / (1 + rise) / (1 + c log2(factor)^2),  only where rise <= max_ce_rise (unless that leaves a layer none)

KL symmetric, at targets. Layers whose best score is at least median + MAD and above 0, at most ceil(sqrt(L)): the best of
each of `bands` parts of the depth, then the best of the rest. A chosen layer's scale is the smallest one that is allowed and
whose KL reaches kl_share * median over the chosen layers of the KL at their best; else the allowed one nearest to it in
log KL. Medians are the lower ones. All scales of a layer go through the model in one call, with the same noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from posttrain.errors import ConfigError
from posttrain.losses.noisefit import Head, response
from posttrain.trainers._noisefit_config import AutoNoiseConfig, NoiseConfig
from posttrain.trainers._noisefit_noise import Operator, Segments, Work, base_of

Table = list[list[float]]
Policy = dict[str, Any]
"""{"selection", "layers", "scales": by layer number as text, "num_layers", and the figures that they were chosen by}."""


@dataclass(frozen=True)
class Batch:
    """Rows to choose layers by: the model's inputs, where a token is predicted and which, and the rows."""

    inputs: dict[str, Any]
    places: torch.Tensor
    targets: torch.Tensor
    segments: Segments


def choose(model: Any, noise: NoiseConfig, batches: Sequence[Batch], layers: int, hidden: int, seed: int, share: bool) -> Policy:
    """Layers and scales.

    Args:
        model: with `add_noisy_forward` and its hooks, in evaluation mode; called without gradient.
        noise: the config.
        batches: calibration rows.
        layers: L.
        hidden: H.
        seed: of the noise that `auto` tries.
        share: whether the layers before the noise may run once.

    Raises:
        ConfigError: layers that the model does not have.
    """
    if noise.selection == "list":
        found: Policy = {"layers": sorted(noise.layers)}
    elif noise.selection == "snr":
        found = pick_by_snr(_snr(model, noise, batches, layers, seed), noise, layers)
    else:
        grid = _responses(model, noise, batches, layers, hidden, seed, share)
        found = pick_by_response(*grid, noise.auto, 1 / math.sqrt(hidden), noise.min_depth)
    if max(found["layers"]) >= layers:
        raise ConfigError(f"layer {max(found['layers'])} of a model with {layers}", where="noise.layers", fix=f"use 0 to {layers - 1}")
    scales = found.pop("scales", dict.fromkeys(found["layers"], base_of(noise)))
    return {"selection": noise.selection, "num_layers": layers, **found, "scales": {str(layer): scales[layer] for layer in found["layers"]}}


def scales_of(policy: Policy) -> dict[int, float]:
    """Layer -> scale."""
    return {int(layer): scale for layer, scale in policy["scales"].items()}


def _snr(model: Any, noise: NoiseConfig, batches: Sequence[Batch], layers: int, seed: int) -> list[float]:
    """SNR of each layer, signal and noise each a mean over the batches."""
    sums = torch.zeros(2, layers, dtype=torch.float64)
    for batch in batches:

        def look(layer: int, hidden: torch.Tensor, batch: Batch = batch) -> None:
            sums[:, layer] += torch.tensor(signal_and_noise(hidden.flatten(0, 1)[batch.segments.flat], noise), dtype=torch.float64)

        model(noisy=_clean(batch, seed, look))
    return (sums[0] / (sums[1] + 1e-6 * len(batches))).tolist()


def signal_and_noise(hidden: torch.Tensor, noise: NoiseConfig) -> tuple[float, float]:
    """Means of |h| and of |h' - h| over tokens and features of (M, H), the latter over all draws."""
    rows = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)
    whole = Segments(rows, torch.arange(len(hidden), device=hidden.device), [len(hidden)], [()])
    operator = Operator(noise.beta, noise.factor_cap, by_std=True, whole=True)
    scale = operator.pattern(hidden[None, None], whole)
    return hidden.abs().double().mean().item(), noise.relative_std * math.sqrt(2 / math.pi) * scale.double().mean().item()


def pick_by_snr(snr: Sequence[float], noise: NoiseConfig, layers: int) -> Policy:
    """The layers with the highest or lowest ratio, earlier ones first among equals."""
    allowed = list(range(math.ceil(noise.min_depth * layers), layers))
    if noise.num_layers > len(allowed):
        raise ConfigError(
            f"{noise.num_layers} noisy layers of {len(allowed)} that may be chosen", where="noise.num_layers", fix=f"at most {len(allowed)}"
        )
    sign = -1 if noise.pick == "highest" else 1
    best = sorted(allowed, key=lambda layer: (sign * snr[layer], layer))[: noise.num_layers]
    return {"layers": sorted(best), "snr": list(snr)}


def _responses(
    model: Any, noise: NoiseConfig, batches: Sequence[Batch], layers: int, hidden: int, seed: int, share: bool
) -> tuple[Table, Table]:
    """KL and rise, each (L, scales), means over the batches as in the script: of each batch's means."""
    bases = [factor / math.sqrt(hidden) for factor in noise.auto.factors]
    kl, more = (torch.zeros(layers, len(bases), dtype=torch.float64) for _ in range(2))
    clean = 0.0
    for number, batch in enumerate(batches):
        count = max(len(batch.targets), 1)

        def score(states: torch.Tensor, head: Head, batch: Batch = batch) -> tuple[torch.Tensor, torch.Tensor]:
            return response(states, batch.targets, head, noise.temperature)

        for layer in range(layers):
            branches = [{layer: base} for base in bases]
            operator = Operator(noise.beta, noise.factor_cap, whole=noise.compat != "none")
            key, draws = (seed, "choose", number), [0] * len(bases)
            entropies, apart = model(noisy=Work(batch.inputs, batch.places, branches, operator, batch.segments, key, share, score, draws))
            kl[layer] += apart / count
            more[layer] += (entropies[1:] - entropies[0]).clamp(min=0) / count
        clean += entropies[0].item() / count
    rise = more / max(abs(clean), 1e-8)
    return (kl / len(batches)).tolist(), rise.tolist()


def _clean(batch: Batch, seed: int, look: Any) -> Work:
    def nothing(states: torch.Tensor, _: Head) -> torch.Tensor:
        return states.new_zeros(())

    return Work(batch.inputs, batch.places, [], Operator(), batch.segments, (seed,), False, nothing, look=look)


def lower_median(values: Sequence[float]) -> float:
    """The lower of the two middle values where their number is even."""
    return sorted(values)[(len(values) - 1) // 2]


def pick_by_response(kl: Table, rise: Table, auto: AutoNoiseConfig, unit: float, min_depth: float = 0.0) -> Policy:
    """The rule `auto` on its table; see the module.

    Args:
        kl, rise: (L, scales).
        auto: the config.
        unit: 1 / sqrt(H).
        min_depth: share of the first layers that are not chosen.
    """
    layers, most = len(kl), max(math.ceil(math.sqrt(len(kl))), 1)
    penalty = [1 + auto.scale_penalty * math.log2(factor) ** 2 for factor in auto.factors]
    plain = [[k / (1 + r) / p for k, r, p in zip(*rows, penalty, strict=True)] for rows in zip(kl, rise, strict=True)]
    allowed = [[i for i, value in enumerate(row) if value <= auto.max_ce_rise] for row in rise]
    best = [max(may or range(len(penalty)), key=lambda i, row=row: row[i]) for row, may in zip(plain, allowed, strict=True)]
    score = [row[i] for row, i in zip(plain, best, strict=True)]
    middle = lower_median(score)
    bar = middle + max(lower_median([abs(value - middle) for value in score]), 1e-12)
    fit = [layer for layer in range(layers) if score[layer] >= bar and score[layer] > 0]
    start = math.ceil(min_depth * layers)
    deep = [layer for layer in fit if layer >= start] or [layer for layer in range(start, layers) if score[layer] > 0]
    chosen = _spread(score, deep if start and deep else fit, auto.bands, most) or [max(range(layers), key=lambda layer: score[layer])]
    target = max(lower_median([kl[layer][best[layer]] for layer in chosen]) * auto.kl_share, 1e-12)
    scales = {layer: auto.factors[_scale(kl[layer], allowed[layer], best[layer], target)] * unit for layer in chosen}
    return {"layers": chosen, "scales": scales, "score": score, "kl": kl, "ce_rise": rise, "threshold": bar}


def _spread(score: Sequence[float], candidates: Sequence[int], bands: int, most: int) -> list[int]:
    """At most `most` candidates: the best ceil(most / bands) of each part of the depth, then the best of the rest."""
    layers = len(score)
    bands = min(bands, layers)
    quota = math.ceil(most / bands)
    ranked = sorted(candidates, key=lambda layer: (-score[layer], layer))
    if most == 1:
        return ranked[:1]
    chosen: list[int] = []
    for band in range(bands):
        inside = range(band * layers // bands, (band + 1) * layers // bands)
        chosen += [layer for layer in ranked if layer in inside][:quota]
    chosen += [layer for layer in ranked if layer not in chosen]
    return sorted(chosen[:most])


def _scale(kl: Sequence[float], allowed: Sequence[int], best: int, target: float) -> int:
    """Number of the scale of one chosen layer."""
    reach = [i for i in allowed if kl[i] >= target]
    if reach:
        return reach[0]
    return min(allowed, key=lambda i: abs(math.log(max(kl[i], 1e-12)) - math.log(target))) if allowed else best

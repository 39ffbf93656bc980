"""Stable-SPAM as its formulas say, one tensor at a time in float64 numpy; and the authors' order of steps, defects included."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Reference:
    """One tensor under Stable-SPAM.

    Args:
        w: its weights, changed by `step`.
        options: keyword arguments of `StableSPAM`, all of them.
    """

    w: np.ndarray
    options: dict[str, Any]
    m: Any = 0.0
    v: Any = 0.0
    k: int = 0
    t: int = 0
    averages: dict[str, float] = field(default_factory=lambda: dict.fromkeys("TMN", 0.0))
    total: int = 0

    def step(self, g: np.ndarray | None) -> None:
        """One optimizer step; None: no gradient."""
        o, self.total = self.options, self.total + 1
        beta1, beta2 = o["betas"]
        fall = o["decay_to"] + (1 - o["decay_to"]) * (1 + math.cos(math.pi * self.total / ((o["total_steps"] or 0) + 1))) / 2
        if o["reset_every"] and self.total % o["reset_every"] == 0:
            self.m, self.v, self.k = self.m * 0.0, self.v * 0.0, 0
        if g is None:
            return
        g = g.astype(np.float64).copy()
        if np.any(g):
            self.t += 1
            g = self._normalised(self._clipped(g), fall)
        self.w *= 1 - o["lr"] * o["weight_decay"]
        self.k += 1
        b1 = beta1 * fall
        self.m = b1 * self.m + (1 - b1) * g
        self.v = beta2 * self.v + (1 - beta2) * g**2
        self.w -= o["lr"] * (self.m / (1 - b1**self.k)) / (np.sqrt(self.v / (1 - beta2**self.k)) + o["eps"])

    def _clipped(self, g: np.ndarray) -> np.ndarray:
        o, a = self.options, self.averages
        if o["clip_decay"] is None:
            return g
        decay, peak = o["clip_decay"], np.abs(g).max()
        seen = peak
        if o["clip_limit"] is not None and self.t > 1:
            seen = min(peak, o["clip_limit"] * a["T"] / (1 - decay ** (self.t - 1)))
        a["T"] = decay * a["T"] + (1 - decay) * seen
        threshold = a["T"] / (1 - decay**self.t)
        return np.where(np.abs(g) > threshold, g * threshold / peak, g)

    def _normalised(self, g: np.ndarray, fall: float) -> np.ndarray:
        o, a = self.options, self.averages
        if o["norm_decays"] is None:
            return g
        first, second, norm = o["norm_decays"][0] * fall, o["norm_decays"][1], np.linalg.norm(g)
        a["M"] = first * a["M"] + (1 - first) * norm
        a["N"] = second * a["N"] + (1 - second) * norm**2
        return g / norm * (a["M"] / (1 - first**self.t)) / (math.sqrt(a["N"] / (1 - second**self.t)) + o["norm_eps"])


@dataclass
class Official:
    """One tensor under the authors' step: one counter, a reset that uses the old moments once more and keeps the averages."""

    w: np.ndarray
    options: dict[str, Any]
    m: Any = 0.0
    v: Any = 0.0
    counter: int = 0
    averages: dict[str, float] = field(default_factory=lambda: dict.fromkeys("TMN", 0.0))
    total: int = 0

    def step(self, g: np.ndarray | None) -> None:
        """One optimizer step; None: no gradient."""
        o, a, self.total = self.options, self.averages, self.total + 1
        fall = o["decay_to"] + (1 - o["decay_to"]) * (1 + math.cos(math.pi * self.total / ((o["total_steps"] or 0) + 1))) / 2
        if g is None:
            return
        g = g.astype(np.float64).copy()
        self.w *= 1 - o["lr"] * o["weight_decay"]
        self.counter += 1
        peak = np.abs(g).max()
        a["T"] = o["clip_decay"] * a["T"] + (1 - o["clip_decay"]) * peak
        threshold = a["T"] / (1 - o["clip_decay"] ** self.counter)
        g = np.where(np.abs(g) > threshold, g / max(peak, 1e-300) * threshold, g)
        norm, first, second = np.linalg.norm(g), o["norm_decays"][0] * fall, o["norm_decays"][1]
        a["M"] = first * a["M"] + (1 - first) * norm
        a["N"] = second * a["N"] + (1 - second) * norm**2
        if norm > 0:
            g = g / norm * (a["M"] / (1 - first**self.counter)) / (math.sqrt(a["N"] / (1 - second**self.counter)) + o["norm_eps"])
        reset = o["reset_every"] and self.total % o["reset_every"] == 0
        self.counter = 1 if reset else self.counter
        b1, b2 = o["betas"][0] * fall, o["betas"][1]
        self.m, self.v = b1 * self.m + (1 - b1) * g, b2 * self.v + (1 - b2) * g**2
        step = (self.m / (1 - b1**self.counter)) / (np.sqrt(self.v) / math.sqrt(1 - b2**self.counter) + o["eps"])
        self.w -= o["lr"] * step
        if reset:
            self.m, self.v = 0.0, 0.0


def gradients(steps: int, shapes: list[tuple[int, ...]], seed: int = 0) -> list[list[np.ndarray | None]]:
    """Gradients of every step: sizes that vary, spikes in one entry and of whole tensors, zeros, and steps without."""
    rng, found = np.random.default_rng(seed), []
    for step in range(steps):
        row: list[np.ndarray | None] = [rng.standard_normal(shape) * math.exp(0.3 * rng.standard_normal()) for shape in shapes]
        row[-1] = None if step % 7 == 3 else row[-1]
        row[1] = np.zeros(shapes[1]) if step in (0, 11) else row[1]
        if step % 9 == 5:
            row[0].flat[step % row[0].size] *= 500  # type: ignore[union-attr]
        if step % 13 == 12:
            row[0] = row[0] * 1000  # type: ignore[operator]
        found.append(row)
    return found

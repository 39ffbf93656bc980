"""Sequential Monte Carlo over weighted particles: effective size, resampling, log Z, ancestry. numpy only.

Each particle carries log W, the sum of its steps' log w. Where the steps are proper (`posttrain.rollout.awrs`), mean W is an
unbiased estimate of the normaliser Z of the constrained sequence distribution, and sum W f / sum W a consistent one of the
mean of f, whatever the resampling scheme and threshold (Del Moral 2004; Douc, Cappe and Moulines 2005 for the schemes).
Particles are resampled where the effective sample size (sum W)^2 / sum W^2 falls below a share of their number; afterwards
all have the mean weight. A finished particle stays in the population.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Scheme = Literal["systematic", "stratified", "multinomial", "residual"]


def log_sum(values: np.ndarray) -> float:
    """log sum exp; -inf where all values are."""
    top = float(np.max(values, initial=-math.inf))
    return top if top == -math.inf else top + math.log(float(np.exp(values - top).sum()))


def normalised(log_weights: np.ndarray) -> np.ndarray:
    """(N,) weights that sum to 1; all 0 where every particle is dead."""
    total = log_sum(log_weights)
    return np.zeros(len(log_weights)) if total == -math.inf else np.exp(log_weights - total)


def effective_size(log_weights: np.ndarray) -> float:
    """(sum W)^2 / sum W^2, between 1 and N; 0 where every particle is dead."""
    shares = normalised(log_weights)
    square = float((shares**2).sum())
    return 1.0 / square if square else 0.0


def ancestors(shares: np.ndarray, uniforms: Iterator[float], scheme: Scheme = "systematic") -> np.ndarray:
    """(N,) sorted ancestor of each new particle; particle i has N * shares[i] children on average.

    Args:
        shares: (N,) weights that sum to 1.
        uniforms: noise in (0, 1); one number is used for `systematic`, up to N for the others.
        scheme: `systematic` (one comb), `stratified` (one draw a stratum), `multinomial`, `residual` (whole parts, the rest drawn).
    """
    count = len(shares)
    if scheme == "residual":
        whole = np.floor(count * shares + 1e-12).astype(np.int64)
        rest = np.maximum(count * shares - whole, 0.0)
        missing = count - int(whole.sum())
        fixed = np.repeat(np.arange(count), whole)
        if missing == 0:
            return fixed
        return np.sort(np.concatenate([fixed, _at(rest / rest.sum(), np.sort([next(uniforms) for _ in range(missing)]))]))
    if scheme == "systematic":
        places = (np.arange(count) + next(uniforms)) / count
    elif scheme == "stratified":
        places = np.array([(i + next(uniforms)) / count for i in range(count)])
    else:
        places = np.sort([next(uniforms) for _ in range(count)])
    return _at(shares, places)


def _at(shares: np.ndarray, places: np.ndarray) -> np.ndarray:
    cumulative = np.cumsum(shares)
    found: np.ndarray = np.searchsorted(cumulative, places * cumulative[-1], side="right")
    return np.minimum(found, int(np.flatnonzero(shares)[-1]))


@dataclass
class Population:
    """Weights and ancestry of the particles of one request.

    Args:
        count: particles.
        threshold: resample where the effective size is below this share of `count`; 0 is never (importance sampling).
        scheme: see `ancestors`.

    Attributes:
        log_weights: (count,) log W.
        ancestry: one (count,) array of ancestors for each resampling.
    """

    count: int
    threshold: float = 0.5
    scheme: Scheme = "systematic"
    log_weights: np.ndarray = field(default_factory=lambda: np.zeros(0))
    ancestry: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not len(self.log_weights):
            self.log_weights = np.zeros(self.count)

    def add(self, increments: np.ndarray) -> None:
        """Multiplies the weights by those of one step; 0 for particles that did not move."""
        self.log_weights = self.log_weights + increments

    def resample(self, uniforms: Iterator[float]) -> np.ndarray | None:
        """Ancestors of the new particles where the effective size asks for it, else None; all dead is never resampled."""
        if self.count == 1:
            return None
        size = effective_size(self.log_weights)
        if size == 0.0 or size >= self.threshold * self.count:
            return None
        found = ancestors(normalised(self.log_weights), uniforms, self.scheme)
        self.log_weights = np.full(self.count, self.log_z())
        self.ancestry.append(found)
        return found

    def log_z(self) -> float:
        """log of the mean weight, an unbiased estimate of Z before the logarithm."""
        return log_sum(self.log_weights) - math.log(self.count)

    def originals(self) -> np.ndarray:
        """(count,) which particle of the beginning each present one comes from."""
        found = np.arange(self.count)
        for step in self.ancestry:
            found = found[step]
        return found

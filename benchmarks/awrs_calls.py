"""How many times adaptive weighted rejection sampling asks a checker, beside theory, a mask of the whole vocabulary, and the worst case.

    python benchmarks/awrs_calls.py            # about a minute on one core
    python benchmarks/awrs_calls.py --quick

Rows are Zipf distributions over 32k and 128k tokens, allowed tokens are drawn at random. Without weights, calls to the first accepted token
have the mean 1 + sum over refused tokens of p/(p + Z); `theory` is that, `of_theory` the measured mean over it. `predicate` is what
masking with an arbitrary predicate would ask: every token of the vocabulary. `weights` are those of `probes: 1` and `probes: auto`: calls,
and the coefficient of variation of w. `worst` is a model that strays, Z about 1e-4: calls end at `max_calls`, then one mask takes over.
`draw_us` is the time of one draw, its checker's time left out; both arms of `ratio` ask the same predicate of 1 us: the mask over AWRS.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from _harness import arguments, compare, finish, speed

from posttrain.rollout.awrs import InverseOrder, awrs, block_sums, local, masked, noise


def row(vocabulary: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(p, allowed) of one position."""
    rng = np.random.default_rng(seed)
    p = 1 / np.arange(1, vocabulary + 1) ** 1.2
    rng.shuffle(p)
    return p / p.sum(), rng.random(vocabulary) < share


class Predicate:
    """An arbitrary predicate that takes about a microsecond, and counts."""

    def __init__(self, allowed: np.ndarray) -> None:
        self.allowed, self.calls = allowed.tolist(), 0

    def __call__(self, token: int) -> bool:
        """Its answer."""
        self.calls += 1
        for _ in range(12):
            pass
        return self.allowed[token]


def calls(vocabulary: int, share: float, draws: int) -> dict[str, Any]:
    """Measured calls beside theory, and weights."""
    found: dict[str, list[float]] = {"local": [], "theory": [], "z": []}
    probes: dict[str, dict[str, list[float]]] = {name: {"calls": [], "w": []} for name in ("1", "auto")}
    spent = []
    for seed in range(8):
        p, allowed = row(vocabulary, share, seed)
        z, sums = float(p[allowed].sum()), block_sums(p)
        found["theory"].append(1 + float((p[~allowed] / (p[~allowed] + z)).sum()))
        found["z"].append(z)
        for i in range(draws // 8):
            predicate = Predicate(allowed)
            found["local"].append(local(InverseOrder(p, noise(seed, i), sums), predicate).calls)
            for name, cell in probes.items():
                start = time.perf_counter()
                drawn = awrs(InverseOrder(p, noise(seed, i), sums), allowed.item, probes=1 if name == "1" else "auto")
                spent.append(time.perf_counter() - start)
                cell["calls"].append(drawn.calls)
                cell["w"].append(math.exp(drawn.log_weight) / z)
    mean, theory = statistics.mean(found["local"]), statistics.mean(found["theory"])
    error = statistics.stdev(found["local"]) / math.sqrt(len(found["local"]))
    return {
        "z": statistics.mean(found["z"]), "calls": mean, "standard_error": error, "theory": theory, "of_theory": mean / theory,
        "predicate": vocabulary / mean, "draw_us": 1e6 * statistics.median(spent),
        "weights": {
            name: {
                "calls": statistics.mean(cell["calls"]), "mean": statistics.mean(cell["w"]),
                "variation": statistics.stdev(cell["w"]) / statistics.mean(cell["w"]),
            }
            for name, cell in probes.items()
        },
    }  # fmt: skip


def worst(vocabulary: int, draws: int) -> dict[str, Any]:
    """A model that strays from the grammar."""
    p, _ = row(vocabulary, 0.0, 0)
    allowed = np.zeros(vocabulary, bool)
    allowed[np.argsort(p)[: vocabulary // 200]] = True
    sums, found, spent = block_sums(p), [], []
    for i in range(draws):
        start = time.perf_counter()
        found.append(awrs(InverseOrder(p, noise(3, i), sums), allowed.item, mask=lambda: allowed))
        spent.append(time.perf_counter() - start)
    return {
        "z": float(p[allowed].sum()), "most_calls": max(d.calls for d in found), "masked": statistics.mean(d.masked for d in found),
        "median_ms": 1e3 * statistics.median(spent), "p99_ms": 1e3 * float(np.quantile(spent, 0.99)),
    }  # fmt: skip


def main() -> None:
    """All settings."""
    args = arguments(__doc__ or "")
    draws, pairs = (400, 3) if args.quick else (8000, 20)
    parts = {f"{size // 1000}k, {share:g}": calls(size, share, draws) for size in (32_000, 128_000) for share in (0.1, 0.5, 0.9)}
    strays = {f"{size // 1000}k": worst(size, max(20, draws // 40)) for size in (32_000, 128_000)}
    p, allowed = row(32_000, 0.5, 0)
    sums, predicate = block_sums(p), Predicate(allowed)

    def by_mask() -> None:
        masked(InverseOrder(p, noise(0, 0), sums), lambda: np.array([predicate(token) for token in range(32_000)]))

    def by_awrs() -> None:
        for i in range(100):
            awrs(InverseOrder(p, noise(0, i), sums), predicate)

    timed = speed(compare(by_mask, by_awrs, pairs=pairs, units=100))
    lead = {**timed, "unit": "CPU s a token, arbitrary predicate, 32k"}
    finish("awrs_calls", {**lead, "parts": parts, "worst": strays}, args)


if __name__ == "__main__":
    main()

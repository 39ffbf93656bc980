"""Point estimates with 95 % intervals.

- `wilson`: score interval of a proportion; never leaves [0, 1] and is honest at 0 and 1.
- `rate`: mean of per-row shares in [0, 1], rows being the independent unit. With several samples a row the row mean m_i has
  variance s^2, the effective number of trials is n_eff = p(1-p) / (s^2 / n), and Wilson's interval is taken at n_eff; for
  single 0/1 values n_eff = n exactly.
- `token_mean`: sum of losses over sum of tokens, L = sum s_i / sum t_i; a ratio of random totals, whose variance over rows is
  n/(n-1) * sum (s_i - L t_i)^2 / (sum t_i)^2 (linearised).
- `pass_at_k`: unbiased estimate 1 - C(n-c, k) / C(n, k) of "one of k samples is right" from c right ones of n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Value = dict[str, float | int | None]
"""`{"value", "low", "high", "n"}`; value and bounds are None where n is 0."""

Z95 = 1.959963984540054


def value_of(value: float | None, low: float | None, high: float | None, n: int) -> Value:
    """The four numbers of a metric as a dict."""
    return {"value": value, "low": low, "high": high, "n": n}


def wilson(p: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Interval of a proportion `p` seen in `n` trials; `n` may be fractional."""
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low, high = (centre - spread) / scale, (centre + spread) / scale
    return (0.0 if p == 0 else max(0.0, low)), (1.0 if p == 1 else min(1.0, high))


def rate(shares: Sequence[float]) -> Value:
    """Mean of per-row shares in [0, 1] with its interval; see the module's docstring."""
    n = len(shares)
    if n == 0:
        return value_of(None, None, None, 0)
    p = math.fsum(shares) / n
    p = min(max(p, 0.0), 1.0)
    variance = math.fsum((share - p) ** 2 for share in shares) / n
    effective = p * (1 - p) * n / variance if variance > 0 else float(n)
    low, high = wilson(p, max(effective, 1.0))
    return value_of(p, low, high, n)


def token_mean(sums: Sequence[float], counts: Sequence[int], z: float = Z95) -> Value:
    """Token-weighted mean of a loss with its interval over rows.

    Args:
        sums: summed loss of each row.
        counts: tokens of each row; rows without any do not count.
    """
    pairs = [(s, t) for s, t in zip(sums, counts, strict=True) if t]
    n, total = len(pairs), sum(t for _, t in pairs)
    if n == 0:
        return value_of(None, None, None, 0)
    mean = math.fsum(s for s, _ in pairs) / total
    if n == 1:
        return value_of(mean, None, None, 1)
    variance = n / (n - 1) * math.fsum((s - mean * t) ** 2 for s, t in pairs) / total**2
    spread = z * math.sqrt(variance)
    return value_of(mean, mean - spread, mean + spread, n)


def exponential(value: Value) -> Value:
    """exp of a value and its bounds: perplexity from a mean loss in nats."""

    def bounded(x: float | None) -> float | None:
        return None if x is None else math.exp(min(x, 700.0))

    return {**value, **{key: bounded(value[key]) for key in ("value", "low", "high")}}


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that at least one of `k` samples is right, from `c` right ones of `n`.

    Raises:
        ValueError: k > n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def pass_ks(samples: int) -> list[int]:
    """The k's reported: powers of two up to `samples`, and `samples` itself."""
    powers = [1 << i for i in range(samples.bit_length()) if 1 << i <= samples]
    return sorted({*powers, samples})

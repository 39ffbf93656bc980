"""What sample recovery is expected to save; no torch, since `plan` shows it.

A step needs N groups that carry information; a round samples M groups, each of which does with probability a. Without
recovery a step takes E[k] rounds, k the first round with Binomial(k M, a) >= N, and the rest of the last round is lost.
With recovery nothing is lost, so a step takes N / a groups on average:

    saving = 1 - (N / a) / (M E[k])

The published loop samples at least one round a step even while its buffer holds a whole step, so there N / a becomes
max(M, N / a), and for a M > N its buffer grows by a M - N groups a step. Ours does not sample then.
"""

from __future__ import annotations

import math

NEGLIGIBLE = 1e-12


def _below(trials: int, a: float, n: int) -> float:
    """P(Binomial(trials, a) < n) for 0 < a < 1, summed from the largest term's side."""
    if trials < n:
        return 1.0
    log_odds = math.log(a) - math.log1p(-a)
    mode = min(n - 1, int((trials + 1) * a))
    top = math.lgamma(trials + 1) - math.lgamma(mode + 1) - math.lgamma(trials - mode + 1) + mode * log_odds + trials * math.log1p(-a)
    odds, total = math.exp(log_odds), 0.0
    term = 1.0
    for j in range(mode, -1, -1):
        total += term
        term *= j / (trials - j + 1) / odds
        if term < NEGLIGIBLE * total:
            break
    term = 1.0
    for j in range(mode, n - 1):
        term *= (trials - j) / (j + 1) * odds
        total += term
        if term < NEGLIGIBLE * total:
            break
    return min(total * math.exp(top), 1.0)


def expected_rounds(n: int, m: int, a: float) -> float:
    """E[k]: mean number of rounds of m groups until n of them carry information.

    Args:
        n: groups a step needs.
        m: groups a round.
        a: share of groups that carry information, above 0.

    Raises:
        ValueError: n or m below 1, or a outside (0, 1].
    """
    if n < 1 or m < 1 or not 0 < a <= 1:
        raise ValueError(f"n and m are at least 1 and a in (0, 1], not {n}, {m}, {a}")
    if a == 1:
        return float(math.ceil(n / m))
    total, k = 1.0, 1
    while (left := _below(k * m, a, n)) > NEGLIGIBLE:
        total += left
        k += 1
    return total


def expected_saving(n: int, m: int, a: float, *, published: bool = False) -> float:
    """Share of sampled groups that recovery saves against discarding what no longer fits into a step; see the module.

    Args:
        n: groups a step needs.
        m: groups a round.
        a: share of groups that carry information, above 0 and constant.
        published: for the published loop, which samples a round in every step.

    Raises:
        ValueError: n or m below 1, or a outside (0, 1].
    """
    rounds = expected_rounds(n, m, a)
    kept = n / a
    return 1 - (max(m, kept) if published else kept) / (m * rounds)

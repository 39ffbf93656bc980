r"""Adaptive weighted rejection sampling: exact constrained next tokens from point queries, with an unbiased weight.

Lipkin et al., "Fast Controlled Generation from Language Models with Adaptive Weighted Rejection Sampling" (COLM 2025, arXiv
2504.05410). Of one position, p is the model's distribution over tokens and c(x) in {0, 1} the checker's answer for token x.
Wanted: x with probability p(x) c(x) / Z, Z = sum_x p(x) c(x), and a weight w with E[w 1{x = t}] = p(t) c(t) for every token t.

Tokens are visited in an order drawn from p without replacement; the first accepted one is returned. After it, n more tokens of
the order are looked at (*probes*), and with M the mass of all tokens visited before the last probe

    w = sum over tokens visited before the last probe of p(y) c(y)  +  (1 - M) c(last probe)

(the ordered estimator of Des Raj 1956 with a stopping time; n = 1 is the recursive form of the authors' code). Whatever was
visited, E[w | visited] = Z, so the number of probes may depend on what was visited, and at any moment a full mask may take
over, with w = Z exactly. `geometric` and `two_pass` are the authors' other two estimators. All of them are proper:
`tests/unit/test_awrs.py` enumerates every order.

Functions of one row; engines draw the order on their device and hand the tokens over one by one (`ListedOrder`).
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

Accepts = Callable[[int], bool]
"""Whether a token may come next; must not change anything."""
Mask = Callable[[], np.ndarray]
"""(V,) bool of all tokens that may come next."""
MAX_PROBES = 16
SMALL = 0.1
"""`probes: auto` ends where what is not visited is less than this share of the accepted mass, or after MAX_PROBES."""
MAX_CALLS = 64
ROUNDING = 1e-6
"""Share of the sum below which what is left has lost ten digits of its sixteen."""
LEAST = 1e-12
BLOCK = 256
"""Tokens summed together by InverseOrder."""
_MASK64 = (1 << 64) - 1
_SILENT: Iterator[float] = iter(())


@dataclass(frozen=True, slots=True)
class Draw:
    """A token and what it cost.

    Args:
        token: id; None at a dead end, where nothing is allowed.
        logprob: log p(token), of the distribution without the constraint.
        log_weight: log w; -inf at a dead end, 0 where the sampler has no weights.
        calls: tokens the checker was asked about.
        first: the first token of the order was accepted; its mean estimates Z.
        masked: a full mask took over.
    """

    token: int | None
    logprob: float
    log_weight: float
    calls: int
    first: bool
    masked: bool = False


class Order(Protocol):
    """Tokens drawn from p without replacement, one by one.

    Attributes:
        left: mass of the tokens not yet drawn.
    """

    left: float

    def draw(self, kept: float = 0.0) -> tuple[int, float] | None:
        """The next token and its probability; None where no token is left, or none is listed.

        Afterwards, `left` plus that probability is accurate relative to itself plus `kept`.
        """
        ...

    def probabilities(self) -> np.ndarray:
        """(V,) p of all tokens, drawn ones included, for a mask."""
        ...

    def uniform(self) -> float:
        """A fresh number in (0, 1)."""
        ...


def noise(seed: int, position: int) -> Iterator[float]:
    """Numbers in (0, 1) of one position of one request: the same wherever and beside whatever it is computed (SplitMix64)."""
    state = _mixed((seed & _MASK64) ^ _mixed((position + 1) * 0x9E3779B97F4A7C15 & _MASK64))
    while True:
        state = (state + 0x9E3779B97F4A7C15) & _MASK64
        yield ((_mixed(state) >> 11) + 0.5) * 2.0**-53


def _mixed(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK64
    return z ^ (z >> 31)


def block_sums(p: np.ndarray) -> np.ndarray:
    """(ceil(V / BLOCK),) float64, cumulative sums of the blocks of a row, for InverseOrder."""
    return np.cumsum(np.add.reduceat(p, np.arange(0, len(p), BLOCK), dtype=np.float64))


class InverseOrder:
    """Draws by inverse transform, stepping over tokens already drawn: first the block by the sums of blocks, then the token in it.

    Where little is left, the sums are built anew without what was drawn, so that `left` and the draws stay exact down to the
    smallest probability that the row holds. The cheapest order on a CPU.

    Args:
        p: (V,) probabilities, non-negative; they need not sum to 1 exactly, and are not changed.
        uniforms: noise.
        blocks: `block_sums(p)`, where the caller has it.
    """

    def __init__(self, p: np.ndarray, uniforms: Iterator[float], blocks: np.ndarray | None = None) -> None:
        self._given, self._uniforms = p, uniforms
        self._drawn: list[int] = []
        self._build(p, block_sums(p) if blocks is None else blocks)

    def _build(self, p: np.ndarray, blocks: np.ndarray) -> None:
        self._p, self._blocks = p, blocks
        self._inside: dict[int, tuple[float, np.ndarray]] = {}
        self._base = self.left = float(blocks[-1])
        self._holes: list[tuple[int, float, float]] = []
        self._gone: set[int] = set()

    def uniform(self) -> float:
        """A fresh number in (0, 1)."""
        return next(self._uniforms)

    def probabilities(self) -> np.ndarray:
        """(V,) p."""
        return self._given

    def draw(self, kept: float = 0.0) -> tuple[int, float] | None:
        """The next token and its probability."""
        if self._holes and (self.left + kept < ROUNDING * self._base or self.left < LEAST * self._base):
            self._rebuild()
        while self.left > 0.0:
            place = next(self._uniforms) * self.left
            for _, start, size in self._holes:
                if place < start:
                    break
                place += size
            token, start, size = self._at(place)
            if size > 0.0 and token not in self._gone:
                insort(self._holes, (token, start, size))
                self._gone.add(token)
                self._drawn.append(token)
                self.left = max(0.0, self.left - size)
                return token, float(self._given[token])
            self._rebuild()
        if self._holes:
            self._rebuild()
            return self.draw(kept) if self.left > 0.0 else None
        return None

    def _at(self, place: float) -> tuple[int, float, float]:
        """(token, sum before it, its probability) at a place of the cumulative sum."""
        block = min(int(self._blocks.searchsorted(place, side="right")), len(self._blocks) - 1)
        found = self._inside.get(block)
        if found is None:
            before = float(self._blocks[block - 1]) if block else 0.0
            sums = self._p[block * BLOCK : (block + 1) * BLOCK].cumsum(dtype=np.float64)
            found = self._inside[block] = before, sums
        before, sums = found
        inside = min(int(sums.searchsorted(place - before, side="right")), len(sums) - 1)
        start = float(sums[inside - 1]) if inside else 0.0
        return block * BLOCK + inside, before + start, float(sums[inside]) - start

    def _rebuild(self) -> None:
        rest = self._given.astype(np.float64)
        rest[self._drawn] = 0.0
        self._build(rest, block_sums(rest))


class ListedOrder:
    """An order that was drawn elsewhere: the first tokens of it, e.g. the top of keys log p + Gumbel noise on a GPU.

    Args:
        pairs: tokens and their probabilities, in order.
        p: gives all probabilities, for a mask and for what is left of a nearly exhausted row; None where `pairs` is the whole row.
        uniforms: noise, needed by a mask.
    """

    def __init__(
        self, pairs: Sequence[tuple[int, float]], p: Callable[[], np.ndarray] | None = None, uniforms: Iterator[float] = _SILENT
    ) -> None:
        self._pairs, self._given, self._uniforms, self._at = pairs, p, uniforms, 0
        self.left = 1.0 if p is not None else math.fsum(size for _, size in pairs)

    def uniform(self) -> float:
        """A fresh number in (0, 1)."""
        return next(self._uniforms)

    def probabilities(self) -> np.ndarray:
        """(V,) p."""
        if self._given is not None:
            return self._given()
        out = np.zeros(max(token for token, _ in self._pairs) + 1)
        for token, size in self._pairs:
            out[token] = size
        return out

    def draw(self, kept: float = 0.0) -> tuple[int, float] | None:
        """The next token and its probability."""
        if self._at == len(self._pairs):
            return None
        token, size = self._pairs[self._at]
        self._at += 1
        self.left -= size
        if self._given is None:
            self.left = math.fsum(rest for _, rest in self._pairs[self._at :])
        elif self.left < 1e-3:
            rest_of = np.array(self._given(), dtype=np.float64)
            rest_of[[drawn for drawn, _ in self._pairs[: self._at]]] = 0.0
            self.left = float(rest_of.sum())
        return token, size


def gumbel_order(logprobs: np.ndarray, uniforms: np.ndarray, top: int, rest: Iterator[float] = _SILENT) -> ListedOrder:
    """The first `top` tokens by descending log p + Gumbel noise, which is a draw without replacement (Yellott 1977).

    Args:
        logprobs: (V,) natural-log probabilities.
        uniforms: (V,) in (0, 1), one a token.
        top: tokens listed.
        rest: noise for a mask.
    """
    keys = np.asarray(logprobs, np.float64) - np.log(-np.log(np.clip(uniforms, 2.0**-53, 1 - 2.0**-53)))
    finite = int(np.isfinite(keys).sum())
    count = min(top, finite)
    best = np.argpartition(-keys, count - 1)[:count] if count else np.zeros(0, np.int64)
    best = best[np.argsort(-keys[best], kind="stable")]
    p = np.exp(np.asarray(logprobs, np.float64))
    pairs = list(zip(best.tolist(), p[best].tolist(), strict=True))
    return ListedOrder(pairs, lambda: p, rest)


class GreedyOrder(InverseOrder):
    """Tokens by descending probability, for temperature 0; no weight is defined for it."""

    def __init__(self, p: np.ndarray) -> None:
        self._given, self._uniforms, self.left = p, iter(()), float(np.sum(p, dtype=np.float64))
        self._tokens = iter(np.argsort(-p, kind="stable").tolist())

    def draw(self, kept: float = 0.0) -> tuple[int, float] | None:
        """The next token and its probability."""
        for token in self._tokens:
            size = float(self._given[token])
            self.left = max(0.0, self.left - size)
            if size > 0.0:
                return token, size
        self.left = 0.0
        return None


def awrs(
    order: Order, accepts: Accepts, *, probes: int | Literal["auto"] = "auto", max_calls: int = MAX_CALLS, mask: Mask | None = None
) -> Draw:
    """A token with probability p c / Z, and its weight; see the module.

    Args:
        order: of this position.
        accepts: the checker's point query.
        probes: tokens looked at after the accepted one; `auto` goes on until what is left can hardly matter, at most 16.
        max_calls: rejections after which a full mask takes over, where there is one; else the walk goes on.
        mask: the checker's full mask.

    Raises:
        ValueError: `probes` is below 1.
    """
    limit = MAX_PROBES if probes == "auto" else probes
    if limit < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    chosen: tuple[int, float] | None = None
    kept, calls, looked, first = 0.0, 0, 0, False
    while True:
        if chosen is None and calls >= max_calls and mask is not None:
            return _by_mask(order, mask, calls, first)
        found = order.draw(kept)
        if found is None:
            if order.left > 0.0 and mask is not None:
                return _by_mask(order, mask, calls, first, chosen)
            return _ended(chosen, kept, calls, first, order.left)
        token, size = found
        before = order.left + size
        ok = bool(accepts(token))
        calls += 1
        if chosen is None:
            first = ok and calls == 1
            if ok:
                chosen, kept = found, size
            continue
        looked += 1
        if looked >= limit or (probes == "auto" and before < SMALL * kept):
            return Draw(chosen[0], math.log(chosen[1]), math.log(kept + before) if ok else math.log(kept), calls, first)
        kept += size * ok


def _ended(chosen: tuple[int, float] | None, kept: float, calls: int, first: bool, left: float) -> Draw:
    """No token is left to draw: every allowed one was seen, so w = Z."""
    if left > 0.0:
        raise ValueError("the order ends before the row does, and there is no mask to go on with")
    if chosen is None:
        return Draw(None, -math.inf, -math.inf, calls, first)
    return Draw(chosen[0], math.log(chosen[1]), math.log(kept), calls, first)


def _by_mask(order: Order, mask: Mask, calls: int, first: bool, chosen: tuple[int, float] | None = None) -> Draw:
    """w = Z exactly; the token, where none is chosen yet, is drawn from p c. Rejected tokens have c = 0, so they need no care."""
    p, allowed = order.probabilities(), mask()
    tokens = np.flatnonzero(allowed[: len(p)])
    sums = p[tokens].cumsum(dtype=np.float64)
    if not len(sums) or sums[-1] <= 0.0:
        return Draw(None, -math.inf, -math.inf, calls, first, True)
    if chosen is None:
        place = int(sums.searchsorted(order.uniform() * sums[-1], side="right"))
        token = int(tokens[min(place, int(sums.searchsorted(sums[-1], side="left")))])
        chosen = token, float(p[token])
    return Draw(chosen[0], math.log(chosen[1]), math.log(sums[-1]), calls, first, True)


def masked(order: Order, mask: Mask) -> Draw:
    """A token from the full mask, with w = Z."""
    return _by_mask(order, mask, 0, False)


def local(order: Order, accepts: Accepts, *, max_calls: int = MAX_CALLS, mask: Mask | None = None) -> Draw:
    """The same law of the token without a weight: exact local sampling, which is what masking samples from."""
    calls = 0
    while True:
        found = order.draw() if calls < max_calls or mask is None else None
        if found is None:
            if order.left > 0.0 and mask is not None:
                drawn = _by_mask(order, mask, calls, False)
                return drawn if drawn.token is None else Draw(drawn.token, drawn.logprob, 0.0, calls, False, True)
            return _ended(None, 0.0, calls, False, order.left)
        calls += 1
        if accepts(found[0]):
            return Draw(found[0], math.log(found[1]), 0.0, calls, calls == 1)


def geometric(p: np.ndarray, accepts: Accepts, uniforms: Iterator[float], accepted: int = 2) -> Draw:
    """The authors' estimator for peaked rows: draws with replacement until the r-th acceptance, w = (r - 1) / (N - 1) of N draws.

    Args:
        p: (V,) probabilities.
        accepts: the checker; asked once about each token.
        uniforms: noise.
        accepted: r, at least 2.
    """
    total = np.cumsum(p, dtype=np.float64)
    known: dict[int, bool] = {}
    chosen, good, draws = None, 0, 0
    support = int(np.count_nonzero(p))
    while good < accepted:
        token = int(total.searchsorted(next(uniforms) * total[-1], side="right"))
        draws += 1
        if token not in known:
            known[token] = bool(accepts(token))
        if known[token]:
            good += 1
            chosen = token if chosen is None else chosen
        elif len(known) == support and not any(known.values()):
            return Draw(None, -math.inf, -math.inf, len(known), False)
    assert chosen is not None
    return Draw(chosen, math.log(p[chosen]), math.log(accepted - 1) - math.log(draws - 1), len(known), draws == accepted)


def two_pass(first: Order, second: Callable[[frozenset[int]], Order], accepts: Accepts) -> Draw:
    """The paper's algorithm: walk to an acceptance, walk again over what was not rejected, w = (1 - rejected mass) / (rejections + 1).

    Args:
        first: order of the row.
        second: tokens rejected in the first walk -> a fresh order of the others, whose `left` is their mass.
        accepts: the checker.
    """
    rejected: list[int] = []
    calls, chosen = 0, None
    while (found := first.draw()) is not None:
        calls += 1
        if accepts(found[0]):
            chosen = found
            break
        rejected.append(found[0])
    if chosen is None:
        return Draw(None, -math.inf, -math.inf, calls, False)
    again = second(frozenset(rejected))
    left, misses = again.left, len(rejected)
    while (found := again.draw()) is not None:
        calls += 1
        if accepts(found[0]):
            break
        misses += 1
    return Draw(chosen[0], math.log(chosen[1]), math.log(left) - math.log(misses + 1), calls, not rejected)

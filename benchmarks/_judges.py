"""What a pick is worth: measures of it against rows of the target that no selector has seen, and intervals over seeds."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from _corpus import RELEVANT, WORD, Corpus, Row
from _lm import Trigrams, Vocabulary

BUCKETS, SMOOTHING = 10_000, 1e-8
DIMENSIONS = 128
"""Of the embedding in which transport is measured."""


def precision(ranked: Sequence[Row], k: int) -> float:
    """Share of the first k rows (of all, where there are fewer) that have the relevant label."""
    first = ranked[:k]
    return sum(row["label"] == RELEVANT for row in first) / max(1, len(first))


class Judge:
    """Everything of one corpus that its measures need; built from raw rows, so that no pick changes it.

    Args:
        corpus: raw without word salad, target and held-out rows.
        vocabulary: ids of the trigram model.
    """

    def __init__(self, corpus: Corpus, vocabulary: int = 20_000) -> None:
        self.heldout = [row["text"] for row in corpus.heldout]
        self.vocabulary = Vocabulary((row["text"] for row in corpus.raw), vocabulary)
        self.encoded = self.vocabulary.encode(self.heldout)
        self.raw_counts, self.heldout_counts = self._counts([row["text"] for row in corpus.raw]), self._counts(self.heldout)
        self._fit_embedding([row["text"] for row in corpus.raw])
        self.heldout_points = self.embed(self.heldout)

    @staticmethod
    def _counts(texts: list[str]) -> np.ndarray:
        from data_pipelines.ngrams import shared_hasher

        counts: np.ndarray = shared_hasher(2, BUCKETS, "sha256").count(texts)
        return counts

    def _fit_embedding(self, texts: list[str]) -> None:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._weights = TfidfVectorizer(token_pattern=WORD.pattern, sublinear_tf=True, min_df=2, max_features=50_000)
        matrix = self._weights.fit_transform(texts)
        self._svd = TruncatedSVD(min(DIMENSIONS, matrix.shape[1] - 1), random_state=0).fit(matrix)

    def embed(self, texts: list[str]) -> np.ndarray:
        """float64[n, d] of length 1: TF-IDF of words, reduced by a singular value decomposition of the raw rows."""
        points: np.ndarray = self._svd.transform(self._weights.transform(texts))
        return points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)

    def transport(self, texts: list[str]) -> float:
        """Exact 1-Wasserstein distance of the pick from the held-out rows, each row weighing the same; cost sqrt(2 - 2 cos)."""
        import ot

        cost = np.sqrt(np.maximum(0, 2 - 2 * self.embed(texts) @ self.heldout_points.T))
        return float(ot.emd2([], [], cost, numItermax=1_000_000))

    def kl_reduction(self, texts: list[str]) -> float:
        """KL(p || q) - KL(p || p') in nats on hashed 1- and 2-grams, p of the held-out, q of the raw, p' of the picked rows."""
        p, q, picked = (counts / max(1, counts.sum()) for counts in (self.heldout_counts, self.raw_counts, self._counts(texts)))
        return float(p @ (np.log(picked + SMOOTHING) - np.log(q + SMOOTHING)))

    def trigram_loss(self, texts: list[str]) -> float:
        """Nats per held-out word of a trigram model trained on the pick."""
        return Trigrams(self.vocabulary.encode(texts), self.vocabulary.size).loss(self.encoded)

    def __call__(self, picked: Sequence[Row]) -> dict[str, Any]:
        """All measures of the rows that were picked within the budget of tokens."""
        texts = [row["text"] for row in picked]
        words = [len(WORD.findall(text)) for text in texts]
        relevant = sum(count for count, row in zip(words, picked, strict=True) if row["label"] == RELEVANT)
        loss = self.trigram_loss(texts)
        return {
            "rows": len(texts), "tokens": sum(words), "median_words": statistics.median(words), "relevant_tokens": relevant / sum(words),
            "labels": dict(sorted(Counter(row["label"] for row in picked).items())),
            "kl_reduction": self.kl_reduction(texts), "transport": self.transport(texts), "loss": loss, "perplexity": math.exp(loss),
        }  # fmt: skip


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean with its 95 % interval by Student's t; no interval for a single value."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return {"mean": mean, "low": None, "high": None, "n": n}
    from scipy.stats import t

    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def paired(values: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """`interval` of the differences value - base, seed by seed."""
    return interval([a - b for a, b in zip(values, base, strict=True)])


def log_ratio(peer: list[float], ours: list[float]) -> dict[str, Any]:
    """Mean of peer / ours on a log scale, seed by seed, with its 95 % interval; None where one of them is 0."""
    if min(*peer, *ours) <= 0:
        return {"value": None, "low": None, "high": None, "n": len(peer)}
    found = interval([math.log(a / b) for a, b in zip(peer, ours, strict=True)])
    low, high = (math.exp(x) if x is not None else None for x in (found["low"], found["high"]))
    return {"value": math.exp(found["mean"]), "low": low, "high": high, "n": len(peer)}

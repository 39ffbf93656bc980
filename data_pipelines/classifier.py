"""`select.classifier`: logistic regression that tells target rows from raw rows, on DSIR's hashed n-grams.

With c_b(x) the hashed 1- to n-gram counts of a row x (as in `select.dsir`), the features are log(1 + c_b) and the score
is the log-odds

    s(x) = sum_b w_b log(1 + c_b(x)) + w_0,      w = argmin 1/2 |w|^2 + C sum_i a_i log(1 + exp(-y_i s(x_i)))

over the target rows (y = 1) and a sample of the raw rows (y = -1), with a_i such that both classes weigh the same
(the discriminative counterpart of importance weighting, e.g. Bickel et al. 2009, JMLR 10). `C` is the field `strength`.

The sample is the `negatives` raw rows with the smallest hash of id and text: a uniform sample that does not depend on
shards or workers. A row that served as a negative would be held down by it, so there are `folds` models: each raw row
belongs to a fold by its hash, and is scored by the model that was fitted without that fold. The same held-out scores
give the area under the ROC curve that is reported; near 0.5 the target cannot be told from the raw data, and the pick
means nothing.

A bag of target words in any order scores high, so the word-salad guard is on by default.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from data_pipelines.selector import PORTS, Guard, SelectorConfig
from posttrain.config.base import Positive
from posttrain.core.registry import stage
from posttrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from posttrain.core.context import StageContext

BATCH = 512
"""Sampled rows whose n-grams are counted at a time."""


class ClassifierConfig(SelectorConfig):
    """Fields of `method: select.classifier`, beside those of every selector."""

    method: Literal["select.classifier"] = "select.classifier"
    """Method name."""
    guard: Guard = Guard(salad=True)
    """Word-salad guard."""
    ngrams: Annotated[int, Field(ge=1, le=5)] = 2
    """Longest n-gram in words."""
    buckets: Annotated[int, Field(ge=16, lt=2**24)] = 10_000
    """Hash buckets."""
    hash: Literal["sha256", "fast"] = "sha256"
    """As in `select.dsir`."""
    negatives: Annotated[int, Field(ge=2)] = 10_000
    """Raw rows that the models are fitted on; about 1 KiB each."""
    positives: Positive = 10_000
    """At most this many rows of a target, chosen in the same way."""
    strength: Annotated[float, Field(gt=0)] = 1.0
    """C, the inverse of the L2 penalty: larger fits the sample more closely."""
    folds: Positive = 5
    """Models; 1 scores every row by one model, also those it was fitted on, and reports no area under the curve."""
    iterations: Positive = 1000
    """At most this many steps of L-BFGS."""


Sample = dict[str, "np.ndarray"]
"""Rows in the order of their hash: `key` uint64[m], and their n-gram counts as `first` int64[m+1], `bucket` and `count` int32."""


def row_hash(row: dict[str, Any], text: str) -> int:
    """64 bits of id and text; the sample and the folds are decided by it."""
    content = f"classifier\x1f{row['id']}\x1f{text}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _counted(keys: list[int], texts: list[str], cfg: ClassifierConfig) -> Sample:
    import numpy as np

    from data_pipelines.ngrams import hashed_counts

    found = hashed_counts(texts, cfg.ngrams, cfg.buckets, cfg.hash)
    first, bucket, count = found.indptr.astype(np.int64), found.indices.astype(np.int32), found.data.astype(np.int32)
    return {"key": np.array(keys, np.uint64), "first": first, "bucket": bucket, "count": count}


def _nothing() -> Sample:
    import numpy as np

    none = np.zeros(0, np.int32)
    return {"key": np.zeros(0, np.uint64), "first": np.zeros(1, np.int64), "bucket": none, "count": none}


def smallest(parts: list[Sample], limit: int) -> Sample:
    """The `limit` rows with the smallest keys of all parts, in the order of their keys."""
    import numpy as np

    key, bucket, count = (np.concatenate([part[name] for part in parts]) for name in ("key", "bucket", "count"))
    size = np.concatenate([np.diff(part["first"]) for part in parts])
    order = np.argsort(key, kind="stable")[:limit]
    begin = (np.cumsum(size) - size)[order]
    first = np.concatenate([[0], np.cumsum(size[order])]).astype(np.int64)
    at = np.arange(first[-1]) + np.repeat(begin - first[:-1], size[order])
    return {"key": key[order], "first": first, "bucket": bucket[at], "count": count[at]}


def fit_shard(rows: Iterable[dict[str, Any]], cfg: ClassifierConfig, role: str) -> dict[str, np.ndarray]:
    """The shard's part of the sample; of picked rows only how many."""
    import numpy as np

    if role == "picked":
        return {"rows": np.array([sum(1 for _ in rows)], np.int64)}
    limit = cfg.negatives if role == "raw" else cfg.positives
    held = _nothing()
    for keys, texts in _candidates(rows, held, limit):
        held.update(smallest([held, _counted(keys, texts, cfg)], limit))
    return held


def _candidates(rows: Iterable[dict[str, Any]], held: Sample, limit: int) -> Iterator[tuple[list[int], list[str]]]:
    """Batches of (hashes, texts) of the rows that may belong to the sample; `held` is what is known of it by now."""
    from posttrain.data.rows import row_text

    keys: list[int] = []
    texts: list[str] = []
    highest = 1 << 64
    for row in rows:
        text = row_text(row)
        key = row_hash(row, text)
        if key >= highest or not text.strip():
            continue
        keys.append(key)
        texts.append(text)
        if len(keys) >= BATCH:
            yield keys, texts
            keys, texts = [], []
            highest = int(held["key"][-1]) if len(held["key"]) == limit else highest
    if keys:
        yield keys, texts


def merge(
    raw: Iterable[dict[str, np.ndarray]], targets: list[Iterable[dict[str, np.ndarray]]], cfg: ClassifierConfig
) -> dict[str, np.ndarray]:
    """The models: `weights` float64[K, T, B], `bias` float64[K, T]; `auc` float64[T] (NaN with one fold); `rows` int64[1 + T].

    K is `folds`, but 1 where a fold would leave a class without rows.

    Raises:
        DataError: raw or target rows without a single word.
    """
    import numpy as np

    negative = _gathered(raw, cfg.negatives, "raw", cfg)
    positives = [_gathered(target, cfg.positives, "target", cfg) for target in targets]
    folds = _folds(negative, positives, cfg)
    fits = [_fit(negative, positive, folds, cfg) for positive in positives]
    return {
        "weights": np.stack([weights for weights, _, _ in fits], axis=1),
        "bias": np.stack([bias for _, bias, _ in fits], axis=1),
        "auc": np.array([auc for _, _, auc in fits]),
        "rows": np.array([len(negative["key"]), *(len(positive["key"]) for positive in positives)], np.int64),
    }


def _gathered(parts: Iterable[dict[str, np.ndarray]], limit: int, role: str, cfg: ClassifierConfig) -> Sample:
    held = _nothing()
    for part in parts:
        held = smallest([held, part], limit)
    if not len(held["key"]):
        raise DataError(f"the {role} rows hold no words", fix=f"give {role} rows with text")
    return held


def _folds(negative: Sample, positives: list[Sample], cfg: ClassifierConfig) -> int:
    import numpy as np

    parts = len(np.unique(negative["key"] % np.uint64(cfg.folds)))
    return cfg.folds if parts > 1 and all(len(positive["key"]) >= cfg.folds for positive in positives) else 1


def _fit(negative: Sample, positive: Sample, folds: int, cfg: ClassifierConfig) -> tuple[np.ndarray, np.ndarray, float]:
    import numpy as np

    n = len(positive["key"])
    x, y = _matrix([positive, negative], cfg.buckets), np.arange(n + len(negative["key"])) < n
    fold = np.concatenate([np.arange(n) % folds, (negative["key"] % np.uint64(folds)).astype(np.int64)])
    weights, bias, areas = np.zeros((folds, cfg.buckets)), np.zeros(folds), []
    for k in range(folds):
        used = fold != k if folds > 1 else np.ones(len(y), bool)
        weights[k], bias[k] = regress(x[used], y[used], cfg.strength, cfg.iterations)
        if folds > 1 and len(set(y[~used])) == 2:
            areas.append(area_under_curve(x[~used] @ weights[k], y[~used]))
    return weights, bias, float(np.mean(areas)) if areas else float("nan")


def _matrix(parts: list[Sample], buckets: int) -> Any:
    """scipy CSR matrix of log(1 + count), the parts' rows below each other."""
    import numpy as np
    from scipy import sparse

    return sparse.vstack(
        [sparse.csr_matrix((np.log1p(p["count"]), p["bucket"], p["first"]), (len(p["first"]) - 1, buckets)) for p in parts], "csr"
    )


def regress(x: Any, y: np.ndarray, strength: float, iterations: int) -> tuple[np.ndarray, float]:
    """Weights and bias of a balanced L2 logistic regression by L-BFGS, one thread: the same bits on any number of cores."""
    try:
        from sklearn.linear_model import LogisticRegression
        from threadpoolctl import threadpool_limits
    except ImportError:
        message = "`select.classifier` needs scikit-learn"
        raise ConfigError(message, where="method", fix="pip install 'posttrain[select]'") from None
    with threadpool_limits(1):
        model = LogisticRegression(C=strength, class_weight="balanced", solver="lbfgs", tol=1e-7, max_iter=iterations).fit(x, y)
    return model.coef_[0], float(model.intercept_[0])


def area_under_curve(score: np.ndarray, positive: np.ndarray) -> float:
    """P(score of a positive > score of a negative) + 1/2 P(equal)."""
    from scipy.stats import rankdata

    n = int(positive.sum())
    return float((rankdata(score)[positive].sum() - n * (n + 1) / 2) / (n * (len(score) - n)))


def score(rows: list[dict[str, Any]], state: dict[str, np.ndarray], cfg: ClassifierConfig) -> dict[str, np.ndarray]:
    """`score` float64[n, T]: log-odds by the model of each row's fold."""
    import numpy as np

    from posttrain.data.rows import row_text

    texts = [row_text(row) for row in rows]
    keys = np.array([row_hash(row, text) for row, text in zip(rows, texts, strict=True)], np.uint64)
    fold = (keys % np.uint64(len(state["bias"]))).astype(np.int64)
    found = state["bias"][fold]
    if rows:
        x = _matrix([_counted([], texts, cfg)], cfg.buckets)
        for k in np.unique(fold):
            found[fold == k] += x[fold == k] @ state["weights"][k].T
    return {"score": found}


def report(state: dict[str, np.ndarray], picked: Iterable[dict[str, np.ndarray]], cfg: ClassifierConfig) -> dict[str, Any]:
    """Area under the ROC curve on rows held out by fold (absent with one fold), models, and rows they were fitted on."""
    areas = [value for value in state["auc"].tolist() if value == value]
    known = {} if not areas else {"auc": areas[0] if len(areas) == 1 else areas}
    return {**known, "folds": len(state["bias"]), "negatives": int(state["rows"][0]), "positives": int(state["rows"][1:].sum())}


def _row_type(cfg: ClassifierConfig, rows: dict[str, str]) -> str:
    return rows["raw"]


@stage(
    "select.classifier",
    config=ClassifierConfig,
    inputs=PORTS,
    output="dataset",
    rows=_row_type,
)
def run(cfg: ClassifierConfig, ctx: StageContext) -> None:
    """Fits, scores, picks and writes; see `data_pipelines.passes`."""
    from data_pipelines.passes import run_selector

    run_selector(__name__, cfg, ctx)


def select(raw: str | Path | list[str | Path], target: str | Path | list[str | Path], out: str | Path, **options: Any) -> dict[str, Any]:
    """Picks rows of local shards by log-odds; arguments as in `dsir.select`, and fields of ClassifierConfig.

    classifier.select(raw=["shards/*.jsonl.zst"], target="target.jsonl", out="picked", rows=50_000)
    """
    from data_pipelines.door import select_files

    return select_files("select.classifier", raw, target, out, **options)

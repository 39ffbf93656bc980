"""DSIR: data selection by importance resampling on hashed n-grams (Xie et al. 2023, arXiv 2302.03169).

With x's hashed unigram and bigram counts c(x) over B buckets, bag-of-n-gram models p of the target and q of the raw
data, and epsilon = `smoothing`,

    p_b = (C_target,b + pseudo) / sum,   q_b = (C_raw,b) / sum
    log w(x) = sum_b c_b(x) [log(p_b + epsilon) - log(q_b + epsilon)]

and the pick is a Gumbel top-k of log w(x)/T: a sample without replacement with odds w(x)^(1/T). Features and weights are
those of the authors' package; where that fits q on a prefix, here a row takes part in the fit by the hash of its id. With
separate targets there is a p and a weight for each. Reported is the paper's data metric, the KL reduction over random
selection, mean over the targets,

    KL(p || q) - KL(p || p')        in nats, p' the n-gram distribution of the picked rows, all three smoothed by epsilon.

It rewards a bag of target words in any order, as the weights do, so by default the word-salad guard (`guard.py`) stands
beside them; the figures should not be trusted without it. The weights of long rows differ by hundreds of nats, so the
effective sample size is often near 1 and sampling picks nearly the same rows as `topk`; raise `temperature`, or cut rows
into `chunks`, for a real sample.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from data_pipelines.selector import PORTS, Arrays, Guard, Row, SelectorConfig
from posttrain.config.base import Share
from posttrain.core.registry import stage

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from data_pipelines.door import Inputs
    from posttrain.core.context import StageContext


LOG_WEIGHTS = True
LONG_WORDS = 12
"""Characters a word on average above which the raw rows are likely written without spaces."""
EMPTY_BUCKETS = 0.5
"""Share of buckets that the target never hits above which it is called small."""


class DsirConfig(SelectorConfig):
    """DSIR on hashed n-grams."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "dsir-1.0.3": {
            "filters": {"min_words": 100}, "guard": {"salad": False}, "sample": "gumbel", "temperature": 1.0, "ngrams": 2,
            "buckets": 10_000, "hash": "sha256", "unit": "word", "regex": "re", "smoothing": 1e-8, "target_pseudo": 0.0,
            "length": "sum", "fit_share": 1.0,
        },
        "dsir-paper": {
            "chunks": {"words": 128}, "filters": {"quality": "dsir-paper"}, "guard": {"salad": False}, "sample": "gumbel",
            "temperature": 1.0, "ngrams": 2, "buckets": 10_000, "hash": "sha256", "unit": "word", "smoothing": 1e-8,
            "target_pseudo": 0.0, "length": "sum", "fit_share": 1.0,
        },
    }  # fmt: skip
    """`dsir-1.0.3`: the authors' package; q is fitted on all rows, where the package stops after 1e9 n-grams. `dsir-paper`: the
    experiments, chunks of 128 words and the quality filter; there buckets came from Python's `hash` (another one in each
    process), q from a validation split, and 4 % of the target's own domains were mixed in."""

    guard: Guard = Guard(salad=True)
    """Word-salad guard: n-gram weights cannot tell words in random order from text."""
    sample: Literal["gumbel", "topk"] = "gumbel"
    """`gumbel`: sample without replacement by importance; `topk`: the largest weights."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the log weights before sampling; higher is closer to uniform."""
    ngrams: Annotated[int, Field(ge=1, le=5)] = 2
    """Longest n-gram in words."""
    buckets: Annotated[int, Field(ge=16, lt=2**24)] = 10_000
    """Hash buckets."""
    hash: Literal["sha256", "fast"] = "sha256"
    """`sha256`: the published buckets; `fast`: other collisions, about twice the speed of hashing, which reading the rows
    mostly hides."""
    unit: Literal["word", "char"] = "word"
    """`char`: n-grams of characters other than white space, for scripts without spaces (Chinese, Japanese, Thai); raise `ngrams`."""
    regex: Literal["re", "regex"] = "re"
    """Who says what a letter is: Python's `re`, as NLTK did until 3.9, or the package `regex`, as since; they differ in
    combining marks and rare scripts."""
    smoothing: Annotated[float, Field(gt=0, lt=1)] = 1e-8
    """Added to each bucket's probability before the logarithm."""
    target_pseudo: Annotated[float, Field(ge=0)] = 0.0
    """Added to each bucket's target count; 0.1 to 1 helps a small target, where most buckets are empty."""
    length: Literal["sum", "mean"] = "sum"
    """`sum`: the published log weight; `mean`: divided by the row's n-grams, so that long rows do not win or lose by length."""
    fit_share: Share = 1.0
    """Share of the raw rows, by hash of the id, on which q is fitted."""
    fit_seed: Annotated[int, Field(ge=0)] = 0
    """Another one draws another share."""


def _hasher(cfg: DsirConfig) -> Any:
    from data_pipelines.ngrams import shared_hasher

    return shared_hasher(cfg.ngrams, cfg.buckets, cfg.hash, cfg.unit, cfg.regex)


def fit_shard(rows: Iterable[Row], cfg: DsirConfig, role: str) -> Arrays:
    """`counts` int64[B], bucket counts of the rows, and `words` int64[2], their words and characters; of a `fit_share` of
    them where `role` is `raw`."""
    import numpy as np

    from posttrain.data.rows import row_text, unit_hash

    share = cfg.fit_share if role == "raw" else 1.0
    kept = rows if share == 1.0 else (row for row in rows if unit_hash("dsir-fit", cfg.fit_seed, row["id"]) < share)
    counts, words, characters = _hasher(cfg).tally(row_text(row) for row in kept)
    return {"counts": counts, "words": np.array([words, characters], np.int64)}


def merge(raw: Iterable[Arrays], targets: list[Iterable[Arrays]], cfg: DsirConfig) -> Arrays:
    """The state, for T targets.

    Returns:
        `raw` int64[B], `target` int64[T, B]; `log_diff` float64[T, B] = log(p + epsilon) - log(q + epsilon); `words` int64[2],
        words and characters of the raw rows; `engine` int64[1], a digest of what the regex engine calls a letter.

    Raises:
        DataError: raw or target text without a single word.
    """
    import numpy as np

    from data_pipelines.ngrams import table_digest
    from posttrain.errors import DataError

    of_raw, of_targets = _sums(raw, cfg), [_sums(parts, cfg) for parts in targets]
    for role, found in (("raw", of_raw), *(("target", found) for found in of_targets)):
        if not found["counts"].any():
            raise DataError(f"the {role} rows hold no words", fix=f"give {role} rows with text")
    target = np.stack([found["counts"] for found in of_targets])
    p, q = _probabilities(target, cfg.target_pseudo), _probabilities(of_raw["counts"])
    log_diff = np.log(p + cfg.smoothing) - np.log(q + cfg.smoothing)
    engine = np.array([table_digest(cfg.regex)], np.int64)
    return {"raw": of_raw["counts"], "target": target, "log_diff": log_diff, "words": of_raw["words"], "engine": engine}


def _sums(parts: Iterable[Arrays], cfg: DsirConfig) -> Arrays:
    import numpy as np

    total = {"counts": np.zeros(cfg.buckets, np.int64), "words": np.zeros(2, np.int64)}
    for part in parts:
        for name, values in total.items():
            values += part[name]
    return total


def _probabilities(counts: np.ndarray, pseudo: float = 0.0) -> np.ndarray:
    """Counts over their sums along the last axis; zero where there are none."""
    import numpy as np

    total = counts.sum(axis=-1, keepdims=True) + pseudo * counts.shape[-1]
    shares: np.ndarray = (counts + pseudo) / np.maximum(total, 1)
    return shares


def score(rows: list[Row], state: Arrays, cfg: DsirConfig) -> Arrays:
    """`score` = log w, float64[n] or [n, T], and `words` int64[n] under `unit: word`.

    Raises:
        DataError: the state comes from another version of Unicode.
    """
    import numpy as np

    from data_pipelines.ngrams import table_digest
    from posttrain.data.rows import row_text
    from posttrain.errors import DataError

    if int(state["engine"][0]) != table_digest(cfg.regex):
        fix = "use one version of Python on all machines, or start the stage anew"
        raise DataError("the state was fitted where other characters are letters (another version of Unicode)", fix=fix)
    log_diff = state["log_diff"][0] if len(state["log_diff"]) == 1 else state["log_diff"].T
    weight, words, grams = _hasher(cfg).weigh([row_text(row) for row in rows], log_diff)
    if cfg.length == "mean":
        weight = (weight.T / np.maximum(grams, 1)).T
    return {"score": weight, "words": words} if cfg.unit == "word" else {"score": weight}


def order(columns: Arrays, cfg: DsirConfig, seed: int) -> np.ndarray:
    """log w / T plus Gumbel noise of the row's id, or log w itself under `topk`."""
    from data_pipelines.pick import gumbel

    key: np.ndarray = columns["score"]
    return key if cfg.sample == "topk" else key / cfg.temperature + gumbel(columns["uid"], seed)


def report(state: Arrays, picked: Iterable[Arrays], cfg: DsirConfig, seed: int = 0) -> dict[str, Any]:
    """KL divergences in nats from the target's n-grams p, mean over the targets, and what to beware of.

    `kl_raw` = KL(p || q), `kl_picked` = KL(p || p'), and `kl_reduction`, their difference, as in the paper. A small pick
    leaves many buckets empty, which alone raises its divergence; so `kl_random` is that of as many n-grams drawn at
    random from q, and `kl_reduction_at_size` = kl_random - kl_picked is what the selection itself has gained. A divergence
    cannot see the order of words: read it beside the guard's exclusions and the median length.

    `target_empty_buckets` is the largest share of buckets that a target never hits; `word_length` characters a word of raw.
    """
    import numpy as np

    p, q = _probabilities(state["target"], cfg.target_pseudo), _probabilities(state["raw"])
    counts = _sums(picked, cfg)["counts"]
    drawn = np.random.default_rng(seed).multinomial(int(counts.sum()), q)

    def divergence(other: np.ndarray) -> float:
        return float(np.mean((p * (np.log(p + cfg.smoothing) - np.log(other + cfg.smoothing))).sum(axis=1)))

    raw, chosen, random = divergence(q), divergence(_probabilities(counts)), divergence(_probabilities(drawn))
    empty = float(np.mean(state["target"] == 0, axis=1).max())
    word_length = float(state["words"][1] / max(1, state["words"][0]))
    return {
        "kl_reduction": raw - chosen, "kl_reduction_at_size": random - chosen, "kl_raw": raw, "kl_picked": chosen, "kl_random": random,
        "target_empty_buckets": empty, "word_length": word_length, "warnings": _warnings(empty, word_length, state, cfg),
    }  # fmt: skip


def _warnings(empty: float, word_length: float, state: Arrays, cfg: DsirConfig) -> list[str]:
    found = []
    if empty > EMPTY_BUCKETS and cfg.target_pseudo == 0:
        grams = int(state["target"].sum(axis=1).min())
        found.append(
            f"the target is small: {grams} n-grams leave {empty:.0%} of {cfg.buckets} buckets empty, and each n-gram of a row that "
            "falls into one costs it several nats; add target rows, or set target_pseudo to 0.1 .. 1, or fewer buckets"
        )
    if word_length > LONG_WORDS and cfg.unit == "word":
        found.append(
            f"the raw rows have {word_length:.0f} characters a word: text without spaces is one long word to `unit: word`; "
            "set `unit: char` and ngrams: 3"
        )
    if not cfg.guard.salad:
        found.append("the word-salad guard is off, and kl_reduction alone cannot tell words in random order from text")
    return found


def _row_type(cfg: DsirConfig, rows: dict[str, str]) -> str:
    return rows["raw"]


@stage(
    "select.dsir",
    config=DsirConfig,
    inputs=PORTS,
    output="dataset",
    rows=_row_type,
)
def run(cfg: DsirConfig, ctx: StageContext) -> None:
    """Fits, scores, picks and writes; see `data_pipelines.passes`."""
    from data_pipelines.passes import run_selector

    run_selector(__name__, cfg, ctx)


def select(raw: Inputs, target: Inputs, out: str | Path, **options: Any) -> dict[str, Any]:
    """Picks rows of local shards and writes them to a folder; the same passes as the stage.

        dsir.select(raw=["shards/*.jsonl.zst"], target="target.jsonl", out="picked", rows=50_000)

    Args:
        raw, target: files, folders or globs; or a dict of name -> such, for quotas by source and separate targets.
        out: new folder for rows-*, scores-*.parquet, state; the work lies in `OUT.work`, so a killed call goes on.
        options: `rows`, `tokens`, `bytes` or `share`; `seed`; `kind` (row type, else seen from the first row); fields of DsirConfig,
            e.g. `preset="dsir-1.0.3"`.

    Returns:
        The summary: rows_in, rows_out, tokens, kl_reduction, ...

    Raises:
        ConfigError: unknown option, or `out` is in use.
        DataError: rows that cannot be used.
    """
    from data_pipelines.door import select_files

    return select_files("select.dsir", raw, target, out, **options)

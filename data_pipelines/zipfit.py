"""ZIP-FIT: data selection by compression distance to target rows (Obbad et al. 2024, arXiv 2410.18194, algorithm 1).

With C(s) the compressed bytes of s, header included, and x + t the plain concatenation,

    NCD(x, t) = (C(x + t) - min(C(x), C(t))) / max(C(x), C(t))
    align(x)  = 1 - mean_j NCD(x, t_j)                              over the targets t_1..t_m; the largest are picked

`codec` and `level` say what C is; the codecs are different selectors, not faster and slower ways to one ranking (Spearman
correlation to gzip 9 on prose and code: libdeflate .99, gzip 1 .98, isal .95, zstd .90, lz4 .73). lz4 is the default, as in
the authors' repository: the fastest, and the best in our measurement, held-out perplexity of a trigram model trained on
200,000 words of the pick from two mixed corpora: random 574 and 772, gzip 9 480 and 649, zstd 3 440 (first corpus), lz4 379
and 513.

`measure: dictionary` is another score, whose cost does not grow with m: with D all targets end to end, 1 - C(x | D)/C(x). It
is nearly free of the length bias and did better still with 40 targets (340 and 419 with zstd 3), but with 400 it went from
337 to 1042: one long text in D that raw rows repeat decides everything. It also takes a bag of target words for a target
(6 of 10 first picks where such rows were mixed in; gzip 0.2, lz4 1.7), so use it with `guard: {salad: true}`.

The score falls with length: with gzip its rank correlation to a row's bytes is about -.8, with lz4 -.5, with a dictionary
about 0, so a budget in rows is filled with short ones. Give budgets in tokens, or rank within `length_bins`; the summary
says how strong it is on your rows (`length_rho`, on a sample of raw rows by hash). Scores of texts under 500 bytes are all
of about the same size, whatever they say, so a threshold on them means little.

A match reaches no further back than the codec's window, so rows and targets are clipped to half of it each (`clip_bytes`);
beyond, a pair would be scored by its last part alone. A subset of `max_targets` targets is those of the lowest hash of
their id: the same in any order and sharding, and the smaller subset is part of the larger. Its standard error, with the
correction for a finite population of n targets, s sqrt((1 - m/n)/m), is the column `score_se`.

Sizes differ between builds of a compressor. The state names its build, and fitting or scoring goes on with no other.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from data_pipelines.selector import PORTS, SelectorConfig
from posttrain.config.base import Positive
from posttrain.core.registry import stage
from posttrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from data_pipelines.codecs import Codec, Texts
    from posttrain.core.context import StageContext

SAMPLE = 256
"""Raw rows on which the correlation with length is measured."""
BLOCK = 1 << 18
"""Pair sizes held at a time."""
_PUBLISHED: dict[str, Any] = {"measure": "ncd", "order": "source_first", "clip_bytes": "never", "max_targets": None, "length_bins": 0}


class ZipfitConfig(SelectorConfig):
    """Fields of `method: select.zipfit`, beside those of every selector."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "zipfit-1.0.9": {**_PUBLISHED, "codec": "zlib", "level": 0},
        "zipfit-paper": {**_PUBLISHED, "codec": "zlib", "level": 9},
        "zipfit-head": {**_PUBLISHED, "codec": "lz4", "level": 0},
    }

    measure: Literal["ncd", "dictionary"] = "ncd"
    """`ncd`: the paper's mean compression distance; `dictionary`: 1 - C(x | all targets)/C(x), for `zstd` and `zlib`."""
    codec: Literal["zlib", "libdeflate", "isal", "lz4", "zstd"] = "lz4"
    """Compressor; `zlib` counts gzip's bytes."""
    level: int | None = None
    """The codec's level; none: zlib 9, libdeflate 6, isal 3, lz4 0, zstd 3. A level that a library ignores is refused."""
    order: Literal["source_first", "target_first"] = "source_first"
    """x + t as published, or t + x; with deflate the rankings correlate by .97."""
    max_targets: Positive | None = 256
    """Targets used, of each target input under `targets: separate`; none: all. Cost is rows times targets."""
    target_seed: int = 0
    """Seed of the hash that chooses them."""
    clip_bytes: Positive | Literal["window", "never"] = "window"
    """Bytes of a row and of a target that are read; `window`: half of the codec's window; `never`: all."""
    length_bins: Annotated[int, Field(ge=0, le=1000)] = 0
    """Rank rows within so many quantile bins of their bytes, so that each bin gives the same share of its rows; 0: one
    ranking. Memory is then about 40 bytes a raw row."""

    @model_validator(mode="after")
    def _codec_can(self) -> ZipfitConfig:
        if self.level is not None:
            from data_pipelines.codecs import level_problem

            if problem := level_problem(self.codec, self.level):
                raise ValueError(f"level: {problem}")
        if self.measure == "dictionary" and (self.codec not in ("zstd", "zlib") or (self.codec, self.level) == ("zlib", 0)):
            raise ValueError("measure: dictionary needs codec: zstd, or zlib at level 1 to 9")
        if self.length_bins and self.targets == "separate":
            raise ValueError("length_bins: only with `targets: merged`")
        return self


def open_codec(cfg: ZipfitConfig) -> Codec:
    """This process's codec."""
    from data_pipelines.codecs import shared_codec

    return shared_codec(cfg.codec, cfg.level)


def clip_of(cfg: ZipfitConfig) -> int:
    """Bytes of a text that are read."""
    from data_pipelines.codecs import WINDOW

    if isinstance(cfg.clip_bytes, int):
        return cfg.clip_bytes
    return 1 << 62 if cfg.clip_bytes == "never" else WINDOW[cfg.codec] // 2


def _encoded(row: dict[str, Any]) -> bytes:
    from posttrain.data.rows import row_text

    return row_text(row).encode("utf-8", "surrogatepass")


def _marked(text: str) -> np.ndarray:
    import numpy as np

    return np.frombuffer(text.encode(), np.uint8)


def fit_shard(rows: Iterable[dict[str, Any]], cfg: ZipfitConfig, role: str) -> dict[str, np.ndarray]:
    """A subset of the rows' texts by hash (targets: `max_targets`; raw: `SAMPLE`; picked: none), and counts of all.

    Returns:
        `hash` uint64[k], `data` uint8 and `offsets` int64[k + 1] (clipped texts), `bytes` int64[k] (before clipping); `seen`,
        `clipped`, `filled` (not empty) int64[1]; `lengths` int64[B], a histogram of bytes; `build` uint8, the codec's.
    """
    import numpy as np

    from data_pipelines.codecs import pack

    keep = {"target": cfg.max_targets, "raw": SAMPLE}.get(role, 0)
    clip = clip_of(cfg)
    kept = _Lowest(keep)
    lengths = np.zeros(length_bin((1 << 62) - 1) + 1, np.int64)
    clipped = 0
    for row in rows:
        text = _encoded(row)
        lengths[length_bin(len(text))] += 1
        clipped += len(text) > clip
        kept.add(_order_hash(row["id"], role, cfg.target_seed), text[:clip], len(text))
    found = kept.sorted()
    texts = pack(text for _, text, _ in found)
    return {
        "hash": np.array([key for key, _, _ in found], np.uint64), "data": texts.data, "offsets": texts.offsets,
        "bytes": np.array([size for _, _, size in found], np.int64), "seen": lengths.sum(keepdims=True),
        "filled": lengths[1:].sum(keepdims=True), "clipped": np.array([clipped]), "lengths": lengths,
        "build": _marked(open_codec(cfg).build),
    }  # fmt: skip


def _order_hash(row_id: str, role: str, seed: int) -> int:
    import hashlib

    text = f"{role}\x1f{seed}\x1f{row_id}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, person=b"zipfit").digest(), "little")


def length_bin(size: int) -> int:
    """Number of a histogram bin: exact below 32 bytes, then 16 bins for each doubling."""
    shift = max(0, size.bit_length() - 5)
    return 16 * shift + (size >> shift)


def _length_of(number: int) -> int:
    """Smallest size in a bin."""
    shift = max(0, number // 16 - 1)
    return (number - 16 * shift) << shift


class _Lowest:
    """The `keep` entries of the lowest (hash, text); all of them where `keep` is None."""

    def __init__(self, keep: int | None) -> None:
        self._keep, self._held = keep, list[tuple[int, bytes, int]]()
        self._bound: tuple[int, bytes, int] | None = None

    def add(self, key: int, text: bytes, size: int) -> None:
        """Takes an entry, unless it cannot be among the lowest."""
        entry = (key, text, size)
        if self._keep == 0 or (self._bound is not None and entry > self._bound):
            return
        self._held.append(entry)
        if self._keep is not None and len(self._held) >= 2 * self._keep + 64:
            self._held = self.sorted()
            self._bound = self._held[-1]

    def sorted(self) -> list[tuple[int, bytes, int]]:
        """The lowest, in order."""
        return sorted(self._held)[: self._keep]


def merge(raw: Iterable[dict[str, np.ndarray]], targets: list[Iterable[dict[str, np.ndarray]]], cfg: ZipfitConfig) -> dict[str, np.ndarray]:
    """The targets and what is known of the raw rows.

    Returns:
        `data`, `offsets`: the targets' texts, those of each input in turn, by hash; `first` int64[T + 1], where each input's
        begin; `sizes` int64[m] = C(t); `seen` int64[T] rows of each input; `build`; of the raw rows `lengths`, `raw_clipped`;
        `length_rho` float64[T], the rank correlation of score and bytes on the sample, and `sample_se` its median `score_se`.

    Raises:
        DataError: targets without text.
        ConfigError: shards fitted with another build of the compressor.
    """
    import numpy as np

    from data_pipelines.codecs import pack

    codec = open_codec(cfg)
    chosen, seen, target_clipped = [], [], 0
    for number, parts in enumerate(targets):
        entries, totals = _joined(parts, cfg.max_targets, codec.build)
        if not totals["filled"]:
            raise DataError(
                "the target rows hold no text" + (f" (target {number + 1})" if len(targets) > 1 else ""), fix="give targets with text"
            )
        chosen.append([text for _, text, _ in entries])
        seen.append(totals["seen"])
        target_clipped += totals["clipped"]
    sample, totals = _joined(raw, SAMPLE, codec.build)
    texts = pack(text for part in chosen for text in part)
    state = {
        "data": texts.data, "offsets": texts.offsets, "first": np.cumsum([0, *map(len, chosen)]), "sizes": codec.sizes(texts),
        "seen": np.array(seen), "target_clipped": np.array([target_clipped]), "raw_clipped": np.array([totals["clipped"]]),
        "lengths": totals["lengths"], "build": _marked(codec.build),
    }  # fmt: skip
    return {**state, **_sampled(sample, state, cfg)}


def _joined(parts: Iterable[dict[str, np.ndarray]], keep: int | None, build: str) -> tuple[list[tuple[int, bytes, int]], dict[str, Any]]:
    """The lowest entries of all shards, and the sums of their counts."""
    from data_pipelines.codecs import Texts

    kept = _Lowest(keep)
    totals: dict[str, Any] = {"seen": 0, "filled": 0, "clipped": 0, "lengths": 0}
    for part in parts:
        _same_build(part["build"], build)
        pieces = Texts(part["data"], part["offsets"]).pieces()
        for key, text, size in zip(part["hash"].tolist(), pieces, part["bytes"].tolist(), strict=True):
            kept.add(key, bytes(text), size)
        totals = {name: value + (part[name] if name == "lengths" else int(part[name][0])) for name, value in totals.items()}
    return kept.sorted(), totals


def _same_build(stored: np.ndarray, build: str) -> None:
    if (found := stored.tobytes().decode()) != build:
        raise ConfigError(
            f"the state was made with {found}, this process has {build}; sizes of different builds cannot be compared",
            where="codec", fix="use the same environment on every machine, or delete the work folder and start over",
        )  # fmt: skip


def _sampled(sample: list[tuple[int, bytes, int]], state: dict[str, np.ndarray], cfg: ZipfitConfig) -> dict[str, np.ndarray]:
    """`length_rho` and `sample_se` on the sample of raw rows."""
    import numpy as np

    sample = [entry for entry in sample if entry[1]]
    score, error = _Scorer(state, cfg).scores([text for _, text, _ in sample])
    rho = [_spearman(column, np.array([size for _, _, size in sample])) for column in score.T]
    return {"length_rho": np.array(rho), "sample_se": np.array([float(np.median(error)) if error.size else 0.0])}


def _spearman(one: np.ndarray, other: np.ndarray) -> float:
    import numpy as np
    from scipy.stats import rankdata

    if len(one) < 3 or len(set(one.tolist())) < 2 or len(set(other.tolist())) < 2:
        return 0.0
    return float(np.corrcoef(rankdata(one), rankdata(other))[0, 1])


class _Scorer:
    """Scores of texts against the state's targets."""

    def __init__(self, state: dict[str, np.ndarray], cfg: ZipfitConfig) -> None:
        import numpy as np

        from data_pipelines.codecs import Dictionary, Texts

        self._codec, self._cfg, self._sizes = open_codec(cfg), cfg, state["sizes"]
        _same_build(state["build"], self._codec.build)
        self._targets = Texts(state["data"], state["offsets"])
        # an empty target at the end makes C(x) a by-product of the pairs
        self._with_none = Texts(state["data"], np.append(state["offsets"], state["offsets"][-1]))
        first = state["first"].tolist()
        self._sets = list(itertools.pairwise(first))
        self._seen = state["seen"].tolist()
        self._dictionaries: list[Any] = []
        if cfg.measure == "dictionary":
            self._dictionaries = [Dictionary(self._codec, self._part(begin, end)) for begin, end in self._sets]

    def _part(self, begin: int, end: int) -> Texts:
        import numpy as np

        return self._targets.take(np.arange(begin, end))

    def scores(self, texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """(float64[n, T], its standard errors; [n, 0] where no target is left out)."""
        import numpy as np

        score = np.zeros((len(texts), len(self._sets)))
        if self._dictionaries:
            size = np.array([self._codec.size(text) for text in texts], np.int64)
            for column, dictionary in enumerate(self._dictionaries):
                score[:, column] = 1 - np.array([dictionary.size(text) for text in texts], np.int64) / size
            return score, score[:, :0]
        sampled = any(seen > end - begin for seen, (begin, end) in zip(self._seen, self._sets, strict=True))
        error = np.zeros((len(texts), len(self._sets) if sampled else 0))
        at = 0
        for size, pairs in self._pairs(texts):
            here = slice(at, at + len(pairs))
            at += len(pairs)
            score[here], errors = self._means(pairs, size[:, None])
            if sampled:
                error[here] = errors
        return score, error

    def _means(self, pairs: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean similarities and their standard errors, of rows of pair sizes [b, m]."""
        import numpy as np

        near = 1 - (pairs - np.minimum(size, self._sizes)) / np.maximum(size, self._sizes)
        mean, error = np.zeros((2, len(pairs), len(self._sets)))
        for column, ((begin, end), seen) in enumerate(zip(self._sets, self._seen, strict=True)):
            part, used = near[:, begin:end], end - begin
            mean[:, column] = part.mean(axis=1)
            spread = part.std(axis=1, ddof=1) if used > 1 else np.full(len(part), np.nan)
            error[:, column] = spread * np.sqrt((1 - used / seen) / used)
        return mean, error

    def _pairs(self, texts: list[bytes]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """C of the texts, int64[b], and of the pairs, int64[b, m], for blocks of rows."""
        import numpy as np

        from data_pipelines.codecs import pack

        step = max(1, BLOCK // (len(self._targets) + 1))
        for at in range(0, len(texts), step):
            block = texts[at : at + step]
            if self._cfg.order == "source_first":
                sizes = np.stack([self._codec.pairs(text, self._with_none) for text in block])
                yield sizes[:, -1], sizes[:, :-1]
            else:
                rows = pack(block)
                yield self._codec.sizes(rows), np.stack([self._codec.pairs(target, rows) for target in self._targets.pieces()], axis=1)


def score(rows: list[dict[str, Any]], state: dict[str, np.ndarray], cfg: ZipfitConfig) -> dict[str, np.ndarray]:
    """Columns of a batch.

    Returns:
        `score` float64[n, T]; `clipped` int64, bytes of the row that were not read; `score_se` float64 where only a subset of
        the targets is used (the largest of the T); `reason`: "without text" for a row of white space alone, which
        any length bias would put first.
    """
    import numpy as np

    clip = clip_of(cfg)
    texts = [_encoded(row) for row in rows]
    score, error = _Scorer(state, cfg).scores([text[:clip] for text in texts])
    size = np.array([len(text) for text in texts], np.int64)
    blank = np.array([not text.strip() for text in texts], bool)
    columns = {"score": score, "clipped": np.maximum(size - clip, 0), "reason": np.where(blank, "without text", "")}
    return columns | ({"score_se": error.max(axis=1)} if error.shape[1] else {})


def report(state: dict[str, np.ndarray], picked: Iterable[dict[str, np.ndarray]], cfg: ZipfitConfig) -> dict[str, Any]:
    """Facts for the summary.

    `codec` (its build), `targets` used and `targets_seen`, `length_rho` (rank correlation of score and bytes on a sample of the
    raw rows), medians of the bytes of raw and picked rows (to 3 %), rows clipped, `score_se`, and `warning` where the pick is
    likely to be decided by length.
    """
    lengths: Any = 0
    clipped = 0
    for part in picked:
        lengths, clipped = lengths + part["lengths"], clipped + int(part["clipped"][0])
    rho = float(min(state["length_rho"], key=float)) if len(state["length_rho"]) else 0.0
    facts: dict[str, Any] = {
        "codec": state["build"].tobytes().decode(), "targets": int(state["first"][-1]), "targets_seen": int(state["seen"].sum()),
        "length_rho": rho, "median_bytes_raw": _median(state["lengths"]), "median_bytes_picked": _median(lengths),
        "clipped_raw": int(state["raw_clipped"][0]), "clipped_targets": int(state["target_clipped"][0]), "clipped_picked": clipped,
    }  # fmt: skip
    if facts["targets"] < facts["targets_seen"] and cfg.measure == "ncd":
        facts["score_se"] = float(state["sample_se"][0])
    if warning := _warning(cfg, rho):
        facts["warning"] = warning
    return facts


def _median(lengths: Any) -> int:
    import numpy as np

    total = int(np.sum(lengths))
    return _length_of(int(np.searchsorted(np.cumsum(lengths), (total + 1) // 2))) if total else 0


def _warning(cfg: ZipfitConfig, rho: float) -> str:
    if cfg.codec == "zlib" and cfg.level == 0:
        return "zlib level 0 stores its input, so this order is by length alone, shortest first; use level 9, or lz4"
    if rho < -0.5 and cfg.budget.unit in ("rows", "share") and not cfg.length_bins:
        return f"scores fall with length (rank correlation {rho:.2f}): give the budget in tokens, or set length_bins"
    return ""


@stage("select.zipfit", config=ZipfitConfig, inputs=PORTS, output="dataset", rows=lambda cfg, rows: rows["raw"])
def run(cfg: ZipfitConfig, ctx: StageContext) -> None:
    """Fits, scores, picks and writes; see `data_pipelines.passes`."""
    from data_pipelines.passes import run_selector

    run_selector("data_pipelines.zipfit_bins" if cfg.length_bins else __name__, cfg, ctx)


def select(raw: str | Path | list[str | Path], target: str | Path | list[str | Path], out: str | Path, **options: Any) -> dict[str, Any]:
    """Picks rows of local shards and writes them to a folder; the same passes as the stage.

        zipfit.select(raw=["shards/*.jsonl.zst"], target="target.jsonl", out="picked", tokens=10_000_000)

    Args:
        raw, target: files, folders or globs.
        out: new folder for rows-*, scores-*.parquet, state; the work lies in `OUT.work`, so a killed call goes on.
        options: `rows`, `tokens`, `bytes` or `share`; `seed`; `kind` (row type, else seen from the first row); fields of ZipfitConfig.

    Returns:
        The summary: rows_in, rows_out, tokens, length_rho, ...

    Raises:
        ConfigError: unknown option, `out` is in use, or a codec that is not installed.
        DataError: rows that cannot be used.
    """
    from data_pipelines.door import select_files

    return select_files("select.zipfit", raw, target, out, **options)

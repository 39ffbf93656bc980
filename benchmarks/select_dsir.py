"""DSIR's features and weights against the authors' package (data-selection), one process each, CPU time, the same texts in memory.

    python benchmarks/select_dsir.py            # about eight minutes
    python benchmarks/select_dsir.py --quick

    exact warm   the published SHA-256 buckets; the table has seen the texts, as it has when scoring follows the fit
    exact cold   the same from an empty table: every n-gram is hashed
    fast         `hash: fast`, other buckets
    files        all of it from files to files: fit, weights, pick, write, with the ids, checks, score tables and summary that
                 ours makes besides; the guard is off in both

Before anything is timed, weights of all texts must agree with the package's to 1e-8 (`fast`: rank correlation above 0.9),
and `files` must write as many rows. What is loaded once a process (compiled code, table of code points) is not timed.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _corpus
from _harness import arguments, compare, finish, speed

from data_pipelines import dsir
from data_pipelines.ngrams import Hasher

KEPT = 500


class Package:
    """The authors' class on files of the corpus, fitted."""

    def __init__(self, folder: Path, corpus: _corpus.Corpus) -> None:
        self.folder = folder
        for name, rows in (("raw", corpus.raw), ("target", corpus.target)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self.texts = [row["text"] for row in corpus.raw]
        self.made = self._new()
        with contextlib.redirect_stderr(io.StringIO()):
            self.made.fit_importance_estimator(num_tokens_to_fit="all")

    def _new(self) -> Any:
        from data_selection import HashedNgramDSIR

        return HashedNgramDSIR(
            [str(self.folder / "raw.jsonl")], [str(self.folder / "target.jsonl")], str(self.folder / "cache"), num_proc=1
        )

    @property
    def regex(self) -> str:
        """The regex engine of the installed NLTK."""
        return "regex" if len(self.made.tokenizer("a\x1fb")) == 3 else "re"

    def weights(self) -> np.ndarray:
        """Log weights of all texts."""
        return np.array([self.made.importance_estimator(self.made.featurizer(text)) for text in self.texts])

    def files(self) -> int:
        """Fit, weights, pick and write; returns the rows written."""
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        made = self._new()
        with contextlib.redirect_stderr(io.StringIO()):
            made.fit_importance_estimator(num_tokens_to_fit="all")
            made.compute_importance_weights()
            made.resample(out_dir=str(self.folder / "out"), num_to_sample=KEPT, cache_dir=str(self.folder / "picked"))
        return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in (self.folder / "out").rglob("*.jsonl"))


class Ours:
    """The same by `data_pipelines`."""

    def __init__(self, package: Package) -> None:
        self.package, self.log_diff, self.count = package, package.made.log_diff, 0
        self.hashers = {kind: Hasher(2, 10_000, kind, regex=package.regex) for kind in ("sha256", "fast")}

    def warm(self) -> np.ndarray:
        """Weights with a table that has seen the texts."""
        return self.hashers["sha256"].weigh(self.package.texts, self.log_diff)[0]

    def cold(self) -> np.ndarray:
        """Weights with an empty table."""
        return Hasher(2, 10_000, regex=self.package.regex).weigh(self.package.texts, self.log_diff)[0]

    def fast(self) -> np.ndarray:
        """Weights by the other hash, fitted to the same texts."""
        return self.hashers["fast"].weigh(self.package.texts, self.fast_diff)[0]

    def fit_fast(self, target: list[str]) -> None:
        """The log ratios of the other buckets."""
        p, q = (self.hashers["fast"].count(texts) for texts in (target, self.package.texts))
        self.fast_diff = np.log(p / p.sum() + 1e-8) - np.log(q / q.sum() + 1e-8)

    def files(self) -> int:
        """The stage through the Python door."""
        out = self.package.folder / "ours"
        shutil.rmtree(out, ignore_errors=True)
        raw, target = (self.package.folder / f"{name}.jsonl" for name in ("raw", "target"))
        options = {
            "preset": "dsir-1.0.3",
            "rows": KEPT,
            "suffix": ".jsonl",
            "regex": self.package.regex,
            "kind": "text",
            "target_kind": "text",
        }
        return int(dsir.select(raw, target, out, **options)["rows_out"])


def check(package: Package, ours: Ours) -> dict[str, float]:
    """How far the results agree; raises where they do not."""
    from scipy.stats import spearmanr

    expected = package.weights()
    difference = max(float(np.abs(found - expected).max()) for found in (ours.cold(), ours.warm()))
    rank = float(spearmanr(expected, ours.fast()).statistic)
    if difference > 1e-8 or rank < 0.9 or package.files() != KEPT or ours.files() != KEPT:
        raise AssertionError(f"not the same work: weights differ by {difference:g}, rank correlation of `fast` {rank:g}")
    return {"max_weight_difference": difference, "fast_rank_correlation": rank}


def main() -> None:
    """Runs all parts."""
    args = arguments(__doc__ or "")
    sizes = _corpus.scaled(0.08 if args.quick else 0.2)
    with tempfile.TemporaryDirectory() as folder:
        corpus = _corpus.build(0, sizes | {"salad": 0})
        package = Package(Path(folder), corpus)
        ours = Ours(package)
        ours.fit_fast([row["text"] for row in corpus.target])
        agreement = check(package, ours)
        size = sum(len(text.encode("utf-8", "surrogatepass")) for text in package.texts) / 1e6
        works: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "exact warm": (package.weights, ours.warm), "exact cold": (package.weights, ours.cold),
            "fast": (package.weights, ours.fast), "files": (package.files, ours.files),
        }  # fmt: skip
        parts = {}
        for name, (theirs, mine) in works.items():
            pairs = 2 if args.quick else 20 if name != "files" else 10
            found = speed(compare(theirs, mine, pairs=pairs, warmup=1))
            parts[name] = {**found, "ours_mb_s": size / found["ours"], "peer_mb_s": size / found["peer"]}
            print(f"{name:<12} {found['ratio']:6.1f}x  {parts[name]['ours_mb_s']:6.1f} MB/s against {parts[name]['peer_mb_s']:.2f}")
    corpus_facts = {"rows": len(package.texts), "megabytes": size, "ngrams": "1 and 2 words", "nltk_regex_engine": package.regex}
    finish("select_dsir", {**parts["exact warm"], "unit": "CPU seconds", "parts": parts, "corpus": corpus_facts, **agreement}, args)


if __name__ == "__main__":
    main()

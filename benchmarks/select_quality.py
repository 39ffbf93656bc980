"""Which selector picks the better training data? Every one at the same budget of tokens, on a labelled corpus, for several seeds.

    python benchmarks/select_quality.py                      # five seeds, trigram judge; about two hours on one core
    python benchmarks/select_quality.py --lm transformer     # the same picks, judged by a small Qwen2 as well
    python benchmarks/select_quality.py --quick              # one small corpus

The corpus (`_corpus.py`): package docstrings, code, licences, manual pages, changelogs and headers; the target is the docstrings of
the standard library, half for the selectors, half for the judges. It comes in four variants: `plain`; `few`, with a tenth of
the target rows; `salad`, with a thousand rows of target words in random order; `guarded`, the same with the selectors' word-salad
guard on.

What counts is the loss on held-out target rows of a model trained on nothing but the picked tokens. Precision by label stands
beside it and is not the same: rows of other sources can be nearer to the target than rows of the relevant label. A row of
the table is a mean over seeds with its 95 % interval by Student's t; differences from random are paired by seed.

In the record `ours` and `peer` are perplexities of `dsir` and `random` on `plain`, `ratio` is peer over ours, and `control` is
random over random with another seed.
"""

from __future__ import annotations

import argparse
import functools
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _corpus
import _vectors
import numpy as np
import pyarrow as pa
from _corpus import SALAD, Corpus
from _harness import Cells, arguments, finish
from _judges import Judge, interval, paired, precision
from _lm import Transformer

VARIANTS = ("plain", "few", "salad", "guarded")
FEW = 40
"""Target rows of the variant `few`."""
RANKS = (500, 1000, 2000)
"""Rows of the order among which precision is measured."""


@dataclass(frozen=True)
class Arm:
    """One selector and its settings.

    Args:
        method: name in the registry.
        options: fields of its config.
        seed: added to the benchmark's seed.
        vectors: kind of the vectors that the rows carry (`_vectors.py`), for methods that compare vectors.
        parts: arms whose scores are combined.
        ranks: its order is not in the score tables; always so for methods that compare vectors.
        slow: left out by `--quick`.
        only: the variants that it is measured on; none = all.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    vectors: str = ""
    parts: tuple[str, ...] = ()
    ranks: bool = False
    slow: bool = False
    only: tuple[str, ...] = ()

    @property
    def targeted(self) -> bool:
        """It reads the target; the guard needs one. A combination goes by the guard of its parts."""
        return not self.parts and self.method != "select.random"


COLUMN = {"features": {"from": "column", "column": "vector"}}
ARMS: dict[str, Arm] = {
    "random": Arm("select.random"),
    "random again": Arm("select.random", seed=1000),
    "length": Arm("select.length"),
    "dsir": Arm("select.dsir"),
    "dsir pseudo 0.1": Arm("select.dsir", {"target_pseudo": 0.1}, only=("plain", "few")),
    "dsir mean": Arm("select.dsir", {"length": "mean", "sample": "topk"}),
    "dsir 1.0.3": Arm("select.dsir", {"preset": "dsir-1.0.3"}),
    "dsir paper": Arm("select.dsir", {"preset": "dsir-paper"}, only=("plain",)),
    "zipfit": Arm("select.zipfit"),
    "zipfit 40 targets": Arm("select.zipfit", {"max_targets": 40}, only=("plain",)),
    "zipfit paper 40 targets": Arm("select.zipfit", {"preset": "zipfit-paper", "max_targets": 40}, slow=True),
    "zipfit 1.0.9 40 targets": Arm("select.zipfit", {"preset": "zipfit-1.0.9", "max_targets": 40}, only=("plain",)),
    "zipfit head 40 targets": Arm("select.zipfit", {"preset": "zipfit-head", "max_targets": 40}, only=("plain",)),
    "zipfit 20 length bins": Arm("select.zipfit", {"length_bins": 20}, ranks=True, only=("plain",)),
    "zipfit dictionary": Arm("select.zipfit", {"measure": "dictionary", "codec": "zstd"}, only=("plain",)),
    "zipfit dictionary 40 targets": Arm("select.zipfit", {"measure": "dictionary", "codec": "zstd", "max_targets": 40}),
    "classifier": Arm("select.classifier"),
    "combine dsir zipfit": Arm("select.combine", parts=("dsir", "zipfit")),
    "combine dsir zipfit classifier": Arm("select.combine", parts=("dsir", "zipfit", "classifier"), only=("plain",)),
    "embed svd": Arm("select.embed", COLUMN, vectors="svd"),
    "embed svd mean": Arm("select.embed", {**COLUMN, "rule": "mean"}, vectors="svd"),
    "tarot svd": Arm("select.tarot", COLUMN, vectors="svd"),
    "tarot gradients": Arm("select.tarot", COLUMN, vectors="gradients", slow=True),
    "tarot gradients otm": Arm("select.tarot", {**COLUMN, "rule": "otm"}, vectors="gradients", slow=True, only=("plain",)),
    "tarot gradients mean": Arm("select.tarot", {**COLUMN, "rule": "mean"}, vectors="gradients", slow=True, only=("plain",)),
    "embed minilm": Arm("select.embed", COLUMN, vectors="minilm", slow=True, only=("plain",)),
    "embed minilm mean": Arm("select.embed", {**COLUMN, "rule": "mean"}, vectors="minilm", slow=True, only=("plain",)),
    "tarot minilm": Arm("select.tarot", COLUMN, vectors="minilm", slow=True, only=("plain",)),
}
CONTROLS = ("random", "random again", "length")


class Bench:
    """Corpora, judges and picks of a run; everything is made once and kept in the work folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.factor = 0.1 if args.quick else 1.0
        self.work, self.budget = Path(args.work) / f"{self.factor:g}", int(args.tokens * self.factor)
        if args.fresh:
            shutil.rmtree(self.work / "picks", ignore_errors=True)
        self.corpus = functools.lru_cache(1)(self._corpus)
        self.judge = functools.lru_cache(1)(self._judge)
        self.transformer = functools.lru_cache(1)(self._transformer)
        self.files = functools.lru_cache(8)(self._files)

    def _corpus(self, seed: int) -> Corpus:
        return _corpus.build(seed, _corpus.scaled(self.factor), cache=self.work / "corpora")

    def _judge(self, seed: int) -> Judge:
        return Judge(self.corpus(seed).without(SALAD))

    def _transformer(self, seed: int) -> Transformer:
        return Transformer([row["text"] for row in self.corpus(seed).raw if row["label"] != SALAD])

    def _files(self, seed: int, variant: str, vectors: str) -> dict[str, list[Path]]:
        corpus = self.corpus(seed)
        if variant in ("plain", "few"):
            corpus = corpus.without(SALAD)
        if variant == "few":
            corpus = replace(corpus, target=corpus.target[:FEW])
        folder = self.work / "shards" / f"{seed}-{variant}-{vectors}"
        if vectors:
            return _vectors.write(folder, corpus, vectors, _vectors.vectors(vectors, self.corpus(seed), self.work / "vectors"))
        return _corpus.write(folder, corpus)

    def cell(self, variant: str, name: str, seed: int) -> dict[str, Any]:
        """All measures of one pick but the transformer's, and the CPU seconds it took."""
        folder, seconds = self.pick(variant, name, seed)
        by_picks = ARMS[name].ranks or ARMS[name].vectors
        first = [self.pick(variant, name, seed, rows)[0] for rows in RANKS] if by_picks else []
        picked = list(read_rows(folder))
        found = self.judge(seed)(picked)
        if first:
            return {**found, **{f"p{k}": precision(list(read_rows(f)), k) for k, f in zip(RANKS, first, strict=True)}, "seconds": seconds}
        order, words = ranking(ARMS[name], folder, self._options(variant, name, seed))
        rows = {row["id"]: row for row in self.corpus(seed).raw}
        fits = int(np.searchsorted(np.cumsum(words), self.budget, side="right"))
        if set(order[:fits]) != {row["id"] for row in picked}:
            raise AssertionError(f"{name}: the picked rows are not the first ones of its order")
        ranked = [rows[row_id.partition("#")[0]] for row_id in order[: max(RANKS)]]
        return {**found, **{f"p{k}": precision(ranked, k) for k in RANKS}, "seconds": seconds}

    def transformer_cell(self, variant: str, name: str, seed: int) -> dict[str, Any]:
        """Held-out loss of the transformer that was trained on the pick, in nats per word."""
        texts = [row["text"] for row in read_rows(self.pick(variant, name, seed)[0])]
        return {"loss": self.transformer(seed).loss(texts, [row["text"] for row in self.corpus(seed).heldout], seed)}

    def _options(self, variant: str, name: str, seed: int) -> dict[str, Any]:
        arm = ARMS[name]
        return {**arm.options, "guard": {"salad": variant == "guarded" and arm.targeted}, "seed": seed + arm.seed}

    def pick(self, variant: str, name: str, seed: int, rows: int | None = None) -> tuple[Path, float]:
        """(folder that the selector wrote through its Python door, CPU seconds); of so many rows, or of the budget of tokens."""
        from data_pipelines.door import select_files

        arm, out = ARMS[name], self.work / "picks" / str(seed) / variant / (f"{name}.{rows}" if rows else name)
        taken = out.with_name(f"{out.name}.seconds")
        if not taken.exists():
            for left in (out, out.with_name(f"{out.name}.work")):
                shutil.rmtree(left, ignore_errors=True)
            files = self.files(seed, "salad" if variant == "guarded" else variant, arm.vectors)
            inputs = {"scores": {part: self.pick(variant, part, seed)[0] for part in arm.parts}} if arm.parts else {}
            target = files["target"] if arm.targeted else None
            amount = {"rows": rows} if rows else {"tokens": self.budget}
            out.parent.mkdir(parents=True, exist_ok=True)
            start = time.process_time()
            select_files(arm.method, files["raw"], target, out, **amount, **inputs, **self._options(variant, name, seed))
            taken.write_text(f"{time.process_time() - start:.2f}")
        return out, float(taken.read_text())


def read_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of a folder that a selector wrote."""
    from posttrain.data.shards import expand_shards, read_shard

    for path in expand_shards(sorted(folder.glob("rows-*"))):
        yield from (row for _, row in read_shard(path))


def ranking(arm: Arm, folder: Path, options: dict[str, Any]) -> tuple[list[str], np.ndarray]:
    """(ids of all eligible rows in the order of the pick, their words), from the score tables that a selector wrote."""
    import pyarrow.parquet as pq

    from data_pipelines.door import make_config
    from posttrain.core import registry

    options = dict(options)
    seed, module = options.pop("seed"), sys.modules[registry.method(arm.method).module]
    table = pq.read_table([str(path) for path in sorted(folder.glob("scores-*.parquet"))])
    table = table.filter(pa.array([reason == "" for reason in table["reason"].to_pylist()]))
    columns = {name: table[name].to_numpy() for name in table.column_names if name not in ("id", "source", "shard", "reason")}
    order = getattr(module, "order", None)
    key = order(columns, make_config(arm.method, {**options, "tokens": 1}), seed) if order else columns["score"]
    ids, first = table["id"].to_pylist(), np.lexsort((columns["uid"], -key))
    return [ids[i] for i in first], columns["words"][first]


COLUMNS = {
    "p500": ("P@500", "6.3f"), "p1000": ("P@1000", "6.3f"), "p2000": ("P@2000", "6.3f"), "relevant_tokens": ("share", "6.3f"),
    "median_words": ("words", "6.0f"), "kl_reduction": ("KLred", "+6.3f"), "transport": ("W1", "6.3f"), "perplexity": ("ppl", "6.1f"),
    "perplexity_minus_random": ("-random", "+7.1f"), "transformer_loss": ("LM loss", "7.3f"),
    "transformer_minus_random": ("-random", "+7.3f"),
}  # fmt: skip
"""Figure -> its head and format in the table; those of the judges get their interval beside them."""
JUDGED = {"perplexity": "perplexity_minus_random", "transformer_loss": "transformer_minus_random"}


def figures(cells: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and interval of each figure of an arm, and of its differences from the cells of `random`, seed by seed."""
    found = {name: interval([cell[name] for cell in cells]) for name in (*COLUMNS, "loss", "seconds") if name in cells[0]}
    for name, difference in JUDGED.items():
        if name in cells[0]:
            found[difference] = paired([cell[name] for cell in cells], [cell[name] for cell in base])
    return found


def table(results: Results, variant: str) -> tuple[list[str], dict[str, Any]]:
    """(printed lines of one variant, arm -> its figures), the lowest perplexity first."""
    arms = {arm: figures(cells, results[variant, "random"]) for (of, arm), cells in results.items() if of == variant}
    shown = [name for name in COLUMNS if name in next(iter(arms.values()))]
    lines = [f"{variant:<30}" + "".join(_head(name) for name in shown)]
    for arm, found in sorted(arms.items(), key=lambda item: item[1]["perplexity"]["mean"]):
        lines.append(f"{arm:<30}" + "".join(_field(name, found[name]) for name in shown))
    return lines, arms


def _head(name: str) -> str:
    title, shape = COLUMNS[name]
    width = int(shape.lstrip("+").split(".")[0])
    return f" {title:>{width}}" + (f" {'95 %':<16}" if name in JUDGED or name in JUDGED.values() else "")


def _field(name: str, found: dict[str, Any]) -> str:
    digits = COLUMNS[name][1][-2] if name.startswith("transformer") else "0"
    span = "" if found["low"] is None else f"[{found['low']:.{digits}f}, {found['high']:.{digits}f}]"
    return f" {found['mean']:{COLUMNS[name][1]}}" + (f" {span:<16}" if name in JUDGED or name in JUDGED.values() else "")


def acceptance(arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Figures that were promised, each with what was measured and whether it is reached; None where the arm was not run."""

    def check(value: float | None, least: float) -> dict[str, Any]:
        return {"value": value, "least": least, "reached": None if value is None else value >= least}

    def mean(variant: str, arm: str, name: str) -> float | None:
        found = arms.get(variant, {}).get(arm)
        return found and found[name]["mean"]

    random = mean("plain", "random", "p500") or math.nan
    parity, guarded = mean("plain", "dsir 1.0.3", "p1000"), mean("guarded", "dsir", "p1000")
    twice = {arm: check(found["p500"]["mean"] / random, 2.0) for arm, found in arms.get("plain", {}).items() if arm not in CONTROLS}
    return {
        "dsir 1.0.3, P@1000, plain": check(parity, 0.63),
        "dsir, P@1000, guarded": check(guarded, 0.55),
        "P@500 over random's, plain": twice,
    }


def chosen(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(variant, arm) of the command line; `random` always among them."""
    usual = [name for name, arm in ARMS.items() if arm.vectors != "minilm" and not (args.quick and arm.slow)]
    arms, without = args.arms.split(",") if args.arms else usual, args.without.split(",") if args.without else []
    if unknown := [arm for arm in (*arms, *without) if arm not in ARMS]:
        sys.exit(f"unknown arms {unknown}; known: {', '.join(ARMS)}")
    arms = [arm for arm in arms if arm not in without]
    arms = [arm for arm in ARMS if arm in {*arms, "random", "random again"}]
    variants = args.variants.split(",") if args.variants else VARIANTS[: 1 if args.quick else None]
    return [(variant, arm) for variant in variants for arm in arms if args.arms or variant in (ARMS[arm].only or VARIANTS)]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Command line; returns the record."""
    work = Path(tempfile.gettempdir()) / "posttrain-select-quality"
    args = arguments(
        __doc__ or "",
        argv,
        seeds={"type": int, "default": None, "help": "draws of the corpus (default 5; 1 with --quick)"},
        tokens={"type": int, "default": 200_000, "help": "words that every selector may pick"},
        lm={
            "choices": ("trigram", "transformer"),
            "default": "trigram",
            "help": "`transformer`: a small Qwen2 as well, about a minute a cell",
        },
        arms={"default": "", "help": "comma-separated; default all but those of minilm, whose vectors take ten minutes a seed"},
        without={"default": "", "help": "comma-separated arms to leave out"},
        finished={"action": "store_true", "help": "measure nothing; report the arms that are finished for all seeds"},
        variants={"default": "", "help": "comma-separated; default all, with --quick the first"},
        work={"type": Path, "default": work, "help": "folder of corpora and shards"},
    )
    seeds = range(args.seeds or (1 if args.quick else 5))
    bench, wanted = Bench(args), chosen(args)
    if args.finished:
        done = Cells("select_quality", args).done
        wanted = [(variant, arm) for variant, arm in wanted if all((f"{variant}/{arm}", seed) in done for seed in seeds)]
    results = measure(bench, wanted, seeds, args)
    arms: dict[str, Any] = {}
    for variant in dict.fromkeys(variant for variant, _ in wanted):
        lines, arms[variant] = table(results, variant)
        print("\n".join(lines), "\n", sep="")
    facts = {"seeds": list(seeds), "budget_tokens": bench.budget, "corpus": _sources(bench, seeds[0])}
    return finish("select_quality", {**headline(results), **facts, "acceptance": acceptance(arms), "arms": arms}, args)


Results = dict[tuple[str, str], list[dict[str, Any]]]


def measure(bench: Bench, wanted: list[tuple[str, str]], seeds: range, args: argparse.Namespace) -> Results:
    """(variant, arm) -> measures, one a seed; with `transformer_loss` where that judge was asked."""
    judges = {"": bench.cell, **({"/transformer": bench.transformer_cell} if args.lm == "transformer" else {})}
    work = {f"{variant}/{arm}{tail}": functools.partial(cell, variant, arm) for tail, cell in judges.items() for variant, arm in wanted}
    done = Cells("select_quality", args).measure(work, seeds)
    results: Results = {(variant, arm): [dict(done[f"{variant}/{arm}", seed]) for seed in seeds] for variant, arm in wanted}
    for (variant, arm), cells in results.items() if args.lm == "transformer" else ():
        for cell, seed in zip(cells, seeds, strict=True):
            cell["transformer_loss"] = done[f"{variant}/{arm}/transformer", seed]["loss"]
    return results


def _sources(bench: Bench, seed: int) -> dict[str, Any]:
    corpus = bench.corpus(seed)
    return {"sizes": corpus.sizes, "sources": corpus.sources, "megabytes": sum(len(row["text"].encode()) for row in corpus.raw) / 1e6}


def headline(results: Results) -> dict[str, Any]:
    """`ours`, `peer`, `ratio`, `ci95` and `control` of the last line; on the first variant that was run."""
    variant = next(iter(results))[0]
    ours, peer, again = ([cell["perplexity"] for cell in results.get((variant, arm), [])] for arm in ("dsir", "random", "random again"))
    if not ours:
        return {}
    ratio, control = interval([b / a for a, b in zip(ours, peer, strict=True)]), interval([b / a for a, b in zip(again, peer, strict=True)])
    return {
        "ours": interval(ours)["mean"], "peer": interval(peer)["mean"], "ratio": ratio["mean"], "ci95": [ratio["low"], ratio["high"]],
        "control": {"value": control["mean"], **{side: control[side] for side in ("low", "high")}},
    }  # fmt: skip


if __name__ == "__main__":
    main()

"""Which selector picks the better training data? Every one at the same budget of tokens, on a labelled corpus, for several seeds.

    python benchmarks/select_quality.py                      # five seeds, trigram judge
    python benchmarks/select_quality.py --lm transformer     # the same picks, judged by a small Qwen2 as well
    python benchmarks/select_quality.py --quick              # one small corpus

The corpus (`_corpus.py`): package docstrings, code, licences, manual pages, changelogs and headers; the target is the docstrings of
the standard library, half for the selectors, half for the judges. It comes in three variants: `plain`; `salad`, with a
thousand rows of target words in random order; `guarded`, the same with the selectors' word-salad guard on.

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _corpus
from _corpus import SALAD, WORD, Corpus, Row
from _harness import Cells, arguments, finish
from _judges import Judge, interval, paired

VARIANTS = ("plain", "salad", "guarded")
FIGURES = ("p500", "p1000", "p2000", "relevant_tokens", "median_words", "kl_reduction", "transport", "loss", "perplexity")
RANKED = 2000
"""Rows of the order that are kept for precision."""


@dataclass(frozen=True)
class Arm:
    """One selector and its settings.

    Args:
        method: name in the registry.
        options: fields of its config.
        seed: added to the benchmark's seed.
        needs: `model`: the options `model` is a small language model trained on raw rows.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    needs: str = ""


ARMS: dict[str, Arm] = {
    "random": Arm("select.random"),
    "random again": Arm("select.random", seed=1000),
    "length": Arm("select.length"),
    "dsir": Arm("select.dsir"),
    "dsir 1.0.3": Arm("select.dsir", {"preset": "dsir-1.0.3"}),
}


class Bench:
    """Corpora, judges and picks of a run; everything is made once and kept in the work folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.work, self.factor = Path(args.work), 0.15 if args.quick else 1.0
        self.budget = int(args.tokens * self.factor)
        self.args = args
        self.corpus = functools.lru_cache(1)(self._corpus)
        self.judge = functools.lru_cache(1)(self._judge)
        self.files = functools.lru_cache(2)(self._files)

    def _corpus(self, seed: int) -> Corpus:
        return _corpus.build(seed, _corpus.scaled(self.factor), cache=self.work / "corpora")

    def _judge(self, seed: int) -> Judge:
        return Judge(self.corpus(seed).without(SALAD))

    def _files(self, seed: int, salad: bool) -> dict[str, list[Path]]:
        corpus = self.corpus(seed)
        return _corpus.write(self.work / f"shards-{seed}-{self.factor}-{salad}", corpus if salad else corpus.without(SALAD))

    def cell(self, variant: str, arm: str, seed: int) -> dict[str, Any]:
        """All measures of one pick, and the CPU seconds it took."""
        ranked, picked, seconds = self.pick(variant, arm, seed)
        return {**self.judge(seed)(ranked, picked), "seconds": seconds}

    def pick(self, variant: str, name: str, seed: int) -> tuple[list[Row], list[Row], float]:
        """(first rows of the order, rows within the budget of tokens, CPU seconds), through the Python door."""
        from data_pipelines.door import select_files

        arm, rows = ARMS[name], {row["id"]: row for row in self.corpus(seed).raw}
        files = self.files(seed, variant != "plain")
        out = self.work / "pick"
        for left in (out, out.with_name("pick.work")):
            shutil.rmtree(left, ignore_errors=True)
        options = {**arm.options, "guard": {"salad": variant == "guarded"}, "tokens": self.budget, "seed": seed + arm.seed}
        start = time.process_time()
        select_files(arm.method, files["raw"], files["target"], out, **options)
        seconds = time.process_time() - start
        order = [rows[row_id] for row_id in ranking(arm.method, out, options)]
        picked = [rows[row["id"]] for row in read_rows(out)]
        same = {row["id"] for row in prefix(order, self.budget)} == {row["id"] for row in picked}
        if not same:
            raise AssertionError(f"{name}: the picked rows are not the first ones of the order")
        return order[:RANKED], picked, round(seconds, 2)


def read_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of a folder that a selector wrote."""
    from posttrain.data.shards import expand_shards, read_shard

    for path in expand_shards(sorted(folder.glob("rows-*"))):
        yield from (row for _, row in read_shard(path))


def prefix(order: list[Row], budget: int) -> list[Row]:
    """The longest prefix with at most `budget` words."""
    taken = []
    for row in order:
        budget -= len(WORD.findall(row["text"].lower()))
        if budget < 0:
            break
        taken.append(row)
    return taken


def ranking(method: str, folder: Path, options: dict[str, Any]) -> list[str]:
    """Ids of all eligible rows in the order of the pick, from the score tables that a selector wrote."""
    import numpy as np
    import pyarrow.parquet as pq

    from data_pipelines.door import make_config
    from posttrain.core import registry

    options = dict(options)
    seed, module = options.pop("seed"), sys.modules[registry.method(method).module]
    table = pq.read_table([str(path) for path in sorted(folder.glob("scores-*.parquet"))])
    table = table.filter(np.asarray(table["reason"].to_pylist()) == "")
    columns = {name: table[name].to_numpy() for name in table.column_names if name not in ("id", "source", "shard", "reason")}
    order = getattr(module, "order", None)
    key = order(columns, make_config(method, options), seed) if order else columns["score"]
    ids = table["id"].to_pylist()
    return [ids[i] for i in np.lexsort((columns["uid"], -key))]


def table(results: dict[tuple[str, str], list[dict[str, Any]]], variant: str) -> tuple[list[str], dict[str, Any]]:
    """Printed lines of one variant, and its figures: arm -> figure -> mean and interval, `perplexity_minus_random` among them."""
    base = [cell["perplexity"] for cell in results[variant, "random"]]
    arms: dict[str, Any] = {}
    for (of, arm), cells in results.items():
        if of == variant:
            arms[arm] = {name: interval([cell[name] for cell in cells]) for name in (*FIGURES, "seconds")}
            arms[arm]["perplexity_minus_random"] = paired([cell["perplexity"] for cell in cells], base)
    head = (
        f"{variant:<28} {'P@500':>6} {'P@1000':>6} {'P@2000':>6} {'share':>6} {'words':>5} {'KL red':>7} {'W1':>6} {'ppl':>7}  {'95 %':<15}"
    )
    lines = [f"{head} {'- random':>8}  {'95 %':<17} {'cpu s':>6}"]
    for arm, found in sorted(arms.items(), key=lambda item: item[1]["perplexity"]["mean"]):
        mean = {name: value["mean"] for name, value in found.items()}
        lines.append(
            f"{arm:<28} {mean['p500']:6.3f} {mean['p1000']:6.3f} {mean['p2000']:6.3f} {mean['relevant_tokens']:6.3f}"
            f" {mean['median_words']:5.0f} {mean['kl_reduction']:+7.3f} {mean['transport']:6.3f}"
            f" {mean['perplexity']:7.1f}  {_span(found['perplexity']):<15}"
            f" {mean['perplexity_minus_random']:+8.1f}  {_span(found['perplexity_minus_random']):<17} {mean['seconds']:6.1f}"
        )
    return lines, arms


def _span(found: dict[str, Any]) -> str:
    return "" if found["low"] is None else f"[{found['low']:.0f}, {found['high']:.0f}]"


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


CONTROLS = ("random", "random again", "length")


def chosen(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(variant, arm) of the command line; `random` always among them."""
    arms = args.arms.split(",") if args.arms else list(ARMS)
    if unknown := [arm for arm in arms if arm not in ARMS]:
        sys.exit(f"unknown arms {unknown}; known: {', '.join(ARMS)}")
    arms = [arm for arm in ARMS if arm in {*arms, "random", "random again"}]
    return [(variant, arm) for variant in args.variants.split(",") for arm in arms]


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
        arms={"default": "", "help": "comma-separated; default all"},
        variants={"default": ",".join(VARIANTS), "help": "comma-separated"},
        work={"type": Path, "default": work, "help": "folder of corpora and shards"},
    )
    seeds = range(args.seeds or (1 if args.quick else 5))
    bench, wanted = Bench(args), chosen(args)
    cells = Cells("select_quality", args)
    names = {f"{variant}/{arm}": functools.partial(bench.cell, variant, arm) for variant, arm in wanted}
    done = cells.measure(names, seeds)
    results = {(variant, arm): [done[f"{variant}/{arm}", seed] for seed in seeds] for variant, arm in wanted}
    arms: dict[str, Any] = {}
    for variant in dict.fromkeys(variant for variant, _ in wanted):
        lines, arms[variant] = table(results, variant)
        print("\n".join(lines), "\n", sep="")
    record = {
        "seeds": list(seeds),
        "budget_tokens": bench.budget,
        "corpus": _sources(bench, seeds[0]),
        "acceptance": acceptance(arms),
        "arms": arms,
    }
    return finish("select_quality", {**headline(results), **record}, args)


def _sources(bench: Bench, seed: int) -> dict[str, Any]:
    corpus = bench.corpus(seed)
    return {"sizes": corpus.sizes, "sources": corpus.sources, "megabytes": sum(len(row["text"].encode()) for row in corpus.raw) / 1e6}


def headline(results: dict[tuple[str, str], list[dict[str, Any]]]) -> dict[str, Any]:
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

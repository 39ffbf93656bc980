"""TAROT from given gradients to the pick: the authors' code against ours, one thread each, the same arrays in memory.

    git clone https://github.com/vita-epfl/TAROT checkout
    python benchmarks/select_tarot.py --official checkout            # about half an hour
    python benchmarks/select_tarot.py --official checkout --quick

Timed are whitening, cosines, neighbour lists and the rule. Theirs: `WFDEstimator.get_wfd` and `DataSelector.select_data` of the
checkout itself, with float32 gradients on the CPU; only the plotting and logging packages it imports for figures are replaced
by empty modules. Ours: float64 covariance, float32 features, exact neighbours, exact transport. The ridge is theirs in both.
Their pool for sorting is held to one process, whose time is not counted.

    synthetic   mixtures of Gaussians with a decaying spectrum: raw rows of 30 centres, targets of 8 of them
    text        hashed n-gram counts of the corpus; the target is docstrings of the standard library

Their product with the whitening matrix L^-T is one with its transpose (`get_matrix_mult` transposes its second argument), so
their features are not white; ours are. Before anything is timed, `compat="repo"` on features like theirs must pick what they
pick but for the rounding of their half-precision (at least 85 % of the rows), and the transport cost W1 of our pick to the
targets, exact, in float64 and between white features, must not exceed that of theirs by more than 0.5 %.

`ratio` of the record is the smallest among the parts. At 1,024 dimensions both spend most of `fixed` in the same two products
of matrices, ours in float64.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _corpus
from _harness import arguments, compare, finish, speed
from select_ot import features

from data_pipelines.neighbours import Neighbours, top_neighbours
from data_pipelines.ot import transport
from data_pipelines.tarot_rules import Space, distance, fixed, otm, with_lists
from data_pipelines.whitening import added, covariance, moments, whiten, whitener

FIGURES = ("matplotlib", "matplotlib.pyplot", "matplotlib.colors", "seaborn", "wandb")
"""What their modules import for plots and logs."""
RULES = {"fixed": "fixed_size", "otm": "otm"}
SHARE, LIMIT, FOLDS, RIDGE = 0.1, 2000, 10, 1e-5
"""Of `fixed`; their list length, folds and ridge."""
ALIKE, WORSE = 0.85, 1.005
Gradients = tuple[np.ndarray, np.ndarray]


class _Empty(types.ModuleType):
    """A module whose names are all empty modules."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Empty(name)


class Official:
    """The modules of a checkout.

    Raises:
        SystemExit: there is no checkout, or what it needs is not installed.
    """

    def __init__(self, folder: Path | None) -> None:
        if folder is None or not (folder / "tarot" / "data_selector.py").exists():
            raise SystemExit("--official: a checkout of https://github.com/vita-epfl/TAROT is needed to compare with; nothing was measured")
        for name in FIGURES:
            sys.modules.setdefault(name, _Empty(name))
        sys.path.insert(0, str(folder.resolve()))
        try:
            from tarot.data_selector import DataSelector
            from tarot.wfd_estimator import WFDEstimator
        except ImportError as missing:
            raise SystemExit(f"--official: their code needs {missing.name}: pip install 'posttrain[peers,select]' psutil tqdm") from missing
        import torch

        torch.set_num_threads(1)
        self._selector, self._estimator, self._torch = DataSelector, WFDEstimator, torch

    def pick(self, gradients: Gradients, rule: str) -> np.ndarray:
        """Ids of the rows that their code picks."""
        with tempfile.TemporaryDirectory() as folder, _silence(), mock.patch("os.cpu_count", return_value=1):
            (Path(folder) / "checkpoint").mkdir()
            store = {"candidate_grads": gradients[0], "target_grads": gradients[1]}
            saver = types.SimpleNamespace(load_current_store=lambda _: None, current_store=store)
            estimator = types.SimpleNamespace(save_dir=folder, saver=saver, device="cpu", dtype=self._torch.float32)
            estimator.get_xtx = lambda rows: self._estimator.get_xtx(estimator, rows)
            score, rows, targets = self._estimator.get_wfd(estimator)
            settings = {
                "device": "cpu", "selection_method": RULES[rule], "selection_ratio": SHARE, "k_fold_splits": FOLDS,
                "merge_target_data": True, "data_weighting": False,
            }  # fmt: skip
            ids, _ = self._selector(settings).select_data(score, rows, targets)
        return np.asarray(ids, np.int64)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def whitened(gradients: Gradients, compat: str = "") -> Gradients:
    """Features of rows and targets, float32, of unit length: of (x - m) L^-T, or of their (x - m) L^-1."""
    raw, target = gradients
    mean, s = covariance(added([moments([raw]), moments([target])]))
    w = whitener(s, RIDGE, relative=False)
    w = np.ascontiguousarray(w.T) if compat == "repo" else w
    return whiten(raw, mean, w), whiten(target, mean, w)


def pick(gradients: Gradients, rule: str, compat: Any = "") -> np.ndarray:
    """Ids of the rows that ours picks."""
    rows, targets = whitened(gradients, compat)
    space, k = Space(targets, lambda ids: rows[ids], compat=compat), int(SHARE * len(rows))

    def make(limit: int) -> Neighbours:
        return top_neighbours([(np.arange(len(rows)), rows)], targets, limit)

    if rule == "fixed":
        return with_lists(make, lambda lists, whole: fixed(lists, space, k, whole=whole), max(16, 4 * -(-k // len(targets))), LIMIT).ids
    return with_lists(make, lambda lists, whole: otm(lists, space, folds=FOLDS, whole=whole), 32, LIMIT).ids


def synthetic(rows: int, targets: int, dim: int) -> Gradients:
    """See the module."""
    rng = np.random.default_rng(0)
    scale = 0.01 * np.arange(1, dim + 1) ** -0.5
    centres = 0.7 * rng.standard_normal((30, dim))
    drawn = (centres[rng.integers(0, most, n)] + rng.standard_normal((n, dim)) for n, most in ((rows, 30), (targets, 8)))
    raw, target = ((values * scale).astype(np.float32) for values in drawn)
    return raw, target


def text(scale: float, dim: int) -> Gradients:
    """Hashed counts, scaled down to the size of gradients."""
    corpus = _corpus.build(0, _corpus.scaled(scale))
    raw, target = (0.01 * features([row["text"] for row in rows], dim) for rows in (corpus.raw, corpus.target))
    return raw, target


def part(official: Official, gradients: Gradients, rule: str, quick: bool) -> dict[str, Any]:
    """One set of gradients and one rule."""
    theirs, ours, alike = official.pick(gradients, rule), pick(gradients, rule), pick(gradients, rule, "repo")
    rows, targets = (x.astype(np.float64) for x in whitened(gradients))
    cost = {name: transport(distance(rows[ids], targets), form="none").value for name, ids in (("peer", theirs), ("ours", ours))}
    shared = len(np.intersect1d(theirs, alike)) / max(len(theirs), len(alike))
    if shared < ALIKE or cost["ours"] > WORSE * cost["peer"]:
        raise RuntimeError(f"{rule}: {shared:.1%} of the rows are the same under compat, transport costs {cost}")
    work: tuple[Callable[[], Any], Callable[[], Any]] = (lambda: official.pick(gradients, rule), lambda: pick(gradients, rule))
    measured = speed(compare(*work, pairs=3 if quick else 20, warmup=1))
    return {
        **measured, "unit": "CPU s", "rows": len(rows), "targets": len(targets), "dimensions": rows.shape[1],
        "transport_cost": cost, "picked": {"peer": len(theirs), "ours": len(ours), "compat": len(alike)}, "same_under_compat": shared,
    }  # fmt: skip


def main() -> None:
    """Runs it."""
    args = arguments(__doc__ or "", official={"type": Path, "help": "checkout of the authors' repository"})
    if os.environ.get("OMP_NUM_THREADS") != "1":
        raise SystemExit("set OMP_NUM_THREADS=1: both run on one thread")
    official = Official(args.official)
    size: tuple[int, int, int] = (1500, 60, 128) if args.quick else (10_000, 400, 1024)
    sets = {"synthetic": synthetic(*size), "text": text(0.12 if args.quick else 0.75, size[2])}
    parts = {f"{name}-{rule}": part(official, gradients, rule, args.quick) for name, gradients in sets.items() for rule in RULES}
    for name, found in parts.items():
        timed = f"{found['peer']:.2f} s / {found['ours']:.2f} s = {found['ratio']:.2f}"
        print(f"{name:16} {timed}; W1 {found['transport_cost']}; {found['picked']}")
    worst = min(parts, key=lambda name: parts[name]["ratio"])
    keys = ("ours", "peer", "ratio", "ci95", "control", "verdict", "clock", "pairs", "unit")
    finish("select_tarot", {**{key: parts[worst][key] for key in keys}, "worst": worst, "parts": parts}, args)


if __name__ == "__main__":
    main()

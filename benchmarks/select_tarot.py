"""TAROT from given gradients to the pick: the authors' code against ours, one thread each, the same arrays in memory.

    git clone https://github.com/vita-epfl/TAROT checkout
    python benchmarks/select_tarot.py --official checkout            # about half an hour
    python benchmarks/select_tarot.py --official checkout --quick

Timed are whitening, cosines, neighbour lists and the rule. Theirs: `WFDEstimator.get_wfd` and `DataSelector.select_data` of the
checkout itself, with float32 gradients on the CPU; only the plotting and logging packages it imports for figures are replaced
by empty modules. Ours: float64 covariance, float32 features, exact neighbours, exact transport. The ridge is theirs in both.
Their pool for sorting is held to one process, whose time is not counted. Without `--official` the peer is `Rendering`, their
steps written down plainly with numpy and GeomLoss, all of it float32; `peer_code` says which it was.

    synthetic   mixtures of Gaussians with a decaying spectrum: raw rows of 30 centres, targets of 8 of them
    text        hashed n-gram counts of the corpus; the target is docstrings of the standard library

Their product with the whitening matrix L^-T is one with its transpose (`get_matrix_mult` transposes its second argument), so
their features are not white; ours are. Before anything is timed, `compat="repo"` on features like theirs must pick what they
pick but for the rounding of their half-precision (at least 85 % of the rows), and the transport cost W1 of our pick to the
targets, exact, in float64 and between white features, must not exceed that of theirs by more than 0.5 %.

`ratio` of the record is the smallest among the parts. `bound` is what it could be at most: their time over that of our three
products of matrices alone (covariance and whitening in float64, cosines in float32), timed in the same process. `layers` is how
often `otm` measures a transport cost; exact costs go on falling where annealed ones have stopped.

    last        not timed: of the layer that `fixed` cuts, the smallest or the largest potentials kept; transport cost of the pick
                to the targets, and to as many held-out ones, over sets and sizes
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
from _harness import arguments, compare, finish, speed, timed
from select_ot import features

from data_pipelines.neighbours import Neighbours, top_neighbours
from data_pipelines.ot import transport
from data_pipelines.tarot_rules import Picked, Space, distance, fixed, folds_of, otm, with_lists
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
        SystemExit: that is no checkout, or what it needs is not installed.
    """

    name = "vita-epfl/TAROT"

    def __init__(self, folder: Path) -> None:
        if not (folder / "tarot" / "data_selector.py").exists():
            raise SystemExit("--official: that is no checkout of https://github.com/vita-epfl/TAROT; nothing was measured")
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


class Rendering:
    """The steps of the authors' code with numpy and GeomLoss, in float32 throughout, which is faster than their float16 on a CPU."""

    name = "own rendering of the published steps"

    def __init__(self) -> None:
        import torch
        from geomloss import SamplesLoss

        torch.set_num_threads(1)
        self._torch = torch
        settings = {"loss": "sinkhorn", "cost": self._cost, "debias": False, "blur": 0.01, "backend": "tensorized", "scaling": 0.5}
        self._value, self._potentials = (SamplesLoss(**settings, potentials=given) for given in (False, True))

    def _cost(self, x: Any, y: Any) -> Any:
        return (2 - 2 * x[0] @ y[0].T).abs().sqrt()[None]

    def pick(self, gradients: Gradients, rule: str) -> np.ndarray:
        """Ids of the rows that these steps pick."""
        split, every = len(gradients[0]), np.concatenate(gradients)
        every = every - every.mean(0)
        lower = np.linalg.cholesky(every.T @ every / len(every) + RIDGE * np.eye(every.shape[1], dtype=np.float32))
        every = every @ np.linalg.inv(lower)
        every /= np.linalg.norm(every, axis=1, keepdims=True)
        rows, targets = every[:split], every[split:]
        score = rows @ targets.T
        best = np.argpartition(-score, min(LIMIT, split) - 1, axis=0)[:LIMIT]
        order = np.take_along_axis(best, np.argsort(-np.take_along_axis(score, best, 0), axis=0), 0)
        x, y = (self._torch.from_numpy(values) for values in (rows, targets))
        return self._fixed(order, x, y, int(SHARE * split)) if rule == "fixed" else self._otm(order, score, x, y)

    def _fixed(self, order: np.ndarray, x: Any, y: Any, k: int) -> np.ndarray:
        ids: set[int] = set()
        for layer in order:
            new = set(layer.tolist()) - ids
            if len(ids) + len(new) > k:
                left = np.array(sorted(new))
                potential = self._potentials(x[left], y)[0][0].numpy()
                ids |= set(left[np.argsort(potential)[len(left) - (k - len(ids)) :]].tolist())
                break
            ids |= new
        self._potentials(x[sorted(ids)], y)
        return np.array(sorted(ids))

    def _otm(self, order: np.ndarray, score: np.ndarray, x: Any, y: Any) -> np.ndarray:
        union: set[int] = set()
        for part in folds_of(len(y), FOLDS, 42):
            others, best = np.setdiff1d(np.arange(len(y)), part), np.inf
            for k in range(1, len(order)):
                lists = order[:k, part]
                ids = np.unique(lists[score[lists, part] > 0])
                cost = self._value(x[ids], y[others]).item()
                if cost >= best:
                    break
                best = cost
            union |= set(ids.tolist())
        self._potentials(x[sorted(union)], y)
        return np.array(sorted(union))


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


def pick(gradients: Gradients, rule: str, compat: Any = "") -> Picked:
    """What ours picks."""
    rows, targets = whitened(gradients, compat)
    space, k = Space(targets, lambda ids: rows[ids], compat=compat), int(SHARE * len(rows))

    def make(limit: int) -> Neighbours:
        return top_neighbours([(np.arange(len(rows)), rows)], targets, limit)

    if rule == "fixed":
        last: Any = "largest" if compat else "smallest"
        return with_lists(
            make, lambda lists, whole: fixed(lists, space, k, last=last, whole=whole), max(16, 4 * -(-k // len(targets))), LIMIT
        )
    return with_lists(make, lambda lists, whole: otm(lists, space, folds=FOLDS, whole=whole), 32, LIMIT)


def products(gradients: Gradients) -> Callable[[], Any]:
    """The three products of matrices that ours cannot do without."""
    from scipy.linalg.blas import dsyrk, dtrmm

    every = np.concatenate(gradients)
    wide, turned = every.astype(np.float64), np.asfortranarray(np.triu(np.ones((every.shape[1],) * 2)))
    return lambda: (dsyrk(1.0, wide.T), dtrmm(1.0, turned, wide.T, lower=0), gradients[0] @ gradients[1].T)


def synthetic(rows: int, targets: int, dim: int, seed: int = 0) -> Gradients:
    """See the module."""
    rng = np.random.default_rng(seed)
    scale = 0.01 * np.arange(1, dim + 1) ** -0.5
    centres = 0.7 * rng.standard_normal((30, dim))
    drawn = (centres[rng.integers(0, most, n)] + rng.standard_normal((n, dim)) for n, most in ((rows, 30), (targets, 8)))
    raw, target = ((values * scale).astype(np.float32) for values in drawn)
    return raw, target


def text(scale: float, dim: int, seed: int = 0, heldout: bool = False) -> Gradients:
    """Hashed counts, scaled down to the size of gradients; `heldout` rows follow the targets."""
    corpus = _corpus.build(seed, _corpus.scaled(scale))
    goal = [*corpus.target, *corpus.heldout] if heldout else corpus.target
    raw, target = (0.01 * features([row["text"] for row in rows], dim) for rows in (corpus.raw, goal))
    return raw, target


def last(seeds: int, sizes: tuple[int, ...] = (100, 300, 450, 700)) -> dict[str, Any]:
    """How often, and by how much, the smallest potentials give the lower transport cost; to targets and held-out targets."""
    found = []
    for seed in range(seeds):
        for raw, both in (synthetic(3000, 240, 128, seed), text(0.25, 256, seed, heldout=True)):
            half = len(both) // 2
            mean, s = covariance(added([moments([raw]), moments([both[:half]])]))
            w = whitener(s, 1.0)
            rows, target, other = (whiten(values, mean, w) for values in (raw, both[:half], both[half:]))
            lists, space = top_neighbours([(np.arange(len(rows)), rows)], target, 400), Space(target, rows.__getitem__)
            for k in sizes:
                ids = [fixed(lists, space, k, last=kept).ids for kept in ("smallest", "largest")]
                goals = (target.astype(np.float64), other.astype(np.float64))
                cost = [[transport(distance(rows[i].astype(np.float64), y), form="none").value for i in ids] for y in goals]
                found.append(cost)
    small, large = np.moveaxis(np.array(found), -1, 0)
    return {
        "cases": len(found), "smallest_is_lower": (small < large).sum(0).tolist(), "mean_change": (small / large - 1).mean(0).tolist(),
    }  # fmt: skip


def part(official: Official | Rendering, gradients: Gradients, rule: str, quick: bool) -> dict[str, Any]:
    """One set of gradients and one rule."""
    found = pick(gradients, rule)
    theirs, ours, alike = official.pick(gradients, rule), found.ids, pick(gradients, rule, "repo").ids
    rows, targets = (x.astype(np.float64) for x in whitened(gradients))
    cost = {name: transport(distance(rows[ids], targets), form="none").value for name, ids in (("peer", theirs), ("ours", ours))}
    shared = len(np.intersect1d(theirs, alike)) / max(len(theirs), len(alike))
    if shared < ALIKE or cost["ours"] > WORSE * cost["peer"]:
        raise RuntimeError(f"{rule}: {shared:.1%} of the rows are the same under compat, transport costs {cost}")
    work: tuple[Callable[[], Any], Callable[[], Any]] = (lambda: official.pick(gradients, rule), lambda: pick(gradients, rule))
    measured = speed(compare(*work, pairs=3 if quick else 20, warmup=1))
    least, layers = products(gradients), sum(map(len, found.facts.get("fold_costs", [])))
    bound = measured["peer"] / sorted(timed(least)[1] for _ in range(3 if quick else 9))[1 if quick else 4]
    return {
        **measured, "bound": bound, "layers": layers, "unit": "CPU s",
        "rows": len(rows), "targets": len(targets), "dimensions": rows.shape[1],
        "transport_cost": cost, "picked": {"peer": len(theirs), "ours": len(ours), "compat": len(alike)}, "same_under_compat": shared,
    }  # fmt: skip


def main() -> None:
    """Runs it."""
    args = arguments(__doc__ or "", official={"type": Path, "help": "checkout of the authors' repository"})
    if os.environ.get("OMP_NUM_THREADS") != "1":
        raise SystemExit("set OMP_NUM_THREADS=1: both run on one thread")
    official = Official(args.official) if args.official else Rendering()
    size: tuple[int, int, int] = (1500, 60, 128) if args.quick else (10_000, 400, 1024)
    sets = {"synthetic": synthetic(*size), "text": text(0.12 if args.quick else 0.75, size[2])}
    parts = {f"{name}-{rule}": part(official, gradients, rule, args.quick) for name, gradients in sets.items() for rule in RULES}
    for name, found in parts.items():
        spent = f"{found['peer']:.2f} s / {found['ours']:.2f} s = {found['ratio']:.2f}"
        print(f"{name:16} {spent}; W1 {found['transport_cost']}; {found['picked']}")
    worst = min(parts, key=lambda name: parts[name]["ratio"])
    keys = ("ours", "peer", "ratio", "ci95", "control", "verdict", "clock", "pairs", "unit")
    figures = {"peer_code": official.name, "worst": worst, "parts": parts, "last": last(1 if args.quick else 4)}
    finish("select_tarot", {**{key: parts[worst][key] for key in keys}, **figures}, args)


if __name__ == "__main__":
    main()

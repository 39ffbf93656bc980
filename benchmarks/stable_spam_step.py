"""One step of Stable-SPAM: ours against the authors' optimizer, and against fused AdamW behind a global clip.

    python benchmarks/stable_spam_step.py                        # 42 million parameters, 20 pairs each; some minutes on one core
    python benchmarks/stable_spam_step.py --quick                # 4 million parameters, 3 pairs each
    python benchmarks/stable_spam_step.py --official CHECKOUT    # the authors' file in a checkout of TianjinYellow/StableSPAM@6a66da1

Without `--official` the peer is `Published`: the published steps, a tensor at a time, in the order and with the operations of the
authors' file. Before anything is timed ours with `compat="official"` must agree with the peer after 12 steps with a reset.

Weights have the shapes of a Llama of 8 layers, in float32. Gradients are normal, each row with its own size, and each tensor's size
varies from step to step (log-normal, 0.2), so that about half of the tensors have entries above their threshold. All optimizers
get the same gradients, which are written anew outside the clock.

`ratio` is the peer's CPU time over ours, with all parts on; `rest` are our times over that of fused AdamW behind
`clip_grad_norm_` (below 1: ours is faster), also for `gradient_stabilizer`, for foreach instead of fused, and for the 336 small
tensors of an adapter.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from _harness import arguments, compare, finish, speed

from posttrain.optim.presets import PRESETS
from posttrain.optim.stable_spam import StableSPAM

FULL = {"layers": 8, "hidden": 512, "inner": 1408, "vocabulary": 16_000}
QUICK = {"layers": 3, "hidden": 256, "inner": 704, "vocabulary": 3_000}
PAIRS = {False: 20, True: 3}
RATE = 1e-5


class Published(torch.optim.Optimizer):
    """The published steps, a tensor at a time, with one counter and the reset after the update's moments were taken."""

    def __init__(self, params: Any, lr: float, decays: tuple[float, float, float] = (0.7, 0.9, 0.999), reset_every: int = 1000) -> None:
        super().__init__(params, {"lr": lr})
        self.decays, self.reset_every, self.total = decays, reset_every, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update."""
        self.total += 1
        for group in self.param_groups:
            for p in group["params"]:
                self._update(p, group["lr"])

    def _update(self, p: torch.Tensor, lr: float) -> None:
        first, second, clip = self.decays
        state = self.state[p]
        if not state:
            state.update(k=0, m=torch.zeros_like(p), v=torch.zeros_like(p), top=0.0, norm=0.0, square=0.0)
        state["k"] += 1
        m, v, g = state["m"], state["v"], p.grad
        peak = g.abs().max()
        state["top"] = clip * state["top"] + (1 - clip) * peak
        threshold = state["top"] / (1 - clip ** state["k"])
        above = g.abs() > threshold
        if above.sum() > 0:
            g[above] = g[above] / peak * threshold
        norm = torch.norm(g)
        state["norm"] = first * state["norm"] + (1 - first) * norm
        state["square"] = second * state["square"] + (1 - second) * norm**2
        if norm > 0:
            size = state["norm"] / (1 - first ** state["k"]) / (torch.sqrt(state["square"] / (1 - second ** state["k"])) + 1e-8)
            g = g / norm * size
        if self.total % self.reset_every == 0:
            state.update(k=1, m=torch.zeros_like(p), v=torch.zeros_like(p))
        m.mul_(0.9).add_(g, alpha=0.1)
        v.mul_(0.999).addcmul_(g, g, value=0.001)
        step = m / (v.sqrt() / math.sqrt(1 - 0.999 ** state["k"])).add_(1e-8)
        p.add_(step, alpha=-lr / (1 - 0.9 ** state["k"]))


def authors(checkout: Path | None) -> Callable[..., Any]:
    """(parameters, lr, reset_every) -> the authors' optimizer, or `Published`."""
    if checkout is None:
        return lambda params, lr, reset_every: Published(params, lr, reset_every=reset_every)
    spec = importlib.util.spec_from_file_location("official_stable_spam", checkout / "galore_torch" / "stablespam.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"no galore_torch/stablespam.py in {checkout}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda params, lr, reset_every: module.StableSPAM(params, lr=lr, update_proj_gap=reset_every)


def shapes(layers: int, hidden: int, inner: int, vocabulary: int) -> list[tuple[int, ...]]:
    """The parameters of a Llama with an output head of its own."""
    layer = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner), (hidden,), (hidden,)]
    return [(vocabulary, hidden), *layer * layers, (hidden,), (vocabulary, hidden)]


def adapter_shapes(layers: int = 24, hidden: int = 896, rank: int = 16) -> list[tuple[int, ...]]:
    """Two small matrices for each of seven projections."""
    return [(rank, hidden), (hidden, rank)] * 7 * layers


class Bench:
    """Gradients that several optimizers share, each with weights of its own.

    Args:
        sizes: shapes of the weights.
    """

    def __init__(self, sizes: list[tuple[int, ...]]) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.banks = [[self._gradient(size) for size in sizes] for _ in range(2)]
        self.gradients = [torch.empty_like(g) for g in self.banks[0]]
        self.steps = 0

    def _gradient(self, size: tuple[int, ...]) -> torch.Tensor:
        rows = torch.randn(size[0], *[1] * (len(size) - 1), generator=self.generator)
        return torch.randn(size, generator=self.generator).mul_(rows.exp_()).mul_(1e-3)

    def prepare(self) -> None:
        """The next step's gradients."""
        self.steps += 1
        sizes = torch.randn(len(self.gradients), generator=self.generator).mul_(0.2).exp_().tolist()
        for out, gradient, size in zip(self.gradients, self.banks[self.steps % 2], sizes, strict=True):
            torch.mul(gradient, size, out=out)

    def parameters(self) -> list[torch.nn.Parameter]:
        """New weights, the shared gradients on them."""
        torch.manual_seed(1)
        found = [torch.nn.Parameter(torch.randn(g.shape) * 0.02) for g in self.gradients]
        for p, gradient in zip(found, self.gradients, strict=True):
            p.grad = gradient
        return found


def assert_equal(sizes: list[tuple[int, ...]], peer: Callable[..., Any]) -> float:
    """Largest difference of weights after 12 steps with a reset, in learning rates; SystemExit where it is no rounding."""
    weights = []
    for make in (lambda p: peer(p, RATE, 5), lambda p: StableSPAM(p, RATE, reset_every=5, compat="official")):
        bench = Bench(sizes)
        params = bench.parameters()
        optimizer = make(params)
        for _ in range(12):
            bench.prepare()
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in params]))
    gap = float((weights[0] - weights[1]).abs().max()) / RATE
    if not gap < 1e-2:
        raise SystemExit(f"ours with compat='official' and the peer differ by {gap:g} learning rates: not the same method")
    return gap


def clipped(params: list[torch.nn.Parameter]) -> Callable[[], Any]:
    """A step of fused AdamW behind a global clip."""
    optimizer = torch.optim.AdamW(params, RATE, fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    return step


def against_clip(sizes: list[tuple[int, ...]], pairs: int, **options: Any) -> dict[str, Any]:
    """Our time over that of fused AdamW behind a global clip."""
    bench = Bench(sizes)
    base, ours = clipped(bench.parameters()), StableSPAM(bench.parameters(), RATE, **options)
    found = compare(base, ours.step, pairs=pairs, prepare=bench.prepare)
    cpu = found["cpu"]
    return {"ours_over_clip": cpu["ratio"], **{name: cpu[name] for name in ("control", "verdict", "baseline_s", "candidate_s")}}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Command line; returns the record."""
    args = arguments(__doc__ or "", argv, official={"type": Path, "metavar": "CHECKOUT", "help": "the authors' repository"})
    torch.set_num_threads(1)
    sizes, pairs, peer = shapes(**(QUICK if args.quick else FULL)), PAIRS[args.quick], authors(args.official)
    gap = assert_equal(shapes(layers=1, hidden=64, inner=160, vocabulary=300), peer)
    bench = Bench(sizes)
    theirs, ours = peer(bench.parameters(), RATE, 1000), StableSPAM(bench.parameters(), RATE)
    record = speed(compare(theirs.step, ours.step, pairs=pairs, prepare=bench.prepare))
    clips = ours.figures()["optim/clipped"]
    del bench, theirs, ours
    record |= {
        "peer_is": "the authors' file" if args.official else "the published steps", "parameters": sum(math.prod(s) for s in sizes),
        "tensors": len(sizes), "tensors_clipped": clips, "gap_in_lr": gap,
        "rest": {
            "stable_spam": against_clip(sizes, pairs),
            "gradient_stabilizer": against_clip(sizes, pairs, **PRESETS["gradient_stabilizer"]),
            "stable_spam, foreach": against_clip(sizes, pairs, foreach=True),
            "stable_spam, adapter": against_clip(adapter_shapes(layers=4 if args.quick else 24), pairs),
        },
    }  # fmt: skip
    return finish("stable_spam_step", record, args)


if __name__ == "__main__":
    main()

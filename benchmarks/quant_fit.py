"""Seconds to fit a block, the same steps with the same loss: ours against the loop of ApiQ's released code.

    OMP_NUM_THREADS=1 python benchmarks/quant_fit.py            # ten minutes on one core
    OMP_NUM_THREADS=1 python benchmarks/quant_fit.py --quick

One Llama block (width 576, 9 heads of 3 groups, 1536 inside: SmolLM2-135M's), 2 bits, groups of 64, rank 16.

    bw   block-wise, both losses, windows of 128 tokens one at a time, 16 steps: `fit_block` of `_quant_authors.py` against `train_block`
    lw   layer-wise, the down projection, 8192 tokens, 20 steps: products with all tokens in each step against second moments, whose
         collection is counted in ours

The losses of both ways after the last step are told; they must agree. `ratio` is that of lw, `parts` has both.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from _harness import arguments, compare, finish, speed
from _quant_authors import fit_block, fit_layer

from posttrain.quant.blocks import Blocks
from posttrain.quant.closed_form import Fitted, Grid
from posttrain.quant.fake import Clip
from posttrain.quant.fit_gram import fit_gram
from posttrain.quant.grams import Moments
from posttrain.quant.job import Job
from posttrain.quant.layers import linear_layers
from posttrain.quant.reconstruct import Training, train_block
from posttrain.quant.states import States

BITS, GROUP, RANK, LENGTH = 2, 64, 16, 128
RATES = {"clip": 5e-3, "lora": 5e-4}
PLAN = {"train": ("clip", "lora"), "lr": RATES, "decay": dict.fromkeys(RATES, 0.1), "augmented": True, "patience": 0, "shuffle": False}


def blocks() -> Blocks:
    """A model of one block."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 1}
    return Blocks(LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape)).eval())


def start(weight: Any, seed: int) -> Fitted:
    """The paper's start, the same draws as the peer's."""
    generator = torch.Generator().manual_seed(seed)
    a = (torch.rand(RANK, weight.shape[1], generator=generator) * 2 - 1) * weight.shape[1] ** -0.5
    return Fitted(Clip(weight, Grid(BITS, GROUP, False)).quantized(), a, torch.zeros(weight.shape[0], RANK))


def block_wise(rows: int, epochs: int, pairs: int, folder: Path) -> dict[str, Any]:
    """Both ways on the same block."""
    made = blocks()
    block = made.modules[0]
    generator = torch.Generator().manual_seed(1)
    plain = torch.randn(rows + 1, LENGTH, 576, generator=generator)
    seen = plain + 0.1 * torch.randn(plain.shape, generator=generator)
    with torch.no_grad():
        targets = [torch.cat([made.run(0, block, x[row : row + 1]) for row in range(rows + 1)]) for x in (plain, seen)]
    files = []
    for name, values in (("h", plain), ("q", seen), ("t", targets[0]), ("a", targets[1])):
        files.append(States(folder / name, tuple(values.shape)))  # type: ignore[arg-type]
        files[-1].write(0, values)
    losses: dict[str, float] = {}
    size = float(targets[0][:rows].square().mean())

    def theirs() -> None:
        losses["peer"] = fit_block(
            copy.deepcopy(block), lambda b, x: made.run(0, b, x), seen[:rows], [t[:rows] for t in targets], BITS, GROUP, RANK, epochs
        ) / size  # fmt: skip

    def ours() -> None:
        work = copy.deepcopy(block)
        layers = linear_layers(work, made.name(0))
        grids = {layer.name: Grid(BITS, GROUP, False) for layer in layers}
        ranks = {layer.name: RANK for layer in layers}
        job = Job(made, 0, block, work, layers, (files[0], files[1]), rows, grids, ranks, 1)
        for seed, layer in enumerate(layers):
            job.fitted[layer.name] = start(job.weights[layer.name], seed)
        train_block(job, Training(epochs=epochs, batch=1, **PLAN), (files[2], files[3]), fresh=True)  # type: ignore[arg-type]
        losses["ours"] = job.facts["losses"][-1]

    found = speed(compare(theirs, ours, pairs=pairs, warmup=1))
    return {**found, "loss": losses, "steps": rows * epochs}


def layer_wise(tokens: int, steps: int, pairs: int) -> dict[str, Any]:
    """Both ways on the same layer."""
    made = blocks()
    linear = linear_layers(made.modules[0])[-1].module
    weight: Any = linear.weight.data
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, weight.shape[1], generator=generator) * torch.logspace(0, -1, weight.shape[1])
    xq = x + 0.05 * torch.randn(x.shape, generator=generator)
    y = x @ weight.T
    losses: dict[str, float] = {}

    def theirs() -> None:
        losses["peer"] = fit_layer(linear, xq, y, BITS, GROUP, RANK, steps)

    def ours() -> None:
        moments = Moments.empty(weight.shape[1])
        moments.add(xq, x, {"weight": weight})
        plan = Training(epochs=steps // 10, batch=1, **PLAN)  # type: ignore[arg-type]
        found = fit_gram(weight, moments, moments, Grid(BITS, GROUP, False), start(weight, 0), plan)
        losses["ours"] = moments.error("weight", weight, found.effective())

    found = speed(compare(theirs, ours, pairs=pairs, warmup=1))
    return {**found, "loss": losses, "steps": steps, "tokens": tokens}


def main() -> None:
    """Measures both."""
    args = arguments(__doc__ or "")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        pairs = 2 if args.quick else 20
        parts = {"bw": block_wise(4 if args.quick else 8, 1 if args.quick else 2, pairs, Path(folder))}
        parts["lw"] = layer_wise(1024 if args.quick else 8192, 20, min(pairs, 6))
    for name, part in parts.items():
        print(f"{name}: {part['peer']:.2f} s and {part['ours']:.2f} s, ratio {part['ratio']:.2f}, losses {part['loss']}")
    finish("quant_fit", {**parts["lw"], "unit": "seconds a fit", "parts": parts}, args)


if __name__ == "__main__":
    main()

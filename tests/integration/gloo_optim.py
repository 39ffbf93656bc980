"""Started by torchrun: Stable-SPAM on a model that FSDP's second version has split, then in the stages of `specs.json` (`gloo_stage.py`).

Argument: a folder with `specs.json`, in which the results are put.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gloo_stage import run
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

from posttrain.optim.stable_spam import AVERAGES, StableSPAM

STEPS, OPTIONS = 12, {"lr": 0.05, "weight_decay": 0.1, "reset_every": 5, "clip_decay": 0.9}
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def make_model() -> torch.nn.Module:
    """Two layers in float64; a bias of one entry is empty on the second process, and 7 rows are split unevenly."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1)).double()


def loss_of(model: torch.nn.Module, step: int, rows: slice = slice(None)) -> torch.Tensor:
    """Mean squared error on rows of a batch whose size varies, with a spike at step 7."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    targets = inputs.sum(1, keepdim=True) * (300 if step == 7 else 1 + step % 3)
    return ((model(inputs[rows]) - targets[rows]) ** 2).mean()


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range, rows: slice = slice(None)) -> None:
    """Some steps on this process's rows."""
    for step in steps:
        loss_of(model, step, rows).backward()
        optimizer.step()
        optimizer.zero_grad()


def split_model() -> Any:
    """The model, each layer split over the processes."""
    model = make_model()
    for layer in (model[0], model[2]):
        fully_shard(layer)
    return fully_shard(model)


def averages_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[float]]:
    """Name -> t, T, mu, nu."""
    return {name: [optimizer.state[p][key] for key in AVERAGES] for name, p in model.named_parameters()}


def weights_of(model: torch.nn.Module) -> dict[str, list[float]]:
    """Whole weights, flattened."""
    return {name: getattr(p, "full_tensor", lambda p=p: p)().detach().flatten().tolist() for name, p in model.named_parameters()}


def main() -> None:
    """The split model, then the stages, in one process group: a second one on the same store can meet the keys of the first, and hang."""
    folder, rank, size = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    (folder / f"fsdp-{rank}.json").write_text(json.dumps(split_run(rank)))
    for spec in json.loads((folder / "specs.json").read_text()):
        run(spec, Path(spec["root"]), rank, size)


def split_run(rank: int) -> dict[str, Any]:
    """Trains straight, and over a checkpoint of whole tensors."""
    mine = slice(4 * rank, 4 * rank + 4)
    model = split_model()
    optimizer = StableSPAM(model.parameters(), **OPTIONS)
    train(model, optimizer, range(STEPS), mine)
    found = {"weights": weights_of(model), "averages": averages_of(model, optimizer)}

    model = split_model()
    first = StableSPAM(model.parameters(), **OPTIONS)
    train(model, first, range(6), mine)
    state = get_optimizer_state_dict(model, first, options=FULL)
    second = StableSPAM(model.parameters(), **OPTIONS)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(model, second, state if rank == 0 else {}, options=options)
    train(model, second, range(6, STEPS), mine)
    return {**found, "resumed": weights_of(model), "updates": second.param_groups[0]["updates"]}


if __name__ == "__main__":
    main()

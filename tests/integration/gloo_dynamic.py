"""Started by torchrun: GRPO with dynamic sampling on a tape of rollouts. Arguments: model folder, output folder, JSON file of runs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from dynamic_kit import dynamic_trainer, logs, watch_gradients
from trainer_kit import weights


def main() -> None:
    """Runs each spec; every rank writes its first gradient, its weights, its logs and what it holds."""
    model, out, specs = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text())
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for name, spec in specs.items():
        args = {**spec["args"], "per_device_train_batch_size": 8 // size}
        trainer = dynamic_trainer(model, out / name, dynamic=spec["dynamic"], ddp_backend="gloo", **args)
        gradients = watch_gradients(trainer)
        trainer.train()
        values, tensors = trainer.dynamic.state()
        found = {"gradients": gradients, "weights": weights(trainer), "logs": logs(trainer), "values": values, "held": tensors}
        torch.save(found, out / f"{name}-{rank}.pt")


if __name__ == "__main__":
    main()

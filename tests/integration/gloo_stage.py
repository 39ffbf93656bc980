"""Started by torchrun: runs trainer stages one after another on every rank, as the worker would. Argument: a JSON file of specs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Runs each spec and writes what this rank ended with beside its folders."""
    for spec in json.loads(Path(sys.argv[1]).read_text()):
        run(spec, Path(spec["root"]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def run(spec: dict[str, Any], root: Path, rank: int, size: int) -> None:
    """One stage on one rank."""
    from trainer_kit import make_context

    from posttrain.core import registry
    from posttrain.core.context import World
    from posttrain.errors import PosttrainError

    method = spec["fields"]["method"]
    ctx = make_context(root, method, spec["kind"], Path(spec["model"]))
    ctx.world, ctx.events.main = World(rank, size), rank == 0
    declared = registry.method(method)
    if spec.get("poison_rank") == rank:
        poison(spec["poison_step"])
    end = {"rank": rank, "size": size, "error": "", "type": ""}
    try:
        declared.run(declared.config.model_validate({"name": "train", "log_every": 1, **spec["fields"]}), ctx)
    except PosttrainError as error:
        end |= {"error": str(error), "type": type(error).__name__}
    end["losses"] = [event["values"]["loss"] for event in ctx.seen if event["kind"] == "metrics" and "loss" in event["values"]]
    (root / f"end-{rank}.json").write_text(json.dumps(end))


def poison(step: int) -> None:
    """Makes this rank's loss NaN at one step."""
    from posttrain.trainers._sft import SFTTrainer

    original = SFTTrainer.compute_loss

    def compute_loss(self: SFTTrainer, *args: object, **kwargs: object) -> object:
        loss = original(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step + 1 == step else loss

    SFTTrainer.compute_loss = compute_loss


if __name__ == "__main__":
    main()

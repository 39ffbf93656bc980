"""Started by torchrun: `gloo_stage`, with the choice of layers of rank `spoil_policy` turned upside down before the ranks agree."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import gloo_stage


def main() -> None:
    """Runs each spec."""
    for spec in json.loads(Path(sys.argv[1]).read_text()):
        if int(os.environ["RANK"]) == spec["spoil_policy"]:
            spoil()
        gloo_stage.run(spec, Path(spec["root"]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def spoil() -> None:
    """This rank would take another layer than it should."""
    from posttrain.trainers import _noisefit

    original = _noisefit.choose

    def other(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        layer = next(i for i in range(found["num_layers"]) if i not in found["layers"])
        return {**found, "layers": [layer], "scales": {str(layer): 0.1}}

    _noisefit.choose = other


if __name__ == "__main__":
    main()

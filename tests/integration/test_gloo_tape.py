"""Two processes on the same recorded rollouts as one: averaged gradients, and weights after ten steps, with `fast` off and on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from gloo_tape import CASES, run  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

pytestmark = pytest.mark.multiproc
HERE = Path(__file__).resolve().parent
LIMITS = {"sgd": 1e-6, "adamw": 1e-5}


def test_two_processes_equal_one(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The second process has completions without gradient, and one that is masked."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    paths = os.pathsep.join([str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(HERE / "gloo_tape.py")]
    done = subprocess.run(
        [*command, str(tiny_model_dir), str(tmp_path / "two")],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    for case in CASES:
        run(case, tiny_model_dir, tmp_path / "one")
        one, two = (load_file(tmp_path / name / f"{case}.safetensors") for name in ("one", "two"))
        kinds = {kind: sorted(name for name in one if name.startswith(kind)) for kind in ("gradient", "weight")}
        whole = {name: torch.cat([one[key].flatten() for key in keys]) for name, keys in kinds.items()}
        shared = {name: torch.cat([two[key].flatten() for key in keys]) for name, keys in kinds.items()}
        assert whole["gradient"].norm() > 1e-3
        assert (whole["gradient"] - shared["gradient"]).norm() < 1e-6 * whole["gradient"].norm(), case
        assert (whole["weight"] - shared["weight"]).abs().max() < LIMITS[case.split("-")[1]], case

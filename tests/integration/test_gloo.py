"""Two processes on one CPU: the same global batch gives the same model, and trouble on one rank stops both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from trainer_kit import CHATS, TASKS, make_folders, run_stage

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.multiproc

HERE = Path(__file__).resolve().parent
SFT = {
    "method": "sft",
    "steps": 5,
    "batch": {"rows": 8, "per_device": 2},
    "data": {"max_length": 64},
    "checkpoint": {"every": 2},
    "optim": {"lr": 1e-3},
}
GRPO = {
    "method": "grpo",
    "steps": 3,
    "group": 4,
    "batch": {"rows": 16, "per_device": 4},
    "data": {"max_length": 64},
    "rollout": {"max_tokens": 6},
    "rewards": [{"use": "length"}],
    "optim": {"lr": 1e-3},
}
BOUND = {
    **GRPO,
    "rollout": {"max_tokens": 6, "constraint": {"regex": "[0-9]( [0-9]){0,2}"}, "weighting": "sequence", "free_share": 0.5},
}
VERIFIABLE, MESSAGES = (TASKS, "verifiable"), (CHATS, "messages")
ROWS: dict[str, tuple[Any, str]] = {"sft": MESSAGES, "grpo": VERIFIABLE, "bound": VERIFIABLE, "nan": MESSAGES}


@pytest.fixture(scope="module")
def two(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which two gloo processes ran `sft`, `grpo`, `bound` (constrained rollouts), and `nan` (rank 1's loss is NaN at step 4)."""
    root = tmp_path_factory.mktemp("two")
    specs = []
    poisoned = {"poison_rank": 1, "poison_step": 4}
    for name, fields, extra in (("sft", SFT, {}), ("grpo", GRPO, {}), ("bound", BOUND, {}), ("nan", SFT, poisoned)):
        rows, kind = ROWS[name]
        make_folders(root / name, rows)
        specs.append({"root": str(root / name), "fields": fields, "kind": kind, "model": str(tiny_model_dir), **extra})
    (root / "specs.json").write_text(json.dumps(specs))
    paths = [str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            str(HERE / "gloo_stage.py"),
            str(root / "specs.json"),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return root


def ends(folder: Path) -> list[dict[str, Any]]:
    """What rank 0 and rank 1 ended with."""
    return [json.loads((folder / f"end-{rank}.json").read_text()) for rank in (0, 1)]


def losses(ctx: Any) -> list[float]:
    """Logged losses of a run in this process."""
    return [event["values"]["loss"] for event in ctx.seen if event["kind"] == "metrics" and "loss" in event["values"]]


def distance(left: Path, right: Path) -> float:
    """Largest difference between the weights of two model folders."""
    from safetensors.torch import load_file

    a, b = (load_file(folder / "model.safetensors") for folder in (left, right))
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize(("name", "fields", "limit"), [("sft", SFT, 1e-6), ("grpo", GRPO, 2e-5), ("bound", BOUND, 2e-5)])
def test_two_processes_equal_one(two: Path, tiny_model_dir: Path, tmp_path: Path, name: str, fields: dict[str, Any], limit: float) -> None:
    rows, kind = ROWS[name]
    one = run_stage(tmp_path, rows=rows, kind=kind, model=tiny_model_dir, **fields)
    found = ends(two / name)
    assert [end["size"] for end in found] == [2, 2]
    assert not any(end["error"] for end in found), found
    assert found[0]["losses"] == pytest.approx(losses(one), abs=1e-5)
    assert distance(tmp_path / "out", two / name / "out") < limit
    assert distance(tmp_path / "out", tiny_model_dir) > 1e-4


def test_checkpoint_of_two_processes(two: Path, tiny_model_dir: Path) -> None:
    """Each rank's state is in it, and one process refuses it (C70) with both sizes."""
    from posttrain.errors import ArtifactError

    marker = json.loads((two / "sft" / "work" / "checkpoint-5" / "COMPLETE.json").read_text())
    assert marker["world_size"] == 2
    assert {"rng_state_0.pth", "rng_state_1.pth", "own_state_0.safetensors", "own_state_1.safetensors"} <= {
        item["name"] for item in marker["files"]
    }
    with pytest.raises(ArtifactError, match="written by 2 processes, this run has 1"):
        run_stage(two / "sft", rows=CHATS, kind="messages", model=tiny_model_dir, **SFT)


def test_nan_on_one_rank_stops_both_before_the_update(two: Path) -> None:
    found = ends(two / "nan")
    assert [end["type"] for end in found] == ["NumericsError", "NumericsError"]
    for end in found:
        assert "step 4" in end["error"]
        assert "checkpoint-2" in end["error"]

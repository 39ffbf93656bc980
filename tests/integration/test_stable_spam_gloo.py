"""Two processes: Stable-SPAM on split tensors and on repeated ones makes the steps of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from trainer_kit import CHATS, make_folders, run_stage

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.multiproc

HERE = Path(__file__).resolve().parent
SFT = {
    "method": "sft", "steps": 4, "batch": {"rows": 8, "per_device": 2}, "data": {"max_length": 64},
    "optim": {"name": "stable_spam", "lr": 1e-3, "stable_spam": {"reset_every": 3}},
}  # fmt: skip


@pytest.fixture(scope="module")
def two(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which two gloo processes ran `gloo_optim.py` with an `sft` stage."""
    root = tmp_path_factory.mktemp("two")
    make_folders(root / "sft", CHATS)
    spec = {"root": str(root / "sft"), "fields": SFT, "kind": "messages", "model": str(tiny_model_dir)}
    (root / "specs.json").write_text(json.dumps([spec]))
    paths = [str(HERE), str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(HERE / "gloo_optim.py"), str(root)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return root


def test_split_tensors_equal_whole_ones(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP's second version: weights and averages, with uneven and empty parts, a spike and resets."""
    monkeypatch.syspath_prepend(str(HERE))
    from gloo_optim import OPTIONS, STEPS, averages_of, make_model, train, weights_of

    from posttrain.optim.stable_spam import StableSPAM

    model = make_model()
    optimizer = StableSPAM(model.parameters(), **OPTIONS)
    train(model, optimizer, range(STEPS))
    found: list[dict[str, Any]] = [json.loads((two / f"fsdp-{rank}.json").read_text()) for rank in (0, 1)]
    for name, values in weights_of(model).items():
        assert found[0]["weights"][name] == pytest.approx(values, rel=1e-10, abs=1e-13)
        assert found[0]["averages"][name] == pytest.approx(averages_of(model, optimizer)[name], rel=1e-10)
    assert found[0]["averages"] == found[1]["averages"]


def test_checkpoint_of_split_tensors_resumes_bitwise(two: Path) -> None:
    for rank in (0, 1):
        found = json.loads((two / f"fsdp-{rank}.json").read_text())
        assert found["resumed"] == found["weights"] and found["updates"] == 12


def test_stage_of_two_processes_equals_one(two: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run_stage(tmp_path, rows=CHATS, kind="messages", model=tiny_model_dir, **SFT)
    ends = [json.loads((two / "sft" / f"end-{rank}.json").read_text()) for rank in (0, 1)]
    assert not any(end["error"] for end in ends), ends
    one, both, start = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", two / "sft" / "out", tiny_model_dir))
    gaps = torch.cat([(one[name] - both[name]).abs().flatten() for name in one])
    assert gaps.mean() < 1e-7 and gaps.max() < 1e-4, "single entries whose gradient is nearly zero are at Adam's mercy"
    assert max((one[name] - start[name]).abs().max().item() for name in one) > 1e-3

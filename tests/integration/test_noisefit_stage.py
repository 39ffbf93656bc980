"""The stage `noisefit`: its choice of layers as an artifact, resuming, adapters, packing, row weights, two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from noisefit_kit import deep_model
from trainer_kit import CHATS, TASKS, Interrupted, at_step, digest, interrupt, make_folders, run_stage

torch = pytest.importorskip("torch")

HERE = Path(__file__).resolve().parent
BASE = {
    "steps": 4,
    "batch": {"rows": 8, "per_device": 2},
    "checkpoint": {"every": 2},
    "data": {"max_length": 64},
    "noise": {"num_layers": 2, "relative_std": 0.5},
}


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deep_model(tiny_model_dir, tmp_path_factory.mktemp("deep") / "model")


def policy_of(root: Path) -> dict[str, Any]:
    """The committed choice of layers."""
    return json.loads((root / "out" / "noise_policy.json").read_text())


def messages(ctx: Any) -> str:
    """Log lines of a run."""
    return "\n".join(event["message"] for event in ctx.seen if event["kind"] == "log")


def test_the_choice_of_layers_is_committed_and_the_model_loads(model_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ctx = run_stage(tmp_path, "noisefit", CHATS, "messages", model_dir, **BASE)
    policy = policy_of(tmp_path)
    assert len(policy["layers"]) == 2
    assert len(policy["snr"]) == policy["num_layers"] == 4
    assert ctx.summary["noise"]["layers"] == policy["layers"]
    assert f"noise on the output of layers {policy['layers'][0]}, {policy['layers'][1]} of 4" in messages(ctx)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 4
    values = [event["values"] for event in ctx.seen if event["kind"] == "metrics" and "loss" in event["values"]]
    assert len(values) == 4
    for row in values:
        expected = 0.5 * row["loss/ce"] + 0.5 * row["loss/soft"] + 0.1 * row["loss/consistency"]
        assert row["loss"] == pytest.approx(expected, rel=0.02)
        assert all(0.3 < row[f"noise/ratio_{layer}"] < 0.9 for layer in policy["layers"])
        assert row["loss/soft"] > 1e-5


@pytest.mark.parametrize(
    ("rows", "kind", "fields"),
    [
        (CHATS, "messages", {}),
        (CHATS, "messages", {"noise": {"selection": "auto", "calibration_rows": 4, "min_depth": 0.25}}),
        (TASKS, "verifiable", {"lora": {"r": 4, "dropout": 0.1}}),
        (CHATS, "messages", {"data": {"max_length": 64, "packing": True}, "batch": {"tokens": 256, "per_device": 2}}),
        ([{"text": row["prompt"] * 4, "weight": 1 + i % 3} for i, row in enumerate(TASKS)], "text",
         {"data": {"max_length": 64, "weights": "loss"}, "noise": {"selection": "list", "layers": [1], "passes": 1}}),
    ],
    ids=["snr", "auto", "lora-dropout", "packing", "row-weights"],
)  # fmt: skip
def test_stopped_and_resumed_equals_straight(model_dir: Path, tmp_path: Path, rows: Any, kind: str, fields: dict[str, Any]) -> None:
    fields = {**BASE, **fields}
    run_stage(tmp_path / "a", "noisefit", rows, kind, model_dir, **fields)
    with pytest.raises(Interrupted):
        run_stage(tmp_path / "b", "noisefit", rows, kind, model_dir, sinks=[at_step(3, interrupt)], **fields)
    from posttrain.trainers import _noisefit

    chosen = _noisefit.choose
    _noisefit.choose = None
    try:
        ctx = run_stage(tmp_path / "b", "noisefit", rows, kind, model_dir, **fields)
    finally:
        _noisefit.choose = chosen
    assert "resuming from checkpoint-2" in messages(ctx)
    assert digest(tmp_path / "b" / "out") == digest(tmp_path / "a" / "out")
    assert ctx.meta["kind"] == ("adapter" if "lora" in fields else "model")


def test_a_run_that_had_finished_training_commits_its_choice_too(model_dir: Path, tmp_path: Path) -> None:
    run_stage(tmp_path, "noisefit", CHATS, "messages", model_dir, **BASE)
    before = digest(tmp_path / "out")
    ctx = run_stage(tmp_path, "noisefit", CHATS, "messages", model_dir, **BASE)
    assert not [event for event in ctx.seen if event["kind"] == "metrics"]
    assert digest(tmp_path / "out") == before


def test_neutral_commits_what_sft_commits(model_dir: Path, tmp_path: Path) -> None:
    run_stage(tmp_path / "sft", "sft", CHATS, "messages", model_dir, **{name: value for name, value in BASE.items() if name != "noise"})
    run_stage(tmp_path / "noisefit", "noisefit", CHATS, "messages", model_dir, **{**BASE, "noise": {"passes": 0}})
    assert digest(tmp_path / "sft" / "out") == digest(tmp_path / "noisefit" / "out")


def test_layers_that_the_model_lacks_are_refused(model_dir: Path, tmp_path: Path) -> None:
    from posttrain.errors import ConfigError

    with pytest.raises(ConfigError, match="layer 4 of a model with 4"):
        run_stage(tmp_path, "noisefit", CHATS, "messages", model_dir, **{**BASE, "noise": {"selection": "list", "layers": [1, 4]}})
    with pytest.raises(ConfigError, match="5 noisy layers of 4"):
        run_stage(tmp_path, "noisefit", CHATS, "messages", model_dir, **{**BASE, "noise": {"num_layers": 5}})


@pytest.mark.multiproc
def test_two_processes_equal_one(model_dir: Path, tmp_path: Path) -> None:
    """Both rules; rank 1's own choice is spoilt, so that only rank 0's can have been used. And FSDP2's split weights equal whole ones."""
    fields = {"snr": BASE["noise"], "auto": {"selection": "auto", "calibration_rows": 4}}
    specs = []
    for name, noise in fields.items():
        make_folders(tmp_path / name, CHATS)
        spec = {"method": "noisefit", **BASE, "optim": {"lr": 1e-3}, "noise": noise}
        specs.append({"root": str(tmp_path / name), "fields": spec, "kind": "messages", "model": str(model_dir), "spoil_policy": 1})
    (tmp_path / "specs.json").write_text(json.dumps(specs))
    paths = [str(HERE), str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(HERE / "gloo_noisefit.py"),
        str(tmp_path / "specs.json"),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    from safetensors.torch import load_file

    for name, noise in fields.items():
        one = run_stage(tmp_path / f"{name}-one", "noisefit", CHATS, "messages", model_dir, **{**BASE, "noise": noise})
        ends = [json.loads((tmp_path / name / f"end-{rank}.json").read_text()) for rank in (0, 1)]
        assert not any(end["error"] for end in ends), ends
        losses = [event["values"]["loss"] for event in one.seen if event["kind"] == "metrics" and "loss" in event["values"]]
        assert ends[0]["losses"] == pytest.approx(losses, abs=1e-5)
        assert policy_of(tmp_path / name)["layers"] == policy_of(tmp_path / f"{name}-one")["layers"]
        left, right = (load_file(tmp_path / folder / "out" / "model.safetensors") for folder in (name, f"{name}-one"))
        assert max((left[key] - right[key]).abs().max().item() for key in left) < 1e-5
    for rank in (0, 1):
        for found in json.loads((tmp_path / f"sharded-{rank}.json").read_text()).values():
            assert found["losses"][0] == pytest.approx(found["losses"][1], rel=1e-6)
            assert found["gradients"] < 1e-6
            assert found["problem"] == ""

"""Figures told before a run, and what is refused because of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from posttrain.config.common import LoraConfig, TrainConfig
from posttrain.core import run as run_module
from posttrain.core.artifact import InputRef
from posttrain.core.estimate import describe, estimate
from posttrain.core.rundir import RunDir
from posttrain.errors import ArtifactError


def planned(folder: Path, output: str = "model", made: Any = None, **fields: Any) -> Any:
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "w").write_bytes(b"0" * 1000)
    config = TrainConfig.model_validate({"name": "sft", "method": "sft", "steps": 10, **fields})
    refs = {"model": [InputRef("model", "m", "model", "model", spec={"id": str(model)})]}
    method = SimpleNamespace(output=output, estimate=made)
    return SimpleNamespace(name="sft", config=config, inputs=refs, method=method, folder=folder / "run" / "stages" / "01-sft-0123456789")


def test_tokens_and_disk(tmp_path: Path) -> None:
    found = estimate(planned(tmp_path, batch={"rows": 4}, data={"max_length": 100}, checkpoint={"keep": 1}))
    assert found == {"tokens": 4000.0, "disk_bytes": 1000 * (1 + 3 * 2)}
    assert describe(found) == "at most 4000 tokens, 0.0 MiB on disk"
    assert estimate(planned(tmp_path, batch={"tokens": 64}))["tokens"] == 640
    assert estimate(planned(tmp_path, lora=LoraConfig()))["disk_bytes"] == 200
    assert "disk_bytes" not in estimate(planned(tmp_path, output="eval"))
    assert describe({}) == "unknown until its inputs are made"


def test_a_methods_own_figures_come_first(tmp_path: Path) -> None:
    found = estimate(planned(tmp_path, made=lambda cfg: {"disk_bytes": 7.0, "seconds": 5.0}))
    assert (found["disk_bytes"], found["seconds"]) == (7.0, 5.0)


def test_seconds_come_from_an_earlier_run_in_proportion_to_the_steps(tmp_path: Path) -> None:
    stage = planned(tmp_path, made=lambda cfg: {"seconds": 5.0})
    old = RunDir(tmp_path / "run").stage_dir(0, "sft", "f" * 10)
    old.mkdir(parents=True)
    (old / "manifest.json").write_text(json.dumps({"kind": "model", "digest": "d", "files": [], "seconds": 30}))
    (old / "config.json").write_text(json.dumps({"config": {"steps": 20}}))
    assert estimate(stage)["seconds"] == 15


def check(stage: Any, limit: float | None, tmp_path: Path) -> None:
    run_module._check_disk([stage], SimpleNamespace(limits=SimpleNamespace(disk_gb=limit)), RunDir(tmp_path))  # type: ignore[arg-type]


def test_limit_of_disk(tmp_path: Path) -> None:
    stage = planned(tmp_path)
    check(stage, None, tmp_path)
    check(stage, 1.0, tmp_path)
    with pytest.raises(ArtifactError, match=r"stage sft needs about 1e-05 GB, and limits\.disk_gb is 5e-06") as caught:
        check(stage, 5e-6, tmp_path)
    assert caught.value.exit_code == 4


def test_too_little_free_space_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(run_module, "free_bytes", lambda _: 10)
    check(planned(tmp_path), None, tmp_path)
    assert "warning: stage sft needs up to" in capsys.readouterr().err

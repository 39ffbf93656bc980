"""A checkpoint that lost, shortened, zeroed or altered any of its files is never used, and the one before is."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from trainer_kit import grpo_trainer, load

pytest.importorskip("torch")

from posttrain.errors import ArtifactError
from posttrain.trainers._checkpoint import MARKER, latest_complete, mark_complete, read_checkpoint, rotate

DAMAGES = ("delete", "truncate", "zero", "flip")


def damage(file: Path, how: str) -> None:
    """Damages one file; `zero` and `flip` keep its size."""
    if how == "delete":
        file.unlink()
    elif how == "truncate":
        os.truncate(file, file.stat().st_size // 2)
    else:
        data = bytearray(file.read_bytes())
        if how == "zero":
            data[len(data) // 3 :] = bytes(len(data) - len(data) // 3)
        else:
            data[len(data) // 2] ^= 1
        file.write_bytes(data)


@pytest.fixture(scope="module")
def work(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two complete checkpoints of a GRPO run, the newer one in the middle of a generation window."""
    from posttrain.trainers.grpo import GRPOTrainer

    folder = tmp_path_factory.mktemp("work")
    grpo_trainer(GRPOTrainer, tiny_model_dir, folder, max_steps=3, save_steps=1, num_iterations=2, save_total_limit=2).train()
    return folder


def test_every_file_and_every_damage(work: Path, tmp_path: Path) -> None:
    names = [item["name"] for item in json.loads((work / "checkpoint-3" / MARKER).read_text())["files"]]
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "own_state_0.safetensors"} <= set(
        names
    )
    shutil.copytree(work / "checkpoint-2", tmp_path / "checkpoint-2")
    for name in names:
        for how in DAMAGES:
            shutil.rmtree(tmp_path / "checkpoint-3", ignore_errors=True)
            shutil.copytree(work / "checkpoint-3", tmp_path / "checkpoint-3")
            damage(tmp_path / "checkpoint-3" / name, how)
            said: list[str] = []
            found = latest_complete(tmp_path, said.append)
            assert found is not None
            assert found.step == 2, (name, how)
            assert name in said[0], (name, how)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"step": 3, "world_size": 1, "files": [{"name": 4}]}', '{"step": 3, "world_size": 1, "files": 7}', "\x00" * 20],
)
def test_damaged_marker(work: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(work, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-3" / MARKER).write_text(text)
    found = latest_complete(tmp_path)
    assert found is not None
    assert found.step == 2


def test_nothing_complete_means_from_the_start(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-9").symlink_to(tmp_path / "checkpoint-5")
    assert latest_complete(tmp_path) is None
    assert latest_complete(tmp_path / "absent") is None


def test_foreign_checkpoint_is_not_loaded(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A folder without our marker, as plain transformers writes it, could hold any pickle: it is refused by name."""
    from posttrain.trainers.grpo import GRPOTrainer

    trainer = grpo_trainer(GRPOTrainer, tiny_model_dir, tmp_path)
    foreign = tmp_path / "checkpoint-7"
    load(tiny_model_dir)[0].save_pretrained(foreign)
    with pytest.raises(ArtifactError, match=MARKER):
        trainer.train(resume_from_checkpoint=str(foreign))


def test_other_number_of_processes_is_refused(tiny_model_dir: Path, tmp_path: Path, work: Path) -> None:
    """C70: refused with both sizes and what to do."""
    from posttrain.trainers.grpo import GRPOTrainer

    shutil.copytree(work / "checkpoint-3", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / MARKER).unlink()
    mark_complete(tmp_path / "checkpoint-3", 3, 2)
    trainer = grpo_trainer(GRPOTrainer, tiny_model_dir, tmp_path)
    with pytest.raises(ArtifactError, match="2 processes, this run has 1"):
        trainer.train(resume_from_checkpoint=True)


def test_rotation_waits_for_a_complete_newer_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "a").write_text("a")
        if step < 3:
            mark_complete(folder, step, 1)
    assert rotate(tmp_path, 1, 3) == []
    mark_complete(tmp_path / "checkpoint-3", 3, 1)
    assert rotate(tmp_path, 2, 3) == [1]
    assert rotate(tmp_path, 1, 3) == [2]
    assert read_checkpoint(tmp_path / "checkpoint-3").step == 3


def test_full_disk_keeps_the_older_checkpoint(tiny_model_dir: Path, tmp_path: Path) -> None:
    """C61: the save fails at a file-size limit: the error names path and bytes, the old checkpoint stays and counts."""
    import resource

    from trainer_kit import sft_trainer

    from posttrain.core.events import Events
    from posttrain.trainers.sft import SFTTrainer

    events = Events(None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(event: dict[str, object]) -> None:
        if event["kind"] == "checkpoint" and event["state"] == "begin" and event["step"] == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))

    events.sinks.append(limit)
    import signal

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        trainer = sft_trainer(SFTTrainer, tiny_model_dir, tmp_path, extra={"events": events}, max_steps=6, save_steps=2, save_total_limit=1)
        with pytest.raises(ArtifactError, match="file-size limit") as error:
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert "bytes free" in str(error.value)
    assert error.value.exit_code == 4
    found = latest_complete(tmp_path)
    assert found is not None
    assert found.step == 2

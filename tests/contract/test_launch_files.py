"""The launch files speak the language of the installed accelerate, bash and Slurm."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
ACCELERATE = sorted((REPO / "launch" / "accelerate").glob("*.yaml"))
DISTRIBUTED = {"cpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda p: p.stem)
def test_accelerate_reads_it_and_knows_every_key(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(path))
    assert config.distributed_type == DISTRIBUTED[path.stem]
    options = {action.dest for action in launch_command_parser()._actions}
    tree = yaml.safe_load(path.read_text())
    assert set(tree.get("fsdp_config", {})) | set(tree.get("deepspeed_config", {})) <= options
    assert tree["mixed_precision"] == "no"


def test_fsdp2_and_zero_carry_what_makes_them_so() -> None:
    read = {path.stem: yaml.safe_load(path.read_text()) for path in ACCELERATE}
    assert read["fsdp2"]["fsdp_config"]["fsdp_version"] == 2
    assert [read[f"zero{n}"]["deepspeed_config"]["zero_stage"] for n in (2, 3)] == [2, 3]
    assert read["zero3"]["deepspeed_config"]["zero3_save_16bit_model"] is True
    assert read["zero2"]["deepspeed_config"]["gradient_accumulation_steps"] == "auto"


@pytest.mark.parametrize("name", ["launch/_env.sh", "launch/test.sh", "launch/quickstart.sh", "launch/slurm.sbatch", ".ci/run"])
def test_scripts_parse(name: str) -> None:
    assert subprocess.run(["bash", "-n", str(REPO / name)], capture_output=True).returncode == 0
    assert name.endswith((".sbatch", "_env.sh")) or os.access(REPO / name, os.X_OK)


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment whose python records a signal and whose scontrol records its arguments."""
    wait = 'for i in $(seq 100); do [ -n "${CODE:-}" ] && exit $CODE; sleep 0.1; done'
    for name, body in {
        "python3": f'trap "echo TERM >>$LOG; exit 75" TERM; echo "$@" >>"$LOG"; {wait}',
        "scontrol": 'echo "scontrol $@" >>"$LOG"',
    }.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    return {
        "PATH": f"{tmp_path}{os.pathsep}{Path(shutil.which('bash') or '/bin/bash').parent}{os.pathsep}/usr/bin:/bin",
        "LOG": str(tmp_path / "log"),
        "SLURM_JOB_ID": "7",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (3, False), (75, True)])
def test_slurm_requeues_exactly_on_75(slurm: dict[str, str], code: int, requeued: bool) -> None:
    done = subprocess.run(["bash", str(REPO / "launch/slurm.sbatch"), "p.yaml", "seed=1"], env={**slurm, "CODE": str(code)}, timeout=30)
    assert done.returncode == code
    log = Path(slurm["LOG"]).read_text().splitlines()
    assert log[0] == "-m posttrain run p.yaml seed=1"
    assert ("scontrol requeue 7" in log) is requeued


def test_slurm_hands_the_warning_signal_to_the_run(slurm: dict[str, str]) -> None:
    job = subprocess.Popen(["bash", str(REPO / "launch/slurm.sbatch"), "p.yaml"], env=slurm)
    log = Path(slurm["LOG"])
    for _ in range(100):
        if log.exists():
            break
        time.sleep(0.05)
    time.sleep(0.2)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=20) == 75
    assert log.read_text().splitlines()[-2:] == ["TERM", "scontrol requeue 7"]

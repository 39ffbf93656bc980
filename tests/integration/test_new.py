"""`posttrain new`: what it writes passes its own tests, in a copy of the tree and as plugins."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.errors import ConfigError
from posttrain.verbs.scaffold import check_name, list_shipped, write_new, write_shipped

REPO = Path(__file__).resolve().parents[2]
NAMES = {"method": "near_start", "reward": "last_word", "selector": "moore_lewis"}
PARTS = (
    "posttrain",
    "data_pipelines",
    "tests/conftest.py",
    "tests/unit/test_tree.py",
    "tests/unit/test_imports.py",
    "pyproject.toml",
    "configs",
)
SHAPE = [
    *(
        f"tests/unit/test_tree.py::{t}"
        for t in ("test_every_public_function_is_annotated", "test_every_yaml_names_its_schema_and_validates")
    ),
    *(f"tests/unit/test_imports.py::{t}" for t in ("test_forbidden_imports", "test_light_modules_have_light_headers")),
    "tests/unit/test_imports.py::test_a_trainer_imports_no_other_method",
]


def _pytest(cwd: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(cwd if (cwd / "posttrain").is_dir() else REPO), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=280)


def _copy(to: Path) -> Path:
    for part in PARTS:
        source, target = REPO / part, to / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, target)
    return to


def test_in_the_tree_source_test_and_yaml_are_found_and_pass(tmp_path: Path) -> None:
    tree = _copy(tmp_path / "tree")
    lines = [line for what, name in NAMES.items() for line in write_new(what, name, tree)]
    files = [Path(line.removeprefix("wrote ")) for line in lines if line.startswith("wrote ")]
    assert [f.relative_to(tree).as_posix() for f in files[:3]] == [
        "posttrain/trainers/near_start.py", "tests/unit/test_near_start.py", "configs/tiny/near_start.yaml"
    ]  # fmt: skip
    tests = [str(f.relative_to(tree)) for f in files if f.name.startswith("test_")]
    result = _pytest(tree, *tests, *SHAPE)
    assert result.returncode == 0, result.stdout + result.stderr


def test_elsewhere_plugins_pass_and_are_known_by_their_flag(tmp_path: Path) -> None:
    kinds = ("reward", "selector")
    folders = [tmp_path / f"posttrain-{NAMES[what].replace('_', '-')}" for what in kinds]
    for what in kinds:
        write_new(what, NAMES[what], tmp_path)
    result = _pytest(tmp_path, *(str(f) for f in folders))
    assert result.returncode == 0, result.stdout + result.stderr
    paths = os.pathsep.join([str(REPO), *map(str, folders)])
    command = [sys.executable, "-m", "posttrain", "validate", "--plugin", "posttrain_moore_lewis", str(folders[1] / "moore_lewis.yaml")]
    found = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert found.returncode == 0 and "valid" in found.stdout, found.stderr


@pytest.mark.parametrize(("what", "name", "says"), [
    ("reward", "My-Reward", "e.g. `my_reward`"), ("method", "class", "keyword"), ("method", "sft", "already"),
    ("selector", "select.dsir", "already"), ("reward", "exact", "already"), ("reward", "../x", "e.g. `x`"),
])  # fmt: skip
def test_bad_names_are_refused(what: str, name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_name(what, name)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    write_new("reward", "mine", tmp_path)
    again = write_new("reward", "mine", tmp_path)
    assert again[0].startswith("wrote")
    source = tmp_path / "posttrain-mine" / "posttrain_mine" / "mine.py"
    source.write_text("mine = 1\n")
    with pytest.raises(ConfigError, match="would overwrite"):
        write_new("reward", "mine", tmp_path)
    assert source.read_text() == "mine = 1\n"


def test_shipped_files_are_listed_and_written_under_their_own_names(tmp_path: Path) -> None:
    assert "pipelines/quickstart.yaml" in list_shipped()
    [path] = write_shipped("pipelines/quickstart.yaml", tmp_path)
    assert path == tmp_path / "configs/pipelines/quickstart.yaml" and path.read_bytes() == (REPO / path.relative_to(tmp_path)).read_bytes()
    path.write_text("name: changed\n")
    with pytest.raises(ConfigError, match="would overwrite"):
        write_shipped("pipelines/quickstart", tmp_path)
    with pytest.raises(ConfigError, match=r"quickstart\.yaml"):
        write_shipped("pipelines/quickstrat.yaml", tmp_path)

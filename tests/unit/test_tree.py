"""The shape of the tree: hard limits of size, and what every method, package and shipped YAML must come with."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SOURCES = sorted(p for package in ("posttrain", "data_pipelines") for p in (REPO / package).rglob("*.py"))
YAMLS = sorted((REPO / "configs").rglob("*.yaml"))
MAX_FILE, MAX_FUNCTION = 600, 120

LOCAL = re.compile(r"/wor[k]/|/roo[t]/|pythonhoste[d]|pyp[i]\.org|registry\.npm[j]s")
UNFINISHED = re.compile(r"\b(TOD[O]|FIXM[E])\b|raise NotImplementedErro[r]")


def _tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [REPO / name for name in listed.stdout.splitlines()]


def _functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def _methods() -> dict[str, str]:
    from posttrain.core import registry

    ours = ("posttrain.", "data_pipelines.")
    return {name: method.module for name, method in registry.methods().items() if method.module.startswith(ours)}


def test_no_file_is_over_600_lines() -> None:
    long = {str(p.relative_to(REPO)): n for p in SOURCES if (n := p.read_text(encoding="utf-8").count("\n")) > MAX_FILE}
    assert not long


def test_no_function_is_over_120_lines() -> None:
    found = [(f"{p.relative_to(REPO)}:{f.name}", (f.end_lineno or 0) - f.lineno + 1) for p in SOURCES for f in _functions(p)]
    assert not [item for item in found if item[1] > MAX_FUNCTION]


def test_every_module_says_what_it_is_for() -> None:
    texts = {p: p.read_text(encoding="utf-8") for p in SOURCES}
    assert not [str(p.relative_to(REPO)) for p, text in texts.items() if text.strip() and not ast.get_docstring(ast.parse(text))]


def test_every_public_function_is_annotated() -> None:
    bare = [f"{p.relative_to(REPO)}:{f.name}" for p in SOURCES for f in _functions(p) if not f.name.startswith("_") and f.returns is None]
    assert not bare


def test_every_public_definition_has_a_docstring() -> None:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    bare = []
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        scopes = [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_"))]
        public = [n for scope in scopes for n in scope.body if isinstance(n, kinds) and not n.name.startswith("_")]
        bare += [f"{path.relative_to(REPO)}:{n.name}" for n in public if not ast.get_docstring(n)]
    assert not bare


@pytest.mark.parametrize("check", [("check",), ("format", "--check")], ids=lambda c: c[0])
def test_style(check: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-m", "ruff", *check, "--no-cache", "."], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_method_has_a_test() -> None:
    text = "\n".join(p.read_text(encoding="utf-8") for p in (REPO / "tests").rglob("test_*.py"))
    lacking = [n for n, module in _methods().items() if not re.search(rf"[\"'\s]{re.escape(n)}[\"'\s,]|{re.escape(module)}\b", text)]
    assert not lacking


def test_every_method_has_a_yaml() -> None:
    text = "\n".join(p.read_text(encoding="utf-8") for p in YAMLS)
    lacking = [n for n in _methods() if not re.search(rf"method:\s*['\"]?{re.escape(n)}['\"]?\s*(#.*|[,}}].*)?$", text, re.MULTILINE)]
    assert not lacking


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.relative_to(REPO).as_posix())
def test_every_yaml_names_its_schema_and_validates(path: Path) -> None:
    from posttrain.config.pipeline import load_pipeline

    assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=")
    if path.parent.name != "stages":
        assert load_pipeline(path).stages


def test_the_schema_that_the_yamls_name_is_the_present_one() -> None:
    from posttrain.config.schema import json_schema

    named = {(p.parent / m[1]).resolve() for p in YAMLS if (m := re.match(r"# yaml-language-server: \$schema=(\S+)", p.read_text()))}
    for path in (p for p in named if p.is_relative_to(REPO)):
        assert json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(json_schema())), f"posttrain schema > {path.name}"
    assert named


def test_documents_name_files_that_exist() -> None:
    path = re.compile(r"(?<![\w/.-])(?:posttrain|data_pipelines|tests|configs|launch|docs|benchmarks)/[\w./*-]*[\w*/]")
    texts = {p: p.read_text(encoding="utf-8") for p in (*REPO.glob("*.md"), *(REPO / "docs").rglob("*.md"))}
    named = {(p.name, name) for p, text in texts.items() for name in path.findall(text) if "NAME" not in name}
    assert not [item for item in sorted(named) if not any(REPO.glob(item[1].rstrip("/")))]


def test_nothing_committed_names_this_machine_or_is_unfinished() -> None:
    wrong = []
    for path in _tracked():
        if not path.is_file() or path.stat().st_size > 1_000_000:
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        source = path.suffix == ".py" and "tests" not in path.parts
        wrong += [f"{path.name}:{i}" for i, line in enumerate(lines, 1) if LOCAL.search(line) or (source and UNFINISHED.search(line))]
    assert not wrong


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.relative_to(REPO).as_posix())
def test_every_stage_is_valid_once_it_is_written_out(path: Path) -> None:
    """A stage's process reads the whole config, defaults included, so no rule may ask which fields were given."""
    import yaml

    from posttrain.core.registry import method

    for stage in yaml.safe_load(path.read_text(encoding="utf-8"))["stages"]:
        config = method(stage["method"]).config
        read = config.model_validate(stage)
        assert config.model_validate(read.dump()) == read

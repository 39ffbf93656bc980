"""`classify`: labels by examples and by a classifier, what is kept, what is unsure, errors, and going on after a kill."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from posttrain.core.artifact import InputRef
from posttrain.core.context import StageContext
from posttrain.core.events import Events
from posttrain.data.shards import expand_shards, read_shard
from posttrain.errors import ConfigError, DataError
from posttrain.rewards import failures, score
from posttrain.stages import classify
from posttrain.stages.classify import Config

OPEN = [
    "Write a poem about {}.", "Tell me a story in which {} plays a part.", "Brainstorm ideas for a party about {}.",
    "Write a friendly letter to a friend who loves {}.", "Imagine a world without {} and describe a day in it.",
]  # fmt: skip
CLOSED = [
    "What is the chemical formula of {}?", "In which year was {} first described?", "How many letters are in the word {}?",
    "What is the Latin name of {}?", "Who discovered {}?",
]  # fmt: skip
THINGS = ["salt", "roses", "gold", "whales", "rain", "sugar", "owls", "iron"]


def labelled(things: list[str]) -> list[dict]:
    return [
        {"prompt": text.format(thing), "prompt_type": kind}
        for thing in things
        for kind, texts in (("open", OPEN), ("closed", CLOSED))
        for text in texts
    ]


def source(folder: Path, name: str, rows: list[dict], port: str) -> InputRef:
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = {"kind": "prompt", "path": str(path), "split": {"validation": 0.0, "test": 0.0}}
    return InputRef(port, name, "source", "dataset", key=f"digest-{name}", rows="prompt", spec=spec)


def classified(folder: Path, rows: list[dict], examples: list[dict] | None = None, model: Path | None = None, **fields):
    """(rows written, context) of a run in `folder`."""
    inputs = {"data": [source(folder, "data", rows, "data")]}
    if examples is not None:
        inputs["examples"] = [source(folder, "examples", examples, "examples")]
    if model is not None:
        inputs["classifier"] = [InputRef("classifier", "c", "model", "model", key="c", spec={"id": str(model)})]
    out, work = folder / "out", folder / "work"
    out.mkdir(exist_ok=True), work.mkdir(exist_ok=True)
    ctx = StageContext("typed", "classify", 0, inputs, out, work, Events(folder / "events.jsonl", "typed"))
    classify.run(Config(name="typed", **fields), ctx)
    return [row for shard in expand_shards(out) for _, row in read_shard(shard)], ctx


def test_prompt_types_are_learned_from_examples_and_read_by_r3(tmp_path):
    asked = labelled(["copper", "bees"])
    found, ctx = classified(tmp_path, [{"prompt": row["prompt"], "n": i} for i, row in enumerate(asked)], labelled(THINGS))
    assert [row["n"] for row in found] == list(range(len(asked)))
    right = sum(row["prompt_type"] == want["prompt_type"] for row, want in zip(found, asked, strict=True))
    assert right >= len(asked) - 1
    assert all(0.5 <= row["prompt_type_probability"] <= 1 for row in found)
    accuracy = ctx.summary["held_out_accuracy"]
    assert accuracy["n"] == ctx.summary["examples"] == 80
    assert 0.9 < accuracy["value"] <= 1 and ctx.summary["commonest_share"] == 0.5
    assert sum(ctx.summary["labels"].values()) == len(asked)
    failures(reset=True)
    rewards = score(
        "r3", ["A poem."] * 2, {"prompts": [row["prompt"] for row in found[:2]], "prompt_type": [r["prompt_type"] for r in found[:2]]}
    )
    assert all(value is not None for value in rewards.total) and not failures()


def test_labels_that_mean_nothing_are_warned_of(tmp_path):
    examples = [{"prompt": f"{text} {i}", "prompt_type": ("open", "closed")[i % 2]} for i in range(12) for text in ("same question",)]
    classified(tmp_path, [{"prompt": "same question"}], examples)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert any("no surer than" in event.get("message", "") for event in events)


def test_given_labels_stay_and_the_unsure_is_said(tmp_path):
    rows = [{"prompt": "Write a poem about tea.", "prompt_type": "closed"}, {"prompt": "Who discovered tea?"}, {"prompt": " "}]
    kept = classified(tmp_path / "a", rows, labelled(THINGS[:3]))[0]
    assert [row["prompt_type"] for row in kept] == ["closed", "closed", None]
    assert "prompt_type_probability" not in kept[0] and kept[2]["prompt_type_probability"] is None
    again = classified(tmp_path / "b", rows, labelled(THINGS[:3]), overwrite=True, unsure="unknown")[0]
    assert [row["prompt_type"] for row in again] == ["open", "closed", "unknown"]
    never = classified(tmp_path / "c", rows, labelled(THINGS[:3]), min_probability=1.0, unsure="unknown")[0]
    assert [row["prompt_type"] for row in never] == ["closed", "unknown", "unknown"]
    assert 0.5 < never[1]["prompt_type_probability"] < 1


@pytest.fixture(scope="module")
def three_labels(tmp_path_factory, tiny_tokenizer) -> Path:
    """A small classifier of three labels with a random head, and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("classifier") / "model"
    names = {0: "essay", 1: "fact", 2: "chat"}
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.8, pad_token_id=tiny_tokenizer.pad_token_id, id2label=names, label2id={v: k for k, v in names.items()},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_a_classifier_is_asked_as_by_a_plain_loop(tmp_path, three_labels):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = [{"prompt": row["prompt"]} for row in labelled(THINGS[:3])]
    values = {"essay": "open", "chat": "open", "fact": "closed"}
    found, ctx = classified(tmp_path, rows, model=three_labels, values=values, batch=4)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(three_labels), AutoTokenizer.from_pretrained(three_labels)
    for row, got in zip(rows, found, strict=True):
        turns = [{"role": "user", "content": row["prompt"]}]
        ids = tokenizer.apply_chat_template(turns, return_dict=False) if tokenizer.chat_template else tokenizer(row["prompt"])["input_ids"]
        with torch.no_grad():
            chance = model(torch.tensor([ids])).logits[0].softmax(0).tolist()
        sums = {"open": chance[0] + chance[2], "closed": chance[1]}
        want = max(sums, key=sums.get)
        assert got["prompt_type"] == want and math.isclose(got["prompt_type_probability"], sums[want], rel_tol=1e-4)
    assert set(ctx.summary["labels"]) == {"open", "closed"} and ctx.summary["labels"]["open"] + ctx.summary["labels"]["closed"] == len(rows)


def test_what_cannot_be_done_is_said(tmp_path, three_labels):
    rows = [{"prompt": "Who?"}]
    for folder, fields in (("a", {}), ("b", {"examples": labelled(THINGS[:1]), "model": three_labels})):
        with pytest.raises(ConfigError, match=r"expected either `in\.examples`.*or `in\.classifier`"):
            classified(tmp_path / folder, rows, **fields)
    with pytest.raises(ConfigError, match="no label `LABEL_0`; its labels: essay, fact, chat"):
        classified(tmp_path / "c", rows, model=three_labels, values={"LABEL_0": "open"})
    with pytest.raises(DataError, match="at least two labels with 2 rows each in the column `prompt_type`, got open: 3"):
        classified(tmp_path / "d", rows, [{"prompt": f"Write {i}", "prompt_type": "open"} for i in range(3)])
    with pytest.raises(DataError, match="got none"):
        classified(tmp_path / "e", rows, labelled(THINGS[:1]), column="kind")
    with pytest.raises(ValueError, match="has a meaning of its own"):
        Config(name="t", column="answer")


def test_a_kill_costs_one_block(tmp_path, monkeypatch):
    monkeypatch.setattr(classify, "BLOCK", 4)
    rows = [{"prompt": row["prompt"]} for row in labelled(["copper"])]
    straight, _ = classified(tmp_path / "straight", rows, labelled(THINGS[:2]))
    blocks = []

    def judged(block, judge, cfg, original=classify._labelled):
        blocks.append(len(block))
        if len(blocks) == 2:
            raise KeyboardInterrupt
        return original(block, judge, cfg)

    monkeypatch.setattr(classify, "_labelled", judged)
    with pytest.raises(KeyboardInterrupt):
        classified(tmp_path / "cut", rows, labelled(THINGS[:2]))
    went_on, _ = classified(tmp_path / "cut", rows, labelled(THINGS[:2]))
    assert blocks == [4, 4, 4, 2]
    assert went_on == straight
    assert (tmp_path / "cut/out/dataset.json").read_bytes() == (tmp_path / "straight/out/dataset.json").read_bytes()

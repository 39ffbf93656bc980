"""Evaluation of a live model: loss against a plain loop, accuracy against the engine, reuse, the stage."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from posttrain.config.common import EvalSet  # noqa: E402
from posttrain.core.artifact import InputRef  # noqa: E402
from posttrain.core.context import StageContext, World  # noqa: E402
from posttrain.core.events import Events  # noqa: E402
from posttrain.errors import ConfigError, DataError  # noqa: E402
from posttrain.eval import EvalSetData, around, evaluate, load_eval_sets, validation_sets  # noqa: E402
from posttrain.eval.loss import row_losses  # noqa: E402
from posttrain.eval.run import fingerprint, take_rows  # noqa: E402

TEXTS = ["The quick brown fox.", "What is 12 + 34?", "x", "A model reads a prompt, writes an answer and gets a reward for it. " * 3]


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    """The tiny model."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir)


@pytest.fixture
def files(tmp_path):
    """A text source and a verifiable source."""
    text, tasks = tmp_path / "text.jsonl", tmp_path / "tasks.jsonl"
    text.write_text("".join(json.dumps({"text": f"{item} {i}"}) + "\n" for i in range(3) for item in TEXTS))
    tasks.write_text("".join(json.dumps({"prompt": f"{i} + 1 =", "answer": str(i + 1)}) + "\n" for i in range(6)))
    return {"text": text, "verifiable": tasks}


def source(files, kind, split="all", port="data"):
    """Reference to one of the sources."""
    spec = {"kind": kind, "path": str(files[kind]), "split": {"validation": 0.0, "test": 0.0}}
    return InputRef(port, kind, "source", "dataset", key=f"digest-{kind}", split=split, rows=kind, spec=spec)


def context(tmp_path, tiny_model_dir, sets, when=("before", "after"), **inputs):
    """A stage context with evaluation sets."""
    out, work = tmp_path / "out", tmp_path / "work"
    out.mkdir(exist_ok=True), work.mkdir(exist_ok=True)
    model = InputRef("model", "tiny", "model", "model", key="model-digest", spec={"id": str(tiny_model_dir)})
    evaluation = {"sets": sets, "when": list(when), "batch": 4, "every": None}
    return StageContext(
        "s", "eval", 3, {"model": [model], **inputs}, out, work, Events(tmp_path / "events.jsonl", "s"), World(), evaluation
    )


def row(ids, mask=None):
    """An encoded row."""
    return SimpleNamespace(input_ids=ids, loss_mask=mask or [1] * len(ids))


def test_row_losses_equal_a_plain_loop(model):
    rows = [row([5, 6, 7, 8], [0, 0, 1, 1]), row([9]), row(list(range(3, 40))), row([5, 6], [1, 0])]
    found = row_losses(model, rows, batch=3)
    for item, (total, count) in zip(rows, found, strict=True):
        ids = torch.tensor([item.input_ids])
        with torch.no_grad():
            logps = torch.log_softmax(model(ids).logits[0].double(), -1)
        expected = [-logps[i - 1, ids[0, i]].item() for i in range(1, ids.shape[1]) if item.loss_mask[i]]
        assert count == len(expected)
        assert total == pytest.approx(sum(expected), abs=1e-4)


def test_loss_and_perplexity(model, tiny_tokenizer, files):
    rows = [{"text": text, "id": str(i)} for i, text in enumerate(TEXTS)]
    item = EvalSetData("t", EvalSet(from_="x", metrics=["loss", "perplexity"]), source(files, "text"), rows)
    model.train()
    found = evaluate(model, tiny_tokenizer, [item], seed=0)["t"]
    assert model.training
    model.eval()
    assert set(found) == {"loss", "perplexity"}
    assert found["perplexity"]["value"] == pytest.approx(math.exp(found["loss"]["value"]))
    assert found["loss"]["low"] < found["loss"]["value"] < found["loss"]["high"]
    assert abs(found["loss"]["value"] - math.log(400)) < 1
    assert found == evaluate(model, tiny_tokenizer, [EvalSetData("t", item.spec, item.ref, rows[::-1])], seed=0)["t"]


def test_accuracy_and_pass_at_k(model, tiny_tokenizer, files):
    from posttrain.data.chat import render_prompt
    from posttrain.rollout.base import Request, Sampling
    from posttrain.rollout.hf import HFEngine

    rows = [{"prompt": f"{i} + 1 =", "answer": "?", "id": str(i)} for i in range(6)]
    prompts = [render_prompt(tiny_tokenizer, item, "auto") for item in rows]
    greedy = HFEngine(model, tiny_tokenizer).generate([Request(p, 0, Sampling(3, 0.0)) for p in prompts])
    for item, completion in list(zip(rows, greedy, strict=True))[:2]:
        item["answer"] = completion.text.strip()
    spec = EvalSet(from_="x", metrics=["accuracy", "pass@k"], samples=4, max_tokens=3)
    found = evaluate(model, tiny_tokenizer, [EvalSetData("a", spec, source(files, "verifiable"), rows)], seed=1, batch=5)["a"]
    right = sum(c.text.strip() == item["answer"] for c, item in zip(greedy, rows, strict=True)) / 6
    assert found["accuracy"]["value"] == pytest.approx(right) and right >= 2 / 6
    assert list(found) == ["accuracy", "accuracy_sampled", "pass@1", "pass@2", "pass@4"]
    assert found["pass@1"]["value"] == pytest.approx(found["accuracy_sampled"]["value"])
    assert found["pass@1"]["value"] <= found["pass@2"]["value"] <= found["pass@4"]["value"]
    assert all(value["n"] == 6 for value in found.values())


def test_prompts_that_do_not_fit_are_counted_or_refused(model, tiny_tokenizer, files):
    rows = [{"prompt": "1 " * 600, "answer": "1", "id": "a"}, {"prompt": "2", "answer": "1", "id": "b"}]
    spec = EvalSet(from_="x", metrics=["accuracy"], max_tokens=2)
    found = evaluate(model, tiny_tokenizer, [EvalSetData("a", spec, source(files, "verifiable"), rows)], seed=1)["a"]
    assert found["skipped"] == {"value": 1, "low": None, "high": None, "n": 2}
    with pytest.raises(DataError, match=r"eval.sets.a.*no prompt fits"):
        evaluate(model, tiny_tokenizer, [EvalSetData("a", spec, source(files, "verifiable"), rows[:1])], seed=1)


def test_taking_rows_is_stable():
    rows = [{"text": f"row {i}", "id": str(i)} for i in range(50)]
    few = take_rows(rows, 10)
    assert len(few) == 10
    assert [item["id"] for item in take_rows(rows[::-1], 10)][::-1] == [item["id"] for item in few]
    assert take_rows(rows, 100) is rows


def test_around_stores_results_and_reuses_the_inputs(model, tiny_tokenizer, tiny_model_dir, files, tmp_path, monkeypatch):
    sets = {
        "val": {"from": "text:validation", "metrics": ["loss"], "rows": 5, "ref": source(files, "text")},
        "test": {"from": "tasks:test", "metrics": ["accuracy"], "max_tokens": 2, "ref": source(files, "verifiable").to_json()},
    }
    ctx = context(tmp_path, tiny_model_dir, sets)
    loaded = load_eval_sets(ctx)
    assert [(item.name, len(item.rows)) for item in loaded] == [("val", 5), ("test", 6)]
    assert len(validation_sets(loaded)) == 2
    results = around(ctx, "after", model, tiny_tokenizer)
    assert ctx.summary["eval"] == {"after": results}
    assert results["val"]["loss"]["n"] == 5

    later = context(tmp_path, tiny_model_dir, sets)
    previous = SimpleNamespace(summary=json.loads(json.dumps(ctx.summary)))
    later.inputs["model"] = [InputRef("model", "s", "stage", "model", path="x", key="k")]
    monkeypatch.setattr(InputRef, "artifact", lambda self: previous)
    monkeypatch.setattr("posttrain.eval.run.evaluate", lambda *args, **kwargs: pytest.fail("measured again"))
    assert around(later, "before", model, tiny_tokenizer) == results
    sets["val"] = {**sets["val"], "rows": 4}
    assert fingerprint(context(tmp_path, tiny_model_dir, sets), model) != ctx.summary["eval_fingerprint"]


def test_around_does_nothing_when_not_asked(model, tiny_tokenizer, tiny_model_dir, files, tmp_path):
    sets = {"val": {"from": "text:validation", "metrics": ["loss"], "ref": source(files, "text")}}
    assert around(context(tmp_path, tiny_model_dir, sets, when=["after"]), "before", model, tiny_tokenizer) is None
    assert around(context(tmp_path, tiny_model_dir, {}), "after", model, tiny_tokenizer) is None


def test_eval_stage(tiny_model_dir, files, tmp_path):
    from posttrain.core.registry import method

    declared = method("eval")
    sets = {"val": {"from": "text:validation", "metrics": ["perplexity"], "ref": source(files, "text")}}
    ctx = context(tmp_path, tiny_model_dir, sets, data=[source(files, "verifiable")])
    declared.run(declared.config(name="s", method="eval", max_tokens=2, samples=2), ctx)
    written = json.loads((ctx.out / "eval.json").read_text())
    assert list(written["sets"]) == ["val", "data"]
    assert set(written["sets"]["data"]) == {"accuracy", "accuracy_sampled", "pass@1", "pass@2"}
    assert set(written["sets"]["val"]) == {"perplexity"}
    assert ctx.summary["eval"]["after"]["data"]["accuracy"]["n"] == 6
    assert str(tmp_path) not in (ctx.out / "eval.json").read_text()


def test_eval_stage_with_nothing_to_measure(tiny_model_dir, tmp_path):
    from posttrain.stages.eval import Config, run

    with pytest.raises(ConfigError, match="nothing to measure"):
        run(Config(name="s", method="eval"), context(tmp_path, tiny_model_dir, {}))

"""D2O and DPO as trainers and as stages: equal to each other at one own answer, exact by parts, resumable, on two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from d2o_kit import BASE, D2O, PAIRS, d2o_trainer, gradient, groups_of  # noqa: E402
from pydantic import ValidationError  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from trainer_kit import COMMON, Interrupted, at_step, digest, interrupt, load, lora, make_context, make_folders, run_stage  # noqa: E402

from posttrain.core import registry  # noqa: E402
from posttrain.errors import ConfigError, DataError  # noqa: E402
from posttrain.trainers.d2o import D2OStage  # noqa: E402

HERE = Path(__file__).parent


def apart(left, right) -> float:
    """Largest difference of two gradients relative to the largest entry."""
    assert left.keys() == right.keys()
    return max(float((left[n] - right[n]).abs().max() / left[n].abs().max().clamp(min=1e-12)) for n in left)


def metrics(ctx, name):
    """Values of a metric by log."""
    return [event["values"][name] for event in ctx.seen if event["kind"] == "metrics" and name in event["values"]]


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_some_answers_at_a_time_are_exact(tiny_model_dir, tmp_path, rows, adapter):
    found = []
    for given in (None, rows):
        torch.manual_seed(0)
        groups = groups_of(3)
        trainer = d2o_trainer(tiny_model_dir, tmp_path, groups, adapter=lora() if adapter else None, rows_per_pass=given)
        found.append(gradient(trainer, groups[:2]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-10)
    assert apart(found[0][1], found[1][1]) < 1e-9


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_checkpointing_changes_nothing(tiny_model_dir, tmp_path, adapter):
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        groups = groups_of(2)
        trainer = d2o_trainer(tiny_model_dir, tmp_path, groups, checkpointing=checkpointing, adapter=lora() if adapter else None)
        if checkpointing:
            trainer.model.gradient_checkpointing_enable()
            trainer.model.train()
            if adapter:
                trainer.model.enable_input_require_grads()
        found.append(gradient(trainer, groups))
    assert apart(found[0][1], found[1][1]) < 1e-10


def test_accumulation_changes_nothing(tiny_model_dir, tmp_path):
    ends = []
    for sizes in (
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    ):
        trainer = d2o_trainer(tiny_model_dir, tmp_path / str(len(ends)), groups_of(3), sizes=sizes, max_self_drop=None)
        trainer.train()
        logs = [item["loss"] for item in trainer.state.log_history if "loss" in item]
        ends.append((logs, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}))
    assert len(ends[0][0]) == 3 and ends[0][0] == pytest.approx(ends[1][0], rel=1e-5)
    assert max(float((ends[0][1][n] - ends[1][1][n]).abs().max()) for n in ends[0][1]) < 2e-5


def test_one_own_answer_equals_trls_dpo(tiny_model_dir, tmp_path):
    import trl
    from datasets import Dataset

    from posttrain.trainers.dpo import DPOTrainer

    groups = groups_of(1)
    rows = [
        {
            "prompt_ids": group.prompt,
            "chosen_ids": group.own[0][0][group.own[0][1] :],
            "rejected_ids": group.negative[0][group.negative[1] :],
        }
        for group in groups
    ]
    model, tokenizer = load(tiny_model_dir)
    args = trl.DPOConfig(
        output_dir=str(tmp_path / "dpo"), beta=0.1, max_length=None, precompute_ref_log_probs=True, save_steps=100, **COMMON
    )
    theirs = DPOTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    batch = theirs.data_collator([theirs.train_dataset[i] for i in range(4)])
    for i, group in enumerate(groups):
        group.own_refs, group.negative_ref = [float(batch["ref_chosen_logps"][i])], float(batch["ref_rejected_logps"][i])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    ours = d2o_trainer(tiny_model_dir, tmp_path / "d2o", groups)
    ours.model.load_state_dict(model.state_dict())
    loss = theirs.compute_loss(theirs.model, theirs._prepare_inputs(batch))
    loss.backward()
    wanted = {n: p.grad.clone() for n, p in theirs.model.named_parameters() if p.grad is not None}
    found, grads = gradient(ours, groups, double=False)
    assert found == pytest.approx(loss.item(), rel=1e-6)
    assert apart(wanted, grads) < 1e-5


def test_the_first_step_lowers_the_unwanted_and_raises_the_own(tiny_model_dir, tmp_path):
    groups = groups_of(4)
    trainer = d2o_trainer(tiny_model_dir, tmp_path, groups)
    answers = [answer for group in groups for answer in group.answers]

    def sides():
        with torch.no_grad():
            values = trainer.logps(trainer.model, answers).view(4, 5)
        return values[:, :4].mean(), values[:, 4].mean()

    own, negative = sides()
    gradient(trainer, groups, double=False)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.01 * parameter.grad)
    after = sides()
    assert after[0] > own and after[1] < negative


@pytest.mark.parametrize("kind", ["preference", "messages"])
def test_a_stage_trains_and_keeps_its_answers(tiny_model_dir, tmp_path, kind):
    rows = PAIRS
    if kind == "messages":
        turns = [[{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["rejected"]}] for r in PAIRS]
        rows = [{"messages": messages, "id": row["id"]} for messages, row in zip(turns, PAIRS, strict=True)]
    fields = {**D2O, "steps": 30, "optim": {"lr": 3e-3, "schedule": "constant"}, "alpha": 0.3, "beta": 0.3, "max_self_drop": None}
    ctx = run_stage(tmp_path, "d2o", rows, kind, tiny_model_dir, **fields)
    assert metrics(ctx, "d2o/negative_gain")[-1] < -1 and metrics(ctx, "d2o/margin")[-1] > 0.5
    assert metrics(ctx, "loss")[0] == pytest.approx(0.6931, abs=1e-3) and metrics(ctx, "loss")[-1] < 0.5
    assert metrics(ctx, "d2o/self_gain")[0] == pytest.approx(0, abs=1e-3) and metrics(ctx, "d2o/jeffrey")[0] == pytest.approx(0, abs=1e-3)
    samples = [json.loads(line) for line in (ctx.out / "self_samples.jsonl").read_text().splitlines()]
    references = load_file(ctx.out / "references.safetensors")
    assert len(samples) == 36 == len(references["own"]) and len(references["negative"]) == 12
    model, _ = load(tiny_model_dir)
    for record, value in zip(samples[:4], references["own"][:4].tolist(), strict=True):
        ids = torch.tensor([record["prompt_ids"] + record["token_ids"]])
        with torch.no_grad():
            logps = torch.log_softmax(model(input_ids=ids).logits[0].float(), -1)
        start = len(record["prompt_ids"])
        want = logps[start - 1 : -1].gather(1, ids[0, start:, None]).sum()
        assert value == pytest.approx(float(want), abs=1e-3)


RESUMED = {
    "full": {},
    "lora": {"lora": {"r": 4}},
    "windows": {"self_samples": {"k": 2, "max_tokens": 5, "every": 2}},
    "moving": {"self_samples": {"k": 2, "max_tokens": 5, "every": 4}, "reference": "policy", "rows_per_pass": 3, "lora": {"r": 4}},
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_a_straight_one(tiny_model_dir, tmp_path, name):
    fields = {**D2O, "checkpoint": {"every": 1}, **RESUMED[name]}
    straight = run_stage(tmp_path / "a", "d2o", PAIRS, "preference", tiny_model_dir, **fields)
    with pytest.raises(Interrupted):
        run_stage(tmp_path / "b", "d2o", PAIRS, "preference", tiny_model_dir, sinks=[at_step(3, interrupt)], **fields)
    resumed = run_stage(tmp_path / "b", "d2o", PAIRS, "preference", tiny_model_dir, **fields)
    assert digest(straight.out) == digest(resumed.out)
    assert metrics(straight, "d2o/margin")[-2:] == metrics(resumed, "d2o/margin")[-2:]


def test_windows_compare_with_the_input_or_with_the_policy(tiny_model_dir, tmp_path):
    fields = {
        **D2O,
        "optim": {"lr": 5e-3, "schedule": "constant"},
        "self_samples": {"k": 2, "max_tokens": 5, "every": 3},
        "max_self_drop": None,
    }
    seen = {}
    for reference in ("input", "policy"):
        ctx = run_stage(tmp_path / reference, "d2o", PAIRS, "preference", tiny_model_dir, reference=reference, **fields)
        seen[reference] = metrics(ctx, "d2o/negative_gain")
        assert {path.name for path in ctx.work.glob("window-*")} == {"window-0", "window-3"}
    assert seen["input"][:3] == seen["policy"][:3]
    assert seen["policy"][3] == pytest.approx(0, abs=1e-3) and seen["input"][3] < -0.5


def test_answers_of_an_earlier_stage(tiny_model_dir, tmp_path):
    from posttrain.core.artifact import InputRef

    make_folders(tmp_path, PAIRS)
    ctx = make_context(tmp_path, "d2o", "preference", tiny_model_dir)
    folder = tmp_path / "rollouts"
    folder.mkdir()
    records = [{"id": row["id"], "sample": k, "token_ids": [5 + k, 9, 2]} for row in PAIRS for k in range(3)]

    class Given(InputRef):
        def artifact(self):
            return type("Folder", (), {"path": folder, "manifest": {}})()

    ctx.inputs["samples"] = [Given("samples", "r", "stage", "rollouts")]
    cfg = D2OStage.model_validate({"name": "train", **D2O, "log_every": 1})
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records[:-1]))
    with pytest.raises(DataError, match="1 of 12 prompts have fewer than 3 answers, e.g. `r11`"):
        registry.method("d2o").run(cfg, ctx)
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    registry.method("d2o").run(cfg, ctx)
    kept = [json.loads(line) for line in (ctx.out / "self_samples.jsonl").read_text().splitlines()]
    assert {tuple(item["token_ids"]) for item in kept} == {(5, 9, 2), (6, 9, 2), (7, 9, 2)}
    with pytest.raises(ConfigError, match="cannot be drawn anew"):
        registry.method("d2o").run(cfg.model_copy(update={"self_samples": cfg.self_samples.model_copy(update={"every": 2})}), ctx)


def test_two_references(tiny_model_dir, tmp_path):
    from posttrain.core.artifact import InputRef

    model, tokenizer = load(tiny_model_dir)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "other"), tokenizer.save_pretrained(tmp_path / "other")
    found = {}
    for port in ("", "helpful", "harmful"):
        root = tmp_path / (port or "none")
        make_folders(root, PAIRS)
        ctx = make_context(root, "d2o", "preference", tiny_model_dir)
        if port:
            ctx.inputs[port] = [InputRef(port, "other", "model", "model", spec={"id": str(tmp_path / "other")})]
        registry.method("d2o").run(D2OStage.model_validate({"name": "train", **D2O, "steps": 1, "log_every": 1}), ctx)
        found[port] = load_file(root / "out" / "references.safetensors")
    assert torch.equal(found[""]["own"], found["helpful"]["own"]) and not torch.allclose(
        found[""]["negative"], found["helpful"]["negative"]
    )
    assert torch.equal(found[""]["negative"], found["harmful"]["negative"]) and not torch.allclose(
        found[""]["own"], found["harmful"]["own"]
    )


def test_training_stops_where_the_own_answers_fall(tiny_model_dir, tmp_path):
    fields = {**D2O, "steps": 60, "optim": {"lr": 2e-2, "schedule": "constant"}, "alpha": 3.0, "beta": 1e-6, "max_self_drop": 0.2}
    ctx = run_stage(tmp_path, "d2o", PAIRS, "preference", tiny_model_dir, **fields)
    assert 10 <= ctx.summary["steps"] < 60
    assert any("own answers have fallen" in str(event.get("message", "")) for event in ctx.seen)


def test_sharded_weights_are_refused(tiny_model_dir, tmp_path, monkeypatch):
    from posttrain.trainers import _d2o

    monkeypatch.setattr(_d2o, "is_sharded", lambda trainer, where: True)
    with pytest.raises(ConfigError, match="split over processes"):
        run_stage(tmp_path, "d2o", PAIRS, "preference", tiny_model_dir, **D2O)


def test_unlikelihood_needs_no_own_answers(tiny_model_dir, tmp_path):
    ctx = run_stage(
        tmp_path, "d2o", PAIRS, "preference", tiny_model_dir, **{**BASE, "steps": 12, "loss": "unlikelihood", "optim": {"lr": 5e-3}}
    )
    assert metrics(ctx, "d2o/negative_logp")[-1] < metrics(ctx, "d2o/negative_logp")[0]
    assert not (ctx.out / "self_samples.jsonl").exists()


def test_templates_change_what_is_asked_and_not_what_is_trained(tiny_model_dir, tmp_path):
    from posttrain.trainers._d2o_samples import asked

    row = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "bad"}]}
    assert [turn["content"] for turn in asked(row, "Kindly: {prompt}")["prompt"]] == ["s", "Kindly: u"]
    assert asked({"prompt": "u"}, "Kindly: {prompt}") == {"prompt": "Kindly: u"}
    plain, other = (
        {**D2O, "steps": 1, "self_samples": {"k": 2, "max_tokens": 5, "templates": t}} for t in (["{prompt}"], ["Kindly: {prompt}"])
    )
    texts = []
    for i, fields in enumerate((plain, other)):
        ctx = run_stage(tmp_path / str(i), "d2o", PAIRS, "preference", tiny_model_dir, **fields)
        texts.append([json.loads(line) for line in (ctx.out / "self_samples.jsonl").read_text().splitlines()])
    assert [t["prompt_ids"] for t in texts[0]] == [t["prompt_ids"] for t in texts[1]]
    assert [t["token_ids"] for t in texts[0]] != [t["token_ids"] for t in texts[1]]


@pytest.mark.parametrize(("fields", "words"), [
    ({"reference": "policy"}, "needs self_samples.every"), ({"data": {"packing": True}}, "do nothing here"),
    ({"self_samples": {"templates": ["no place"]}}, "exactly once"), ({"batch": {"tokens": 100}}, "packing|prompts of a step"),
])  # fmt: skip
def test_configs_are_checked(fields, words):
    with pytest.raises(ValidationError, match=words):
        D2OStage(name="t", steps=1, **fields)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_dpo_trains_and_resumes(tiny_model_dir, tmp_path, adapter):
    fields = {**BASE, "steps": 8, "checkpoint": {"every": 1}, **({"lora": {"r": 4}} if adapter else {})}
    straight = run_stage(tmp_path / "a", "dpo", PAIRS, "preference", tiny_model_dir, **fields)
    assert metrics(straight, "rewards/margins")[-1] > metrics(straight, "rewards/margins")[0] == pytest.approx(0, abs=1e-4)
    with pytest.raises(Interrupted):
        run_stage(tmp_path / "b", "dpo", PAIRS, "preference", tiny_model_dir, sinks=[at_step(3, interrupt)], **fields)
    resumed = run_stage(tmp_path / "b", "dpo", PAIRS, "preference", tiny_model_dir, **fields)
    assert digest(straight.out) == digest(resumed.out)


def test_dpo_takes_conversations(tiny_model_dir, tmp_path):
    rows = [
        {
            "prompt": [{"role": "user", "content": r["prompt"]}],
            "chosen": [{"role": "assistant", "content": r["chosen"]}],
            "rejected": [{"role": "assistant", "content": r["rejected"]}],
            "id": r["id"],
        }
        for r in PAIRS
    ]
    plain = run_stage(tmp_path / "a", "dpo", PAIRS, "preference", tiny_model_dir, **BASE)
    chats = run_stage(tmp_path / "b", "dpo", rows, "preference", tiny_model_dir, **BASE)
    assert metrics(plain, "loss") == metrics(chats, "loss")


@pytest.mark.multiproc
def test_two_processes_equal_one(tiny_model_dir, tmp_path):
    specs = []
    for name, method, fields in (("d2o", "d2o", D2O), ("parts", "d2o", {**D2O, "rows_per_pass": 2}), ("dpo", "dpo", BASE)):
        spec = {"method": method, **fields, "optim": {"lr": 1e-3, "schedule": "constant"}, "batch": {"rows": 4, "per_device": 1}}
        specs.append({"root": str(tmp_path / name), "fields": spec, "kind": "preference", "model": str(tiny_model_dir)})
        make_folders(tmp_path / name, PAIRS)
    (tmp_path / "specs.json").write_text(json.dumps(specs))
    paths = [str(HERE), str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(HERE / "gloo_stage.py"),
        str(tmp_path / "specs.json"),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    for spec in specs:
        root = Path(spec["root"])
        fields = {key: value for key, value in spec["fields"].items() if key != "method"}
        one = run_stage(root.with_name(f"{root.name}-one"), spec["fields"]["method"], PAIRS, "preference", tiny_model_dir, **fields)
        ends = [json.loads((root / f"end-{rank}.json").read_text()) for rank in (0, 1)]
        assert not any(end["error"] for end in ends), ends
        assert ends[0]["losses"] == pytest.approx(metrics(one, "loss"), abs=1e-5)
        left, right = (load_file(folder / "out" / "model.safetensors") for folder in (root, one.out.parent))
        assert max((left[key] - right[key]).abs().max().item() for key in left) < 2e-5


def test_the_tiny_chain(tmp_path, run_cli):
    done = run_cli("run", str(HERE.parents[1] / "configs" / "tiny" / "d2o.yaml"), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pairs_after" in done.stdout

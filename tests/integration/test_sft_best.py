"""What `sft` promises about masks, stop tokens, partial windows and adapters, each shown on a stage or its trainer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from trainer_kit import CHATS, COMMON, TASKS, curve, load, run_stage, same, weights

torch = pytest.importorskip("torch")

BASE = {"steps": 2, "batch": {"rows": 8, "per_device": 4}, "data": {"max_length": 64}}


def encoded(tokenizer: Any, rows: list[dict[str, Any]], **fields: Any) -> list[Any]:
    """Training sequences of rows."""
    from posttrain.config.common import DataConfig
    from posttrain.data.chat import encode_rows

    return encode_rows(tokenizer, rows, DataConfig.model_validate({"max_length": 64, **fields}))[0]


TURNS = [
    {"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "It is 2."},
    {"role": "user", "content": "And 2 + 2?"}, {"role": "assistant", "content": "It is 4."},
]  # fmt: skip


def test_what_is_shown_is_what_is_trained(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The marked text, the labels, the places that get a gradient, and the log of a run say the same."""
    from posttrain.data.mask import loss_runs, shown_rows
    from posttrain.trainers._sft import SFTTrainer, encode_dataset

    _, tokenizer = load(tiny_model_dir)
    items = encoded(tokenizer, [{"messages": TURNS}, {"messages": CHATS[3]["messages"]}])
    shown = shown_rows(tokenizer, items)
    assert re.findall("⟦(.*?)⟧", shown[0]["text"]) == ["It is 2.<|im_end|>", "It is 4.<|im_end|>"]
    dataset = encode_dataset(items)
    labels = [label for label in dataset[0]["labels"] if label != -100]
    assert tokenizer.decode(labels) == "".join(
        text for text, loss, _ in loss_runs(tokenizer, items[0].input_ids, items[0].loss_mask) if loss
    )
    assert shown[0]["loss"] == len(labels)

    model, _ = load(tiny_model_dir)
    hidden: list[Any] = []
    model.model.register_forward_hook(lambda _m, _i, out: (out.last_hidden_state.retain_grad(), hidden.append(out.last_hidden_state))[0])
    trainer = _trainer(SFTTrainer, model, tokenizer, dataset, tmp_path)
    trainer.compute_loss(model, trainer.data_collator([dataset[0], dataset[1]])).backward()
    for row, item in enumerate(items):
        taught = hidden[0].grad[row].abs().amax(-1) > 0
        expected = [bool(bit) for bit in item.loss_mask[1:]]
        assert taught[: len(expected)].tolist() == expected and not taught[len(expected) :].any()

    ctx = run_stage(tmp_path / "run", "sft", CHATS, "messages", tiny_model_dir, **BASE)
    told = [event["message"] for event in ctx.seen if "⟦" in str(event.get("message"))]
    assert len(told) == len(ctx.summary["encoding"]["shown"]) == 2
    assert "⟦It is 0.<|im_end|>" in told[0] and "carry loss" in told[0]
    assert ctx.summary["encoding"]["stops_trained"] == ctx.summary["encoding"]["answers"] == 24


def _trainer(cls: type, model: Any, tokenizer: Any, dataset: Any, out: Path, **args: Any) -> Any:
    import trl

    values = {**COMMON, "dataset_kwargs": {"skip_prepare_dataset": True}, "output_dir": str(out), "save_steps": 100, **args}
    return cls(model, args=trl.SFTConfig(**values), train_dataset=dataset, processing_class=tokenizer)


TAGGED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNTAGGED = TAGGED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def test_masks_are_trls_assistant_only_and_completion_only(tiny_model_dir: Path, tmp_path: Path) -> None:
    """TRL takes the mask from generation tags or from a prompt's length, we from a template without tags; ids and labels agree."""
    import trl
    from datasets import Dataset

    from posttrain.trainers._sft import labels_of

    def theirs(rows: list[dict[str, Any]], template: str, **args: Any) -> list[tuple[list[int], list[int]]]:
        model, tokenizer = load(tiny_model_dir)
        tokenizer.chat_template = template
        config = trl.SFTConfig(output_dir=str(tmp_path), max_length=64, **COMMON, **args)
        made = trl.SFTTrainer(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer).train_dataset
        return [(list(row["input_ids"]), list(row["labels"])) for row in made]

    def ours(rows: list[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
        _, tokenizer = load(tiny_model_dir)
        tokenizer.chat_template = UNTAGGED
        return [(item.input_ids, labels_of(item.input_ids, item.loss_mask)) for item in encoded(tokenizer, rows)]

    talks = [{"messages": TURNS}, *CHATS[:3]]
    assert ours(talks) == theirs(talks, TAGGED, assistant_only_loss=True)
    pairs = [
        {"prompt": [{"role": "user", "content": t["prompt"]}], "completion": [{"role": "assistant", "content": t["answer"]}]} for t in TASKS
    ]
    assert ours(TASKS) == theirs(pairs, UNTAGGED, completion_only_loss=True)


def test_one_bos_in_every_sequence(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A template that writes bos and a tokenizer that adds one give one; so do text rows."""
    from tokenizers.processors import TemplateProcessing

    _, tokenizer = load(tiny_model_dir)
    tokenizer.add_special_tokens({"bos_token": "<|pad|>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|pad|> $A", special_tokens=[("<|pad|>", bos)])
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert tokenizer(tokenizer.apply_chat_template(TURNS, tokenize=False))["input_ids"][:2] == [bos, bos]
    for item in encoded(tokenizer, [{"messages": TURNS}, {"text": "What is 12?"}, {"prompt": "1 + 1 =", "answer": "2"}]):
        assert item.input_ids.count(bos) == 1 and item.input_ids[0] == bos and item.ends is not False


def test_answers_that_never_end_are_refused_before_the_first_step(tiny_model_dir: Path, tmp_path: Path) -> None:
    from posttrain.errors import DataError

    long = [{"prompt": "Count.", "answer": "1 2 3 4 5 6 7 8 9 " * 20} for _ in range(8)]
    with pytest.raises(DataError, match="none of 8 answers.*8 are cut") as error:
        run_stage(tmp_path / "a", "sft", long, "verifiable", tiny_model_dir, **BASE)
    assert "stages.train.data.max_length" in str(error.value)
    ctx = run_stage(tmp_path / "b", "sft", [*long, *TASKS], "verifiable", tiny_model_dir, **BASE)
    assert (ctx.summary["encoding"]["answers"], ctx.summary["encoding"]["stops_trained"]) == (33, 25)
    texts = [{"text": row["answer"]} for row in long]
    assert run_stage(tmp_path / "c", "sft", texts, "text", tiny_model_dir, **BASE).summary["encoding"]["answers"] == 0


def test_a_partial_last_window_weighs_every_token_alike(tiny_model_dir: Path, tmp_path: Path) -> None:
    """12 rows of unequal length, 2 a pass, 4 passes a step: the last step has 2 passes, and equals one pass of 4 rows."""
    from posttrain.trainers._sft import SFTTrainer, encode_dataset

    rows = [
        SimpleNamespace(input_ids=list(range(5 + n, 15 + 3 * n)), loss_mask=[0] * (n % 5) + [1] * (10 + 2 * n - n % 5)) for n in range(12)
    ]
    found = []
    for per_device, accumulation in ((8, 1), (2, 4), (1, 8)):
        model, tokenizer = load(tiny_model_dir)
        trainer = _trainer(
            SFTTrainer, model, tokenizer, encode_dataset(rows), tmp_path / str(per_device), per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulation, train_sampling_strategy="sequential", max_steps=2, optim="sgd", max_grad_norm=1e9,
            lr_scheduler_type="constant", learning_rate=0.1,
        )  # fmt: skip
        trainer.train()
        found.append((np.array(curve(trainer)), weights(trainer)))
    for figures, after in found[1:]:
        assert figures == pytest.approx(found[0][0], rel=1e-4)
        assert all(torch.allclose(after[name], found[0][1][name], atol=2e-6) for name in after)


def test_length_groups_change_no_step_and_pad_less(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} =", "answer": "1 2 3 " * (n % 7 + 1)} for n in range(48)]
    fields = {**BASE, "steps": 4, "batch": {"rows": 24, "per_device": 4}, "optim": {"lr": 1e-3, "schedule": "constant", "warmup": 0}}
    found = {}
    for name in ("plain", "grouped"):
        data = {"max_length": 64, "group_by_length": name == "grouped"}
        ctx = run_stage(tmp_path / name, "sft", rows, "verifiable", tiny_model_dir, **{**fields, "data": data})
        losses = [event["values"]["loss"] for event in ctx.seen if event["kind"] == "metrics" and "loss" in event["values"]]
        found[name] = losses, ctx.summary["padding_share"]
    assert found["grouped"][0] == pytest.approx(found["plain"][0], rel=1e-4)
    assert found["grouped"][1] < found["plain"][1] / 2


@pytest.mark.parametrize(
    "kind", [{}, {"dora": True}, {"rslora": True}, {"dora": True, "rslora": True}], ids=["lora", "dora", "rslora", "both"]
)
def test_adapters_against_float64_numpy_and_merged(tiny_model_dir: Path, tmp_path: Path, kind: dict[str, bool]) -> None:
    """W' = W + s B A, DoRA: m (W + s B A) / ||W + s B A||, row by row; the merge is checked and its figure kept."""
    from safetensors.numpy import load_file

    from posttrain.models.load import load_model

    fields = {**BASE, "steps": 4, "optim": {"lr": 0.05, "schedule": "constant", "warmup": 0}, "lora": {"r": 4, "alpha": 8, **kind}}
    run_stage(tmp_path, "sft", CHATS, "messages", tiny_model_dir, **fields)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["use_dora"], config["use_rslora"]) == (bool(kind.get("dora")), bool(kind.get("rslora")))
    base, adapter = load_file(tiny_model_dir / "model.safetensors"), load_file(tmp_path / "out" / "adapter_model.safetensors")
    loaded = load_model(tmp_path / "out")
    state, scale = loaded.model.state_dict(), 8 / 2 if kind.get("rslora") else 8 / 4
    names = [name.removesuffix(".weight") for name in base if name.endswith("_proj.weight")]
    for name in names:
        a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"].astype(np.float64) for part in "AB")
        expected = base[f"{name}.weight"].astype(np.float64) + scale * b @ a
        if kind.get("dora"):
            magnitude = adapter[f"base_model.model.{name}.lora_magnitude_vector"].astype(np.float64)
            assert np.abs(magnitude - np.linalg.norm(base[f"{name}.weight"], axis=1)).max() > 1e-4, "the norms are trained"
            expected *= (magnitude / np.linalg.norm(expected, axis=1))[:, None]
        assert np.abs(state[f"{name}.weight"].double().numpy() - expected).max() < 2e-6, name
    assert len(names) == 14 and 0 <= loaded.merge["merge_difference"] < loaded.merge["merge_limit"] / 100
    ctx = run_stage(tmp_path / "next", "sft", CHATS, "messages", tmp_path / "out", **BASE)
    assert ctx.summary["merge"] == loaded.merge


def test_a_merge_that_loses_a_module_is_refused(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import Linear

    from posttrain.errors import ArtifactError
    from posttrain.models.load import load_model

    fields = {**BASE, "steps": 4, "optim": {"lr": 0.01, "schedule": "constant", "warmup": 0}, "lora": {"r": 4}}
    run_stage(tmp_path, "sft", CHATS, "messages", tiny_model_dir, **fields)
    merge, seen = Linear.merge, []

    def forgetful(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self)
        return None if len(seen) == 3 else merge(self, *args, **kwargs)

    monkeypatch.setattr(Linear, "merge", forgetful)
    with pytest.raises(ArtifactError, match="changes what the model computes"):
        load_model(tmp_path / "out")
    assert len(seen) == 14


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_an_adapter_on_a_tied_table_is_refused(tiny_model_dir: Path, tmp_path: Path, targets: list[str]) -> None:
    from posttrain.errors import ConfigError

    with pytest.raises(ConfigError, match="tied") as error:
        run_stage(tmp_path, "sft", CHATS, "messages", tiny_model_dir, **BASE, lora={"r": 4, "targets": targets})
    assert "stages.train.lora.targets" in str(error.value)


def test_untied_tables(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The embedding takes an adapter; the output layer takes none, since TRL's loss would pass it by."""
    from posttrain.errors import ConfigError
    from posttrain.models.load import load_model

    model, tokenizer = load(tiny_model_dir)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(tmp_path / "untied")
    tokenizer.save_pretrained(tmp_path / "untied")
    run_stage(tmp_path / "a", "sft", CHATS, "messages", tmp_path / "untied", **BASE, lora={"r": 4, "targets": ["q_proj", "embed_tokens"]})
    assert load_model(tmp_path / "a" / "out").merge
    with pytest.raises(ConfigError, match="never be trained"):
        run_stage(tmp_path / "b", "sft", CHATS, "messages", tmp_path / "untied", **BASE, lora={"r": 4, "targets": ".*lm_head"})


@pytest.mark.parametrize(("gpu", "package", "words"), [(False, True, "GPU"), (True, False, "bitsandbytes")])
def test_four_bits_are_refused_where_they_cannot_be(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool, package: bool, words: str
) -> None:
    from posttrain.errors import ConfigError
    from posttrain.models import fourbit

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(fourbit.util, "find_spec", lambda name: object() if package else None)
    with pytest.raises(ConfigError, match=words) as error:
        run_stage(tmp_path, "sft", CHATS, "messages", tiny_model_dir, **BASE, lora={"load_in_4bit": True})
    assert "stages.train.lora.load_in_4bit" in str(error.value)


def test_four_bits_and_an_adapter_to_merge_are_refused(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.errors import ConfigError
    from posttrain.trainers import _train

    run_stage(tmp_path / "a", "sft", CHATS, "messages", tiny_model_dir, **BASE, lora={"r": 4})
    monkeypatch.setattr("posttrain.models.fourbit.four_bit_problem", lambda: "")
    assert _train.check_four_bit("x", "folder") is None
    with pytest.raises(ConfigError, match="on_input: continue"):
        run_stage(tmp_path / "b", "sft", CHATS, "messages", tmp_path / "a" / "out", **BASE, lora={"load_in_4bit": True})


def test_four_bit_options_are_the_papers() -> None:
    from posttrain.models.fourbit import four_bit_options

    options = four_bit_options(torch.bfloat16, "cuda:0")
    given = options["quantization_config"].to_dict()
    assert (given["load_in_4bit"], given["bnb_4bit_quant_type"], given["bnb_4bit_use_double_quant"]) == (True, "nf4", True)
    assert given["bnb_4bit_compute_dtype"] == "bfloat16" and options["device_map"] == {"": "cuda:0"}


def test_a_base_in_four_bits_is_asked_for_and_left_as_it_is(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers is asked for, with a float base in its place; the adapter belongs to the base as given."""
    from transformers import AutoModelForCausalLM

    from posttrain.models.load import load_model

    original, asked = AutoModelForCausalLM.from_pretrained, []

    def recorded(*args: Any, quantization_config: Any = None, device_map: Any = None, **kwargs: Any) -> Any:
        asked.append((quantization_config, device_map))
        return original(*args, **kwargs)

    monkeypatch.setattr("posttrain.models.fourbit.four_bit_problem", lambda: "")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", recorded)
    ctx = run_stage(tmp_path, "sft", CHATS, "messages", tiny_model_dir, **BASE, lora={"r": 4, "load_in_4bit": True})
    assert len(asked) == 1 and asked[0][0].bnb_4bit_quant_type == "nf4" and asked[0][1] == {"": "cpu"}
    loaded = load_model(tmp_path / "out")
    assert asked[1] == (None, None) and loaded.merge and ctx.meta["base_digest"]


def test_the_tiny_chain_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`configs/tiny/sft.yaml`: packed, length-grouped with DoRA, exported with its merge checked."""
    from posttrain.cli import main

    file = Path(__file__).resolve().parents[2] / "configs" / "tiny" / "sft.yaml"
    assert main(["run", str(file), "--runs", str(tmp_path), "--quiet"]) == 0
    made = {}
    for path in (tmp_path / "tiny-sft" / "stages").glob("*/manifest.json"):
        manifest = json.loads(path.read_text())
        made[manifest["name"]] = manifest
    assert made["grouped"]["kind"] == "adapter" and made["packed"]["summary"]["encoding"]["shown"]
    figures = made["whole"]["summary"]
    assert 0 <= figures["merge_difference"] <= figures["merge_limit"]


@pytest.mark.parametrize(
    ("method", "lora", "words"),
    [
        ("sft", {"dora": True, "on_input": "continue"}, "new adapter"),
        *((name, {"load_in_4bit": True}, "supervised") for name in ("grpo", "dpo", "d2o")),
    ],
)
def test_adapter_settings_that_cannot_work(method: str, lora: dict[str, Any], words: str) -> None:
    from pydantic import ValidationError

    from posttrain.core import registry

    with pytest.raises(ValidationError, match=words):
        registry.method(method).config.model_validate({"name": "s", "method": method, "steps": 1, "lora": lora})


def test_plain_lora_is_what_it_was(tiny_model_dir: Path, tmp_path: Path) -> None:
    """`dora: false, rslora: false` is peft's LoRA bitwise."""
    import trl

    from posttrain.config.common import LoraConfig
    from posttrain.trainers._sft import SFTTrainer
    from posttrain.trainers._train import peft_config

    found = []
    for cls, make in ((SFTTrainer, "ours"), (trl.SFTTrainer, "peft")):
        model, tokenizer = load(tiny_model_dir)
        from peft import LoraConfig as PeftLora

        plain = PeftLora(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        config = peft_config(LoraConfig(r=4), model) if make == "ours" else plain
        from datasets import Dataset

        args = trl.SFTConfig(output_dir=str(tmp_path / make), max_length=64, **{**COMMON, "max_steps": 3})
        torch.manual_seed(0)
        trainer = cls(model, args=args, train_dataset=Dataset.from_list(CHATS), processing_class=tokenizer, peft_config=config)
        trainer.train()
        found.append(weights(trainer))
    assert same(*found)

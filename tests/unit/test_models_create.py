"""The `init` stage: tokenizer, template, model, determinism."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from posttrain.core.artifact import InputRef
from posttrain.core.context import StageContext
from posttrain.core.events import Events
from posttrain.models.create import END, SPECIAL, new_model, train_tokenizer
from posttrain.models.digest import model_digest
from posttrain.models.load import load_model
from posttrain.stages.init import InitConfig, row_texts, run

TEXTS = [
    "What is 12 + 345? It is 357.",
    "def add(left, right):\n    return left + right\n",
    "The quick brown fox doesn't jump.\n\n  Again é ü.",
] * 3
CHAT = [{"role": "user", "content": "7 + 58?"}, {"role": "assistant", "content": "65"}, {"role": "user", "content": "again"}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, 320, 128)


def config(**fields: Any) -> InitConfig:
    return InitConfig.model_validate({"name": "i", "method": "init", "hidden_size": 32, "heads": 2, "vocab_size": 320, **fields})


def run_init(folder: Path, seed: int = 3, **fields: Any) -> StageContext:
    rows = folder.parent / "rows.jsonl"
    turns = [{"messages": [*CHAT[:2], {"role": "user", "content": text}, {"role": "assistant", "content": "ok"}]} for text in TEXTS]
    rows.write_text("".join(json.dumps(row) + "\n" for row in turns))
    folder.mkdir()
    ref = InputRef("data", "d", "source", "dataset", rows="messages", spec={"kind": "messages", "path": str(rows)})
    ctx = StageContext("i", "init", seed, {"data": [ref]}, folder, folder.parent / "work", Events(None))
    run(config(**fields), ctx)
    return ctx


def test_digits_stand_alone_and_text_comes_back(tokenizer: Any) -> None:
    pieces = tokenizer.tokenize("12345 + 6")
    assert pieces[:5] == list("12345")
    for text in [*TEXTS, "数 x", "\ttab  \n end "]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_special_tokens_are_one_id_each(tokenizer: Any) -> None:
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL)) == list(range(len(SPECIAL)))
    assert (tokenizer.eos_token, tokenizer.padding_side) == (END, "left") and tokenizer.pad_token_id != tokenizer.eos_token_id


def test_template(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>7 + 58?<|assistant|>65<|im_end|><|user|>again<|assistant|>"
    whole, part = (tokenizer.apply_chat_template(turns, tokenize=False) for turns in (CHAT, CHAT[:1]))
    assert whole.startswith(part)
    with pytest.raises(Exception, match="unknown role"):
        tokenizer.apply_chat_template([{"role": "narrator", "content": "x"}], tokenize=False)


def test_equal_texts_give_an_equal_tokenizer(tokenizer: Any) -> None:
    assert train_tokenizer(iter(TEXTS), 320, 128).backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


@pytest.mark.parametrize("arch", ["qwen2", "llama"])
def test_weights_follow_from_the_seed(tokenizer: Any, arch: str) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
    before = torch.random.get_rng_state()
    first, same, other = (new_model(arch, tokenizer, seed, **sizes).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


@pytest.mark.parametrize("arch", ["qwen2", "llama"])
def test_stage_is_deterministic_and_every_loader_cuts_alike(tmp_path: Path, arch: str) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    ctx = run_init(tmp_path / "a" / "out", arch=arch)
    run_init(tmp_path / "b" / "out", arch=arch)
    assert model_digest(tmp_path / "a" / "out") == model_digest(tmp_path / "b" / "out")
    loaded = load_model(tmp_path / "a" / "out")
    assert loaded.model.config.vocab_size == len(loaded.tokenizer) == ctx.summary["vocab_size"]
    auto = AutoTokenizer.from_pretrained(tmp_path / "a" / "out")
    assert len(auto) == len(loaded.tokenizer)
    for text in [*TEXTS, "<|user|>1234<|assistant|>"]:
        assert auto(text).input_ids == loaded.tokenizer(text).input_ids
    assert auto.chat_template == loaded.tokenizer.chat_template


def test_own_template_is_kept(tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}")
    run_init(tmp_path / "out", chat_template=str(template))
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template.read_text()


def test_texts_of_all_row_types() -> None:
    assert list(row_texts({"text": "a", "id": "x"})) == ["a"]
    assert list(row_texts({"prompt": CHAT[:1], "answer": 65})) == ["7 + 58?", "65"]
    assert list(row_texts({"prompt": "p", "chosen": "c", "rejected": "r"})) == ["p", "c", "r"]
    assert list(row_texts({"messages": [{"role": "assistant", "content": None}]})) == []


@pytest.mark.parametrize("fields", [{"hidden_size": 30, "heads": 4}, {"heads": 4, "kv_heads": 3}, {"vocab_size": 100}, {"arch": "gpt2"}])
def test_sizes_that_do_not_fit(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        config(**fields)

"""Token ids and loss masks: exactly the assistant's words with their end of turn, one bos, nothing lost silently."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.config.common import DataConfig
from posttrain.core.events import Events
from posttrain.data.chat import Encoded, encode_row, encode_rows, render_prompt, resolve_format, scan_prompts, set_template
from posttrain.data.rows import Row, checked
from posttrain.data.shards import read_shard
from posttrain.data.spans import assistant_spans
from posttrain.data.strict_json import RowError
from posttrain.errors import ConfigError, DataError

CASES = Path(__file__).parents[1] / "cases"
CHAT, PLAIN = DataConfig(format="chat"), DataConfig(format="plain")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (
    "{% set last = namespace(user=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.index0 > last.user %}"
    "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def make() -> Callable[..., Any]:
    """Byte-level tokenizers: make(template, eos=..., bos=..., add_bos=...)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    def build(template: str | None = CHATML, *, eos: str = "<|im_end|>", bos: str | None = None, add_bos: bool = False) -> Any:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        special = list(dict.fromkeys(["<|im_start|>", "<|im_end|>", eos, *([bos] if bos else [])]))
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        core.train_from_iterator(
            ["assistant user\n\n"],
            trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
        )
        if add_bos:
            core.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, core.token_to_id(bos))]
            )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, pad_token=eos, bos_token=bos)
        tokenizer.chat_template = template
        return tokenizer

    return build


def case(name: str, kind: str = "messages", columns: dict[str, str] | None = None) -> list[Row]:
    """Rows of a case file with their places."""
    return [Row(checked(row, kind, columns), where=f"{name}:{number}") for number, row in read_shard(CASES / name)]


def learned(tokenizer: Any, encoded: Encoded) -> str:
    """Text of the tokens that carry loss."""
    return tokenizer.decode([token for token, bit in zip(encoded.input_ids, encoded.loss_mask, strict=True) if bit])


def talk(*turns: str) -> dict[str, Any]:
    """A conversation: user, assistant, user, ..."""
    return {"id": "t", "messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]}


def test_c01_mask_without_generation_tags_is_answer_and_end_of_turn(make: Callable[..., Any]) -> None:
    tokenizer = make((CASES / "C01-no-generation-tag.jinja").read_text(), eos="[END]")
    rows = case("C01-rows.jsonl")
    found, report = encode_rows(tokenizer, rows, CHAT)
    assert [learned(tokenizer, e) for e in found] == ["Blueberry.[END]Raspberry.[END]", "Green.[END]", "5[END]10[END]"]
    assert report["supervised_tokens"] == sum(sum(e.loss_mask) for e in found) > 0


def test_c01_a_stop_token_that_is_never_trained_is_refused_and_named(make: Callable[..., Any]) -> None:
    tokenizer = make((CASES / "C01-no-generation-tag.jinja").read_text(), eos="<|im_end|>")
    with pytest.raises(ConfigError, match=r"untrained stop token.*\[END\]'.*<\|im_end\|>"):
        encode_rows(tokenizer, case("C01-rows.jsonl"), CHAT, "skip")


def test_extra_stop_ids_count_as_stop_tokens(make: Callable[..., Any]) -> None:
    tokenizer = make(eos="<|pad|>")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert learned(tokenizer, encode_row(tokenizer, talk("a", "b"), CHAT, stop_ids=[end])) == "b<|im_end|>"
    with pytest.raises(ConfigError, match="untrained stop token"):
        encode_row(tokenizer, talk("a", "b"), CHAT)


def test_c03_reasoning_is_learned_where_the_template_renders_it(make: Callable[..., Any]) -> None:
    template = CHATML.replace(
        "{{ m.content }}", "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    )
    tokenizer = make(template)
    found, report = encode_rows(tokenizer, case("C03-reasoning-field.jsonl"), CHAT)
    assert learned(tokenizer, found[0]) == "<think>21 is 3 times 7.</think>No.<|im_end|>"
    assert learned(tokenizer, found[1]).count("<think>") == 2
    assert report["notes"] == {}


def test_c03_reasoning_that_the_template_ignores_is_counted(make: Callable[..., Any]) -> None:
    seen: list[dict[str, Any]] = []
    events = Events(None)
    events.sinks.append(seen.append)
    _, report = encode_rows(make(), case("C03-reasoning-field.jsonl"), CHAT, events=events)
    assert report["notes"] == {"reasoning not rendered": 2}
    assert any(e.get("level") == "warning" and "2 rows: reasoning not rendered" in e["message"] for e in seen)


def test_template_that_renders_the_last_turn_differently(make: Callable[..., Any]) -> None:
    tokenizer = make(THINKING)
    row = talk("assistant", "user", "more", "done")
    row["messages"][3]["reasoning_content"] = "hm"
    encoded = encode_row(tokenizer, row, CHAT)
    assert learned(tokenizer, encoded) == "user<|im_end|><think>\nhm\n</think>\n\ndone<|im_end|>"


def test_real_templates_give_answers_and_nothing_of_the_user(make: Callable[..., Any]) -> None:
    spec = importlib.util.find_spec("trl")
    folder = Path(spec.submodule_search_locations[0]) / "chat_templates" if spec and spec.submodule_search_locations else Path("none")
    found, refused = {}, set()
    tokenizer = make(None, bos="<s>")
    row = talk("assistant", "user", "Which fruit?", "assistant pear")
    for file in sorted(folder.glob("*.jinja")):
        tokenizer.chat_template = file.read_text()
        try:
            text, spans = assistant_spans(tokenizer, row["messages"], None)
        except RowError as error:
            refused.add(error.reason)
            continue
        found[file.name] = [text[a:b] for a, b in spans]
    assert len(found) > 20
    assert refused <= {"template refused", "template drops turn"}
    for name, (first, second) in found.items():
        assert "user" in first, name
        assert "assistant pear" in second, name
        assert "Which fruit?" not in first + second, name


def test_earlier_turns_that_end_otherwise_keep_whole_tokens_only(make: Callable[..., Any]) -> None:
    ending = "{% if loop.last %}<|im_end|>{% else %}<|im_next|>{% endif %}"
    tokenizer = make(CHATML.replace("<|im_end|>", "[E]\n" + ending))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_next|>"]})
    assert learned(tokenizer, encode_row(tokenizer, talk("b", "a", "c", "s"), CHAT)) == "a[E]s[E]\n<|im_end|>"


def test_generation_prompt_that_no_finished_turn_has(make: Callable[..., Any]) -> None:
    template = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
    tokenizer = make(template)
    assert learned(tokenizer, encode_row(tokenizer, talk("b", "a", "c", "s"), CHAT)) == "a<|im_end|>s<|im_end|>"


def test_c05_the_true_end_carries_loss_where_pad_is_eos(make: Callable[..., Any]) -> None:
    tokenizer = make()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    for row in (talk("a", "b"), talk("a", "a longer answer")):
        encoded = encode_row(tokenizer, row, CHAT)
        last = max(i for i, bit in enumerate(encoded.loss_mask) if bit)
        assert encoded.input_ids[last] == tokenizer.eos_token_id


def test_c07_tool_arguments_are_rendered_as_written(make: Callable[..., Any]) -> None:
    template = CHATML.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}",
    )
    tokenizer = make(template)
    texts = [learned(tokenizer, encode_row(tokenizer, row, CHAT)) for row in case("C07-tool-args-mixed.jsonl")]
    assert '[weather {"city": "Oslo"}]' in texts[0]
    assert '[forecast {"days": 3}]' in texts[1]
    assert '{"days": "few", "unit": null}' in texts[2]
    assert '[weather {"city": "Bergen"}]' in texts[3]


def test_c11_null_content_never_shows_and_the_call_is_learned(make: Callable[..., Any]) -> None:
    template = CHATML.replace("{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}[{{ c.function.name }}]{% endfor %}")
    tokenizer = make(template)
    raw = [row for _, row in read_shard(CASES / "C11-null-content-toolcall.jsonl")][:2]
    for row in raw:
        encoded = encode_row(tokenizer, checked(row, "messages"), CHAT)
        text = tokenizer.decode(encoded.input_ids)
        assert "None" not in text
        assert "null" not in text
        assert learned(tokenizer, encoded) == "[clock]<|im_end|>Nine.<|im_end|>"


def test_a_template_that_drops_a_turn_or_a_call_is_refused(make: Callable[..., Any]) -> None:
    tokenizer = make("{%- for m in messages if m.role != 'system' -%}{{ m.content }}<|im_end|>{%- endfor -%}")
    row = {"messages": [{"role": "system", "content": "Be kind."}, *talk("a", "b")["messages"]]}
    with pytest.raises(DataError, match=r"silently drops turn 1 \(system\)"):
        encode_row(tokenizer, row, CHAT)
    with pytest.raises(DataError, match=r"silently drops turn 1 \(user\)"):
        encode_row(
            make("{% for m in messages if m.role == 'assistant' %}user {{ m.content }}<|im_end|>{% endfor %}"), talk("user", "b"), CHAT
        )
    _, call = next(read_shard(CASES / "C11-null-content-toolcall.jsonl"))
    with pytest.raises(DataError, match="drops the tool call `clock` of turn 2"):
        encode_row(make(), checked(call, "messages"), CHAT)


def test_a_template_that_reshapes_content_does_not_drop_it(make: Callable[..., Any]) -> None:
    tokenizer = make(CHATML.replace("{{ m.content }}", "{{ m.content | upper }}"))
    assert learned(tokenizer, encode_row(tokenizer, talk("one", "two"), CHAT)) == "TWO<|im_end|>"


@pytest.mark.parametrize(
    ("template", "add_bos", "bos", "count"),
    [("own", True, "<s>", 1), ("own", False, "<s>", 1), (CHATML, True, "<s>", 1), (CHATML, False, "<s>", 0), (CHATML, False, None, 0)],
)
def test_c44_one_bos_in_training_and_prompt_ids(
    template: str, add_bos: bool, bos: str | None, count: int, make: Callable[..., Any]
) -> None:
    text = (CASES / "C44-bos.jinja").read_text() if template == "own" else template
    tokenizer = make(text, bos=bos, add_bos=add_bos)
    row = {"prompt": "2+3=", "answer": "5", "id": "r"}
    for format, data in (("chat", CHAT), ("plain", PLAIN)):
        prompt = render_prompt(tokenizer, row, format)
        encoded = encode_row(tokenizer, row, data)
        assert encoded.input_ids[: len(prompt)] == prompt
        expected = count if format == "chat" else int(add_bos)
        assert encoded.input_ids.count(tokenizer.bos_token_id) == expected
        assert not any(encoded.loss_mask[: len(prompt)])
        assert learned(tokenizer, encoded) == "5<|im_end|>"


def test_prompt_ids_are_a_prefix_even_where_tokens_would_merge(make: Callable[..., Any]) -> None:
    tokenizer = make()
    row = {"prompt": "q", "answer": "\nspaced", "id": "r"}
    prompt = render_prompt(tokenizer, row)
    assert encode_row(tokenizer, row, CHAT).input_ids[: len(prompt)] == prompt
    assert learned(tokenizer, encode_row(tokenizer, row, CHAT)) == "\nspaced<|im_end|>"


def test_c45_long_prompts_are_counted_by_length_and_the_good_row_stays(make: Callable[..., Any]) -> None:
    tokenizer, rows = make(), case("C45-long-prompts.jsonl")
    data = DataConfig(format="chat", max_length=64)
    found, report = encode_rows(tokenizer, [*rows[:7], Row(talk("hi", "yes"))], data)
    assert len(found) == 1
    assert report["left_out"] == {"prompt too long": 7}
    with pytest.raises(DataError, match=r"7 of 7 rows cannot be used \(7 prompt too long; the longest prompt has \d+ tokens\)") as caught:
        encode_rows(tokenizer, rows[:7], data, "skip")
    assert "64" in caught.value.where
    assert caught.value.exit_code == 4


def test_c63_every_refused_row_is_named_in_one_error(make: Callable[..., Any]) -> None:
    tokenizer = make((CASES / "C63-strict-alternation.jinja").read_text(), eos="[END]")
    rows = []
    for number, row in read_shard(CASES / "C63-rows.jsonl"):
        if number <= 6:
            rows.append(Row(checked(row, "messages"), where=f"C63-rows.jsonl:{number}"))
    with pytest.raises(DataError) as caught:
        encode_rows(tokenizer, rows, CHAT)
    text = str(caught.value)
    assert "4 of 6 rows cannot be used (4 template refused)" in text
    assert all(f"C63-rows.jsonl:{number}: " in text for number in (2, 3, 4, 5))
    assert "turns must go user, assistant" in text
    found, report = encode_rows(tokenizer, rows, CHAT, "skip")
    assert [e.id for e in found] == ["ok", "ends-with-user"]
    assert [learned(tokenizer, e) for e in found] == ["b[END]", "b[END]"]
    assert report["notes"] == {"turns after the last answer left out": 1}


def test_c75_a_long_prompt_is_found_before_the_first_step(make: Callable[..., Any]) -> None:
    rows = case("C75-long-prompt.jsonl", "verifiable", {"answer": "final"})
    with pytest.raises(DataError, match=r"C75-long-prompt.jsonl:18: the prompt alone has \d{4,} tokens, the limit is 256"):
        scan_prompts(make(), rows, max_prompt=256)
    kept, prompts, report = scan_prompts(make(), rows, max_prompt=256, on_bad="skip")
    assert len(kept) == len(prompts) == len(rows) - 1
    assert report["left_out"] == {"prompt too long": 1}
    assert all(render_prompt(make(), row) == ids for row, ids in zip(kept[:3], prompts[:3], strict=True))


def test_plain_rows(make: Callable[..., Any]) -> None:
    tokenizer = make(None)
    assert resolve_format(tokenizer, "auto") == "plain"
    encoded = encode_row(tokenizer, {"prompt": "12+34=", "answer": "046", "id": "r", "weight": 0.5}, DataConfig())
    assert tokenizer.decode(encoded.input_ids) == "12+34=046<|im_end|>"
    assert (learned(tokenizer, encoded), encoded.weight, encoded.id) == ("046<|im_end|>", 0.5, "r")
    text = encode_row(tokenizer, {"text": "hello"}, DataConfig())
    assert learned(tokenizer, text) == "hello<|im_end|>"
    assert learned(tokenizer, encode_row(tokenizer, {"prompt": "12", "answer": 7}, DataConfig(loss_on="all"))) == "127<|im_end|>"


def test_text_is_cut_at_the_end_and_noted(make: Callable[..., Any]) -> None:
    encoded = encode_row(make(None), {"text": "x" * 50}, DataConfig(max_length=16))
    assert len(encoded.input_ids) == len(encoded.loss_mask) == 16
    assert encoded.notes == ("cut at max_length",)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "", "id": "e"}, "row e: not one token of the row carries loss"),
        ({"prompt": "", "answer": "1"}, "the prompt is empty"),
        ({"prompt": "1"}, "a prompt without an answer"),
        ({"prompt": "1", "answer": ["a"]}, "an answer of type list"),
        ({"messages": talk("a", "b", "c", "d")["messages"]}, "needs a chat template"),
    ],
)
def test_rows_that_teach_nothing_are_named(row: dict[str, Any], words: str, make: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match=words):
        encode_row(make(None), row, DataConfig())


def test_formats_and_templates_are_checked(make: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no chat template"):
        resolve_format(make(None), "chat")
    good, bad = tmp_path / "t.jinja", tmp_path / "bad.jinja"
    good.write_text(CHATML)
    bad.write_text("{% for %}")
    tokenizer = make(None)
    set_template(tokenizer, good, replace=False)
    assert tokenizer.chat_template == CHATML
    set_template(tokenizer, good, replace=False)
    with pytest.raises(ConfigError, match="not a readable Jinja template"):
        set_template(tokenizer, bad, replace=True)
    with pytest.raises(ConfigError, match="already has another chat template"):
        set_template(make("{{ messages }}"), good, replace=False)

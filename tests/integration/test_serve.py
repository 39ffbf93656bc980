"""`posttrain serve` as a process, asked through the openai client: constraints, streaming, adapters, hostile bodies, limits, drain."""

from __future__ import annotations

import concurrent.futures
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.constraint_kit import JSON, SCHEMA
from tests.serve_kit import KEY, named, refused, served

pytest.importorskip("vllm")
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def server(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from posttrain.models.load import load_tokenizer
    from posttrain.models.save import save_model

    folder = tmp_path_factory.mktemp("serve")
    lora = LoraConfig(r=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), lora)
    save_model(adapted, load_tokenizer(tiny_model_dir), folder / "adapter", base=tiny_model_dir)
    words = ["--lora", f"tuned={folder / 'adapter'}", "--max-body", "20000", "--max-batch", "16", "--drain", "20", "--", "--enforce-eager"]
    with served(folder, tiny_model_dir, *words) as running:
        yield running


@pytest.fixture
def client(server: dict[str, Any]) -> Any:
    return openai.OpenAI(base_url=f"{server['url']}/v1", api_key=KEY, max_retries=0, timeout=120)


def awrs(constraint: dict[str, Any] = JSON, **sampler: Any) -> dict[str, Any]:
    return {"vllm_xargs": {"awrs": json.dumps({"constraint": constraint, "sampler": sampler})}}


def test_surface_and_keys(server: dict[str, Any], client: Any) -> None:
    assert {model.id for model in client.models.list().data} == {"tiny", "tuned"}
    assert httpx.get(f"{server['url']}/v1/models").status_code == 401
    assert httpx.get(f"{server['url']}/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert "vllm:" in httpx.get(f"{server['url']}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    assert KEY not in server["log"].read_text()
    found = httpx.get(f"{server['url']}/v1/models", headers={"Authorization": f"Bearer {KEY}", "X-Request-Id": "abc"})
    assert found.headers["x-request-id"] == "abc"


def test_constrained_completions_are_those_of_the_engine(client: Any, tiny_model_dir: Path, tiny_tokenizer: Any) -> None:
    """Same seed, same tokens as the transformers engine; n of them differ and are all valid; chat, too."""
    from transformers import AutoModelForCausalLM

    from posttrain.config.constraint import ConstraintConfig
    from posttrain.rollout._build import build_constraint
    from posttrain.rollout.base import Request, Sampling
    from posttrain.rollout.hf import HFEngine

    engine = HFEngine(AutoModelForCausalLM.from_pretrained(tiny_model_dir), tiny_tokenizer)
    constraint, prompt = build_constraint(ConstraintConfig(**JSON)), "The quick brown"
    for temperature in (0.7, 1.0):
        request = Request(tiny_tokenizer.encode(prompt), 11, Sampling(40, temperature), "", constraint)
        wanted = engine.generate([request])[0].text
        options = {"max_tokens": 40, "temperature": temperature, "seed": 11, "extra_body": awrs()}
        assert client.completions.create(model="tiny", prompt=prompt, **options).choices[0].text == wanted
    many = client.completions.create(model="tiny", prompt=prompt, max_tokens=40, n=6, seed=5, extra_body=awrs()).choices
    assert len({choice.text for choice in many}) > 1
    for choice in many:
        jsonschema.validate(json.loads(choice.text), SCHEMA)
    turns = [{"role": "user", "content": "hello"}]
    chat = client.chat.completions.create(model="tiny", messages=turns, max_tokens=40, temperature=0, extra_body=awrs())
    jsonschema.validate(json.loads(chat.choices[0].message.content), SCHEMA)


def test_streams(client: Any) -> None:
    options = {"model": "tiny", "prompt": "What is 12", "max_tokens": 40, "seed": 3, "extra_body": awrs()}
    whole = client.completions.create(**options).choices[0]
    parts = [chunk.choices[0] for chunk in client.completions.create(**options, stream=True) if chunk.choices]
    assert len(parts) > 2 and "".join(part.text for part in parts) == whole.text and parts[-1].finish_reason == "stop"


def test_log_probabilities_are_the_models_own(client: Any, tiny_model_dir: Path, tiny_tokenizer: Any) -> None:
    """Of a forced token too: those of the distribution without the constraint."""
    import torch
    from transformers import AutoModelForCausalLM

    options = {"max_tokens": 12, "temperature": 1.0, "seed": 4, "logprobs": 0, "extra_body": {**awrs(), "return_token_ids": True}}
    found = client.completions.create(model="tiny", prompt="A model", **options).choices[0]
    prompt, drawn = tiny_tokenizer.encode("A model"), found.token_ids
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        rows = model(torch.tensor([prompt + drawn])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    wanted = rows.gather(1, torch.tensor(drawn)[:, None]).squeeze(1)
    assert torch.allclose(wanted, torch.tensor(found.logprobs.token_logprobs), atol=1e-4) and float(wanted.sum()) < -5


def test_adapters_and_the_masks_of_vllm_stay_usable(client: Any) -> None:
    options = {"prompt": "The quick brown", "max_tokens": 4, "temperature": 0, "logprobs": 0}
    plain, tuned = (client.completions.create(model=name, **options).choices[0].logprobs.token_logprobs for name in ("tiny", "tuned"))
    assert plain != pytest.approx(tuned, abs=1e-3)
    bound = client.completions.create(model="tuned", prompt="The quick", max_tokens=40, extra_body=awrs()).choices[0].text
    jsonschema.validate(json.loads(bound), SCHEMA)
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}}
    turns = [{"role": "user", "content": "hello"}]
    masked = client.chat.completions.create(model="tiny", messages=turns, max_tokens=20, response_format=schema)
    assert json.loads(masked.choices[0].message.content) in ("yes", "no")


def test_response_format_by_our_sampler(client: Any) -> None:
    """The same text as with the schema as constraint, which is another one than vLLM's mask gives."""
    options = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 40, "seed": 9}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    sampler = {"vllm_xargs": {"awrs": json.dumps({"sampler": {"method": "awrs"}})}}
    bound = client.chat.completions.create(**options, extra_body=awrs({"json_schema": SCHEMA}, method="awrs")).choices[0].message.content
    assert client.chat.completions.create(**options, response_format=schema, extra_body=sampler).choices[0].message.content == bound
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**options, response_format={"type": "text"}, extra_body=sampler)


HOSTILE: list[Any] = [
    b"", b"{", b"[]", b"null", b"\xff\xfe", {}, {"model": "tiny"}, {"model": "nobody", "prompt": "x"}, {"model": "tiny", "prompt": ""},
    {"prompt": "x", "max_tokens": -1}, {"prompt": "x", "max_tokens": 10**9}, {"prompt": "x", "temperature": -1},
    {"prompt": "x", "top_p": 2},
    {"prompt": "x", "n": 0}, {"prompt": [10**9]}, {"prompt": [-1]}, {"prompt": "x", "logprobs": 10**6}, {"prompt": "x" * 30_000},
    *({"prompt": "x", "vllm_xargs": {"awrs": text}} for text in ("", "{", "[]", "7", "null x", '{"constraint": {}}')),
    *({"prompt": "x", "vllm_xargs": {"awrs": json.dumps(spec)}} for spec in (
        {"constraint": {"regex": "("}}, {"constraint": {"regex": "a" * 5000}},
        {"constraint": {"json_schema": {"type": "objekt"}}},
        {"constraint": {"json_schema": "/etc/hostname"}}, {"constraint": {"uncited": {"path": "/etc/hostname"}}},
        {"constraint": {"plugin": "os.system"}}, {"constraint": {"lark": "start: start"}},
        {"constraint": JSON, "sampler": {"particles": 8}},
        {"constraint": JSON, "key": "x", "surprise": 1}, {"key": "x"},
    )),
    *({"prompt": "x", **awrs(), **more} for more in (
        {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.2}, {"presence_penalty": 1.0}, {"logit_bias": {"5": 1}},
        {"min_tokens": 3, "max_tokens": 9},
        {"structured_outputs": {"regex": "a"}},
    )),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_bodies_are_refused_and_the_server_lives(server: dict[str, Any], number: int) -> None:
    refused(server, named(HOSTILE[number]))


def test_many_at_once_and_clients_that_leave(server: dict[str, Any], client: Any) -> None:
    def one(i: int) -> bool:
        if i % 4 == 3:
            stream = client.completions.create(model="tiny", prompt="The quick", max_tokens=200, temperature=1.5, stream=True)
            next(iter(stream))
            stream.close()
            return True
        options = {
            "model": "tiny",
            "prompt": "The quick",
            "max_tokens": 40,
            "seed": i,
            "extra_body": awrs(method="local" if i % 2 else "awrs"),
        }
        jsonschema.validate(json.loads(client.completions.create(**options).choices[0].text), SCHEMA)
        return True

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert all(pool.map(one, range(32)))
    assert httpx.get(f"{server['url']}/health").status_code == 200


def test_it_drains_on_sigterm(server: dict[str, Any], client: Any) -> None:
    """Runs last: a running stream ends whole, then the process does."""
    options = {"model": "tiny", "prompt": "The", "max_tokens": 300, "temperature": 0, "stream": True, "extra_body": {"ignore_eos": True}}
    stream = client.completions.create(**options)
    parts = [next(iter(stream)).choices[0]]
    server["process"].send_signal(signal.SIGTERM)
    parts += [chunk.choices[0] for chunk in stream if chunk.choices]
    assert parts[-1].finish_reason == "length"
    assert server["process"].wait(60) == 0

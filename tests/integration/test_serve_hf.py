"""`posttrain serve --engine hf` as a process, asked through the openai client."""

from __future__ import annotations

import concurrent.futures
import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.constraint_kit import JSON, SCHEMA
from tests.serve_kit import HEADERS, KEY, named, refused, served

pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")


@pytest.fixture(scope="module")
def server(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("serve-hf")
    words = ["--engine", "hf", "--max-body", "20000", "--max-batch", "16", "--max-waiting", "40", "--drain", "20"]
    with served(folder, tiny_model_dir, *words) as running:
        yield running


@pytest.fixture
def client(server: dict[str, Any]) -> Any:
    return openai.OpenAI(base_url=f"{server['url']}/v1", api_key=KEY, max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path, tiny_tokenizer: Any) -> Any:
    from transformers import AutoModelForCausalLM

    from posttrain.rollout.hf import HFEngine

    return HFEngine(AutoModelForCausalLM.from_pretrained(tiny_model_dir), tiny_tokenizer)


def awrs(constraint: dict[str, Any] = JSON, **sampler: Any) -> dict[str, Any]:
    return {"awrs": {"constraint": constraint, "sampler": sampler}}


def wanted(engine: Any, prompt: str, seed: int, limit: int, temperature: float = 1.0, stop: tuple[str, ...] = (), **sampler: Any) -> Any:
    """What the engine itself draws."""
    from posttrain.config.constraint import ConstraintConfig, SamplerConfig
    from posttrain.rollout._build import build_constraint
    from posttrain.rollout.base import Request, Sampling

    bound = () if stop or sampler.pop("free", False) else (build_constraint(ConstraintConfig(**JSON)), SamplerConfig(**sampler))
    return engine.generate([Request(engine.tokenizer.encode(prompt), seed, Sampling(limit, temperature, stop=stop), "", *bound)])[0]


def metric(server: dict[str, Any], name: str) -> float:
    text = httpx.get(f"{server['url']}/metrics", headers=HEADERS).text
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.M)
    return float(found[1]) if found else 0.0


def test_surface_and_keys(server: dict[str, Any], client: Any) -> None:
    assert [model.id for model in client.models.list().data] == ["tiny"]
    for path in ("/v1/models", "/metrics", "/nowhere"):
        assert httpx.get(server["url"] + path).status_code == 401
        assert httpx.get(server["url"] + path, headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert httpx.get(f"{server['url']}/nowhere", headers=HEADERS).status_code == 404
    assert httpx.get(f"{server['url']}/v1/completions", headers=HEADERS).json()["error"]["code"] == 405
    assert KEY not in server["log"].read_text()


@pytest.mark.parametrize("sampler", [{}, {"method": "local"}, {"particles": 4, "ess_threshold": 0.9}], ids=str)
def test_constrained_completions_are_those_of_the_engine(client: Any, engine: Any, sampler: dict[str, Any]) -> None:
    """Same seed, same tokens, same weights, and n of them as seeds in a row."""
    found = client.completions.create(model="tiny", prompt="The quick", max_tokens=40, n=3, seed=11, extra_body=awrs(**sampler)).choices
    for i, choice in enumerate(found):
        alone = wanted(engine, "The quick", 11 + i, 40, **sampler)
        assert (choice.text, choice.finish_reason) == (alone.text, alone.finish_reason) and choice.index == i
        assert choice.awrs["log_weight"] == pytest.approx(alone.extra["log_weight"], abs=1e-4)
        assert choice.awrs["particles"] == sampler.get("particles", 1)
        if alone.finish_reason == "stop":
            jsonschema.validate(json.loads(choice.text), SCHEMA)


def test_the_form_that_the_server_on_vllm_takes(client: Any, engine: Any) -> None:
    extra = {"vllm_xargs": {"awrs": json.dumps({"constraint": JSON})}}
    found = client.completions.create(model="tiny", prompt="The quick", max_tokens=40, seed=11, extra_body=extra).choices[0]
    assert found.text == wanted(engine, "The quick", 11, 40).text


def test_free_completions_stop_strings_and_log_probabilities(client: Any, engine: Any) -> None:
    alone = wanted(engine, "What is 12", 3, 30, free=True)
    options = {"model": "tiny", "prompt": "What is 12", "seed": 3, "max_tokens": 30}
    found = client.completions.create(**options, logprobs=0, extra_body={"return_token_ids": True})
    choice = found.choices[0]
    assert choice.text == alone.text and choice.token_ids == alone.token_ids and found.usage.completion_tokens == len(alone.token_ids)
    assert choice.logprobs.token_logprobs == pytest.approx(alone.logprobs, abs=1e-4)
    stop = alone.text[4:6]
    cut = client.completions.create(**options, stop=[stop]).choices[0]
    assert cut.text == wanted(engine, "What is 12", 3, 30, stop=(stop,)).text and cut.finish_reason == "stop" and stop not in cut.text
    streamed = "".join(part.choices[0].text for part in client.completions.create(**options, stop=[stop], stream=True))
    assert streamed == cut.text


def test_prompts_may_be_many_and_ids(client: Any, engine: Any) -> None:
    prompts = ["The quick", "A model"]
    both = client.completions.create(model="tiny", prompt=prompts, n=2, seed=5, max_tokens=6).choices
    ids = client.completions.create(model="tiny", prompt=[engine.tokenizer.encode(p) for p in prompts], n=2, seed=5, max_tokens=6).choices
    assert [c.text for c in both] == [c.text for c in ids] and [c.index for c in both] == [0, 1, 2, 3]
    assert [c.text for c in both] == [wanted(engine, p, 5 + i, 6, free=True).text for p in prompts for i in range(2)]


@pytest.mark.parametrize("particles", [1, 3])
def test_streams(client: Any, particles: int) -> None:
    options = {"model": "tiny", "prompt": "What is 12", "max_tokens": 40, "seed": 3, "n": 2, "extra_body": awrs(particles=particles)}
    whole = client.completions.create(**options)
    parts = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert parts[-1].usage == whole.usage and not parts[-1].choices
    for choice in whole.choices:
        own = [part.choices[0] for part in parts[:-1] if part.choices[0].index == choice.index]
        assert "".join(part.text for part in own) == choice.text and own[-1].finish_reason == choice.finish_reason
        assert own[-1].awrs == choice.awrs and all(part.finish_reason is None for part in own[:-1])
        assert len(own) == 1 if particles > 1 else len(own) > 2


def test_chat_and_response_format(client: Any) -> None:
    turns = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}}
    options = {"model": "tiny", "messages": turns, "max_completion_tokens": 20, "seed": 1}
    sampler = {"sampler": {"particles": 4}}
    found = client.chat.completions.create(**options, response_format=form, logprobs=True, extra_body={"awrs": sampler})
    assert json.loads(found.choices[0].message.content) in ("yes", "no") and found.choices[0].awrs["particles"] == 4
    assert len(found.choices[0].logprobs.content) == found.usage.completion_tokens
    plain = client.chat.completions.create(**options).choices[0].message
    stream = client.chat.completions.create(**options, stream=True)
    deltas = [part.choices[0].delta for part in stream]
    assert deltas[0].role == "assistant" and "".join(delta.content or "" for delta in deltas) == plain.content


def test_dead_ends_are_said(server: dict[str, Any], client: Any) -> None:
    """`a` and `b` at once: no text has both."""
    before = metric(server, 'posttrain_completions_total{finish_reason="dead_end"}')
    both = {"all": [{"regex": "a+"}, {"choices": ["ab"]}]}
    found = client.completions.create(model="tiny", prompt="x", max_tokens=5, extra_body=awrs(both)).choices[0]
    assert found.finish_reason == "dead_end" and found.awrs["log_z"] is None and not found.awrs["complete"]
    assert metric(server, 'posttrain_completions_total{finish_reason="dead_end"}') == before + 1


HOSTILE: list[Any] = [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 9_000, b'{"model": "tiny", "prompt": "x", "temperature": NaN}', {}, {"model": "tiny"},
    {"model": "nobody", "prompt": "x"}, {"model": "tiny", "prompt": ""}, {"prompt": []}, {"prompt": [[]]}, {"prompt": None}, {"prompt": 7},
    {"prompt": "x", "max_tokens": -1}, {"prompt": "x", "max_tokens": 10**9}, {"prompt": "x", "temperature": -1},
    {"prompt": "x", "top_p": 2}, {"prompt": "x", "top_p": 0}, {"prompt": "x", "top_k": -5}, {"prompt": "x", "seed": -1},
    {"prompt": "x", "seed": 2**70}, {"prompt": "x", "stop": [""]}, {"prompt": "x", "stop": "", "stream": True}, {"prompt": "x", "n": "2"},
    {"prompt": "x", "n": 0}, {"prompt": "x", "n": 10**6}, {"prompt": ["x"] * 100, "n": 100}, {"prompt": [10**9]}, {"prompt": [-1]},
    {"prompt": [1.5]}, {"prompt": "x", "logprobs": 5}, {"prompt": "x" * 30_000}, {"prompt": "x " * 9_000}, {"prompt": "x", "echo": True},
    {"prompt": "x", "presence_penalty": 1.0}, {"prompt": "x", "logit_bias": {"5": 1}}, {"prompt": "x", "surprise": 1},
    {"prompt": "x", "awrs": {}}, {"prompt": "x", "awrs": {"sampler": {"particles": 2}}}, {"prompt": "x", "awrs": "x"},
    {"prompt": "x", "response_format": {"type": "json_schema"}}, {"prompt": "x", "response_format": {"type": "xml"}},
    {"prompt": "x", **awrs(), "response_format": {"type": "json_object"}}, {"prompt": "x", "vllm_xargs": {"awrs": "{"}},
    {"prompt": "x", **awrs(), "vllm_xargs": {"awrs": "{}"}}, {"prompt": "x", "vllm_xargs": {}},
    *({"prompt": "x", **awrs(constraint)} for constraint in (
        {"regex": "("}, {"regex": "a" * 5000}, {"json_schema": {"type": "objekt"}}, {"json_schema": "/etc/hostname"}, {},
        {"uncited": {"path": "/etc/hostname"}}, {"plugin": "os.system"}, {"lark": "start: start"}, {"regex": "a", "choices": ["a"]},
    )),
    *({"prompt": "x", **awrs(**sampler)} for sampler in ({"particles": 17}, {"particles": 0}, {"method": "magic"})),
    *({"prompt": "x", **awrs(), **more} for more in ({"top_p": 0.5}, {"top_k": 3}, {"stop": "x"})),
    {"prompt": "x", **awrs(particles=2), "temperature": 0},
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_bodies_are_refused_and_the_server_lives(server: dict[str, Any], number: int) -> None:
    refused(server, named(HOSTILE[number]))


@pytest.mark.parametrize("turns", [[], [{"role": "user"}], [{"role": "", "content": "x"}], [{"role": "user", "content": None}], "x", [7],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/hostname"}}]}],
])  # fmt: skip
def test_hostile_conversations(server: dict[str, Any], turns: Any) -> None:
    assert "messages" in refused(server, {"model": "tiny", "messages": turns}, "/v1/chat/completions")["param"]


def test_many_at_once_clients_that_leave_and_a_full_queue(server: dict[str, Any], client: Any) -> None:
    def one(i: int) -> bool:
        if i % 4 == 3:
            stream = client.completions.create(model="tiny", prompt="The quick", max_tokens=200, temperature=1.5, stream=True)
            next(iter(stream))
            stream.close()
            return True
        extra = awrs(method="local" if i % 2 else "awrs", particles=1 + i % 3)
        found = client.completions.create(model="tiny", prompt="The quick", max_tokens=60, seed=i, extra_body=extra).choices[0]
        if found.finish_reason == "stop":
            jsonschema.validate(json.loads(found.text), SCHEMA)
        return found.finish_reason in ("stop", "length")

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert all(pool.map(one, range(32)))
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model="tiny", prompt="x", n=100)
    assert caught.value.response.headers["retry-after"] == "1"
    deadline = time.monotonic() + 20
    while (metric(server, "posttrain_running_rows"), metric(server, "posttrain_waiting_requests")) != (0, 0):
        assert time.monotonic() < deadline, "rows of clients that left go on"
        time.sleep(0.1)
    assert metric(server, "posttrain_checker_calls_total") >= metric(server, "posttrain_constrained_tokens_total") > 0


def test_it_drains_on_sigterm(server: dict[str, Any], client: Any) -> None:
    """Runs last: a running stream ends whole, then the process does."""
    options = {"model": "tiny", "prompt": "The", "max_tokens": 300, "extra_body": awrs({"regex": "[a-z ]{250}"}), "stream": True}
    stream = client.completions.create(**options)
    parts = [next(iter(stream)).choices[0]]
    server["process"].send_signal(signal.SIGTERM)
    parts += [chunk.choices[0] for chunk in stream if chunk.choices]
    assert parts[-1].finish_reason in ("stop", "length") and len("".join(part.text for part in parts)) > 100
    assert server["process"].wait(60) == 0

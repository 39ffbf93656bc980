"""judge_http beside servers of every kind, and reward_model beside a plain loop."""

from __future__ import annotations

import contextlib
import http.server
import json
import math
import socketserver
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import ArtifactError, ConfigError, RewardError
from posttrain.rewards import failures, get_reward
from posttrain.rewards.judge_http import judge_http
from posttrain.rewards.reward_model import reward_model

TIME_S = 0.6
OK = b'HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n{"score": 0.5}'


@contextlib.contextmanager
def server(handle: Callable[[Any], None]):
    """Address of a server that hands each connection, its request read, to `handle`; and the requests it got."""
    seen: list[tuple[dict[str, str], bytes]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append((dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
            with contextlib.suppress(OSError):
                handle(self)

        def log_message(self, *args: Any) -> None:
            pass

    class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
        daemon_threads = True
        request_queue_size = 64

    with Server(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_address[1]}/judge", seen
        found.shutdown()


def says(raw: bytes) -> Callable[[Any], None]:
    """Answers with these bytes and hangs up."""
    return lambda request: request.wfile.write(raw)


def body(text: str, status: str = "200 OK") -> bytes:
    return f"HTTP/1.0 {status}\r\nContent-Type: application/json\r\n\r\n{text}".encode()


def judged(url: str, completions: list[Any], **options: Any) -> tuple[list[float | None], dict[str, int]]:
    failures(reset=True)
    found = judge_http(completions, **{"url": url, "timeout_s": TIME_S, "retries": 0, **options})
    return found, {name.removeprefix("judge_http."): count for name, count in failures(reset=True).items()}


def drip(text: bytes) -> Callable[[Any], None]:
    """One byte now and then: every wait is short, the whole never ends."""

    def handle(request: Any) -> None:
        for i in range(200):
            request.wfile.write(text[i % len(text) : i % len(text) + 1])
            request.wfile.flush()
            time.sleep(0.1)

    return handle


def endless(request: Any) -> None:
    request.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
    for _ in range(400):
        request.wfile.write(b"1" * (1 << 16))


HOSTILE = {
    "never answers": (lambda request: time.sleep(5), "timeout"),
    "drips its headers": (drip(b"X"), "timeout"),
    "drips header lines": (drip(b"HTTP/1.0 200 OK\r\nA: b\r\n"), "timeout"),
    "drips its body": (lambda request: (request.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n"), drip(b'{"score": 1}  ')(request)), "timeout"),
    "sends without end": (endless, "answer"),
    "hangs up": (lambda request: None, "connection"),
    "half a number": (says(b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{"score": 1'), "connection"),
    "no HTTP": (says(b"\x00\x01\x02 hello\r\n\r\n"), "connection"),
    "refuses": (says(body("no", "403 Forbidden")), "refused"),
    "is broken": (says(body("no", "500 Internal Server Error")), "status"),
    "points elsewhere": (says(b"HTTP/1.0 302 Found\r\nLocation: http://127.0.0.1:9/other\r\n\r\n"), "refused"),
    "no JSON": (says(body("I would say 5")), "answer"),
    "a list": (says(body("[1]")), "answer"),
    "a bare number": (says(body("1")), "answer"),
    "more than the score": (says(body('{"score": 1, "other": 2}')), "answer"),
    "a word": (says(body('{"score": "1"}')), "answer"),
    "true": (says(body('{"score": true}')), "answer"),
    "not a number": (says(body('{"score": NaN}')), "answer"),
    "infinite": (says(body('{"score": 1e999}')), "answer"),
    "no UTF-8": (says(b"HTTP/1.0 200 OK\r\n\r\n\xff\xfe"), "answer"),
    "nested without end": (says(body("[" * 100_000)), "answer"),
    "a chunk that ends early": (says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n{"), "connection"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_judge_costs_its_time_and_one_count(name):
    handle, reason = HOSTILE[name]
    with server(handle) as (url, _):
        start = time.monotonic()
        found, counts = judged(url, ["an answer"])
        took = time.monotonic() - start
    assert found == [None] and counts == {reason: 1}
    assert took < TIME_S + 1


def test_a_pattern_does_not_read_half_a_number():
    with server(says(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nScore: 1")) as (url, _):
        assert judged(url, ["x"], pattern=r"Score: (\d+)") == ([None], {"connection": 1})


def test_what_is_asked_and_told():
    def handle(request: Any) -> None:
        request.wfile.write(OK)

    with server(handle) as (url, seen):
        found, counts = judged(
            url, ["a", [{"role": "assistant", "content": "b"}]], prompts=["p", [{"role": "user", "content": "q"}]], answer=["g", None]
        )
        assert found == [0.5, 0.5] and not counts
        asked = sorted((json.loads(raw) for _, raw in seen), key=lambda item: item["completion"])
        assert asked == [{"prompt": "p", "completion": "a", "answer": "g"}, {"prompt": "q", "completion": "b", "answer": ""}]
        chat = {"messages": [{"role": "user", "content": "Judge: {prompt} {completion}"}], "n": 1}
        judged(url, ["{prompt}"], prompts=["p"], body=chat)
        assert json.loads(seen[-1][1]) == {"messages": [{"role": "user", "content": "Judge: p {prompt}"}], "n": 1}


def test_a_score_outside_its_range_is_a_failure():
    with server(says(body('{"score": 11}'))) as (url, _):
        assert judged(url, ["x"], low=0, high=10) == ([None], {"answer": 1})
        assert judged(url, ["x"], low=0, high=11) == ([11.0], {})


def test_a_judge_that_is_busy_is_asked_again():
    turns = iter([body("", "429 Too Many Requests"), body("", "503 Service Unavailable"), OK])
    with server(lambda request: request.wfile.write(next(turns))) as (url, seen):
        assert judged(url, ["x"], retries=2, timeout_s=5.0) == ([0.5], {})
        assert len(seen) == 3
    with server(says(body("", "403 Forbidden"))) as (url, seen):
        judged(url, ["x"], retries=5)
        assert len(seen) == 1


def test_the_time_of_a_batch_holds_whatever_each_may_take():
    with server(lambda request: time.sleep(3)) as (url, _):
        start = time.monotonic()
        found, counts = judged(url, [str(i) for i in range(40)], timeout_s=0.5, batch_timeout_s=1.0, concurrency=4, retries=3)
        assert time.monotonic() - start < 2
    assert found == [None] * 40 and counts == {"timeout": 40}


def test_answers_are_kept_without_the_key(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    cache = tmp_path / "deep" / "cache.jsonl"
    with server(says(OK)) as (url, seen):
        for _ in range(2):
            assert judged(url, ["a", "b", "a"], cache=cache, key="${JUDGE_KEY}")[0] == [0.5] * 3
        assert len(seen) == 2 and all(headers["Authorization"] == "Bearer sk-very-secret" for headers, _ in seen)
    text = cache.read_text()
    assert len(text.splitlines()) == 2 and "secret" not in text
    cache.with_name("broken.jsonl").write_text('{"key": 1\nnothing\n' + text + '{"key": "x", "score": "y"}\n')
    found, _ = judged(url, ["a", "b"], cache=cache.with_name("broken.jsonl"), key="${JUDGE_KEY}")
    assert found == [0.5, 0.5]


def test_failures_are_not_kept(tmp_path):
    answers = iter([body("no"), OK])
    with server(lambda request: request.wfile.write(next(answers))) as (url, _):
        assert judged(url, ["a"], cache=tmp_path / "c")[0] == [None]
        assert judged(url, ["a"], cache=tmp_path / "c")[0] == [0.5]


@pytest.mark.parametrize(("options", "words"), [
    ({"url": "ftp://somewhere"}, "http or https"),
    ({"url": "http://x/${NO_SUCH_VARIABLE}"}, "`NO_SUCH_VARIABLE` is not set"),
    ({"key": "sk-in-the-open"}, "must name an environment variable"),
    ({"pattern": "("}, "no regular expression"),
    ({"pattern": "a"}, "no group"),
])  # fmt: skip
def test_options_are_checked(options, words):
    with pytest.raises(ConfigError, match=words) as error:
        judged(**{"url": "http://127.0.0.1:9/", "completions": ["x"], **options})
    assert "sk-in-the-open" not in str(error.value)


@pytest.fixture(scope="module")
def judge_model(tmp_path_factory, tiny_tokenizer) -> Path:
    """A small reward model with a random head."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("reward") / "model"
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.5, num_labels=1, pad_token_id=tiny_tokenizer.pad_token_id, max_position_embeddings=128,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_a_reward_model_scores_the_whole_conversation(judge_model):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(judge_model), AutoTokenizer.from_pretrained(judge_model)
    prompts, completions = (
        ["What is 1 + 1?", "Say it.", "And a longer question, of more words?"],
        ["2", "It is said, as you wished.", "No."],
    )
    want = []
    for prompt, completion in zip(prompts, completions, strict=True):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        ids = (
            tokenizer.apply_chat_template(turns, return_dict=False)
            if tokenizer.chat_template
            else tokenizer(f"{prompt}\n\n{completion}")["input_ids"]
        )
        with torch.no_grad():
            want.append(float(model(torch.tensor([ids])).logits[0, 0]))
    state = torch.random.get_rng_state()
    assert reward_model(completions, prompts, model=judge_model, batch=2) == pytest.approx(want, rel=1e-4, abs=1e-5)
    assert torch.equal(state, torch.random.get_rng_state())
    scaled = reward_model(completions, prompts, model=judge_model, scale=2.0, shift=-1.0, squash="sigmoid")
    assert scaled == pytest.approx([2 / (1 + math.exp(-value)) - 1 for value in want], rel=1e-4, abs=1e-5)


def test_a_reward_model_that_gives_no_number_is_counted(judge_model, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    shutil.copytree(judge_model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"] = weights["score.weight"] * float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    failures(reset=True)
    assert reward_model(["a", "b"], ["p", "q"], model=folder) == [None, None]
    assert failures(reset=True) == {"reward_model.not_finite": 2}


def test_what_is_no_reward_model(tiny_model_dir, judge_model):
    with pytest.raises(ArtifactError, match="no classifier"):
        reward_model(["a"], ["p"], model=tiny_model_dir)
    with pytest.raises(ConfigError, match="label 3 does not exist"):
        reward_model(["a"], ["p"], model=judge_model, label=3)
    with pytest.raises(RewardError, match="needs the prompts"):
        reward_model(["a"], model=judge_model)
    with pytest.raises(ConfigError, match="needs the option `url`"):
        get_reward("judge_http")

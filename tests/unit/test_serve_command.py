"""The command of the server: addresses, keys, adapters, plugins, and what may not be overridden; the limit on bodies."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.cli import _parse
from posttrain.errors import ConfigError
from posttrain.rollout.limits import BodyLimit, with_format
from posttrain.verbs.serve import server_command


def command(*words: str, **environment: str) -> tuple[list[str], dict[str, str]]:
    return server_command(_parse(["serve", *words]), environment)


def after(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_it_listens_on_the_loopback_address_with_our_sampler(tiny_model_dir: Path) -> None:
    words, environment = command(str(tiny_model_dir), "--port", "8123", "--", "--enforce-eager")
    assert after(words, "--host") == "127.0.0.1" and after(words, "--port") == "8123" and words[-1] == "--enforce-eager"
    assert after(words, "--model") == str(tiny_model_dir) and after(words, "--served-model-name") == "model"
    assert after(words, "--logits-processors") == "posttrain.rollout.vllm_plugin:AWRS"
    assert "VLLM_API_KEY" not in environment and environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1"


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_elsewhere_only_with_a_key(tiny_model_dir: Path, tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="no key"):
        command(str(tiny_model_dir), "--host", host)
    words, environment = command(str(tiny_model_dir), "--host", host, POSTTRAIN_API_KEY="s3cret")
    assert environment["VLLM_API_KEY"] == "s3cret" and "s3cret" not in " ".join(words) and "POSTTRAIN_API_KEY" not in environment
    (tmp_path / "key").write_text("from-file\n")
    assert command(str(tiny_model_dir), "--host", host, "--api-key-file", str(tmp_path / "key"))[1]["VLLM_API_KEY"] == "from-file"
    with pytest.raises(ConfigError, match="opens routes"):
        command(str(tiny_model_dir), "--host", host, POSTTRAIN_API_KEY="x", VLLM_SERVER_DEV_MODE="1")
    (tmp_path / "key").write_text(" \n")
    with pytest.raises(ConfigError, match="is empty"):
        command(str(tiny_model_dir), "--api-key-file", str(tmp_path / "key"))


@pytest.mark.parametrize(
    "option",
    [
        "--api-key",
        "--host=0.0.0.0",
        "--logits-processors",
        "--speculative-config={}",
        "--lora-modules=x",
        "--api_key",
        "--hos",
        "--config=x",
    ],
)
def test_what_is_ours_cannot_be_overridden(tiny_model_dir: Path, option: str) -> None:
    with pytest.raises(ConfigError, match="is set by posttrain"):
        command(str(tiny_model_dir), "--", option, "x")


def test_an_adapter_is_served_on_its_base_and_others_beside(tiny_model_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from posttrain.models.load import load_tokenizer
    from posttrain.models.save import save_model

    for rank in (4, 24):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), LoraConfig(r=rank, target_modules=["q_proj"]))
        save_model(model, load_tokenizer(tiny_model_dir), tmp_path / f"r{rank}", base=tiny_model_dir)
    words, _ = command(str(tmp_path / "r4"), "--name", "mine", "--lora", f"other={tmp_path / 'r24'}")
    assert after(words, "--model") == str(tiny_model_dir) and after(words, "--served-model-name") == "base"
    assert after(words, "--max-lora-rank") == "32" and f"mine={tmp_path / 'r4'}" in words and f"other={tmp_path / 'r24'}" in words
    for wrong in (str(tmp_path / "r4"), f"x={tiny_model_dir}", "=x"):
        with pytest.raises(ConfigError, match="--lora"):
            command(str(tiny_model_dir), "--lora", wrong)


def ask(limit: int, monkeypatch: pytest.MonkeyPatch, pieces: list[bytes], declared: bytes | None) -> tuple[list[int], bytes]:
    """Status codes sent, and what the application read."""
    monkeypatch.setenv("POSTTRAIN_MAX_BODY", str(limit))
    sent: list[int] = []
    read = bytearray()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        more = True
        while more:
            message = await receive()
            read.extend(message["body"])
            more = message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    messages = [{"type": "http.request", "body": piece, "more_body": i + 1 < len(pieces)} for i, piece in enumerate(pieces)]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            sent.append(message["status"])
        elif sent[-1] == 413:
            assert json.loads(message["body"])["error"]["code"] == 413

    headers = [] if declared is None else [(b"content-length", declared)]
    asyncio.run(BodyLimit(app)({"type": "http", "headers": headers}, receive, send))
    return sent, bytes(read)


def test_bodies_are_limited_declared_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(10, monkeypatch, [b"12345", b"67890"], b"10") == ([200], b"1234567890")
    assert ask(10, monkeypatch, [b"12345", b"67890"], None) == ([200], b"1234567890")
    for declared in (b"11", b"-1", b"x"):
        assert ask(10, monkeypatch, [b"1"], declared) == ([413], b"")
    assert ask(10, monkeypatch, [b"12345", b"678901"], None) == ([413], b"")


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"[" * 9_000, b"{}", {"vllm_xargs": 7}, {"vllm_xargs": {"awrs": 7}}, {"vllm_xargs": {"awrs": "{}"}},
    {"vllm_xargs": {"awrs": "[]"}, "response_format": {"type": "json_object"}},
    {"vllm_xargs": {"awrs": "{}"}, "response_format": {"type": "text"}},
    {"vllm_xargs": {"awrs": '{"constraint": {"regex": "a"}}'}, "response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_object"}}, {"vllm_xargs": {"awrs": "{}"}, "response_format": {"type": "json_schema"}},
])  # fmt: skip
def test_bodies_without_a_format_for_our_sampler_go_on_as_they_are(body) -> None:
    assert with_format(body if isinstance(body, bytes) else json.dumps(body).encode()) is None


def test_a_format_becomes_the_constraint() -> None:
    body = {"prompt": "x", "response_format": {"type": "json_object"}, "vllm_xargs": {"awrs": '{"sampler": {"method": "mask"}}', "b": 1}}
    found = json.loads(with_format(json.dumps(body).encode()) or b"")
    asked = json.loads(found["vllm_xargs"].pop("awrs"))
    assert found == {"prompt": "x", "vllm_xargs": {"b": 1}}
    assert asked["constraint"]["json_schema"] == {"type": "object"} and asked["sampler"] == {"method": "mask"}


@pytest.mark.parametrize(("words", "said"), [
    (["--host", "0.0.0.0"], "no key"), (["--lora", "a=b"], "one model"), (["--", "--enforce-eager"], "are vLLM's"),
    (["--max-batch", "0"], "at least 1"), (["--port", "1"], "cannot listen"), (["--api-key-file", "/nowhere/key"], "/nowhere/key"),
])  # fmt: skip
def test_the_transformers_engine_refuses_before_it_loads(tiny_model_dir: Path, monkeypatch, words: list[str], said: str) -> None:
    import socket

    from posttrain.errors import PosttrainError
    from posttrain.verbs.serve import serve

    pytest.importorskip("uvicorn")

    def taken(self: socket.socket, address: tuple[str, int]) -> None:
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", taken)
    monkeypatch.delenv("POSTTRAIN_API_KEY", raising=False)
    with pytest.raises((PosttrainError, OSError), match=said):
        serve(_parse(["serve", str(tiny_model_dir), "--engine", "hf", *words]))

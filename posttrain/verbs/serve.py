"""`posttrain serve MODEL`: an OpenAI-compatible server with our constraint sampler, on vLLM or (`--engine hf`) on transformers.

The server on vLLM is vLLM's own (completions, chat, streaming, logprobs, LoRA, /health, /metrics, /v1/models), started in this process's
place with our logits processor, so that a request may carry

    {"vllm_xargs": {"awrs": "{\\"constraint\\": {\\"json_schema\\": {...}}, \\"sampler\\": {\\"method\\": \\"awrs\\"}}"}}

(through the openai client: `extra_body`). `response_format` is drawn by our sampler where one is named, else by vLLM's mask. It
listens on the loopback address unless told otherwise, and elsewhere only with a key, which is read from the environment or a file
and never stands on a command line.
"""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from posttrain.core.environment import VLLM_VARIABLES
from posttrain.core.registry import plugins
from posttrain.errors import ConfigError
from posttrain.models.source import read_base, read_json, resolve_model

KEY = "POSTTRAIN_API_KEY"
SERVER = "vllm.entrypoints.openai.api_server"
PLUGIN = "posttrain.rollout.vllm_plugin"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Largest LoRA ranks that vLLM can be set to."""
OURS = (
    "--model", "--host", "--port", "--api-key", "--logits-processors", "--worker-extension-cls", "--enable-lora", "--lora-modules",
    "--max-lora-rank", "--trust-remote-code", "--shutdown-timeout", "--speculative-config", "--config",
)  # fmt: skip
"""Options of vLLM that must not come from the rest of the command line, nor from a file named there."""


def serve(args: argparse.Namespace) -> int:
    """Serves until it is told to stop; vLLM's server takes this process's place."""
    if args.engine == "hf":
        return _serve_hf(args, os.environ)
    from posttrain.rollout._vllm import unavailable

    problem = unavailable()
    if problem:
        raise ConfigError(problem, where="serve")
    command, environment = server_command(args, os.environ)
    print(f"serving {args.model} on http://{args.host}:{args.port}/v1", flush=True)
    os.execve(command[0], command, environment)


def server_command(args: argparse.Namespace, environment: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Command and environment of the server.

    Raises:
        ConfigError: an address without a key, an option of vLLM that is ours, an adapter that is none.
    """
    key = _key(args, environment)
    _check_address(args.host, key, environment)
    _check_options(args.engine_args)
    name, model, adapters = _model(args)
    command = [sys.executable, "-m", SERVER, "--model", model, "--host", args.host, "--port", str(args.port)]
    command += ["--served-model-name", name, "--dtype", args.dtype, "--max-num-seqs", str(args.max_batch)]
    command += ["--logits-processors", f"{PLUGIN}:AWRS", "--worker-extension-cls", f"{PLUGIN}.Worker"]
    command += ["--shutdown-timeout", str(args.drain), "--enable-request-id-headers"]
    command += ["--middleware", "posttrain.rollout.limits.FormatSampler", "--middleware", "posttrain.rollout.limits.BodyLimit"]
    if args.max_model_len:
        command += ["--max-model-len", str(args.max_model_len)]
    if adapters:
        command += ["--enable-lora", "--max-lora-rank", str(_rank(adapters)), "--lora-modules"]
        command += [f"{name}={folder}" for name, folder in adapters.items()]
    if args.trust_remote_code:
        command.append("--trust-remote-code")
    found = {**VLLM_VARIABLES, **environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "POSTTRAIN_PLUGINS": ",".join(plugins())}
    found["POSTTRAIN_MAX_BODY"] = str(args.max_body)
    found.pop(KEY, None)
    if key:
        found["VLLM_API_KEY"] = key
    return [*command, *args.engine_args], found


def _serve_hf(args: argparse.Namespace, environment: Mapping[str, str]) -> int:
    missing = [name for name in ("starlette", "uvicorn", "prometheus_client") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} is not installed", where="serve --engine hf", fix="pip install 'posttrain[serve]'")
    key = _key(args, environment)
    _check_address(args.host, key, environment)
    if args.lora:
        raise ConfigError("the transformers engine serves one model", where="--lora", fix="give the adapter's folder as MODEL")
    if args.engine_args:
        raise ConfigError("options after `--` are vLLM's", where="serve --engine hf")
    from posttrain.rollout.server.run import run

    run(
        args.model,
        host=args.host,
        port=args.port,
        name=args.name or Path(args.model).name,
        key=key,
        dtype=args.dtype,
        max_batch=args.max_batch,
        max_model_len=args.max_model_len,
        max_waiting=args.max_waiting,
        max_body=args.max_body,
        drain=args.drain,
        trust_remote_code=args.trust_remote_code,
    )
    return 0


def _check_options(options: Sequence[str]) -> None:
    """vLLM takes `_` for `-`, and any beginning of a name that is clear."""
    for option in options:
        name = option.partition("=")[0].replace("_", "-")
        taken = next((ours for ours in OURS if name.startswith("--") and ours.startswith(name)), None)
        if taken is not None:
            fix = "use posttrain's own option, or start vLLM's server yourself"
            raise ConfigError(f"`{name}` is set by posttrain", where="serve", fix=fix)


def _key(args: argparse.Namespace, environment: Mapping[str, str]) -> str:
    if not args.api_key_file:
        return environment.get(KEY, "")
    key = Path(args.api_key_file).read_text(encoding="utf-8").strip()
    if not key:
        raise ConfigError("the file is empty", where="--api-key-file", fix="write the key into it")
    return key


def _check_address(host: str, key: str, environment: Mapping[str, str]) -> None:
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if local:
        return
    if not key:
        fix = f"set {KEY}, or give --api-key-file"
        raise ConfigError(f"{host} is not the loopback address, and there is no key", where="--host", fix=fix)
    if environment.get("VLLM_SERVER_DEV_MODE", "0") not in ("", "0"):
        fix = "unset it, or listen on 127.0.0.1"
        raise ConfigError("VLLM_SERVER_DEV_MODE opens routes that control the engine", where="--host", fix=fix)


def _model(args: argparse.Namespace) -> tuple[str, str, dict[str, str]]:
    """Name of the model, its folder or hub id, and adapters by the name they are asked for with."""
    source, name = resolve_model(args.model), args.name or Path(args.model).name
    adapters: dict[str, str] = {}
    if source.form == "adapter":
        adapters[name] = str(source.local)
        name, source = "base", read_base(source.local)[0]
    if source.form == "gguf":
        from posttrain.models.load import fetch

        source = fetch(source)
    for item in args.lora:
        wanted, _, folder = item.partition("=")
        if not wanted or not folder or resolve_model(folder).form != "adapter":
            raise ConfigError(f"`{item}`: expected NAME=FOLDER of a LoRA adapter", where="--lora")
        adapters[wanted] = folder
    return name, str(source.path or source.id), adapters


def _rank(adapters: Mapping[str, str]) -> int:
    largest = max(int(read_json(Path(folder) / "adapter_config.json").get("r", 8)) for folder in adapters.values())
    fitting = [rank for rank in RANKS if rank >= largest]
    if not fitting:
        raise ConfigError(f"rank {largest} is more than vLLM takes, {RANKS[-1]}", where="--lora", fix="merge the adapter: posttrain export")
    return fitting[0]

"""Loads a model and listens."""

from __future__ import annotations

import argparse
import signal
import socket
from pathlib import Path

from posttrain.errors import ConfigError
from posttrain.models.load import fit_threads, load_model
from posttrain.rollout.hf import HFEngine
from posttrain.rollout.server.app import Service


def run(args: argparse.Namespace, key: str) -> None:
    """Serves until SIGINT or SIGTERM, then lets running requests end for `args.drain` seconds.

    Raises:
        ConfigError: the address is taken, or an option is out of range.
        ArtifactError: the model cannot be read.
    """
    import uvicorn

    for name in ("max_batch", "max_waiting", "max_body"):
        if getattr(args, name) < 1:
            raise ConfigError(f"got {getattr(args, name)}, expected at least 1", where=f"--{name.replace('_', '-')}")
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((args.host, args.port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {args.host}:{args.port}: {error.strerror}", where="--port", fix="choose another one") from None
    loaded = load_model(args.model, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    fit_threads(loaded.model, str(next(loaded.model.parameters()).device))
    engine = HFEngine(loaded.model.eval(), loaded.tokenizer, max_batch=args.max_batch)
    name = args.name or Path(args.model).name
    app = Service(engine, name, key, args.max_model_len, args.max_waiting).asgi(args.max_body)
    print(f"serving {args.model} on http://{args.host}:{listener.getsockname()[1]}/v1", flush=True)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=args.drain, lifespan="on", loop="asyncio")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # uvicorn raises what it caught once more when it has ended, which is no fault here
    uvicorn.Server(config).run(sockets=[listener])

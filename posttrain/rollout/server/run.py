"""Loads a model and listens."""

from __future__ import annotations

import signal
import socket

from posttrain.errors import ConfigError
from posttrain.models.load import fit_threads, load_model
from posttrain.rollout.hf import HFEngine
from posttrain.rollout.server.app import Service


def run(
    model: str,
    *,
    host: str,
    port: int,
    name: str,
    key: str,
    dtype: str,
    max_batch: int,
    max_model_len: int | None,
    max_waiting: int,
    max_body: int,
    drain: int,
    trust_remote_code: bool,
) -> None:
    """Serves until SIGINT or SIGTERM, then lets running requests end.

    Args:
        model: any model source, see `posttrain.models.load.load_model`.
        host, port: where to listen; port 0 is a free one.
        name: of the model, as clients ask for it.
        key: that clients must send; empty for none.
        dtype: of the weights.
        max_batch: rows of the model's batch.
        max_model_len: longest prompt and completion together, in tokens; None is the model's own limit.
        max_waiting: requests that may wait for room; more are answered 429.
        max_body: largest request in bytes.
        drain: seconds that running requests have after the signal.
        trust_remote_code: run code that comes with the model.

    Raises:
        ConfigError: the address is taken, or a number is out of range.
        ArtifactError: the model cannot be read.
    """
    import uvicorn

    for option, value in (("--max-batch", max_batch), ("--max-waiting", max_waiting), ("--max-body", max_body)):
        if value < 1:
            raise ConfigError(f"got {value}, expected at least 1", where=option)
    with _listener(host, port) as listener:
        loaded = load_model(model, dtype=dtype, trust_remote_code=trust_remote_code)
        fit_threads(loaded.model, str(next(loaded.model.parameters()).device))
        engine = HFEngine(loaded.model.eval(), loaded.tokenizer, max_batch=max_batch)
        app = Service(engine, name, key, max_model_len, max_waiting).asgi(max_body)
        print(f"serving {model} on http://{host}:{listener.getsockname()[1]}/v1", flush=True)
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=drain, lifespan="on", loop="asyncio")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)  # uvicorn raises what it caught once more when it has ended, which is no fault here
        uvicorn.Server(config).run(sockets=[listener])


def _listener(host: str, port: int) -> socket.socket:
    """Takes the address before the model is loaded."""
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}", where="--port", fix="choose another one") from None
    return found

"""A server in a process of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

KEY = "test-key"
HEADERS = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}


@contextmanager
def served(folder: Path, model: Path, *words: str) -> Iterator[dict[str, Any]]:
    """`posttrain serve MODEL` as `tiny` with KEY, its log in `folder`: {"url", "process", "log"} once it answers; ended at the end."""
    import httpx

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "posttrain", "serve", str(model), "--port", str(port), "--name", "tiny", "--dtype", "float32", *words]
    environment = {**os.environ, "POSTTRAIN_API_KEY": KEY, "VLLM_LOGGING_LEVEL": "ERROR"}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 400
    try:
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
            try:
                if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.3)
        yield {"url": url, "process": process, "log": folder / "log"}
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def refused(server: dict[str, Any], body: Any, path: str = "/v1/completions") -> dict[str, Any]:
    """Posts a bad body, bytes or JSON, and checks that it is refused in words and the server lives; the error."""
    import httpx

    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    found = httpx.post(server["url"] + path, content=raw, headers=HEADERS, timeout=60)
    assert 400 <= found.status_code < 500, (found.status_code, found.text[:300])
    error: dict[str, Any] = found.json()["error"]
    assert error["message"] and "Traceback" not in found.text
    assert httpx.get(f"{server['url']}/health").status_code == 200
    return error


def named(body: Any) -> Any:
    """The body with the model's name, where it is a prompt without one."""
    return {"model": "tiny", **body} if isinstance(body, dict) and "prompt" in body and "model" not in body else body

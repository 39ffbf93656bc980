"""A server in a process of its own."""

from __future__ import annotations

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

"""Five minutes of mixed load on `posttrain serve`: does every answer hold, does memory grow, does the server live?

    python benchmarks/serve_soak.py            # about six minutes, on both cores
    python benchmarks/serve_soak.py --quick

Sixteen clients in threads: constrained completions (each answer is checked by jsonschema), free ones, streams that are left after
the first token, and bad constraints, which must be answered 400. The model is that of `_records.py`. `peer` is the memory of the
server's processes after a minute (`--quick`: a few seconds), `ours` at the end; `ratio` is 1 where nothing grows.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import httpx
import jsonschema
from _harness import arguments, finish
from _records import PROMPT, SCHEMA, records_model

CLIENTS = 16
KINDS = ("constrained", "constrained", "local", "free", "left", "bad")


def memory(process: int) -> float:
    """MiB resident of a process and all below it."""
    children: dict[int, list[int]] = {}
    sizes: dict[int, float] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "status").read_text()
            except OSError:
                continue
            fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
            children.setdefault(int(fields["PPid"]), []).append(int(entry.name))
            sizes[int(entry.name)] = float(fields.get("VmRSS", "0 kB").split()[0]) / 1024
    total, waiting = 0.0, [process]
    while waiting:
        one = waiting.pop()
        total += sizes.get(one, 0.0)
        waiting += children.get(one, [])
    return total


class Load:
    """Clients that ask until told to stop.

    Args:
        url: of the server.
    """

    def __init__(self, url: str) -> None:
        self.url, self.stop = url, threading.Event()
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.seconds: list[float] = []
        self.lock = threading.Lock()

    def client(self, number: int) -> None:
        """One client."""
        rng = random.Random(number)
        with httpx.Client(base_url=self.url, timeout=120) as http:
            while not self.stop.is_set():
                kind = rng.choice(KINDS)
                start = time.perf_counter()
                try:
                    problem = getattr(self, f"_{kind}")(http, rng)
                except Exception as error:
                    problem = f"{type(error).__name__}: {error}"
                with self.lock:
                    self.counts[kind] += 1
                    if kind in ("constrained", "local"):
                        self.seconds.append(time.perf_counter() - start)
                    if problem:
                        self.wrong.append(f"{kind}: {problem}"[:300])

    def _ask(self, http: httpx.Client, rng: random.Random, **more: Any) -> httpx.Response:
        return http.post(
            "/v1/completions", json={"model": "records", "prompt": PROMPT, "max_tokens": 48, "seed": rng.getrandbits(40), **more}
        )

    def _xargs(self, spec: dict[str, Any]) -> dict[str, Any]:
        return {"vllm_xargs": {"awrs": json.dumps(spec)}}

    def _constrained(self, http: httpx.Client, rng: random.Random, method: str = "awrs") -> str:
        found = self._ask(http, rng, **self._xargs({"constraint": {"json_schema": SCHEMA}, "sampler": {"method": method}}))
        if found.status_code != 200:
            return f"{found.status_code} {found.text}"
        choice = found.json()["choices"][0]
        if choice["finish_reason"] == "stop":
            jsonschema.validate(json.loads(choice["text"]), SCHEMA)
        return ""

    def _local(self, http: httpx.Client, rng: random.Random) -> str:
        return self._constrained(http, rng, "local")

    def _free(self, http: httpx.Client, rng: random.Random) -> str:
        found = self._ask(http, rng, n=2)
        return "" if found.status_code == 200 else f"{found.status_code} {found.text}"

    def _left(self, http: httpx.Client, rng: random.Random) -> str:
        body = {"model": "records", "prompt": PROMPT, "max_tokens": 200, "stream": True, "ignore_eos": True}
        with http.stream("POST", "/v1/completions", json=body) as found:
            next(found.iter_lines())
            return "" if found.status_code == 200 else str(found.status_code)

    def _bad(self, http: httpx.Client, rng: random.Random) -> str:
        spec = rng.choice([{"constraint": {"regex": "("}}, {"constraint": {"json_schema": {"type": rng.random()}}}, {"surprise": 1}])
        found = self._ask(http, rng, **self._xargs(spec))
        return "" if found.status_code == 400 else f"{found.status_code} instead of 400"


def main() -> None:
    """Starts the server, loads it, stops it."""
    args = arguments(__doc__ or "")
    from posttrain.models.save import save_model

    length, settled = (15, 4) if args.quick else (300, 60)
    model, tokenizer = records_model(args.quick)
    with tempfile.TemporaryDirectory() as scratch:
        save_model(model, tokenizer, Path(scratch) / "records")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "posttrain", "serve", str(Path(scratch) / "records"), "--port", str(port), "--dtype", "float32"]
        environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
        server = subprocess.Popen([*command, "--max-batch", "32", "--", "--enforce-eager"], stdout=subprocess.DEVNULL, env=environment)
        url = f"http://127.0.0.1:{port}"
        while True:
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.HTTPError:
                if server.poll() is not None:
                    raise SystemExit("the server did not start") from None
                time.sleep(0.5)
        load = Load(url)
        threads = [threading.Thread(target=load.client, args=(i,)) for i in range(CLIENTS)]
        for thread in threads:
            thread.start()
        time.sleep(settled)
        first = memory(server.pid)
        time.sleep(length - settled)
        last, alive = memory(server.pid), httpx.get(f"{url}/health").status_code == 200
        load.stop.set()
        for thread in threads:
            thread.join()
        server.terminate()
        code = server.wait(120)
    ordered = sorted(load.seconds)
    record = {
        "ours": last, "peer": first, "ratio": first / last, "ci95": None, "control": None, "unit": "MiB resident", "seconds": length,
        "requests": dict(load.counts), "wrong": len(load.wrong), "examples": load.wrong[:5], "alive": alive, "exit_code": code,
        "constrained_s": {"p50": ordered[len(ordered) // 2], "p99": ordered[int(len(ordered) * 0.99)]},
    }  # fmt: skip
    print(f"{sum(load.counts.values())} requests, {len(load.wrong)} wrong; {first:.0f} -> {last:.0f} MiB; exit {code}")
    finish("serve_soak", record, args)


if __name__ == "__main__":
    main()

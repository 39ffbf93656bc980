"""Five minutes of mixed load on `posttrain serve`, on vLLM and on transformers: does every answer hold, does memory grow, does it live?

    python benchmarks/serve_soak.py            # about six minutes an engine, on both cores
    python benchmarks/serve_soak.py --quick

Sixteen clients in threads: constrained completions (each answer is checked by jsonschema), free ones, streams that are left after
the first token, and bad constraints, which must be answered 400; on transformers also four particles a request. The model is that
of `_records.py`. `peer` is the memory of the server's processes after a minute (`--quick`: a few seconds), `ours` at the end;
`ratio` is 1 where nothing grows.
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
from _harness import Cells, arguments, finish
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
        engine: behind it.
    """

    def __init__(self, url: str, engine: str) -> None:
        self.url, self.engine, self.stop = url, engine, threading.Event()
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.seconds: list[float] = []
        self.lock = threading.Lock()

    def client(self, number: int) -> None:
        """One client."""
        rng = random.Random(number)
        with httpx.Client(base_url=self.url, timeout=120) as http:
            while not self.stop.is_set():
                kind = rng.choice(KINDS if self.engine == "vllm" else (*KINDS, "particles"))
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

    def _constrained(self, http: httpx.Client, rng: random.Random, **sampler: Any) -> str:
        found = self._ask(http, rng, **self._xargs({"constraint": {"json_schema": SCHEMA}, "sampler": sampler}))
        if found.status_code != 200:
            return f"{found.status_code} {found.text}"
        choice = found.json()["choices"][0]
        if choice["finish_reason"] == "stop":
            jsonschema.validate(json.loads(choice["text"]), SCHEMA)
        return ""

    def _local(self, http: httpx.Client, rng: random.Random) -> str:
        return self._constrained(http, rng, method="local")

    def _particles(self, http: httpx.Client, rng: random.Random) -> str:
        return self._constrained(http, rng, particles=4)

    def _free(self, http: httpx.Client, rng: random.Random) -> str:
        found = self._ask(http, rng, n=2)
        return "" if found.status_code == 200 else f"{found.status_code} {found.text}"

    def _left(self, http: httpx.Client, rng: random.Random) -> str:
        body = {"model": "records", "prompt": PROMPT, "max_tokens": 200, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as found:
            next(found.iter_lines())
            return "" if found.status_code == 200 else str(found.status_code)

    def _bad(self, http: httpx.Client, rng: random.Random) -> str:
        spec = rng.choice([{"constraint": {"regex": "("}}, {"constraint": {"json_schema": {"type": rng.random()}}}, {"surprise": 1}])
        found = self._ask(http, rng, **self._xargs(spec))
        return "" if found.status_code == 400 else f"{found.status_code} instead of 400"


def soak(engine: str, folder: Path, length: int, settled: int) -> dict[str, Any]:
    """Starts a server, loads it, stops it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "posttrain", "serve", str(folder), "--engine", engine, "--port", str(port), "--dtype", "float32"]
    command += ["--max-batch", "32", *(["--", "--enforce-eager"] if engine == "vllm" else [])]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"})
    url = f"http://127.0.0.1:{port}"
    while True:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                break
        except httpx.HTTPError:
            if server.poll() is not None:
                raise SystemExit("the server did not start") from None
            time.sleep(0.5)
    load = Load(url, engine)
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
    code, ordered = server.wait(120), sorted(load.seconds)
    print(f"{engine}: {sum(load.counts.values())} requests, {len(load.wrong)} wrong; {first:.0f} -> {last:.0f} MiB; exit {code}")
    return {
        "ours": last, "peer": first, "ratio": first / last, "ci95": None, "control": None, "unit": "MiB resident", "seconds": length,
        "requests": dict(load.counts), "wrong": len(load.wrong), "examples": load.wrong[:5], "alive": alive, "exit_code": code,
        "constrained_s": {"p50": ordered[len(ordered) // 2], "p99": ordered[int(len(ordered) * 0.99)]},
    }  # fmt: skip


def main() -> None:
    """Both engines."""
    args = arguments(__doc__ or "")
    from posttrain.models.save import save_model

    length, settled = (12, 4) if args.quick else (300, 60)
    cells = Cells("serve_soak", args)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "records"
        save_model(*records_model(args.quick), folder)
        arms = {engine: lambda _seed, engine=engine: soak(engine, folder, length, settled) for engine in ("vllm", "hf")}
        found = {engine: result for (engine, _), result in cells.measure(arms, [0]).items()}
    finish("serve_soak", {**found["vllm"], "hf": found["hf"]}, args)


if __name__ == "__main__":
    main()

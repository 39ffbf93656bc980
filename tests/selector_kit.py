"""A selector whose scores stand in the rows, a slow pick of the same rules, and corpora: for tests of the shared passes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.door import source_ref
from data_pipelines.passes import run_selector
from data_pipelines.pick import row_uid
from data_pipelines.selector import SelectorConfig
from posttrain.core.context import StageContext
from posttrain.core.events import Events

LOG_WEIGHTS = True
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


class KitConfig(SelectorConfig):
    """No field of its own; the method is one that exists."""

    method: str = "select.dsir"


def fit_shard(rows: Iterable[dict[str, Any]], cfg: Any, role: str) -> dict[str, np.ndarray]:
    """`rows`: how many."""
    return {"rows": np.array([sum(1 for _ in rows)])}


def merge(raw: Iterable[Any], targets: list[Iterable[Any]], cfg: Any) -> dict[str, np.ndarray]:
    """`targets`: rows of each."""
    return {"raw": sum(part["rows"] for part in raw), "targets": np.array([sum(int(part["rows"][0]) for part in one) for one in targets])}


def score(rows: list[dict[str, Any]], state: dict[str, np.ndarray], cfg: Any) -> dict[str, np.ndarray]:
    """The first T numbers of `s`."""
    count = len(state["targets"])
    return {"score": np.array([row["s"][:count] for row in rows], np.float64).reshape(len(rows), count)}


def report(state: dict[str, np.ndarray], picked: Iterable[Any], cfg: Any) -> dict[str, Any]:
    """Rows of each target, and those picked."""
    return {"target_rows": state["targets"].tolist(), "seen_picked": sum(int(part["rows"][0]) for part in picked)}


def corpus(count: int = 200, seed: int = 0, levels: int = 40) -> list[dict[str, Any]]:
    """Rows of 1 to 12 words with three scores of few levels, so that there are ties, and a group."""
    draw = random.Random(seed)
    return [
        {
            "id": f"r{i}",
            "text": " ".join(draw.choices(WORDS, k=draw.randint(1, 12))),
            "s": [float(draw.randint(-levels, levels)) / 4 for _ in range(3)],
            "kind": draw.choice(["web", "web", "code", "math"]),
            "v": [draw.gauss(0, 1) for _ in range(4)],
        }
        for i in range(count)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A JSON-lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_shards(folder: Path, rows: list[dict[str, Any]], count: int) -> Path:
    """The rows over so many files."""
    for i in range(count):
        write_rows(folder / f"s{i}.jsonl", rows[i::count])
    return folder


def config(kit: Any = None, **fields: Any) -> Any:
    """A config of the kit's selector."""
    return (kit or KitConfig).model_validate({"name": "pick", "budget": {"rows": 20}, **fields})


def run(
    folder: Path,
    raw: Any,
    targets: dict[str, Path],
    cfg: Any,
    *,
    selector: str = "selector_kit",
    seed: int = 3,
    log: list[str] | None = None,
    watch: Any = None,
) -> StageContext:
    """Runs the passes into `folder/out` with the work in `folder/work`."""
    (folder / "out").mkdir(parents=True, exist_ok=True)
    named = raw if isinstance(raw, dict) else {"raw": raw}
    refs = {
        "raw": [source_ref("raw", path, None, {}, "stop", name) for name, path in named.items()],
        "target": [source_ref("target", path, "text", {}, "stop", name) for name, path in targets.items()],
    }
    events = Events(None)
    if log is not None:
        events.sinks.append(lambda event: log.append(event.get("message", "")))
    if watch is not None:
        events.sinks.append(watch)
    ctx = StageContext(
        "pick", "select.dsir", seed, {port: found for port, found in refs.items() if found}, folder / "out", folder / "work", events
    )
    run_selector(selector, cfg, ctx)
    return ctx


def chosen(out: Path) -> list[dict[str, Any]]:
    """The picked rows."""
    from posttrain.data.shards import read_shard

    return [row for file in sorted(out.glob("rows-*")) for _, row in read_shard(file)]


def tree(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def weight_of(row: dict[str, Any], unit: str) -> int:
    """What a row takes of a budget; the kit's texts have one word a space-separated piece."""
    return {"tokens": len(row["text"].split()), "bytes": len(row["text"].encode())}.get(unit, 1)


def prefix(rows: list[dict[str, Any]], budget: int, unit: str) -> list[dict[str, Any]]:
    """Rows in order until the next one does not fit."""
    spent, taken = 0, []
    for row in rows:
        spent += weight_of(row, unit)
        if spent > budget:
            break
        taken.append(row)
    return taken


def by_score(rows: list[dict[str, Any]], target: int = 0) -> list[dict[str, Any]]:
    """Best first, ties by uid."""
    return sorted(rows, key=lambda row: (-row["s"][target], row_uid(row["id"])))


def round_targets(rows: list[dict[str, Any]], shares: list[float]) -> list[dict[str, Any]]:
    """All rows by min_t (rank_t + 1) / share_t, ties by uid, the slow way."""
    ranks = [{row["id"]: i for i, row in enumerate(by_score(rows, target))} for target in range(len(shares))]
    key = {row["id"]: min((rank[row["id"]] + 1) / share for rank, share in zip(ranks, shares, strict=True)) for row in rows}
    return sorted(rows, key=lambda row: (key[row["id"]], row_uid(row["id"])))

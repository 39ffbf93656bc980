"""`report.html`: one self-contained file that shows a run, made from what lies on disk and nothing else.

No script, no request, no torch. Everything in it has passed redaction and escaping (`core/markup.py`), since prompts and
completions are text that anybody may have written.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from posttrain import __version__
from posttrain.config.redact import redact
from posttrain.core import svg
from posttrain.core.display import clock
from posttrain.core.durable import write_text
from posttrain.core.events import dumps
from posttrain.core.markup import clean, esc, folded, page, section, table
from posttrain.core.records import StageRecord, read_curves, read_stages
from posttrain.core.rundir import RunDir, read_json
from posttrain.core.table import eval_rows, fact_rows, number, size, stage_rows

REPORT = "report.html"
FIRST = ("loss", "reward", "reward_std", "entropy", "grad_norm", "lr", "learning_rate", "tokens_per_s", "kl")
CURVES_SHOWN = 12
SAMPLES_SHOWN = 20
TEXT_SHOWN = 4000
WORST_LAYERS = 10
SELECTION = (
    "rows_read", "skipped", "excluded_heldout", "other_part", "rows_in", "not_eligible", "eligible", "rows_out", "tokens",
    "groups", "targets", "ess", "top_1_percent", "median_words",
)  # fmt: skip


def write_report(run: RunDir) -> Path:
    """Writes `<run>/report.html` and returns its path; replaces an older one in one step.

    Raises:
        ArtifactError: the file cannot be written.
    """
    records = read_stages(run)
    done = [r for r in records if r.manifest]
    parts = [
        _header(run, records),
        section("Lineage", _lineage(done)),
        section("Tables", _tables(done)),
        section("Evaluation", _evaluation(done)),
        section("Curves", "".join(_curves(r) for r in records)),
        section("Selection", "".join(_selection(r) for r in done)),
        section("Quantization error by layer", "".join(_layers(r) for r in done)),
        section("Loss mask", "".join(_mask(r) for r in done)),
        section("Samples", "".join(_samples(r) for r in done)),
        section("Artifacts", "".join(_artifact(r, run) for r in done)),
        section("Model card", _card(done)),
        section("Config and environment", _settings(run, records)),
    ]
    path = run.path / REPORT
    write_text(path, page(f"{_title(run)}: posttrain report", "".join(parts)))
    return path


def _title(run: RunDir) -> str:
    resolved = read_json(run.path / "pipeline.resolved.json")
    return str(resolved.get("name") or run.path.name) if isinstance(resolved, dict) else run.path.name


def _when(seconds: Any) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds)) if isinstance(seconds, int | float) else "unknown"


def _header(run: RunDir, records: list[StageRecord]) -> str:
    done = [r.manifest for r in records if r.manifest]
    open_ones = [r.name for r in records if not r.manifest]
    seconds = sum(m.get("seconds", 0) for m in done)
    facts = [f"{len(done)} of {len(records)} stages committed", f"{clock(seconds)} of work", f"posttrain {__version__}"]
    if done:
        facts.append(f"{_when(min(m.get('started', math.inf) for m in done))} to {_when(max(m.get('ended', 0) for m in done))}")
    note = f"<p class=soft>not committed: {esc(', '.join(open_ones))}</p>" if open_ones else ""
    return f"<h1>{esc(_title(run))}</h1><p class=soft>{esc(' · '.join(facts))}</p>{note}"


def _lineage(records: list[StageRecord]) -> str:
    nodes: dict[str, tuple[str, list[str]]] = {}
    edges: list[tuple[str, str, str]] = []
    stages = {r.manifest.get("key"): r for r in records}
    for record in records:
        m = record.manifest
        target = f"{record.name} {m.get('key', '')}"
        for item in m.get("inputs", []):
            known = item.get("origin") == "stage" and item.get("key") in stages
            source = f"{item.get('name')} {item.get('key')}" if known else f"{item.get('origin')} {item.get('name')} {item.get('key')}"
            nodes.setdefault(source, (str(item.get("name")), [str(item.get("origin")), f"digest {str(item.get('digest'))[:16]}"]))
            edges.append((source, target, f"{item.get('port')} ({item.get('split')})"))
        nodes[target] = (
            record.name,
            [f"{m.get('method')} → {m.get('kind')}", f"key {str(m.get('key'))[:16]}", f"digest {str(m.get('digest'))[:16]}"],
        )
    return svg.lineage(nodes, edges)


def _tables(records: list[StageRecord]) -> str:
    manifests = [r.manifest for r in records]
    return "".join(f"<section>{text}</section>" for build in (stage_rows, eval_rows, fact_rows) if (text := table(*build(manifests))))


def _interval(value: Any) -> svg.Interval | None:
    if not isinstance(value, dict) or not isinstance(value.get("value"), int | float):
        return None
    low, high = value.get("low"), value.get("high")
    if isinstance(low, int | float) and isinstance(high, int | float):
        return float(value["value"]), float(low), float(high)
    return float(value["value"]), None, None


def _evaluation(records: list[StageRecord]) -> str:
    charts: dict[tuple[str, str], list[tuple[str, svg.Interval | None, svg.Interval | None]]] = {}
    for record in records:
        found = record.summary.get("eval", {})
        before, after = found.get("before", {}), found.get("after", {})
        for name in dict.fromkeys([*before, *after]):
            old, new = before.get(name, {}), after.get(name, {})
            for metric in dict.fromkeys([*old, *new]):
                charts.setdefault((name, metric), []).append((record.name, _interval(old.get(metric)), _interval(new.get(metric))))
    drawn = [svg.intervals(f"{name}: {metric}", rows) for (name, metric), rows in charts.items()]
    text = "".join(f"<section class=wide>{d}</section>" for d in drawn if d)
    return f"<p class=soft>Grey before the stage, coloured after it; lines are confidence intervals.</p>{text}" if text else ""


def _place(metric: str) -> int:
    return FIRST.index(metric) if metric in FIRST else len(FIRST) + (not metric.startswith(("eval/", "rewards/")))


def _curves(record: StageRecord) -> str:
    curves = read_curves(record.folder)
    order = sorted(curves, key=lambda n: (_place(n), n))
    drawn = [svg.curve(name, curves[name]) for name in order]
    if not drawn:
        return ""
    rest = drawn[CURVES_SHOWN:]
    more = folded(f"{len(rest)} more", f"<div class=grid>{''.join(rest)}</div>") if rest else ""
    return f"<section><h3>{esc(record.name)}</h3><div class=grid>{''.join(drawn[:CURVES_SHOWN])}</div>{more}</section>"


def _numbers(values: Any) -> list[float]:
    return [float(v) for v in values] if isinstance(values, list) and all(isinstance(v, int | float) for v in values) else []


def _selection(record: StageRecord) -> str:
    parts = []
    for name, title in (("score_histogram", "scores"), ("words_histogram", "words a row")):
        found = record.summary.get(name)
        if isinstance(found, dict):
            series = {part: _numbers(found.get(part)) for part in ("raw", "picked")}
            parts.append(svg.histogram(f"{record.name}: {title}, share of rows", _numbers(found.get("edges")), series))
    drawn = "".join(f"<section class=wide>{part}</section>" for part in parts if part)
    return f"{drawn}{_selection_facts(record)}{_examples(record)}" if drawn else ""


def _selection_facts(record: StageRecord) -> str:
    """Counts that reconcile the rows, and figures of the weights, groups and targets."""
    named = {name: record.summary[name] for name in SELECTION if name in record.summary}
    rows = [[name.replace("_", " "), number(v) if isinstance(v, int | float) else _pairs(v)] for name, v in named.items() if v != {}]
    return table([f"{record.name}", ""], rows) if len(rows) > 2 else ""


def _pairs(value: Any) -> str:
    return ", ".join(f"{name} {number(v)}" for name, v in value.items()) if isinstance(value, dict) else dumps(value)


def _examples(record: StageRecord) -> str:
    found = record.summary.get("examples")
    if not isinstance(found, dict):
        return ""
    items = [(kind, item) for kind, some in found.items() if isinstance(some, list) for item in some if isinstance(item, dict)]
    rows = [[kind.replace("_", " "), number(item.get("score")), item.get("words"), item.get("text")] for kind, item in items]
    return folded(f"{record.name}: examples", table(["", "score", "words", "text"], rows)) if rows else ""


def _error(layer: dict[str, Any]) -> float:
    value = layer.get("error")
    return float(value) if isinstance(value, int | float) else math.nan


def _layers(record: StageRecord) -> str:
    layers = [layer for layer in record.summary.get("layers") or [] if isinstance(layer, dict)]
    if not layers:
        return ""
    items = [(str(x.get("name")), _error(x), f"{x.get('bits')} bit, group {x.get('group_size')}") for x in layers]
    worst = sorted(layers, key=lambda x: -_error(x) if math.isfinite(_error(x)) else -math.inf)[:WORST_LAYERS]
    rows = [[x.get("name"), short_error(_error(x)), x.get("bits"), x.get("group_size")] for x in worst]
    largest = folded(f"largest {len(rows)} of {len(layers)}", table(["layer", "error", "bits", "group size"], rows))
    return f"<section class=wide>{svg.bars(f'{record.name}: {len(layers)} layers in order', items)}{largest}</section>"


def short_error(value: float) -> str:
    """An error for a table."""
    return svg.short(value) if math.isfinite(value) else "not finite"


def _mask(record: StageRecord) -> str:
    """The first training sequences, the tokens that carry loss between brackets."""
    encoding = record.summary.get("encoding")
    shown = encoding.get("shown") if isinstance(encoding, dict) else None
    rows = [[row.get("row"), f"{row.get('loss')} of {row.get('tokens')}", row.get("text")] for row in shown or [] if isinstance(row, dict)]
    return folded(f"{record.name}: {len(rows)} sequences", table(["row", "tokens with loss", "⟦with loss⟧"], rows)) if rows else ""


def _samples(record: StageRecord) -> str:
    found = record.summary.get("samples")
    groups = found if isinstance(found, dict) else {"": found}
    parts = []
    for title, given in groups.items():
        rows = given if isinstance(given, list) else []
        shown = [row if isinstance(row, dict) else {"completion": row} for row in rows[:SAMPLES_SHOWN]]
        columns = list(dict.fromkeys(key for row in shown for key in row))
        cells = [[_sample_cell(row.get(c)) for c in columns] for row in shown]
        if cells:
            parts.append(folded(f"{record.name} {title}: {len(cells)} of {len(rows)}", table(columns, cells)))
    return "".join(parts)


def _sample_cell(value: Any) -> str:
    if isinstance(value, str):
        text = value
    elif isinstance(value, list) and all(isinstance(v, dict) and "content" in v for v in value):
        text = "\n".join(f"{v.get('role')}: {v['content']}" for v in value)
    else:
        text = number(value) if isinstance(value, int | float) else dumps(value) if value is not None else ""
    return text if len(text) <= TEXT_SHOWN else f"{text[:TEXT_SHOWN]} … ({len(text):,} characters)"


def _artifact(record: StageRecord, run: RunDir) -> str:
    m = record.manifest
    files = [[f.get("path"), size(f.get("size")), str(f.get("sha256"))[:16]] for f in m.get("files", [])]
    facts = [[k, m.get(k)] for k in ("kind", "method", "method_version", "key", "digest", "seed", "attempts")]
    facts += [["folder", record.folder.relative_to(run.path).as_posix()], ["ended", _when(m.get("ended"))]]
    facts += [[f"in.{i.get('port')}", f"{i.get('name')}:{i.get('split')} {i.get('digest')}"] for i in m.get("inputs", [])]
    summary = f"<h3>summary</h3><pre>{esc(_json(_without_bulk(record.summary)))}</pre>"
    return folded(f"{record.name} ({m.get('kind')})", table(["", ""], facts) + table(["file", "size", "sha256"], files) + summary)


def _without_bulk(summary: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in summary.items() if k not in ("samples", "layers", "score_histogram", "words_histogram", "examples", "eval")}


def _json(value: Any) -> str:
    return dumps(redact(value), indent=1)


def _card(records: list[StageRecord]) -> str:
    from posttrain.core.card import card_for
    from posttrain.core.registry import MODEL_KINDS

    model = next((r for r in reversed(records) if r.manifest.get("kind") in MODEL_KINDS), None)
    return folded(f"{model.name}: README.md", f"<pre>{esc(card_for(model.folder))}</pre>") if model else ""


def _settings(run: RunDir, records: list[StageRecord]) -> str:
    path = run.path / "pipeline.yaml"
    source = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    parts = [folded("pipeline.yaml", f"<pre>{esc(source)}</pre>") if source else ""]
    for record in records:
        parts.append(folded(f"{record.name}: config", f"<pre>{esc(_json(record.config))}</pre>") if record.config else "")
    shown: dict[str, list[str]] = {}
    for record in records:
        if record.env:
            shown.setdefault(clean(_json({k: v for k, v in record.env.items() if k != "argv"})), []).append(record.name)
    parts += [folded(f"environment of {', '.join(names)}", f"<pre>{esc(text)}</pre>") for text, names in shown.items()]
    return "".join(parts)

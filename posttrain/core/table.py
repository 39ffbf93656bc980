"""The tables at the end of a run, from manifests only."""

from __future__ import annotations

import math
from typing import Any

Row = list[str]


def render(header: Row, rows: list[Row]) -> str:
    """Aligned plain-text table; the first column is left-aligned, the others right."""
    if not rows:
        return ""
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * w for w in widths], *rows]
    return "\n".join(
        "  ".join([r[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(r[1:], widths[1:], strict=True))]).rstrip() for r in lines
    )


def number(value: Any, digits: int = 3) -> str:
    """Short text of a number, or of an interval's value and half width."""
    if isinstance(value, dict):
        half = (value["high"] - value["low"]) / 2 if isinstance(value.get("high"), int | float) else None
        text = number(value.get("value"), digits)
        return f"{text} ±{half:.{digits}f}" if half is not None else text
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value).lower()
    if isinstance(value, float):
        return f"{value:.{digits}f}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def size(value: float | None) -> str:
    """Bytes as MiB."""
    return "" if value is None else f"{value / 2**20:.2f} MiB"


def eval_rows(manifests: list[dict[str, Any]]) -> tuple[Row, list[Row]]:
    """Before and after of every eval metric, one row a stage and set."""
    rows = []
    for m in manifests:
        evaluation = m.get("summary", {}).get("eval", {})
        before, after = evaluation.get("before", {}), evaluation.get("after", {})
        for name in dict.fromkeys([*before, *after]):
            for metric in dict.fromkeys([*before.get(name, {}), *after.get(name, {})]):
                old, new = before.get(name, {}).get(metric), after.get(name, {}).get(metric)
                n = (new or old or {}).get("n")
                rows.append([f"{m['name']}", name, metric, number(old), number(new), number(n)])
    return ["stage", "set", "metric", "before", "after", "n"], rows


def stage_rows(manifests: list[dict[str, Any]]) -> tuple[Row, list[Row]]:
    """Rows, tokens, seconds, speed and size of every stage."""
    rows = []
    for m in manifests:
        s = m.get("summary", {})
        moved = f"{number(s['rows_in'])} -> {number(s['rows_out'])}" if "rows_in" in s and "rows_out" in s else number(s.get("rows_out"))
        bytes_out = sum(f["size"] for f in m["files"])
        rows.append(
            [
                m["name"],
                m["method"],
                moved,
                number(s.get("tokens")),
                number(m["seconds"], 1),
                number(s.get("tokens_per_s"), 0),
                size(bytes_out),
            ]
        )
    return ["stage", "method", "rows", "tokens", "seconds", "tokens/s", "on disk"], rows


def fact_rows(manifests: list[dict[str, Any]]) -> tuple[Row, list[Row]]:
    """Single figures: the selector's KL reduction, size and perplexity around quantization."""
    rows = []
    for m in manifests:
        s = m.get("summary", {})
        if "kl_reduction" in s:
            rows.append([m["name"], "KL from the target, raw -> picked (nats)", number(s.get("kl_raw")), number(s.get("kl_picked"))])
            rows.append(
                [m["name"], "the same, random pick of equal size -> picked", number(s.get("kl_random")), number(s.get("kl_picked"))]
            )
            rows.append([m["name"], "KL reduction at equal size", "", number(s.get("kl_reduction_at_size"))])
        if "size_bytes_before" in s:
            rows.append([m["name"], "weights on disk", size(s["size_bytes_before"]), size(s.get("size_bytes"))])
    return ["stage", "figure", "before", "after"], rows


def run_table(manifests: list[dict[str, Any]]) -> str:
    """All tables of a run as text."""
    parts = [render(*build(manifests)) for build in (stage_rows, eval_rows, fact_rows)]
    return "\n\n".join(p for p in parts if p)


def _value(metric: dict[str, Any] | None) -> float:
    """A metric's value; NaN where it was not measured, and for the texts that stand for non-finite numbers."""
    value = (metric or {}).get("value")
    return math.nan if value is None else float(value)


def _mean(values: list[float]) -> str:
    return number(sum(values) / len(values))


def seeds_table(runs: list[tuple[int, list[dict[str, Any]]]]) -> str:
    """After-values of every eval metric, one column a seed, with mean and range."""
    cells: dict[tuple[str, str, str], dict[int, tuple[float, float]]] = {}
    for seed, manifests in runs:
        for m in manifests:
            evaluation = m.get("summary", {}).get("eval", {})
            for name, metrics in evaluation.get("after", {}).items():
                before = evaluation.get("before", {}).get(name, {})
                for metric, value in metrics.items():
                    cells.setdefault((m["name"], name, metric), {})[seed] = (_value(before.get(metric)), _value(value))
    rows = []
    for place, values in cells.items():
        before, after = map(list, zip(*values.values(), strict=True))
        span = f"{number(min(after))} to {number(max(after))}"
        rows.append([*place, _mean(before), _mean(after), span, *(number(values[s][1]) if s in values else "" for s, _ in runs)])
    return render(["stage", "set", "metric", "before (mean)", "after (mean)", "range", *(f"seed {s}" for s, _ in runs)], rows)

"""Small charts as inline SVG text: curves, intervals, histograms, bars, and the lineage picture.

Numbers are data, not text, so only labels pass through `esc`. A value that is not finite is drawn as a red tick at the
top of the chart and leaves a gap in the curve; it is never drawn as a number. Curves of more than `BINS` points are drawn
as bin means with a band from each bin's least to its greatest value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from posttrain.core.markup import esc

BINS = 300
Point = tuple[float, float]


def short(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}"


def _svg(width: float, height: float, body: str, label: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" aria-label="{esc(label)}">{body}</svg>'
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{f" class={kind}" if kind else ""}>{esc(text)}</text>'


def _bar(kind: str, x: float, base: float, wide: float, tall: float, tip: str) -> str:
    size = f'x="{x:.1f}" y="{base - tall:.1f}" width="{wide:.1f}" height="{tall:.1f}"'
    return f'<rect class="{kind}" {size}><title>{esc(tip)}</title></rect>'


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low > 1e-12 * max(abs(high), abs(low)):
        return low, high
    pad = abs(low) * 0.05 or 1.0
    return low - pad, high + pad


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Maps [low, high] to [start, end]."""
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _binned(points: list[Point]) -> list[tuple[float, float, float, float]]:
    """(x, mean, least, greatest) of consecutive bins."""
    size = max(1, math.ceil(len(points) / BINS))
    found = []
    for i in range(0, len(points), size):
        part = points[i : i + size]
        ys = [y for _, y in part]
        found.append((sum(x for x, _ in part) / len(part), math.fsum(y / len(ys) for y in ys), min(ys), max(ys)))
    return found


def _runs(points: list[Point]) -> list[list[Point]]:
    """The curve cut where a value is not finite."""
    found: list[list[Point]] = [[]]
    for x, y in points:
        if math.isfinite(y):
            found[-1].append((x, y))
        elif found[-1]:
            found.append([])
    return [run for run in found if run]


def curve(title: str, points: list[Point], *, unit: str = "step", width: float = 350, height: float = 170) -> str:
    """One metric by step, with its range, its last value, and red ticks where it was not finite."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    left, right, top, bottom = 56.0, width - 10, 26.0, height - 22
    x0, x1 = _range([x for x, _ in points])
    y0, y1 = _range([y for _, y in finite]) if finite else (0.0, 1.0)
    px, py = _scale(x0, x1, left, right), _scale(y0, y1, bottom, top)
    last = f"{short(points[-1][1])} at {unit} {points[-1][0]:g}"
    parts = [_text(left, 15, title), _text(right, 15, last, anchor="end", kind="soft"),
             f'<path class=axis d="M{left:.1f} {top:.1f}V{bottom:.1f}H{right:.1f}"/>']  # fmt: skip
    parts += [_text(left - 5, py(y) + 4, short(y), anchor="end", kind="soft") for y in (y0, y1)]
    parts += [
        _text(left, height - 6, f"{points[0][0]:g}", kind="soft"),
        _text(right, height - 6, f"{points[-1][0]:g}", anchor="end", kind="soft"),
    ]
    for run in _runs(points):
        bins = _binned(run)
        if len(bins) < len(run):
            edge = [(x, high) for x, _, _, high in bins] + [(x, low) for x, _, low, _ in reversed(bins)]
            parts.append(f'<path class=band d="M{"L".join(f"{px(x):.1f} {py(y):.1f}" for x, y in edge)}Z"/>')
        if len(bins) == 1:
            parts.append(f'<circle class=one cx="{px(bins[0][0]):.1f}" cy="{py(bins[0][1]):.1f}" r="2"/>')
        parts.append(f'<path class=curve d="M{"L".join(f"{px(x):.1f} {py(y):.1f}" for x, y, _, _ in bins)}"/>')
    wrong = [x for x, y in points if not math.isfinite(y)][:BINS]
    parts += [f'<path class=bad d="M{px(x):.1f} {top:.1f}v8"><title>not finite at {unit} {x:g}</title></path>' for x in wrong]
    return _svg(width, height, "".join(parts), f"{title}: {last}")


Interval = tuple[float, float | None, float | None]


def intervals(title: str, rows: list[tuple[str, Interval | None, Interval | None]], *, width: float = 720) -> str:
    """Before (grey) and after (coloured) of one metric, a row each; whiskers are confidence intervals."""
    values = [v for _, before, after in rows for item in (before, after) if item for v in item if v is not None and math.isfinite(v)]
    if not values:
        return ""
    low, high = _range(values)
    left, right, height = 220.0, width - 150, 30.0 + 34 * len(rows)
    px = _scale(low, high, left, right)
    parts = [_text(0, 15, title), _text(left, 15, short(low), kind="soft"), _text(right, 15, short(high), anchor="end", kind="soft")]
    for i, (label, before, after) in enumerate(rows):
        y = 36.0 + 34 * i
        parts.append(_text(0, y + 8, label))
        for item, dy, kind in ((before, 0.0, "old"), (after, 11.0, "one")):
            if item and math.isfinite(item[0]):
                parts.append(_whisker(item, y + dy, kind, px))
        parts.append(_text(right + 10, y + 8, " → ".join(short(v[0]) for v in (before, after) if v), kind="soft"))
    return _svg(width, height, "".join(parts), title)


def _whisker(item: Interval, y: float, kind: str, px: Callable[[float], float]) -> str:
    value, low, high = item
    line = f'<path class={kind} d="M{px(low):.1f} {y:.1f}H{px(high):.1f}"/>' if low is not None and high is not None else ""
    return f'{line}<circle class={kind} cx="{px(value):.1f}" cy="{y:.1f}" r="4"/>'


def histogram(title: str, edges: list[float], series: dict[str, list[float]], *, width: float = 520, height: float = 200) -> str:
    """Shares by bin of one or two counts over the same edges; `edges` is one longer than each series."""
    bins = len(edges) - 1
    totals = {name: math.fsum(counts) for name, counts in series.items()}
    if bins < 1 or any(len(counts) != bins for counts in series.values()) or not any(totals.values()):
        return ""
    shares = {name: [c / totals[name] if totals[name] else 0.0 for c in counts] for name, counts in series.items()}
    top = max(v for values in shares.values() for v in values) or 1.0
    left, right, base = 10.0, width - 10, height - 22
    step = (right - left) / bins
    parts = [_text(left, 14, title), f'<path class=axis d="M{left} {base}H{right}"/>']
    for kind, (name, values) in zip(("old", "two"), shares.items(), strict=False):
        for i, share in enumerate(values):
            tall = share / top * (base - 40)
            tip = f"{name}: {short(edges[i])} to {short(edges[i + 1])}: {series[name][i]:g} rows ({share:.1%})"
            parts.append(_bar(f"{kind} half", left + i * step, base, step, tall, tip))
    legend = [(x, kind, name) for x, kind, name in zip((0.0, 90.0), ("old", "two"), series, strict=False)]
    parts += [
        f'<rect class="{k} half" x="{left + x:.1f}" y="21" width="10" height="10"/>' + _text(left + x + 15, 30, name)
        for x, k, name in legend
    ]
    parts += [_text(left, height - 6, short(edges[0]), kind="soft"), _text(right, height - 6, short(edges[-1]), anchor="end", kind="soft")]
    return _svg(width, height, "".join(parts), title)


def bars(title: str, items: list[tuple[str, float, str]], *, width: float = 1080, height: float = 200) -> str:
    """One bar an item, in order: (label, value, note shown when pointed at)."""
    finite = [v for _, v, _ in items if math.isfinite(v)]
    if not finite:
        return ""
    top = max([*finite, 0.0]) or 1.0
    left, base = 56.0, height - 12
    step = (width - left - 10) / len(items)
    parts = [
        _text(left, 14, title),
        _text(left - 5, 34, short(top), anchor="end", kind="soft"),
        f'<path class=axis d="M{left} {base}H{width - 10}"/>',
    ]
    for i, (label, value, note) in enumerate(items):
        tall = max(value, 0.0) / top * (base - 30) if math.isfinite(value) else base - 30
        kind = "one" if math.isfinite(value) else "bad"
        parts.append(_bar(kind, left + i * step, base, max(step * 0.8, 0.5), tall, f"{label}: {short(value)} {note}"))
    return _svg(width, height, "".join(parts), title)


def lineage(nodes: dict[str, tuple[str, list[str]]], edges: list[tuple[str, str, str]]) -> str:
    """Boxes joined by arrows, left to right by depth.

    Args:
        nodes: id -> (title, further lines).
        edges: (from id, to id, label); the graph has no cycles.
    """
    if not nodes:
        return ""
    depth = _depths(list(nodes), edges)
    columns: dict[int, list[str]] = {}
    for node in nodes:
        columns.setdefault(depth[node], []).append(node)
    wide, tall, gap_x, gap_y = 210.0, 78.0, 60.0, 18.0
    place = {n: (10 + d * (wide + gap_x), 10 + i * (tall + gap_y)) for d, column in columns.items() for i, n in enumerate(column)}
    width, height = (max(p[i] for p in place.values()) + size + 10 for i, size in ((0, wide), (1, tall)))
    parts = []
    for source, target, label in edges:
        (x0, y0), (x1, y1) = place[source], place[target]
        x0, y0, y1 = x0 + wide, y0 + tall / 2, y1 + tall / 2
        bend = max((x1 - x0) / 2, 20)
        line = f"M{x0:.0f} {y0:.0f}C{x0 + bend:.0f} {y0:.0f} {x1 - bend:.0f} {y1:.0f} {x1:.0f} {y1:.0f}"
        parts.append(f'<path class=edge d="{line}"><title>{esc(label)}</title></path>')
        parts.append(f'<circle class=old cx="{x1:.0f}" cy="{y1:.0f}" r="3"/>')
    for node, (title, lines) in nodes.items():
        x, y = place[node]
        parts.append(
            f'<g><title>{esc(node)}</title><rect class=box x="{x:.0f}" y="{y:.0f}" width="{wide:.0f}" height="{tall:.0f}" rx="6"/>'
        )
        parts.append(_text(x + 10, y + 19, title[:32]))
        parts += [_text(x + 10, y + 36 + 15 * i, line[:36], kind="soft") for i, line in enumerate(lines[:3])]
        parts.append("</g>")
    return f"<div class=wide>{_svg(width, height, ''.join(parts), 'lineage')}</div>"


def _depths(nodes: list[str], edges: list[tuple[str, str, str]]) -> dict[str, int]:
    depth = dict.fromkeys(nodes, 0)
    for _ in nodes:
        moved = False
        for source, target, _label in edges:
            if depth[target] <= depth[source]:
                depth[target], moved = depth[source] + 1, True
        if not moved:
            break
    return depth

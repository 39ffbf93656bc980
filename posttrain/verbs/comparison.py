"""The figures of `select compare`: means over seeds with t intervals, paired differences, table, report.

With n seeds, the interval of a mean m is m ± t(0.975, n - 1) s / sqrt(n). Two methods share, for a seed, the tokenizer,
the initial weights and the evaluation rows, so their difference is taken seed by seed and has a narrower interval than
the two losses suggest. One seed has no interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from posttrain.core import svg
from posttrain.core.markup import esc, page, section, table
from posttrain.core.table import number, render
from posttrain.eval.intervals import Value, value_of

CONTROL = "random"
UNTRAINED = "(untrained)"


def t_quantile(df: int, p: float = 0.975) -> float:
    """Quantile of Student's t for a whole number of degrees of freedom, by bisection of its closed form.

    P(|T| <= t) is, with a = atan(t / sqrt(df)), a finite sum of powers of cos a (Abramowitz and Stegun 26.7.3, 26.7.4).
    """

    def inside(t: float) -> float:
        a = math.atan(t / math.sqrt(df))
        term, total = (math.cos(a), 0.0) if df % 2 else (1.0, 0.0)
        for k in range(1 + df % 2, df, 2):
            total += term
            term *= math.cos(a) ** 2 * k / (k + 1)
        total *= math.sin(a)
        return (a + total) * 2 / math.pi if df % 2 else total

    low, high = 0.0, 1e4
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 2 * p - 1 else (low, middle)
    return (low + high) / 2


def mean_value(values: Sequence[float]) -> Value:
    """Mean over seeds with its 95 % interval; see the module."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return value_of(mean, None, None, n)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n) * t_quantile(n - 1)
    return value_of(mean, mean - spread, mean + spread, n)


def _method(manifests: list[dict[str, Any]], label: str) -> dict[str, Any]:
    """One method's figures of one seed."""
    by_name = {m["name"]: m for m in manifests}
    pick, sft = by_name.get(f"pick-{label}", {}), by_name[f"sft-{label}"]
    facts = sft.get("summary", {})
    return {
        "method": pick.get("method"),
        "rows": pick.get("summary", {}).get("rows_out"),
        "words": pick.get("summary", {}).get("tokens"),
        "trained_tokens": facts.get("tokens"),
        "epochs": facts.get("epochs"),
        "rows_cut": facts.get("encoding", {}).get("notes", {}).get("cut at max_length", 0),
        "loss": facts["eval"]["after"]["target"]["loss"]["value"],
    }


def summarise(runs: list[tuple[int, list[dict[str, Any]]]], labels: list[str]) -> dict[str, Any]:
    """compare.json's `untrained` and `methods`: every figure by seed, `loss`, and `difference` from the control, with intervals.

    Args:
        runs: seed -> manifests of that seed's stages `pick-LABEL`, `sft-LABEL` and `untrained`.
        labels: of the methods; `random` is the control.
    """
    seeds = [seed for seed, _ in runs]
    found: dict[str, Any] = {}
    for label in labels:
        by_seed = {seed: _method(manifests, label) for seed, manifests in runs}
        columns = {key: [by_seed[seed][key] for seed in seeds] for key in ("rows", "words", "trained_tokens", "epochs", "rows_cut")}
        losses = [by_seed[seed]["loss"] for seed in seeds]
        found[label] = {"method": by_seed[seeds[0]]["method"], **columns, "loss_by_seed": losses, "loss": mean_value(losses)}
    control = found.get(CONTROL, {}).get("loss_by_seed")
    for label, facts in found.items():
        if control and label != CONTROL:
            differences = [a - b for a, b in zip(facts["loss_by_seed"], control, strict=True)]
            facts.update(difference=mean_value(differences), better_in=sum(d < 0 for d in differences))
    before = [m["summary"]["eval"]["after"]["target"]["loss"]["value"] for _, ms in runs for m in ms if m["name"] == "untrained"]
    return {"seeds": seeds, "untrained": {"loss": mean_value(before)} if before else None, "methods": found}


def _span(value: Value | None) -> str:
    if not value:
        return ""
    low, high = value["low"], value["high"]
    return f"{number(value['value'], 4)} [{number(low, 4)}, {number(high, 4)}]" if low is not None else number(value["value"], 4)


def _average(values: list[Any]) -> str:
    known = [v for v in values if v is not None]
    return number(round(math.fsum(known) / len(known))) if known else ""


HEADER = ["method", "rows", "words", "epochs", "held-out loss (95 % CI)", "perplexity", f"minus {CONTROL} (95 % CI)", "better in"]


def rows_of(found: dict[str, Any]) -> list[list[str]]:
    """Cells of the table, best loss first."""
    rows = []
    for label, facts in sorted(found["methods"].items(), key=lambda item: item[1]["loss"]["value"]):
        loss, better = facts["loss"], facts.get("better_in")
        wins = "" if better is None else f"{better} of {len(found['seeds'])}"
        epochs = [e for e in facts["epochs"] if e is not None]
        rows.append([
            label, _average(facts["rows"]), _average(facts["words"]), number(math.fsum(epochs) / len(epochs), 2) if epochs else "",
            _span(loss), number(math.exp(min(loss["value"], 700.0)), 2), _span(facts.get("difference")), wins,
        ])  # fmt: skip
    if found["untrained"]:
        loss = found["untrained"]["loss"]
        rows.append([UNTRAINED, "", "", "", _span(loss), number(math.exp(min(loss["value"], 700.0)), 2), "", ""])
    return rows


def notes(found: dict[str, Any]) -> list[str]:
    """What a reader must know before trusting the table."""
    lines = []
    seeds, methods = found["seeds"], found["methods"]
    if len(seeds) < 2:
        lines.append("one seed says nothing about chance; give seeds=0,1,2")
    words = [w for facts in methods.values() for w in facts["words"] if w]
    if words and min(words) < 0.95 * max(words):
        lines.append(f"the picks hold {min(words):,} to {max(words):,} words: rows are long for this budget, so it cannot be spent evenly")
    for label, facts in methods.items():
        rows, cut = sum(r or 0 for r in facts["rows"]), sum(facts["rows_cut"])
        if rows and cut > 0.1 * rows:
            share = f"{cut / rows:.0%} of `{label}`'s rows are longer than max_length and were cut"
            lines.append(f"{share}; raise max_length, or pick chunks: chunks.words=100")
    return lines


def text_of(found: dict[str, Any]) -> str:
    """The table and its notes, as printed."""
    return "\n".join([render(HEADER, rows_of(found)), *(f"note: {line}" for line in notes(found))])


def _chart(title: str, items: list[tuple[str, Value]]) -> str:
    rows: list[tuple[str, svg.Interval | None, svg.Interval | None]] = []
    rows += [(name, None, (float(value["value"] or 0.0), value["low"], value["high"])) for name, value in items]
    return svg.intervals(title, rows)


def html_of(found: dict[str, Any]) -> str:
    """The same as one self-contained page with charts."""
    ordered = sorted(found["methods"].items(), key=lambda item: item[1]["loss"]["value"])
    losses = _chart("held-out loss of the target, nats a token", [(n, f["loss"]) for n, f in ordered])
    gains = _chart(f"loss minus that of {CONTROL}, by seed", [(n, f["difference"]) for n, f in ordered if "difference" in f])
    said = "".join(f"<li>{esc(line)}</li>" for line in notes(found))
    by_seed = [[n, *(number(v, 4) for v in f["loss_by_seed"])] for n, f in ordered]
    budget = f"{found['tokens']:,} words a pick, {found['steps']:,} steps, seeds {', '.join(map(str, found['seeds']))}"
    body = [
        f"<h1>{esc(found['name'])}</h1><p class=soft>{esc(budget)}; lines are 95 % intervals over seeds, lower is better.</p>",
        section("Result", table(HEADER, rows_of(found)) + (f"<ul>{said}</ul>" if said else "")),
        section("Charts", f"<section class=wide>{losses}</section><section class=wide>{gains}</section>"),
        section("By seed", table(["method", *(f"seed {seed}" for seed in found["seeds"])], by_seed)),
    ]
    return page(f"{found['name']}: comparison of selectors", "".join(body))

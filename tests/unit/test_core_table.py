"""The tables at the end of a run."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.core.table import number, render, run_table, seeds_table, size


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (True, "true"),
        (1234567, "1,234,567"),
        (0.12345, "0.123"),
        (123456.7, "123,457"),
        ("NaN", "NaN"),
        ({"value": 0.5, "low": 0.4, "high": 0.6}, "0.500 ±0.100"),
        ({"value": 0.5, "low": "NaN", "high": "NaN"}, "0.500"),
        ({"value": "NaN", "low": None, "high": None, "n": 0}, "NaN"),
    ],
)
def test_number(value: Any, text: str) -> None:
    assert number(value) == text


def test_size_and_render() -> None:
    assert (size(None), size(3 * 2**20)) == ("", "3.00 MiB")
    assert render(["a", "b"], []) == ""
    assert render(["name", "n"], [["x", "1"], ["longer", "22"]]).splitlines() == ["name     n", "------  --", "x        1", "longer  22"]


def manifest(name: str, **summary: Any) -> dict[str, Any]:
    return {"name": name, "method": "m", "seconds": 2.5, "files": [{"size": 2**20}], "summary": summary}


def cell(value: Any) -> dict[str, Any]:
    return {"value": value, "low": 0.0, "high": 1.0, "n": 7}


def test_run_table() -> None:
    measured = {"before": {"val": {"loss": cell(3.0)}}, "after": {"val": {"loss": cell(2.0), "acc": cell("NaN")}}}
    text = run_table([
        manifest("picked", rows_in=100, rows_out=10, kl_reduction=1.25, kl_raw=3.0, kl_picked=1.75),
        manifest("sft", tokens=5000, tokens_per_s=123.4, eval=measured),
        manifest("small", size_bytes_before=2**21, size_bytes=2**20),
        manifest("odd", eval={"before": {}, "after": {}}),
    ])  # fmt: skip
    for words in ("100 -> 10", "5,000", "123", "3.000 ±0.500", "2.000 ±0.500", "NaN", "KL from the target", "2.00 MiB", "1.750"):
        assert words in text
    assert run_table([]) == ""


def test_seeds_table() -> None:
    runs = [
        (s, [manifest("sft", eval={"before": {"val": {"loss": cell(5.0)}}, "after": {"val": {"loss": cell(v)}}})])
        for s, v in ((0, 1.0), (1, 3.0))
    ]
    text = seeds_table(runs)
    assert "seed 0" in text and "seed 1" in text
    assert text.splitlines()[-1].split() == ["sft", "val", "loss", "5.000", "2.000", "1.000", "to", "3.000", "1.000", "3.000"]
    assert seeds_table([(0, [manifest("x")])]) == ""


def test_seeds_table_with_a_metric_that_is_not_a_number_or_was_not_measured_before() -> None:
    after = {"after": {"val": {"loss": cell("NaN")}}}
    text = seeds_table([(0, [manifest("sft", eval=after)]), (1, [manifest("sft", eval={"after": {"val": {"loss": cell(2.0)}}})])])
    assert text.splitlines()[-1].split() == ["sft", "val", "loss", "nan", "nan", "nan", "to", "nan", "nan", "2.000"]

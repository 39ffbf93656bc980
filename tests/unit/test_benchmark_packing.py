"""The packing benchmark: the arms do the same work, and its expectation is the padding's."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmark_kit import load

torch = pytest.importorskip("torch")

load("_harness")
packing = load("packing")
SMALL = packing.Setting(rows=12, longest=40, mu=2.5, per_device=4, hidden=64, layers=1, vocabulary=256)


def test_arms_agree_and_count_their_positions(tmp_path: Path) -> None:
    base = packing.Arm("padded", SMALL, tmp_path)
    rows = packing.make_rows(SMALL)
    assert base.tokens == sum(len(row.input_ids) for row in rows) and base.passes == 3
    for name in ("packed", "end_to_end", "grouped"):
        arm = packing.Arm(name, SMALL, tmp_path)
        found = packing.assert_equal(arm, base)
        assert max(found.values()) < 1e-5
        assert arm.tokens == base.tokens and arm.tokens <= arm.positions < base.positions
        assert arm.positions * (1 - arm.padding) == pytest.approx(arm.tokens)
    assert packing.Arm("end_to_end", SMALL, tmp_path).padding == 0.0


def test_arms_that_differ_are_found(tmp_path: Path) -> None:
    base, other = packing.Arm("padded", SMALL, tmp_path), packing.Arm("packed", SMALL, tmp_path)
    other.examples = other.examples[:1]
    other.passes = 1
    with pytest.raises(AssertionError):
        packing.assert_equal(other, base)


def test_every_arm_has_a_layout_and_a_setting() -> None:
    found = {name: packing.of_arm(name, True) for name in packing.ARMS}
    assert found["packed_wide"][0] == "packed" and found["packed_wide"][1].hidden == 2 * found["packed"][1].hidden
    assert all(layout == name for name, (layout, _) in found.items() if name != "packed_wide")


def test_lengths_are_skewed() -> None:
    lengths = sorted(len(row.input_ids) for row in packing.make_rows(packing.Setting()))
    assert max(lengths) > 3 * lengths[len(lengths) // 2] and min(lengths) >= 8

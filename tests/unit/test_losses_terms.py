"""Advantages, hardness weights and targeted entropy against loops over floats, and advantages against TRL's own code."""

from __future__ import annotations

import itertools
import math
import statistics
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from posttrain.losses.advantages import advantages, failed_gates, totals  # noqa: E402
from posttrain.losses.entropy import side_of, targeted_entropy  # noqa: E402
from posttrain.losses.hardness import correctness, hardness_weight  # noqa: E402

NAN = float("nan")


def rewards(seed: int = 0, rows: int = 16) -> Any:
    """(R, 3) with values that do not apply, one completion without any, one group of equal rewards."""
    values = np.random.default_rng(seed).normal(size=(rows, 3))
    values[3, 1] = values[5, 0] = values[5, 2] = NAN
    values[9] = NAN
    values[12:16] = 0.25
    return values


def reference(
    values: Any, weights: list[float], group: int, scale: str, gates: dict[int, float], gate_value: float, hardness: Any = None
) -> list[float]:
    """The module's formula, completion by completion."""
    total: list[float | None] = []
    for row in values:
        here = [w * r for f, (w, r) in enumerate(zip(weights, row, strict=True)) if f not in gates and not math.isnan(r)]
        failed = any(row[f] < level for f, level in gates.items())
        total.append(gate_value if failed else sum(here) if here else None)
    known_all = [r for r in total if r is not None]
    found = []
    for i, r in enumerate(total):
        start = i - i % group
        known = [x for x in total[start : start + group] if x is not None]
        spread = known_all if scale == "batch" else known
        if r is None or (scale != "none" and len(spread) < 2):
            found.append(0.0)
            continue
        value = r - statistics.fmean(known)
        value = value if scale == "none" else value / (statistics.stdev(spread) + 1e-4)
        found.append(value * (1.0 if hardness is None else hardness[i]))
    return found


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("gates", [{}, {2: 0.3}, {1: -0.5, 2: 0.3}], ids=["no-gate", "gate", "two-gates"])
def test_advantages_equal_the_loop(scale: Any, gates: dict[int, float]) -> None:
    values, weights = rewards(), [1.0, -0.5, 2.0]
    hardness = np.linspace(1.0, 1.5, 16)
    found, _ = advantages(
        torch.tensor(values), torch.tensor(weights, dtype=torch.float64), 4, scale,
        gates=gates, gate_value=-1.0, hardness=torch.tensor(hardness),
    )  # fmt: skip
    expected = reference(values, weights, 4, scale, gates, -1.0, hardness)
    assert found.tolist() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    assert found.isfinite().all()


def test_a_failed_gate_takes_the_place_of_the_sum() -> None:
    """Also where the answer was right, and where it could not be judged; a gate that does not apply is passed."""
    values = torch.tensor([[1.0, 0.0], [NAN, 0.0], [1.0, NAN], [NAN, 1.0], [0.0, 1.0]])
    weights = torch.tensor([2.0, 7.0])
    assert totals(values, weights, {1: 1.0}, -3.0).tolist()[:3] == [-3.0, -3.0, 2.0]
    assert totals(values, weights, {1: 1.0}, -3.0)[3].isnan()
    assert failed_gates(values, {1: 1.0}).tolist() == [True, True, False, False, False]
    assert failed_gates(values, {1: 0.0}).tolist() == [False] * 5


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("group", [2, 4, 8])
def test_neutral_advantages_are_trls_bit_by_bit(scale: Any, group: int) -> None:
    """TRL's inline computation, run from its own source."""
    values, weights = torch.tensor(rewards(1), dtype=torch.float32), torch.tensor([1.0, -0.5, 2.0])
    found, facts = advantages(values, weights, group, scale)
    theirs = trl_advantages(values, weights, group, scale)
    assert torch.equal(found, theirs["advantages"])
    assert torch.equal(torch.isclose(facts["std"], torch.zeros(16)), theirs["is_std_zero"])


def trl_advantages(values: Any, weights: Any, group: int, scale: str) -> dict[str, Any]:
    """Executes the lines of TRL's `_generate_and_score_completions` between the rewards and the slice by process."""
    import inspect
    import textwrap

    import trl
    from trl.trainer.utils import nanstd

    source = inspect.getsource(trl.GRPOTrainer._generate_and_score_completions)
    start, end = source.index("        unscorable_mask = "), source.index("        # Slice to keep only the local part of the data")
    names: dict[str, Any] = {
        "torch": torch,
        "nanstd": nanstd,
        "rewards_per_func": values,
        "num_generations": group,
        "device": values.device,
        "self": SimpleNamespace(multi_objective_aggregation="sum_then_normalize", reward_weights=weights, scale_rewards=scale),
    }
    exec(compile(textwrap.dedent(source[start:end]), "trl", "exec"), names)
    return names


def test_a_broken_group_is_refused() -> None:
    with pytest.raises(ValueError, match="no whole number of groups"):
        advantages(torch.zeros(6, 1), torch.ones(1), 4)


def test_correctness_is_raw_and_gated() -> None:
    values = torch.tensor([1.0, 0.99, NAN, 1.0, NAN])
    assert correctness(values, 1.0).tolist()[:2] == [1.0, -1.0]
    found = correctness(values, 1.0, torch.tensor([False, False, False, True, True]))
    assert found[2].isnan()
    assert found[[0, 1, 3, 4]].tolist() == [1.0, -1.0, -1.0, -1.0]


@pytest.mark.parametrize("alpha", [-0.256, -1.0, 0.2])
def test_hardness_equals_its_formula(alpha: float) -> None:
    groups = [[1, 1, 1, 1], [-1, -1, -1, -1], [1, -1, -1, 1], [1, -1, NAN, NAN], [NAN] * 4]
    correct = torch.tensor([value for group in groups for value in group], dtype=torch.float64)
    expected = [alpha * mu + 1 - alpha for mu in (1, -1, 0, 0)] + [1.0]
    found = hardness_weight(correct, 4, alpha)
    assert found.tolist() == pytest.approx([d for d in expected for _ in range(4)], rel=1e-12)
    scaled = hardness_weight(correct, 4, alpha, normalise=True)
    assert scaled.mean().item() == pytest.approx(1, rel=1e-12)
    assert (scaled / found).tolist() == pytest.approx([5 / sum(expected)] * 20, rel=1e-12)


def test_published_hardness_weights() -> None:
    """1.256 - 0.256 mu: 1.512 for a group without, 1 for one with only right completions."""
    correct = torch.tensor([-1.0] * 8 + [1.0] * 8 + [1.0] + [-1.0] * 7, dtype=torch.float64)
    assert hardness_weight(correct, 8)[[0, 8, 16]].tolist() == pytest.approx([1.512, 1.0, 1.256 + 0.256 * 0.75])


def entropy_case(seed: int = 0) -> tuple[Any, Any]:
    """(6, 5) entropies and a ragged mask with one empty row."""
    values = np.random.default_rng(seed).gamma(2.0, 0.4, (6, 5))
    return values, np.array([[float(t < n) for t in range(5)] for n in (5, 2, 0, 1, 4, 3)])


@pytest.mark.parametrize("target", [0.2, 0.55, 2.0])
def test_entropy_term_equals_the_loop(target: float) -> None:
    values, mask = entropy_case()
    chosen = [values[i, t] for i in range(6) for t in range(5) if mask[i, t]]
    mean = statistics.fmean(chosen)
    h, m = torch.tensor(values), torch.tensor(mask)
    assert targeted_entropy(h, m, target, 0.3, parts=2).item() == pytest.approx(0.3 * abs(mean - target) / 2, rel=1e-12)
    whole = targeted_entropy(h, m, target, 0.3, side=side_of(mean, target), tokens=15)
    assert whole.item() == pytest.approx(0.3 * abs(mean - target), rel=1e-12)


@pytest.mark.parametrize("side", [None, 1.0, -1.0, 0.0])
@pytest.mark.parametrize("target", [0.2, 2.0])
def test_entropy_gradient(side: float | None, target: float) -> None:
    values, mask = entropy_case(1)
    h, m = torch.tensor(values, requires_grad=True), torch.tensor(mask)

    def term(entropies: Any) -> Any:
        return targeted_entropy(entropies, m, target, 0.7, side=side, tokens=None if side is None else 15, parts=3)

    assert torch.autograd.gradcheck(term, (h,))
    (gradient,) = torch.autograd.grad(term(h), h)
    expected = (1.0 if target < 1 else -1.0) * 0.7 / 15 / 3 if side is None else side * 0.7 / 15
    assert gradient.flatten().tolist() == pytest.approx((expected * mask).flatten().tolist(), rel=1e-12)


def test_entropy_of_a_step_does_not_depend_on_how_it_is_cut() -> None:
    """Micro-batches of unequal tokens, on two processes: the sum of the parts is the whole's value and gradient."""
    values, mask = entropy_case(2)
    h, m = torch.tensor(values, requires_grad=True), torch.tensor(mask)
    whole = targeted_entropy(h, m, 0.55, 1.0, side=1.0, tokens=15)
    (expected,) = torch.autograd.grad(whole, h)
    for processes, cuts in ((1, [0, 2, 4, 6]), (2, [0, 1, 3, 4, 6]), (2, [0, 3, 6])):
        parts = (len(cuts) - 1) // processes
        pieces = [
            targeted_entropy(h[a:b], m[a:b], 0.55, 1.0, side=1.0, tokens=15 / processes, parts=parts) for a, b in itertools.pairwise(cuts)
        ]
        total = sum(pieces) / processes
        assert total.item() == pytest.approx(whole.item(), rel=1e-12)
        assert torch.allclose(torch.autograd.grad(total, h)[0], expected, rtol=1e-12)
    cut = sum(targeted_entropy(h[a:b], m[a:b], 0.55, 1.0, parts=2) for a, b in ((0, 2), (2, 6)))
    assert not torch.allclose(torch.autograd.grad(cut, h)[0], expected, rtol=1e-2)


def test_entropy_without_tokens_is_zero() -> None:
    h = torch.ones(2, 3, requires_grad=True)
    for side, tokens in ((None, None), (1.0, 10)):
        term = targeted_entropy(h, torch.zeros(2, 3), 0.0, 1.0, side=side, tokens=tokens)
        assert term.item() == 0
        assert torch.autograd.grad(term, h)[0].abs().max() == 0
    assert targeted_entropy(h, torch.zeros(2, 3), 5.0, 1.0).item() == 0
    with pytest.raises(ValueError, match="number of tokens"):
        targeted_entropy(h, torch.ones(2, 3), 0.5, 1.0, side=1.0)

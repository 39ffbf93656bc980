"""Clipped policy losses against loops over floats in double precision, their gradients, and TRL's own function."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from posttrain.losses.policy import policy_loss  # noqa: E402

TYPES = ["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sum"]
LIMIT = 11


def sample(seed: int = 0, rows: int = 8, width: int = 7) -> dict[str, Any]:
    """Log-probabilities far enough from the old ones that both clips bind, ragged masks, one row without tokens."""
    generator = np.random.default_rng(seed)
    lengths = [width, 3, 1, 0, 5, 6, 2, 6]
    return {
        "logps": -generator.gamma(2.0, 1.0, (rows, width)),
        "old": -generator.gamma(2.0, 1.0, (rows, width)),
        "ref": -generator.gamma(2.0, 1.0, (rows, width)),
        "advantages": generator.normal(size=rows),
        "mask": np.array([[float(t < n) for t in range(width)] for n in lengths]),
    }


def reference(
    x: dict[str, Any],
    loss_type: str,
    low: float,
    high: float,
    beta: float,
    rows: float,
    tokens: float,
    old: bool = True,
    unbiased: bool = True,
    level: str = "token",
    delta: float = math.inf,
) -> dict[str, float]:
    """The module's formula, one token after another."""
    total, clipped, count = 0.0, {"low": 0, "high": 0}, 0
    for i in range(len(x["logps"])):
        summed, length = 0.0, x["mask"][i].sum()
        mean = ((x["logps"] - x["old"])[i] * x["mask"][i]).sum() / max(length, 1)
        for t in range(x["logps"].shape[1]):
            if not x["mask"][i, t]:
                continue
            logp, advantage = x["logps"][i, t], x["advantages"][i]
            ratio = math.exp(mean if level == "sequence" else logp - (x["old"][i, t] if old else logp))
            if loss_type == "cispo":
                value = -min(ratio, high) * advantage * logp
                clipped["high"] += ratio > high and advantage > 0
            else:
                value = -min(min(ratio, delta) * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
                clipped["low"] += ratio < 1 - low and advantage < 0
                clipped["high"] += ratio > 1 + high and advantage > 0
            gap = x["ref"][i, t] - logp
            summed += value + beta * (ratio if unbiased else 1.0) * (math.exp(gap) - gap - 1)
            count += 1
        total += summed / max(length, 1) if loss_type == "grpo" else summed
    divisor = {"grpo": rows, "sum": rows, "dr_grpo": rows * LIMIT}.get(loss_type, max(tokens, 1))
    return {"loss": total / divisor, "low": clipped["low"], "high": clipped["high"], "tokens": count}


def ours(x: dict[str, Any], loss_type: Any, old: bool = True, **options: Any) -> tuple[Any, Any]:
    """`policy_loss` on tensors of the sample."""
    tensors = {name: torch.tensor(value) for name, value in x.items()}
    return policy_loss(
        tensors["logps"],
        tensors["old"] if old else None,
        tensors["advantages"],
        tensors["mask"],
        loss_type=loss_type,
        ref_logps=tensors["ref"],
        max_tokens=LIMIT,
        **options,
    )


@pytest.mark.parametrize("loss_type", TYPES)
@pytest.mark.parametrize(("seed", "unbiased"), [(0, True), (1, False)])
def test_value_and_shares_equal_the_loop(loss_type: str, seed: int, unbiased: bool) -> None:
    x = sample(seed)
    loss, sums = ours(x, loss_type, epsilon=0.2, epsilon_high=0.28, beta=0.07, unbiased_kl=unbiased)
    expected = reference(x, loss_type, 0.2, 0.28, 0.07, 8, x["mask"].sum(), unbiased=unbiased)
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-12)
    assert sums["tokens"].item() == expected["tokens"] == 30
    assert (sums["clip_low"].item(), sums["clip_high"].item()) == (expected["low"], expected["high"])
    assert sums["clip_high"].item() > 0
    assert sums["clip_low"].item() > 0 or loss_type == "cispo"


@pytest.mark.parametrize("loss_type", TYPES)
@pytest.mark.parametrize("options", [{"level": "sequence"}, {"delta": 1.1}, {"level": "sequence", "delta": 1.02}])
def test_ratios_of_sequences_and_the_upper_bound_equal_the_loop(loss_type: str, options: dict[str, Any]) -> None:
    x = sample(2)
    loss, sums = ours(x, loss_type, epsilon=0.2, epsilon_high=0.28, beta=0.07, **options)
    assert loss.item() == pytest.approx(reference(x, loss_type, 0.2, 0.28, 0.07, 8, 30, **options)["loss"], rel=1e-12)
    assert loss.item() != pytest.approx(ours(x, loss_type, epsilon=0.2, epsilon_high=0.28, beta=0.07)[0].item(), rel=1e-3) or (
        loss_type == "cispo" and "level" not in options
    )
    assert sums["count"].item() == (8 if "level" in options else 30)


@pytest.mark.parametrize("loss_type", TYPES)
def test_divisors_of_a_whole_step_are_taken(loss_type: str) -> None:
    x = sample()
    loss, _ = ours(x, loss_type, rows=20, tokens=torch.tensor(64))
    assert loss.item() == pytest.approx(reference(x, loss_type, 0.2, 0.2, 0.0, 20, 64)["loss"], rel=1e-12)


def test_clip_higher_moves_only_the_upper_clip() -> None:
    x = sample()
    _, narrow = ours(x, "dapo", epsilon=0.2)
    _, wide = ours(x, "dapo", epsilon=0.2, epsilon_high=2.0)
    assert wide["clip_low"] == narrow["clip_low"]
    assert wide["clip_high"] < narrow["clip_high"]


@pytest.mark.parametrize("loss_type", [name for name in TYPES if name != "cispo"])
def test_gradient_is_that_of_the_value(loss_type: str) -> None:
    """By finite differences, away from the clip's edges."""
    x = {name: torch.tensor(value) for name, value in sample(3).items()}

    def value(logps: Any) -> Any:
        options = {"loss_type": loss_type, "epsilon_high": 0.3, "ref_logps": x["ref"], "beta": 0.1, "max_tokens": LIMIT}
        return policy_loss(logps, x["old"], x["advantages"], x["mask"], **options)[0]

    assert torch.autograd.gradcheck(value, (x["logps"].requires_grad_(),), eps=1e-7, atol=1e-6)


def test_gradient_of_cispo_is_that_of_fixed_weights() -> None:
    x = {name: torch.tensor(value) for name, value in sample(3).items()}
    weights = (x["logps"] - x["old"]).exp().clamp(max=1.5) * x["advantages"][:, None] * x["mask"]

    def surrogate(logps: Any) -> Any:
        return -(weights * logps).sum() / x["mask"].sum()

    logps = x["logps"].requires_grad_()
    assert torch.autograd.gradcheck(surrogate, (logps,))
    (expected,) = torch.autograd.grad(surrogate(logps), logps)
    loss, _ = policy_loss(logps, x["old"], x["advantages"], x["mask"], loss_type="cispo", epsilon_high=1.5)
    (found,) = torch.autograd.grad(loss, logps)
    assert torch.allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("loss_type", TYPES)
def test_without_old_the_ratio_is_one_and_the_gradient_that_of_reinforce(loss_type: str) -> None:
    x = sample()
    loss, sums = ours(x, loss_type, old=False, epsilon_high=5.0)
    assert loss.item() == pytest.approx(reference(x, loss_type, 0.2, 5.0, 0.0, 8, 30, old=False)["loss"], rel=1e-12)
    assert sums["ratio"].item() == pytest.approx(30)
    assert sums["kl_old"].item() == 0
    assert sums["ratio_max"].item() == 1


def test_parts_of_a_step_add_up() -> None:
    """Sums over micro-batches with the step's divisors are the loss of the whole, but for bnpo, by definition."""
    x = sample()
    parts = [{name: value[rows] for name, value in x.items()} for rows in (slice(0, 2), slice(2, 8))]
    for loss_type in ("grpo", "dr_grpo", "dapo", "cispo", "sum"):
        whole, _ = ours(x, loss_type, rows=8, tokens=30)
        assert sum(ours(part, loss_type, rows=8, tokens=30)[0] for part in parts).item() == pytest.approx(whole.item(), rel=1e-12)


def test_advantages_by_token() -> None:
    x = sample()
    by_row, _ = ours(x, "dapo")
    by_token, _ = ours({**x, "advantages": np.repeat(x["advantages"][:, None], 7, axis=1)}, "dapo")
    assert by_token.item() == by_row.item()


def test_dr_grpo_without_its_limit_is_refused() -> None:
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="max_tokens"):
        policy_loss(x, None, torch.ones(1), torch.ones(1, 2), loss_type="dr_grpo")

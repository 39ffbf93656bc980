"""The unconstrained optimum, the low-rank part and their alternation against float64 on the tokens themselves."""

from __future__ import annotations

import pytest
import torch
from quant_kit import correlated

from posttrain.quant.base import dequantize
from posttrain.quant.closed_form import Fitted, Grid, closed_form, gptq, low_rank, unconstrained
from posttrain.quant.grams import Moments
from posttrain.quant.loftq import loftq

OUT, IN = 24, 32


def data(tokens: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs of the float model, inputs of the quantized one, weight."""
    x = correlated(tokens, IN, seed)
    shift = torch.randn(IN, IN, generator=torch.Generator().manual_seed(5)) * 0.02
    noise = torch.randn(tokens, IN, generator=torch.Generator().manual_seed(seed + 90)) * 0.1
    return x, x + x @ shift + noise, torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))


def moments(x: torch.Tensor, xq: torch.Tensor, w: torch.Tensor) -> Moments:
    found = Moments.empty(IN)
    for low in range(0, len(x), 128):
        found.add(xq[low : low + 128], x[low : low + 128], {"weight": w})
    return found


def test_error_is_that_of_the_outputs() -> None:
    x, xq, w = data()
    v = w + 0.1 * torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2))
    wanted = ((x @ w.T - xq @ v.T).double() ** 2).sum() / ((x @ w.T).double() ** 2).sum()
    m = moments(x, xq, w)
    assert m.tokens == len(x) and m.error("weight", w, v) == pytest.approx(float(wanted), rel=1e-5)
    wide = Moments.empty(IN)
    wide.add(xq, x, {"weight": w, "other": w[:2]})
    assert wide.energy["weight"] == pytest.approx(m.energy["weight"], rel=1e-5) and wide.energy["other"] < wide.energy["weight"]


@pytest.mark.parametrize("ridge", [1e-8, 1e-2, 1.0, 1e9])
def test_unconstrained_optimum(ridge: float) -> None:
    """Least squares with a ridge that pulls to W: min ||X W^T - X^ V^T||^2 + l ||V - W||^2, solved on the tokens."""
    x, xq, w = data()
    strength = ridge * float((xq.double() ** 2).sum()) / IN
    tall = torch.cat([xq.double(), strength**0.5 * torch.eye(IN, dtype=torch.float64)])
    wanted = torch.cat([x.double() @ w.double().T, strength**0.5 * w.double().T])
    expected = torch.linalg.lstsq(tall, wanted, driver="gelsd").solution.T
    found = unconstrained(w, moments(x, xq, w), ridge)
    assert torch.allclose(found.double(), expected, atol=2e-3 * float(expected.abs().max()))
    if ridge == 1e9:
        assert torch.allclose(found, w, atol=1e-4)


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_low_rank_is_the_best_under_the_inputs(shape: tuple[int, int]) -> None:
    r = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    x = correlated(300, shape[1])
    a, b = low_rank(r, x.T @ x, 5)
    singular = torch.linalg.svd((x @ r.T).double(), full_matrices=False).S
    error = ((x @ (r - b @ a).T).double() ** 2).sum()
    assert float(error) == pytest.approx(float((singular[5:] ** 2).sum()), rel=1e-3)
    assert torch.allclose(a.norm(dim=1), b.norm(dim=0), rtol=1e-3)
    whole_a, whole_b = low_rank(r, x.T @ x, 64)
    assert whole_a.shape == (64, shape[1]) and torch.allclose(whole_b @ whole_a, r, atol=1e-2)


def test_alternation_is_better_than_its_parts() -> None:
    x, xq, w = data(2000)
    held = moments(*data(1000, seed=1)[:2], w)
    train = moments(x, xq, w)
    grid = Grid(2, 16, False)
    errors = {
        "gptq": held.error("weight", w, dequantize(gptq(w, train.gram, grid))),
        "loftq": held.error("weight", w, loftq(w, grid, 4).effective()),
        "optimum": held.error("weight", w, closed_form(w, train, held, grid, rank=0).effective()),
        "rank 4": held.error("weight", w, closed_form(w, train, held, grid, rank=4).effective()),
        "rank 12": held.error("weight", w, closed_form(w, train, held, grid, rank=12).effective()),
    }
    assert errors["rank 12"] < errors["rank 4"] < errors["optimum"] < errors["gptq"] < errors["loftq"]


def test_the_ridge_is_chosen_on_held_out_inputs() -> None:
    """Few tokens: a weak ridge fits them best and others worst."""
    x, xq, w = data(40)
    train, held = moments(x, xq, w), moments(*data(2000, seed=1)[:2], w)
    grid = Grid(4, 16, True)
    weak, strong = (unconstrained(w, train, ridge) for ridge in (1e-6, 1.0))
    assert train.error("weight", w, weak) < train.error("weight", w, strong)
    found = closed_form(w, train, held, grid, rank=0, ridges=(1e-6, 1e-2, 1e-1, 1.0))
    tried = [
        held.error("weight", w, closed_form(w, train, held, grid, rank=0, ridges=(ridge,)).effective()) for ridge in (1e-6, 1e-2, 1e-1, 1.0)
    ]
    assert held.error("weight", w, found.effective()) == pytest.approx(min(tried)) and tried[0] > min(tried)


def test_loftq_without_data() -> None:
    """Each alternation lowers the Frobenius error; rank 0 rounds to nearest."""
    w = data()[2]
    grid = Grid(2, 16, False)
    errors = [float((loftq(w, grid, 4, rounds=n).effective() - w).square().sum()) for n in (1, 2, 5)]
    assert errors[0] >= errors[1] * 0.999 and errors[2] < errors[0]
    plain = loftq(w, grid, 0)
    assert plain.a is None and torch.equal(plain.effective(), Fitted(plain.q).effective())

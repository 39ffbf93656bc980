"""GPTQ against Optimal Brain Quantization written out in float64; what coordinate descent and new scales may and may not do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from quant_kit import correlated, hostile

from posttrain.errors import QuantError
from posttrain.quant.base import dequantize, fit_grid, quantize_rtn
from posttrain.quant.obq import descend, inverse_factor, output_error, quantize_gptq, refit_scales


def inputs(columns: int = 64, tokens: int = 512) -> torch.Tensor:
    x = correlated(tokens, columns).double()
    return x.T @ x


def weight(rows: int = 10, columns: int = 64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))


def oracle(w: np.ndarray, h: np.ndarray, bits: int, group: int, symmetric: bool, damp: float, weighted: bool) -> np.ndarray:
    """One column after the other: round it, move the free ones by the OBQ formula, invert what is left of H anew."""
    h = h + np.eye(len(h)) * damp * np.diag(h).mean()
    w = w.astype(np.float64).copy()
    found = np.empty_like(w)
    for j in range(w.shape[1]):
        if j % group == 0:
            cost = np.array([1 / np.linalg.inv(h[k:, k:])[0, 0] for k in range(j, j + group)])
            part = torch.from_numpy(w[:, None, j : j + group]).float()
            importance = torch.from_numpy(cost).float() if weighted else None
            scale, zero = (t[:, 0, 0].double().numpy() for t in fit_grid(part, bits, symmetric, mse=True, importance=importance))
        inverse = np.linalg.inv(h[j:, j:])
        code = np.clip(np.round(w[:, j] / scale) + zero, 0, 2**bits - 1)
        found[:, j] = (code - zero) * scale
        w[:, j:] -= np.outer((w[:, j] - found[:, j]) / inverse[0, 0], inverse[0])
    return found


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_equals_obq_in_float64(bits: int, symmetric: bool, weighted: bool) -> None:
    w, h = weight(), inputs()
    found = dequantize(quantize_gptq(w, h, bits, 16, symmetric, weighted=weighted))
    expected = oracle(w.numpy(), h.numpy(), bits, 16, symmetric, 0.01, weighted)
    same = np.abs(found.numpy() - expected) < 1e-4 * np.abs(expected).max()
    assert same.all(1).mean() >= 0.8
    assert output_error(w, found, h) == pytest.approx(output_error(w, torch.from_numpy(expected), h), rel=0.02)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_order_of_the_methods(bits: int, symmetric: bool) -> None:
    """Round to nearest, plain GPTQ, weighted ranges, coordinate descent: each better than the one before."""
    w, h = weight(48), inputs()
    errors = [output_error(w, dequantize(quantize_rtn(w, bits, 16, symmetric, mse=True)), h)]
    for options in ({"weighted": False}, {}, {"sweeps": 2}):
        errors.append(output_error(w, dequantize(quantize_gptq(w, h, bits, 16, symmetric, **options)), h))
    assert errors[1] < 0.6 * errors[0] and errors[3] < errors[2]
    assert errors[2] < errors[1] * (1.0 if bits < 8 else 1.1)


@pytest.mark.parametrize("name", list(hostile()))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hostile_groups(name: str, symmetric: bool, dtype: torch.dtype) -> None:
    """Codes and zero points are storable, scales are ones the type holds, and sweeps never raise the error."""
    w, h = hostile()[name], inputs()
    if dtype == torch.float16 and name == "huge":
        pytest.skip("a float16 scale cannot reach 1e20")
    last = float("inf")
    for sweeps in (0, 1, 2):
        q = quantize_gptq(w, h, 2, 16, symmetric, sweeps=sweeps, scale_dtype=dtype)
        assert q.codes.max() <= 3 and q.scales.dtype == dtype and (q.scales.float() > 0).all() and torch.isfinite(q.scales.float()).all()
        assert symmetric or (q.zero_points is not None and q.zero_points.max() <= 3)
        error = output_error(w, dequantize(q), h)
        assert np.isfinite(error) and error <= last * (1 + 1e-5) + 1e-30
        last = error
    assert name != "zero" or (dequantize(q) == 0).all()


def test_each_step_of_descent_is_the_best_of_its_column() -> None:
    """After a round at convergence no single code can be changed for the better."""
    w, h = weight(4, 32), inputs(32)
    q = quantize_gptq(w, h, 2, 16, False)
    for _ in range(30):
        q = descend(w, h, q)
    best = output_error(w, dequantize(q), h)
    for row in range(4):
        for column in range(32):
            for code in range(4):
                moved = q.codes.clone()
                moved[row, column] = code
                other = dequantize(type(q)(moved, q.scales, q.zero_points, 2, 16, False))
                assert output_error(w, other, h) >= best * (1 - 1e-4)


def test_new_scales_are_those_of_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against numpy's least squares on X itself; in parts of rows too."""
    x = correlated(256, 32).double()
    w, h = weight(6, 32), x.T @ x
    q = quantize_gptq(w, h, 3, 8, True)
    found = refit_scales(w, h, q)
    levels = (q.codes.double() - 4).view(6, 4, 8)
    for row in range(6):
        parts = torch.stack([x[:, g * 8 : g * 8 + 8] @ levels[row, g] for g in range(4)], 1)
        scales = np.linalg.lstsq(parts.numpy(), (x @ w[row].double()).numpy(), rcond=None)[0]
        assert np.allclose(found.scales[row].numpy(), scales, rtol=5e-3)
    monkeypatch.setattr("posttrain.quant.obq.NORMAL_ENTRIES", 32)
    assert torch.equal(refit_scales(w, h, q).scales, found.scales)


def test_dead_and_dependent_columns() -> None:
    h = inputs()
    h[5] = h[:, 5] = 0
    h[7], h[:, 7] = h[6].clone(), h[:, 6].clone()
    h[7, 7] = h[6, 6]
    q = quantize_gptq(weight(), h, 2, 16, False, sweeps=1)
    assert torch.isfinite(dequantize(q)).all()
    zero = quantize_gptq(weight(), torch.zeros(64, 64), 2, 16, False)
    assert torch.isfinite(dequantize(zero)).all()
    factor = inverse_factor(inputs(), 0.01).double()
    damped = inputs() + torch.eye(64) * 0.01 * inputs().diagonal().mean()
    assert torch.allclose(factor.T @ factor @ damped, torch.eye(64, dtype=torch.float64), atol=1e-3)


def test_bad_input() -> None:
    w = weight()
    with pytest.raises(QuantError, match="does not divide"):
        quantize_gptq(w, inputs(), 4, 24, True)
    w[0, 0] = float("nan")
    with pytest.raises(QuantError, match="NaN"):
        quantize_gptq(w, inputs(), 4, 16, True)
    with pytest.raises(QuantError, match="positive definite"):
        inverse_factor(torch.diag(torch.tensor([1.0, 2.0])) - torch.full((2, 2), 100.0), 0.01)

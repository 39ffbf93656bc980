"""The learned quantizer against autograd on its formulas, and what it starts with."""

from __future__ import annotations

import pytest
import torch
from quant_kit import correlated, hostile

from posttrain.quant.base import dequantize
from posttrain.quant.closed_form import Grid
from posttrain.quant.fake import Clip, Rounded, Scaled
from posttrain.quant.obq import quantize_gptq


def straight(value: torch.Tensor) -> torch.Tensor:
    """round(value) whose gradient is 1."""
    return value + (value.round() - value).detach()


def reference(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int) -> torch.Tensor:
    """The formula as the papers' code has it: clamp lets no gradient through outside the range."""
    return ((straight(w / scale) + zero).clamp(0, top) - zero) * scale


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gradients_are_those_of_the_formula(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(6, 4, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    scale = (torch.rand(6, 4, 1, generator=generator, dtype=torch.float64) * 0.4 + 0.2).requires_grad_()
    zero = torch.randint(0, 2**bits, (6, 4, 1), generator=generator).double()
    push = torch.randn(6, 4, 16, generator=generator, dtype=torch.float64)
    found = []
    for function in (Rounded.apply, reference):
        w.grad = scale.grad = None
        out = function(w, scale, zero, 2**bits - 1)
        (out * push).sum().backward()
        found.append((out.detach(), w.grad, scale.grad))
    for ours, expected in zip(*found, strict=True):
        assert ours is not None and expected is not None and torch.allclose(ours, expected, atol=1e-10)


@pytest.mark.parametrize("symmetric", [True, False])
def test_range_is_learned(symmetric: bool) -> None:
    """gamma and beta get the gradient of the whole formula, z held still."""
    w = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    clip = Clip(w, Grid(3, 16, symmetric))
    push = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    (clip() * push).sum().backward()
    gamma = clip.gamma.detach().clone().requires_grad_()
    beta = clip.beta.detach().clone().requires_grad_()
    groups = w.view(4, 2, 16)
    hi, lo = groups.amax(-1, keepdim=True).clamp(min=0), groups.amin(-1, keepdim=True).clamp(max=0)
    if symmetric:
        scale, zero = torch.maximum(hi, -lo) * gamma.sigmoid() / 3.5, torch.full_like(hi, 4.0)
    else:
        scale = (hi * gamma.sigmoid() - lo * beta.sigmoid()) / 7
        zero = (-lo * beta.sigmoid() / scale).round().clamp(0, 7).detach()
    (reference(groups, scale, zero, 7) * push.view(4, 2, 16)).sum().backward()
    assert clip.gamma.grad is not None and gamma.grad is not None
    assert torch.allclose(clip.gamma.grad, gamma.grad, atol=1e-5)
    if not symmetric:
        assert clip.beta.grad is not None and beta.grad is not None and torch.allclose(clip.beta.grad, beta.grad, atol=1e-5)
    assert not clip.weight.requires_grad and clip.clipped()[0] == pytest.approx(0.982, abs=1e-3)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_begins_at_given_codes(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    """The codes of GPTQ, which no rounding of W gives, are the first state; scales move by no more than their storage."""
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    x = correlated(300, 64)
    q = quantize_gptq(w, x.T @ x, bits, 16, symmetric, scale_dtype=dtype)
    clip = Clip(w, Grid(bits, 16, symmetric, True, dtype), q)
    assert torch.allclose(clip().detach(), dequantize(q), atol=1e-5 if dtype == torch.float32 else 0.02)
    again = clip.quantized()
    assert (again.codes == q.codes).float().mean() > 0.99
    assert torch.equal(dequantize(again), clip().detach())
    frozen = Scaled(q, learn=True)
    assert torch.equal(frozen().detach(), dequantize(q)) and torch.equal(frozen.quantized().codes, q.codes)
    frozen().sum().backward()
    assert frozen.factor.grad is not None and frozen.factor.grad.abs().sum() > 0


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", list(hostile()))
def test_hostile_groups_stay_storable(name: str, symmetric: bool) -> None:
    """One-signed groups, which put the authors' zero point out of range; nothing that moves gamma and beta changes that."""
    clip = Clip(hostile()[name], Grid(2, 16, symmetric))
    for shift in (0.0, -6.0, 6.0):
        with torch.no_grad():
            clip.gamma.add_(shift)
        q = clip.quantized()
        assert q.codes.max() <= 3 and torch.isfinite(q.scales).all() and (q.scales > 0).all()
        assert symmetric or (q.zero_points is not None and q.zero_points.max() <= 3)
        assert torch.isfinite(clip()).all()

"""Log-probabilities and entropies from hidden states: against the plain formula, gradients, tiles kept and computed again."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")


def inputs(dtype: Any, bias: bool = True) -> Any:
    generator = torch.Generator().manual_seed(0)
    make = [torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype) for size in ((7, 5), (11, 5), (11,))]
    hidden, weight, shift = (tensor.requires_grad_() for tensor in make)
    return hidden, weight, torch.randint(11, (7,), generator=generator), shift if bias else None


def plain(hidden: Any, weight: Any, targets: Any, bias: Any, temperature: float, scale: float = 1.0, softcap: Any = None) -> Any:
    logits = scale * torch.nn.functional.linear(hidden, weight, bias)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    found = torch.log_softmax(logits / temperature, dim=-1)
    return found.gather(1, targets[:, None]).squeeze(1), -(found.exp() * found).sum(dim=1)


@pytest.mark.parametrize("keep", [0, 1 << 20], ids=["again", "kept"])
@pytest.mark.parametrize("tile", [11, 33, 1 << 20])
@pytest.mark.parametrize("wanted", ["logps", "entropies", "both"])
@pytest.mark.parametrize("shape", [{}, {"scale": 0.125}, {"scale": 1.5, "softcap": 2.0}], ids=["plain", "scaled", "capped"])
def test_equals_the_plain_formula(shape: dict[str, float], wanted: str, tile: int, keep: int) -> None:
    from posttrain.losses.token_logps import token_logps

    hidden, weight, targets, bias = inputs(torch.float64)
    push = torch.randn(2, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    push[0] *= wanted != "entropies"
    push[1] *= wanted != "logps"
    results = []
    ours = token_logps(hidden, weight, targets, bias, 0.7, tile=tile, keep=keep, **shape)
    for found in (plain(hidden, weight, targets, bias, 0.7, **shape), ours):
        used = [value * scale for value, scale in zip(found, push, strict=True) if scale.any()]
        results.append([*found, *torch.autograd.grad(torch.stack(used).sum(), (hidden, weight, bias))])
    for theirs, found in zip(*results, strict=True):
        assert torch.allclose(theirs, found, rtol=1e-12, atol=1e-14)


def test_gradcheck() -> None:
    from posttrain.losses.token_logps import token_logps

    hidden, weight, targets, bias = inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda h, w, b: token_logps(h, w, targets, b, 1.3, tile=33), (hidden, weight, bias))


def test_frozen_head_and_narrow_types() -> None:
    """No gradient where none is wanted; bfloat16 gives float32 statistics near those of the rounded inputs."""
    from posttrain.losses.token_logps import token_logps

    hidden, weight, targets, _ = inputs(torch.bfloat16, bias=False)
    weight.requires_grad_(False)
    logps, entropies = token_logps(hidden, weight, targets)
    assert logps.dtype == entropies.dtype == torch.float32
    expected, _ = plain(hidden.double(), weight.double(), targets, None, 1.0)
    assert (logps - expected).abs().max() < 0.05
    (logps.sum() + entropies.sum()).backward()
    assert hidden.grad.dtype == torch.bfloat16
    assert weight.grad is None


def test_autocast_computes_in_its_type() -> None:
    from posttrain.losses.token_logps import token_logps

    hidden, weight, targets, bias = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps, _ = token_logps(hidden, weight, targets, bias)
    rounded = [tensor.detach().bfloat16() for tensor in (hidden, weight, bias)]
    expected, _ = token_logps(rounded[0], rounded[1], targets, rounded[2])
    assert torch.equal(logps, expected)
    logps.sum().backward()
    assert weight.grad.dtype == torch.float32

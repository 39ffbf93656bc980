"""Stable-SPAM on a GPU: the CPU's steps up to rounding, and AdamW's bit by bit where all of it is off. Skipped where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

from posttrain.optim.presets import PRESETS  # noqa: E402
from posttrain.optim.stable_spam import AVERAGES, StableSPAM  # noqa: E402

SHAPES = [(300, 257), (64,), (70_001,), (8, 4, 3)]


def run(kind: type, device: str, dtype: Any = torch.float32, **options: Any) -> tuple[list[Any], Any]:
    """Weights after 20 steps with spikes, on the CPU, and the optimizer."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES]
    optimizer = kind(params, 1e-3, **options)
    for step in range(20):
        for p in params:
            gradient = torch.randn(p.shape, generator=generator) * (1000 if step == 12 else 1 + step % 3)
            gradient.view(-1)[step] *= 50
            p.grad = gradient.to(device, dtype)
        optimizer.step()
    return [p.detach().cpu() for p in params], optimizer


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_steps_are_those_of_the_cpu(preset: str, implementation: str) -> None:
    options = {**PRESETS[preset], "reset_every": 7}
    (cpu, one), (gpu, two) = (run(StableSPAM, device, **options, **{implementation: True}) for device in ("cpu", "cuda"))
    for a, b in zip(cpu, gpu, strict=True):
        assert (a - b).abs().mean() < 1e-7 and (a - b).abs().max() < 1e-3
    for p, q in zip(one.param_groups[0]["params"], two.param_groups[0]["params"], strict=True):
        assert [one.state[p][name] for name in AVERAGES] == pytest.approx([two.state[q][name] for name in AVERAGES], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_off_is_adamw_bitwise(dtype: Any) -> None:
    off = {"clip_decay": None, "norm_decays": None, "reset_every": 0}
    (ours, _), (theirs, _) = (
        run(StableSPAM, "cuda", dtype, **off),
        run(torch.optim.AdamW, "cuda", dtype, fused=True, weight_decay=0.0),
    )
    assert all(map(torch.equal, ours, theirs))


def test_bfloat16_steps_are_finite_and_averages_single() -> None:
    weights, optimizer = run(StableSPAM, "cuda", torch.bfloat16)
    assert all(w.isfinite().all() for w in weights)
    assert optimizer.figures()["optim/spike"] > 5

"""Gradient features on a GPU: those of the CPU up to float32 rounding, and the same bits twice. Skipped where there is no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

ROWS = [{"id": str(i), "text": f"{'the river ' * (1 + i % 5)}runs under bridge {i}"} for i in range(12)]


def features(folder: Path, **fields: Any) -> np.ndarray:
    from data_pipelines.features import FeaturesConfig, feature_maker

    cfg = FeaturesConfig.model_validate({"from": "gradients", "dim": 256, **fields})
    found: np.ndarray = feature_maker(cfg, {"model": [folder]})(ROWS)
    return found


@pytest.mark.parametrize("params", ["last_layer", "lora", "full"])
@pytest.mark.parametrize("batch", [1, 8])
def test_gradients_agree_with_the_cpu(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, params: str, batch: int) -> None:
    gpu, again = (features(tiny_model_dir, params=params, batch=batch) for _ in range(2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpu = features(tiny_model_dir, params=params)
    np.testing.assert_allclose(gpu, cpu, rtol=0, atol=1e-4 * np.abs(cpu).max())
    assert np.array_equal(gpu, again)


@pytest.mark.parametrize("kind", ["sparse", "rademacher"])
def test_projections_agree_with_the_cpu(kind: Any) -> None:
    from data_pipelines.projection import Projector

    projector = Projector(100_000, 512, kind)
    values = np.random.default_rng(0).standard_normal((3, 100_000)).astype(np.float32)
    sums = projector.zeros(3, "cuda")
    for start in range(0, 100_000, 30_001):
        projector.add(sums, torch.from_numpy(values[:, start : start + 30_001]).cuda(), start)
    np.testing.assert_allclose(projector.finish(sums), projector.project(values), rtol=0, atol=1e-4)

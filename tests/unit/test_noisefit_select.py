"""How NoiseFiT chooses layers: the rules on tables against a second writing of them, and the config's refusals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

torch = pytest.importorskip("torch")

from posttrain.errors import ConfigError  # noqa: E402
from posttrain.trainers._noisefit_config import AutoNoiseConfig, NoiseConfig  # noqa: E402
from posttrain.trainers._noisefit_select import pick_by_response, pick_by_snr, signal_and_noise  # noqa: E402
from posttrain.trainers.noisefit import NoiseFiTStage  # noqa: E402


def auto_reference(kl: Any, rise: Any, factors: Any, unit: float) -> tuple[list[int], dict[int, float]]:
    """The later script's rule in tensors: -inf for what is not allowed, then torch's median, topk order and argmin."""
    kl, rise = torch.tensor(kl), torch.tensor(rise)
    layers = len(kl)
    raw = kl / (1 + rise) / (1 + 0.05 * torch.tensor(factors).log2() ** 2)
    valid = rise <= 0.02
    grid = raw.masked_fill(~valid, -math.inf)
    grid[~valid.any(1)] = raw[~valid.any(1)]
    best, where = grid.max(1)
    middle = best.median()
    bar = middle + (best - middle).abs().median().clamp(min=1e-12)
    candidates = [i for i in range(layers) if best[i] >= bar and best[i] > 0]
    most = math.ceil(math.sqrt(layers))
    if not candidates:
        chosen = [int(best.argmax())]
    elif most == 1:
        chosen = [max(candidates, key=lambda i: best[i])]
    else:
        chosen = []
        bands = min(3, layers)
        for band in range(bands):
            inside = [i for i in candidates if band * layers // bands <= i < (band + 1) * layers // bands]
            chosen += sorted(inside, key=lambda i: -best[i])[: math.ceil(most / bands)]
        chosen += [i for i in sorted(candidates, key=lambda i: -best[i]) if i not in chosen][: max(most - len(chosen), 0)]
        chosen = sorted(chosen[:most])
    target = (kl[range(layers), where][chosen].median() * 0.75).clamp(min=1e-12)
    scales = {}
    for i in chosen:
        may = valid[i].nonzero().flatten()
        reach = [int(j) for j in may if kl[i, j] >= target]
        if reach:
            j = reach[0]
        elif len(may):
            j = int(may[(kl[i, may].clamp(min=1e-12).log() - target.log()).abs().argmin()])
        else:
            j = int(where[i])
        scales[i] = factors[j] * unit
    return chosen, scales


@pytest.mark.parametrize("layers", [1, 2, 4, 7, 12, 16, 32, 33])
def test_auto_equals_the_scripts_rule(layers: int) -> None:
    rng = np.random.default_rng(layers)
    auto = AutoNoiseConfig()
    for trial in range(40):
        kl = np.sort(rng.gamma(2, 0.01, size=(layers, 5)), axis=1) * rng.lognormal(0, 1, size=(layers, 1))
        rise = np.maximum(rng.normal(0.0, [0.004, 0.02, 1.0, 0.03][trial % 4], size=(layers, 5)), 0)
        kl = kl * 0 if trial == 39 else kl
        found = pick_by_response(kl.tolist(), rise.tolist(), auto, 0.125)
        chosen, scales = auto_reference(kl, rise, auto.factors, 0.125)
        assert found["layers"] == chosen
        assert found["scales"] == pytest.approx(scales)


def test_auto_leaves_the_first_layers_out() -> None:
    kl = [[0.1 * (8 - layer)] * 5 for layer in range(8)]
    rise = [[0.0] * 5 for _ in range(8)]
    assert min(pick_by_response(kl, rise, AutoNoiseConfig(), 1.0)["layers"]) == 0
    late = pick_by_response(kl, rise, AutoNoiseConfig(), 1.0, min_depth=0.5)["layers"]
    assert min(late) == 4
    assert set(late) <= set(range(4, 8))


@pytest.mark.parametrize(("pick", "wanted"), [("highest", [1, 2, 4]), ("lowest", [0, 3, 5])])
def test_snr_takes_an_end(pick: str, wanted: list[int]) -> None:
    snr = [1.0, 5.0, 4.0, 2.0, 5.0, 0.5]
    assert pick_by_snr(snr, NoiseConfig(pick=pick), 6)["layers"] == wanted
    assert pick_by_snr(snr, NoiseConfig(pick=pick, min_depth=0.5), 6)["layers"] == [3, 4, 5]
    with pytest.raises(ConfigError, match="3 noisy layers of 2"):
        pick_by_snr(snr, NoiseConfig(pick=pick, min_depth=0.6), 6)


def test_signal_and_noise_are_the_means_of_many_draws() -> None:
    """Against the script's way: draw the noise, add it, average what has changed."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 64, generator=generator, dtype=torch.float64) * 2 + 0.5
    signal, noise = signal_and_noise(hidden, NoiseConfig())
    variance = hidden.var(-1, keepdim=True)
    median = hidden.median(-1, keepdim=True).values
    away = (hidden - median).abs()
    mad = away.median(-1, keepdim=True).values
    scale = 0.1 * hidden.std() * mad * torch.exp(-0.1 * away / (mad + 1e-6)) * torch.exp(variance / (variance.mean() + 1e-6)).clamp(max=5)
    drawn = [(hidden + scale * torch.randn(40, 64, generator=generator, dtype=torch.float64) - hidden).abs().mean() for _ in range(200)]
    assert signal == pytest.approx(hidden.abs().mean().item())
    assert noise == pytest.approx(torch.stack(drawn).mean().item(), rel=0.01)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"selection": "list"}, "give `layers`"),
        ({"layers": [1]}, "give `layers`"),
        ({"selection": "list", "layers": [1, 1]}, "named twice"),
        ({"passes": 1, "consistency_weight": 0.1}, "compares two noisy passes"),
        ({"selection": "auto", "compat": "v1"}, "belongs to the later script"),
        ({"selection": "auto", "num_layers": 4}, "no use for `num_layers`"),
        ({"selection": "list", "layers": [0], "min_depth": 0.5}, "no use for `min_depth`"),
        ({"auto": {"factors": [1.0, 0.5]}}, "factors must rise"),
        ({"relative_std": 0.0}, "greater than 0"),
    ],
)
def test_refused_noise(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        NoiseConfig.model_validate(fields)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"trl": {"neftune_noise_alpha": 5.0}}, "trl.neftune_noise_alpha"),
        ({"trl": {"label_smoothing_factor": 0.1}}, "trl.label_smoothing_factor"),
        ({"trl": {"loss_type": "dft"}}, "trl.loss_type"),
        ({"noise": {"compat": "v1"}, "data": {"weights": "loss"}}, "know no row weights"),
        ({"data": {"weights": "loss", "packing": True}}, "one row a sequence"),
    ],
)
def test_refused_stage(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        NoiseFiTStage.model_validate({"name": "train", "method": "noisefit", "steps": 2, **fields})


def test_a_config_survives_its_own_dump() -> None:
    for noise in ({"selection": "list", "layers": [3]}, {"selection": "auto"}, {}):
        config = NoiseFiTStage.model_validate({"name": "train", "method": "noisefit", "steps": 2, "noise": noise})
        assert NoiseFiTStage.model_validate(config.dump()) == config


def test_neutral_is_named() -> None:
    assert NoiseConfig(passes=0).neutral
    assert NoiseConfig(ce_weight=1.0, consistency_weight=0.0).neutral
    assert not NoiseConfig(ce_weight=1.0).neutral
    assert NoiseConfig(passes=1).consistency == 0
    assert NoiseConfig().consistency == 0.1

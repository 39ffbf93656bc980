"""`compat="repo"` against the authors' code of TAROT and the GeomLoss that it calls.

`golden/tarot_official.npz` holds what vita-epfl/TAROT at bbb6ce2 returned: `DataSelector.select_data` for given features, methods
`fixed_size` and `otm`, and the repeats that `update_dataloader_with_weights` makes of weights. GeomLoss itself runs here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_pipelines.neighbours import Neighbours, top_neighbours
from data_pipelines.sinkhorn import annealed
from data_pipelines.tarot_rules import Space, distance, fixed, otm, repeats

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "tarot_official.npz"


def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN, allow_pickle=False) as file:
        return dict(file)


OFFICIAL = golden()
FIXED = sorted(name.removesuffix(".ids") for name in OFFICIAL if ".fixed." in name and name.endswith(".ids"))
OTM = sorted(name.removesuffix(".ids") for name in OFFICIAL if ".otm." in name and name.endswith(".ids"))


def case(name: str) -> tuple[Neighbours, Space]:
    rows, targets = OFFICIAL[f"{name[0]}.rows"], OFFICIAL[f"{name[0]}.targets"]
    lists = top_neighbours([(np.arange(len(rows)), rows)], targets, min(2000, len(rows)))
    return lists, Space(targets, lambda ids: rows[ids], compat="repo")


@pytest.mark.parametrize("name", FIXED)
def test_fixed_size(name: str) -> None:
    lists, space = case(name)
    picked = fixed(lists, space, int(name.split(".")[2]), last="largest")
    order = np.argsort(picked.ids)
    np.testing.assert_array_equal(picked.ids[order], OFFICIAL[f"{name}.ids"])
    np.testing.assert_allclose(picked.weight[order], OFFICIAL[f"{name}.weight"], atol=2e-5)


@pytest.mark.parametrize("name", OTM)
def test_otm(name: str) -> None:
    lists, space = case(name)
    picked = otm(lists, space, folds=int(name.split(".")[2]), seed=42)
    order = np.argsort(picked.ids)
    np.testing.assert_array_equal(picked.ids[order], OFFICIAL[f"{name}.ids"])
    np.testing.assert_allclose(picked.weight[order], OFFICIAL[f"{name}.weight"], atol=2e-5)


def test_the_cases_hold_what_the_code_does_beyond_its_definition() -> None:
    more_than_asked = [name for name in FIXED if len(OFFICIAL[f"{name}.ids"]) > int(name.split(".")[2])]
    assert more_than_asked
    for name in OTM:
        lists, space = case(name)
        ours = otm(lists, Space(space.targets, space.rows), folds=int(name.split(".")[2]), seed=42)
        assert len(ours.ids) < len(OFFICIAL[f"{name}.ids"])


@pytest.mark.parametrize("j", [0, 1])
def test_repeats(j: int) -> None:
    weight, (total, targets) = OFFICIAL[f"repeats.{j}.weight"], OFFICIAL[f"repeats.{j}.sizes"]
    wanted = OFFICIAL[f"repeats.{j}.counts"]
    found = repeats(weight, int(total), targets=int(targets), compat="repo")
    tied = np.append(weight == weight.max(), np.ones(int(targets), bool))  # the largest weight is that of the targets: any of them first
    np.testing.assert_array_equal(found[~tied], wanted[~tied])
    assert sorted(found[tied]) == sorted(wanted[tied])


def test_annealed_is_geomloss() -> None:
    import torch
    from geomloss import SamplesLoss

    rows, targets = OFFICIAL["0.rows"], OFFICIAL["0.targets"]
    both = np.concatenate([rows, targets])
    diameter = float(np.linalg.norm(both.max(0) - both.min(0)))
    cost = distance(rows.astype(np.float64), targets.astype(np.float64))
    options = {"cost": lambda x, y: (2 - 2 * x @ y.transpose(1, 2)).abs().sqrt(), "debias": False, "blur": 0.01, "backend": "tensorized"}
    points = torch.tensor(rows, dtype=torch.float64), torch.tensor(targets, dtype=torch.float64)
    value, f, g = annealed(cost, diameter)
    assert value == pytest.approx(SamplesLoss(scaling=0.5, **options)(*points).item(), abs=1e-9)
    wanted_f, wanted_g = SamplesLoss(scaling=0.5, potentials=True, **options)(*points)
    np.testing.assert_allclose(f, wanted_f.numpy().ravel(), atol=1e-9)
    np.testing.assert_allclose(g, wanted_g.numpy().ravel(), atol=1e-9)


def test_folds_are_those_of_scikit_learn() -> None:
    from sklearn.model_selection import KFold

    from data_pipelines.tarot_rules import folds_of

    for targets, folds, seed in ((12, 4, 42), (23, 5, 0), (7, 7, 1)):
        wanted = [test for _, test in KFold(folds, shuffle=True, random_state=seed).split(np.arange(targets))]
        found = folds_of(targets, folds, seed)
        assert len(found) == len(wanted) and all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))

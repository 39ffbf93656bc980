"""DSIR against recorded figures of the authors' package (data-selection 1.0.3); the file says how they were made."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import dsir
from data_pipelines.ngrams import Hasher

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "dsir_official.json").read_text(encoding="utf-8"))


def config(**fields):
    return dsir.DsirConfig.model_validate({"name": "s", "method": "select.dsir", "budget": {"rows": GOLDEN["k"]}, **fields})


def rows(name):
    return [{"id": str(i), "text": text} for i, text in enumerate(GOLDEN[name])]


@pytest.fixture(scope="module")
def state():
    cfg = config()
    raw, target = dsir.fit_shard(rows("texts"), cfg, "raw"), dsir.fit_shard(rows("target"), cfg, "target")
    return dsir.merge([raw], [[target]], cfg)


def test_features_are_the_published_buckets():
    for text, expected in zip(GOLDEN["texts"], GOLDEN["counts"], strict=True):
        counts = Hasher().count([text])
        if "sha256" in expected:
            assert hashlib.sha256(counts.astype("<i8").tobytes()).hexdigest() == expected["sha256"]
        else:
            found = np.flatnonzero(counts)
            assert {str(i): int(counts[i]) for i in found} == expected


def test_log_ratios_are_bit_equal(state):
    assert {i: state["log_diff"][0][int(i)] for i in GOLDEN["log_diff"]} == GOLDEN["log_diff"]
    assert state["log_diff"].sum() == pytest.approx(GOLDEN["log_diff_sum"], abs=1e-8)


def test_weights_and_lengths(state):
    scored = dsir.score(rows("texts"), state, config())
    assert np.abs(scored["score"] - GOLDEN["log_weights"]).max() < 1e-8
    assert scored["words"].tolist() == GOLDEN["length"]


def test_same_set_under_the_same_noise(state):
    scored = dsir.score(rows("texts"), state, config())
    key = np.where(scored["words"] >= GOLDEN["min_length"], scored["score"] + GOLDEN["noise"], -np.inf)
    assert sorted(np.argsort(-key)[: GOLDEN["k"]].tolist()) == GOLDEN["chosen"]

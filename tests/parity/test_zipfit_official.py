"""ZIP-FIT against its authors' package (zip-fit 1.0.9), run beside ours, and against recorded figures of their repository."""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import zipfit
from data_pipelines.codecs import Codec, pack

GOLDEN = Path(__file__).parent.parent / "golden"
INPUTS = json.loads((GOLDEN / "dsir_official.json").read_text(encoding="utf-8"))
RAW = [text for text in INPUTS["texts"] if "\ud800" not in text]
TARGET = [*INPUTS["target"], "", "x = 1"]
HEAD = json.loads((GOLDEN / "zipfit_head.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def peer():
    """The package's class; it imports brotli, which it does not declare and these codecs do not need."""
    try:
        importlib.import_module("brotli")
    except ImportError:
        sys.modules["brotli"] = types.ModuleType("brotli")
    return importlib.import_module("zip_fit").ZIPFIT


def ours(**fields):
    cfg = zipfit.ZipfitConfig.model_validate({"name": "s", "method": "select.zipfit", "budget": {"rows": 5}, **fields})
    raw = [{"id": str(i), "text": text} for i, text in enumerate(RAW)]
    target = [{"id": f"t{i}", "text": text} for i, text in enumerate(TARGET)]
    state = zipfit.merge([zipfit.fit_shard(raw, cfg, "raw")], [[zipfit.fit_shard(target, cfg, "target")]], cfg)
    return zipfit.score(raw, state, cfg)["score"][:, 0]


def theirs(model):
    source, target = ([model.compress(text) for text in texts] for texts in (RAW, TARGET))
    pairs = [[model.compress(x + t) for t in TARGET] for x in RAW]
    near = [[model.similarity((x, t, source[i], target[j], i))[1] for j, t in enumerate(TARGET)] for i, x in enumerate(RAW)]
    return source, target, pairs, [float(np.mean(row)) for row in near]


@pytest.mark.parametrize(
    ("algorithm", "level", "fields"),
    [
        ("gzip", 0, {"preset": "zipfit-1.0.9"}),
        ("gzip", 9, {"preset": "zipfit-paper"}),
        ("gzip", 6, {"preset": "zipfit-paper", "level": 6}),
        ("gzip", 1, {"preset": "zipfit-paper", "level": 1}),
        ("lz4", 0, {"preset": "zipfit-head"}),
        ("lz4", 9, {"preset": "zipfit-head", "level": 9}),
        ("zstd", 3, {"preset": "zipfit-head", "codec": "zstd", "level": 3}),
    ],
)
def test_sizes_are_byte_identical_and_scores_equal(peer, algorithm, level, fields):
    model = peer("source.jsonl", "target.jsonl", 5, compression_algorithm=algorithm, compress_level=level)
    source, target, pairs, scores = theirs(model)
    codec = Codec("zlib" if algorithm == "gzip" else algorithm, level)
    raw, texts = (pack(text.encode() for text in listed) for listed in (RAW, TARGET))
    assert codec.sizes(raw).tolist() == source and codec.sizes(texts).tolist() == target
    assert [codec.pairs(bytes(piece), texts).tolist() for piece in raw.pieces()] == pairs
    np.testing.assert_allclose(ours(**fields), scores, rtol=0, atol=1e-14)


def test_the_preset_is_the_packages_own_default(peer):
    model = peer("source.jsonl", "target.jsonl", 5)
    assert (model.compression_algorithm, model.compress_level) == ("gzip", 0)


def test_the_repositorys_default():
    codec = Codec("lz4", 0)
    raw, texts = (pack(text.encode() for text in listed) for listed in (RAW, TARGET))
    assert codec.sizes(raw).tolist() == HEAD["raw"] and codec.sizes(texts).tolist() == HEAD["target"]
    assert [codec.pairs(bytes(piece), texts).tolist() for piece in raw.pieces()] == HEAD["pairs"]
    score = ours(preset="zipfit-head")
    np.testing.assert_allclose(score, HEAD["scores"], rtol=0, atol=1e-14)
    assert score[np.argsort(-score, kind="stable")[:5]].tolist() == pytest.approx([HEAD["scores"][i] for i in HEAD["top5"]], abs=1e-14)

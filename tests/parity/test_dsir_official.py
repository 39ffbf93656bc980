"""DSIR against the authors' package (data-selection 1.0.3): recorded figures, and the package itself run beside ours."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import json
import random
import string
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


def corpus(count, seed):
    """Docstrings of the standard library, made longer, and hostile rows among them."""
    draw = random.Random(seed)
    trees = (ast.parse(Path(module.__file__).read_text("utf-8")) for module in (ast, contextlib, hashlib, json, random, string))
    nodes = [n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    found = [text for node in nodes if (text := ast.get_docstring(node))]
    texts = ["\n".join(draw.choices(found, k=draw.randint(1, 12))) for _ in range(count)]
    odd = [
        "",
        " ",
        "a",
        "İstanbul ΟΔΟΣ ΣΑΣ Σ",
        "日本語テキスト。" * 30,
        "e\u0301 x\u0902 a\x1fb ²",
        "nul\x00 " * 60,
        "w" * 3000,
        "é " * 120,
        "🙂 🙂🙂",
    ]
    return [text for pair in zip(texts, odd * count, strict=False) for text in pair][:count]


RAW, TARGET, OTHER = corpus(160, 0), corpus(30, 1), corpus(20, 2)
KEPT = 40


@pytest.fixture(scope="module", params=[False, True], ids=["merged", "separate"])
def package(request, tmp_path_factory):
    """The package after its own fit, weights and resampling with a seeded noise."""
    from data_selection import HashedNgramDSIR

    folder, names = tmp_path_factory.mktemp("package"), {"raw": RAW, "target": TARGET, "other": OTHER}
    for name, texts in names.items():
        lines = (json.dumps({"text": text, "n": i}) for i, text in enumerate(texts))
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    paths = [str(folder / f"{name}.jsonl") for name in names]
    official = HashedNgramDSIR(paths[:1], paths[1:], str(folder / "cache"), num_proc=1, separate_targets=request.param)
    official.separate = request.param
    with contextlib.redirect_stderr(io.StringIO()):
        official.fit_importance_estimator(num_tokens_to_fit="all")
        official.compute_importance_weights()
        np.random.seed(5)
        official.resample(out_dir=str(folder / "out"), num_to_sample=KEPT, cache_dir=str(folder / "picked"))
    lines = (line for path in (folder / "out").rglob("*.jsonl") for line in path.read_text().splitlines())
    official.picked = sorted(json.loads(line)["n"] for line in lines)
    official.weights = np.load(folder / "cache" / "log_importance_weights" / "0.npy")
    return official


def ours(package):
    """Our state and scores with the regex engine that the installed NLTK uses."""
    regex = "regex" if len(package.tokenizer("a\x1fb")) == 3 else "re"
    cfg = config(preset="dsir-1.0.3", regex=regex, targets="separate" if package.separate else "merged")
    fits = {
        name: dsir.fit_shard([{"id": "x", "text": t} for t in texts], cfg, "") for name, texts in (("r", RAW), ("t", TARGET), ("o", OTHER))
    }
    targets = [[fits["t"]], [fits["o"]]] if package.separate else [[fits["t"], fits["o"]]]
    state = dsir.merge([fits["r"]], targets, cfg)
    return state, dsir.score([{"id": "x", "text": text} for text in RAW], state, cfg)


def test_the_package_gives_the_same_weights(package):
    state, scored = ours(package)
    assert (state["log_diff"] == np.atleast_2d(package.log_diff)).all()
    assert scored["score"].shape == package.weights.shape
    assert np.abs(scored["score"] - package.weights).max() <= 1e-8
    length = [package.get_perexample_metadata({}, package.featurizer(text)) for text in RAW]
    assert [w for w in scored["words"] if w] == [x for x, w in zip(length, scored["words"], strict=True) if w]


def test_the_package_picks_the_same_rows_under_the_same_noise(package):
    """Its noise is one stream over the rows that are left, target by target; ours is the row's own, so it is given here."""
    _, scored = ours(package)
    left = scored["words"] >= 100
    columns = scored["score"].reshape(len(RAW), -1)
    shares = package.target_proportions if package.separate else [1.0]
    counts = [int(KEPT * share) for share in shares]
    counts[-1] += KEPT - sum(counts)
    np.random.seed(5)
    chosen: list[int] = []
    for t, count in enumerate(counts):
        at = np.flatnonzero(left)
        key = columns[at, t] + np.random.gumbel(size=len(at))
        best = at[np.argsort(-key)[:count]]
        left[best] = False
        chosen += best.tolist()
    assert sorted(chosen) == package.picked and len(chosen) == KEPT

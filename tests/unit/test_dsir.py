"""DSIR's features, weights and report against a slow float64 reference, and hostile rows."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import dsir, ngrams
from data_pipelines.budget import Budget
from data_pipelines.ngrams import Hasher
from posttrain.errors import ConfigError, DataError

CASES = Path(__file__).parent.parent / "cases"
REPO = Path(__file__).parent.parent.parent

TEXTS = [
    "", " ", "!!!", "a", "Hello, world: hello", "a_b __c 1.5e-3 ... (x)", "Straße ΟΔΟΣ ΣΑΣ İx naïve café", "日本語 テスト です。",
    "tab\tand\x1cfs\u2028line\u00a0nbsp", "\ud800 lone", "nul\x00nul", "the quick brown fox " * 40, "word " * 3 + "end",
]  # fmt: skip


def slow_counts(text: str, n: int, buckets: int) -> dict[int, int]:
    words = re.findall(r"\w+|[^\w\s]+", text.lower())
    counts: dict[int, int] = {}
    for m in range(1, n + 1):
        for i in range(len(words) - m + 1):
            gram = " ".join(words[i : i + m]).encode("utf-8", "surrogatepass")
            bucket = int(hashlib.sha256(gram).hexdigest(), 16) % buckets
            counts[bucket] = counts.get(bucket, 0) + 1
    return counts


def dense(counts: dict[int, int], buckets: int) -> list[int]:
    return [counts.get(i, 0) for i in range(buckets)]


def config(**fields):
    return dsir.DsirConfig.model_validate({"name": "s", "method": "select.dsir", "budget": {"rows": 2}, **fields})


def rows(texts):
    return [{"id": str(i), "text": text} for i, text in enumerate(texts)]


def test_weights_equal_the_slow_reference_in_float64():
    log_diff = np.random.default_rng(0).normal(size=1000)
    score, words, grams = Hasher(2, 1000).weigh(TEXTS, log_diff)
    for i, text in enumerate(TEXTS):
        counts = slow_counts(text, 2, 1000)
        assert score[i] == pytest.approx(math.fsum(log_diff[b] * c for b, c in counts.items()), abs=1e-9)
        assert grams[i] == sum(counts.values())
        assert words[i] == len(re.findall(r"\w+|[^\w\s]+", text.lower()))


def test_a_row_weighs_the_same_bits_in_any_batch():
    log_diff = np.random.default_rng(1).normal(size=10_000)
    texts = [t for t in TEXTS for _ in range(2)]
    together = Hasher().weigh(texts, log_diff)[0]
    alone = [Hasher.weigh(ngrams.shared_hasher(2, 10_000, "sha256"), [t], log_diff)[0][0] for t in texts]
    backwards = Hasher().weigh(texts[::-1], log_diff)[0][::-1]
    assert together.tolist() == alone == backwards.tolist()


def test_fast_hash_is_fixed_and_spreads():
    counts = Hasher(1, 64, "fast").count([" ".join(f"w{i}" for i in range(6400))])
    assert counts.sum() == 6400 and counts.min() > 50 and counts.max() < 160
    assert np.flatnonzero(Hasher(2, 10_000, "fast").count(["hello world"])).tolist() == [3159, 3335, 7364]


def fitted(raw, given, **fields):
    cfg = config(**fields)
    parts = [[dsir.fit_shard(rows([text]), cfg, "target") for text in texts] for texts in given]
    return cfg, dsir.merge([dsir.fit_shard(rows([text]), cfg, "raw") for text in raw], parts, cfg)


def shares(texts, buckets, pseudo=0.0):
    counts = np.sum([dense(slow_counts(text, 2, buckets), buckets) for text in texts], axis=0) + pseudo
    return counts / counts.sum()


def slow_kl(p, q, smoothing):
    return math.fsum(a * (math.log(a + smoothing) - math.log(b + smoothing)) for a, b in zip(p, q, strict=True))


def test_state_and_report_follow_the_formulas():
    raw, target, chosen = ["a b c d e", "x y z w v u"], ["a b c"], ["a b c d e"]
    cfg, state = fitted(raw, [target], buckets=64, target_pseudo=0.5, smoothing=1e-6)
    p, q, s = shares(target, 64, 0.5), shares(raw, 64), shares(chosen, 64)
    np.testing.assert_allclose(state["log_diff"], [np.log(p + 1e-6) - np.log(q + 1e-6)], rtol=1e-13)
    report = dsir.report(state, [dsir.fit_shard(rows(chosen), cfg, "picked")], cfg)
    assert report["kl_raw"] == pytest.approx(slow_kl(p, q, 1e-6), abs=1e-12)
    assert report["kl_reduction"] == pytest.approx(slow_kl(p, q, 1e-6) - slow_kl(p, s, 1e-6), abs=1e-12)
    assert report["word_length"] == 1.0 and report["warnings"] == []


def test_separate_targets_have_weights_of_their_own():
    raw, targets = ["a b c d e", "x y z w v u", "m n"], [["a b c"], ["x y z", "x y"]]
    cfg, state = fitted(raw, targets, buckets=64, targets="separate", target_pseudo=0.1)
    assert state["target"].shape == state["log_diff"].shape == (2, 64)
    both = dsir.score(rows(raw), state, cfg)["score"]
    for t, target in enumerate(targets):
        alone = fitted(raw, [target], buckets=64, target_pseudo=0.1)[1]
        assert (dsir.score(rows(raw), alone, cfg)["score"] == both[:, t]).all()
    assert both[0, 0] > both[1, 0] and both[0, 1] < both[1, 1]
    report = dsir.report(state, [dsir.fit_shard(rows(raw[:1]), cfg, "picked")], cfg)
    expected = [slow_kl(shares(target, 64, 0.1), shares(raw, 64), 1e-8) for target in targets]
    assert report["kl_raw"] == pytest.approx(np.mean(expected), abs=1e-12)


@pytest.mark.parametrize("count", [1, 2])
def test_mean_divides_by_the_ngrams(count):
    texts = ["a b c", "a b c " * 9, ""]
    cfg, state = fitted(["a b c d", "x"], [["a b"]] * count, buckets=64)
    total = dsir.score(rows(texts), state, cfg)["score"]
    mean = dsir.score(rows(texts), state, config(length="mean", buckets=64))["score"]
    np.testing.assert_allclose((mean.T * [5, 53, 1]).T, total)


def test_char_ngrams_see_into_text_without_spaces():
    target, raw = ["ภาษาไทยไม่มีช่องว่าง" * 3], ["ไทยภาษาไม่มี" * 4, "กขฃคฅฆงจฉชซฌ" * 4]
    cfg, state = fitted(raw, [target], unit="char", ngrams=3, buckets=512)
    scored = dsir.score(rows(raw), state, cfg)
    assert scored["score"][0] > scored["score"][1] and "words" not in scored
    words, state = fitted(raw, [target], buckets=512)
    by_word = dsir.score(rows(raw), state, words)["score"]
    assert by_word[0] < by_word[1]


def warnings(raw, target, **fields):
    cfg, state = fitted(raw, [target], **fields)
    return dsir.report(state, [dsir.fit_shard(rows(raw[:1]), cfg, "picked")], cfg)["warnings"]


def test_what_to_beware_of_is_said_with_what_helps():
    long, short = ["日本語のテキストには空白がありません" * 2], ["some words and more words"]
    assert [w.split(",")[0] for w in warnings(short, short, buckets=10_000)] == [
        "the target is small: 9 n-grams leave 100% of 10000 buckets empty"
    ]
    assert warnings(short, short, target_pseudo=0.5) == []
    (found,) = warnings(long, short, target_pseudo=0.5)
    assert "36 characters a word" in found and "unit: char" in found
    assert warnings(long, short, target_pseudo=0.5, unit="char") == []
    (found,) = warnings(short, short, target_pseudo=0.5, guard={"salad": False})
    assert "guard is off" in found


def test_a_state_of_another_unicode_is_refused():
    cfg, state = fitted(["a b"], [["a"]])
    other = config(regex="regex")
    with pytest.raises(DataError, match="Unicode"):
        dsir.score(rows(["a"]), state, other)
    assert dsir.score(rows(["a"]), fitted(["a\x1fb"], [["a"]], regex="regex")[1], other)["words"].tolist() == [1]
    assert dsir.score(rows(["a\x1fb"]), state, cfg)["words"].tolist() == [2]


def test_presets_are_the_published_settings_and_give_way():
    package, paper = config(preset="dsir-1.0.3"), config(preset="dsir-paper")
    assert package.filters.min_words == 100 and not package.guard.salad and package.chunks is None
    assert paper.chunks.words == 128 and paper.filters.quality == "dsir-paper" and not paper.guard.salad
    assert config(preset="dsir-1.0.3", filters={"min_words": 5}, buckets=99).filters.min_words == 5
    assert config().guard.salad and config(preset="default").filters.min_words == 0
    with pytest.raises(ValueError, match="known: default, dsir-1.0.3, dsir-paper"):
        config(preset="dsir-2")


def test_fit_share_takes_rows_by_hash_not_a_prefix():
    cfg = config(fit_share=0.5)
    data = [{"id": f"r{i}", "text": f"w{i}"} for i in range(400)]
    forward, backward = dsir.fit_shard(data, cfg, "raw"), dsir.fit_shard(data[::-1], cfg, "raw")
    assert (forward["counts"] == backward["counts"]).all() and 150 < forward["counts"].sum() < 250
    other = dsir.fit_shard(data, config(fit_share=0.5, fit_seed=1), "raw")
    assert (forward["counts"] != other["counts"]).any()
    first = dsir.fit_shard(data[:200], cfg, "raw")["counts"].sum()
    assert 60 < first < 140
    assert dsir.fit_shard(data, cfg, "target")["counts"].sum() == 400


def write(path: Path, data) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in data), encoding="utf-8")
    return path


def test_c88_rows_without_words_cannot_win(tmp_path):
    target = write(tmp_path / "t.jsonl", [{"text": "rivers and bridges"}])
    summary = dsir.select(CASES / "C88-empty-texts.jsonl", target, tmp_path / "o", rows=4)
    assert summary["not_eligible"] == {"without words": 3} and summary["rows_out"] == 4
    import pyarrow.parquet as pq

    assert np.isfinite(pq.read_table(tmp_path / "o" / "scores-00000.parquet")["score"].to_numpy()).all()


@pytest.mark.parametrize("lines", ["", '{"text": ""}\n{"text": " "}\n'])
def test_c88_empty_target_is_refused_with_its_path(tmp_path, lines):
    target = tmp_path / "empty.jsonl"
    target.write_text(lines)
    with pytest.raises(DataError) as caught:
        dsir.select(CASES / "C88-empty-texts.jsonl", target, tmp_path / "o", rows=1, target_kind="text")
    assert "empty.jsonl" in str(caught.value)


def test_c49_surrogates_are_refused_by_row_or_skipped(tmp_path):
    target = write(tmp_path / "t.jsonl", [{"text": "some words"}])
    with pytest.raises(DataError, match=r"C49-surrogates.jsonl:\d+"):
        dsir.select(CASES / "C49-surrogates.jsonl", target, tmp_path / "a", rows=1)
    summary = dsir.select(CASES / "C49-surrogates.jsonl", target, tmp_path / "b", rows=1, on_bad="skip")
    assert summary["skipped"] >= 1 and summary["rows_out"] == 1


def test_c90_a_budget_beyond_the_data_is_said(tmp_path):
    raw, target = write(tmp_path / "r.jsonl", [{"text": t} for t in ("a b", "", "c d")]), write(tmp_path / "t.jsonl", [{"text": "a"}])
    summary = dsir.select(raw, target, tmp_path / "o", rows=128)
    assert summary["rows_out"] == 2 and "asked for 128 rows, only 2 are eligible of 3 rows (1 without words)" in summary["short"]
    with pytest.raises(DataError, match="only 2 are eligible"):
        dsir.select(raw, target, tmp_path / "o2", rows=128, on_short="stop")


@pytest.mark.parametrize("given", [{}, {"rows": 1, "share": 0.5}, {"rows": 0}, {"share": 1.5}, {"rows": "3"}])
def test_a_budget_has_exactly_one_positive_unit(given):
    with pytest.raises(ValueError):
        Budget.model_validate(given)


def test_the_door_explains_itself(tmp_path):
    raw = write(tmp_path / "r.jsonl", [{"text": "a b"}])
    with pytest.raises(ConfigError, match="min_wrods"):
        dsir.select(raw, raw, tmp_path / "o", rows=1, min_wrods=3)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").touch()
    with pytest.raises(ConfigError, match="not empty"):
        dsir.select(raw, raw, tmp_path / "used", rows=1)
    with pytest.raises(DataError, match="exceeds the budget"):
        dsir.select(raw, raw, tmp_path / "o", tokens=1)


PLACES = {"river": "river bank water boat bridge flood", "kitchen": "oven bread flour sugar table knife"}


def prose(topic: str, count: int, seed: int = 0) -> list[str]:
    """Sentences in which each word has few successors, as in text."""
    draw, words = random.Random(f"{topic}{seed}"), PLACES[topic].split()
    follows = {word: draw.choices([*words, "of", "the", "and"], k=2) for word in [*words, "of", "the", "and"]}
    found = []
    for _ in range(count):
        line = [draw.choice(words)]
        while len(line) < 60:
            line.append(draw.choice(follows[line[-1]]) if draw.random() < 0.9 else draw.choice(words))
        found.append(" ".join(line))
    return found


def picked_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.glob("rows-*")) for line in path.read_text().splitlines()]


def test_salad_of_the_targets_words_is_left_out(tmp_path):
    draw = random.Random(0)
    salad = [" ".join(draw.choices([*PLACES["river"].split(), "of", "the", "and"], k=60)) for _ in range(30)]
    raw = [{"text": t, "of": of} for of in PLACES for t in prose(of, 60)] + [{"text": text, "of": "salad"} for text in salad]
    raw, target = write(tmp_path / "r.jsonl", raw), write(tmp_path / "t.jsonl", [{"text": t} for t in prose("river", 120)[60:]])
    options = {"rows": 80, "suffix": ".jsonl", "target_pseudo": 0.1}
    summary = dsir.select(raw, target, tmp_path / "o", **options)
    assert 30 <= summary["not_eligible"]["word salad"] <= 36 and summary["warnings"] == []
    assert {row["of"] for row in picked_rows(tmp_path / "o")} == {"river", "kitchen"}
    fooled = dsir.select(raw, target, tmp_path / "p", guard={"salad": False}, **options)
    assert fooled["not_eligible"] == {} and "guard is off" in fooled["warnings"][0]
    assert Counter(row["of"] for row in picked_rows(tmp_path / "p"))["salad"] >= 15


def test_separate_targets_share_the_pick(tmp_path):
    raw = write(tmp_path / "r.jsonl", [{"text": t, "of": of} for of in PLACES for t in prose(of, 40)])
    targets = {of: write(tmp_path / f"{of}.jsonl", [{"text": t} for t in prose(of, 20, 1)]) for of in PLACES}
    options = {"rows": 20, "suffix": ".jsonl", "targets": "separate", "target_shares": {"river": 0.25, "kitchen": 0.75}}
    summary = dsir.select(raw, targets, tmp_path / "o", **options)
    assert summary["targets"] == {"kitchen": 15, "river": 5}
    assert Counter(row["of"] for row in picked_rows(tmp_path / "o")) == {"kitchen": 15, "river": 5}


def test_the_papers_preset_picks_chunks(tmp_path):
    filler = ["the", "of", "and", "to", "in", "is", "for", "by", "on", "at"]
    draw = random.Random(0)
    text = " ".join(draw.choice(filler) if draw.random() < 0.5 else f"word{draw.randint(0, 400)}" for _ in range(128 * 5 + 10))
    raw = write(tmp_path / "r.jsonl", [{"id": "long", "text": text}, {"id": "same", "text": "the the " * 100}])
    summary = dsir.select(
        raw, write(tmp_path / "t.jsonl", [{"text": text[:500]}]), tmp_path / "o", rows=3, preset="dsir-paper", suffix=".jsonl"
    )
    assert {row["id"] for row in picked_rows(tmp_path / "o")} < {f"long#{i}" for i in range(5)} and summary["rows_out"] == 3
    assert set(summary["not_eligible"]) == {"dsir-paper: words", "dsir-paper: most frequent word"}


def test_the_hash_seed_of_python_does_not_matter(tmp_path):
    raw = write(tmp_path / "r.jsonl", [{"text": f"word{i % 7} other{i % 5} and more", "n": i} for i in range(60)])
    target = write(tmp_path / "t.jsonl", [{"text": "word3 and word4"}])
    code = "import sys; from data_pipelines import dsir; dsir.select(sys.argv[1], sys.argv[2], sys.argv[3], rows=9)"
    for seed in "12":
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(REPO)}
        subprocess.run([sys.executable, "-c", code, raw, target, tmp_path / seed], env=env, check=True, timeout=120)
    files = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "2").iterdir())
    assert all((tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes() for name in files)


def test_the_stage_module_is_light():
    code = "import sys, data_pipelines.dsir; print([m for m in ('numpy', 'pyarrow', 'torch', 'transformers') if m in sys.modules])"
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

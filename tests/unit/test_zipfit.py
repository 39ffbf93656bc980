"""ZIP-FIT's codecs, pair sizes, sampling and scores against slow references, and hostile rows."""

from __future__ import annotations

import gzip
import json
import math
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from data_pipelines import codecs, zipfit, zipfit_bins
from data_pipelines.codecs import Codec, Dictionary, pack
from data_pipelines.deflate_size import LEVELS, LONGEST, PairSizer, agrees
from posttrain.errors import ConfigError, DataError

REPO = Path(__file__).parent.parent.parent
CASES = REPO / "tests" / "cases"
WORDS = (REPO / "README.md").read_text(encoding="utf-8").split()
TEXTS = [
    "",
    " ",
    "a",
    "ab",
    "abc" * 100,
    "nul\x00nul\x00" * 9,
    "\ud800 lone \udfff" * 5,
    "Straße 日本語 \U0001f642 naïve " * 20,
    "x" * 5000,
    " ".join(WORDS[:400]),
    " ".join(WORDS[200:260]),
    " ".join(WORDS[100:110]),
]
TARGETS = [" ".join(WORDS[300:380]), "abcabc naïve", "", "\ud800", "x" * 300]


def config(**fields):
    return zipfit.ZipfitConfig.model_validate({"name": "s", "method": "select.zipfit", "budget": {"rows": 2}, **fields})


def rows(texts, tag="r"):
    return [{"id": f"{tag}{i}", "text": text} for i, text in enumerate(texts)]


def fitted(cfg, raw=TEXTS, targets=TARGETS):
    return zipfit.merge([zipfit.fit_shard(rows(raw), cfg, "raw")], [[zipfit.fit_shard(rows(targets, "t"), cfg, "target")]], cfg)


def utf8(text):
    return text.encode("utf-8", "surrogatepass")


def slow_score(x, targets, size, order="source_first"):
    """The paper's formula, one pair at a time."""
    total = 0.0
    for t in targets:
        both = size(x + t if order == "source_first" else t + x)
        total += 1 - (both - min(size(x), size(t))) / max(size(x), size(t))
    return total / len(targets)


SIZES = {
    ("zlib", 9): lambda s: len(gzip.compress(s, 9)),
    ("zlib", 1): lambda s: len(gzip.compress(s, 1)),
    ("zlib", 0): lambda s: len(gzip.compress(s, 0)),
    ("libdeflate", 6): lambda s: len(__import__("deflate").gzip_compress(s, 6)),
    ("isal", 2): lambda s: len(__import__("isal.igzip").igzip.compress(s, 2)),
    ("lz4", 0): lambda s: len(__import__("lz4.frame").frame.compress(s)),
    ("lz4", 9): lambda s: len(__import__("lz4.frame").frame.compress(s, compression_level=9)),
    ("zstd", 3): lambda s: len(__import__("zstandard").ZstdCompressor(level=3).compress(s)),
}


@pytest.mark.parametrize("order", ["source_first", "target_first"])
@pytest.mark.parametrize(("codec", "level"), SIZES)
def test_scores_equal_the_formula(codec, level, order):
    cfg = config(codec=codec, level=level, order=order, max_targets=None, clip_bytes="never")
    scored = zipfit.score(rows(TEXTS), fitted(cfg), cfg)
    expected = [slow_score(utf8(x), [utf8(t) for t in TARGETS], SIZES[codec, level], order) for x in TEXTS]
    np.testing.assert_allclose(scored["score"][:, 0], expected, rtol=0, atol=1e-14)
    assert scored["reason"].tolist() == ["without text"] * 2 + [""] * (len(TEXTS) - 2)
    assert "score_se" not in scored and not scored["clipped"].any()


PIECES = st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.sampled_from([b"the cat", b" sat on ", b"\x00", b"ab"]).flatmap(lambda s: st.integers(0, 90).map(lambda n: s * n)),
        st.integers(0, 2**32).map(lambda seed: np.random.default_rng(seed).integers(0, 3, 500, np.uint8).tobytes()),
    ),
    max_size=8,
).map(b"".join)


@settings(max_examples=120, deadline=None)
@given(first=PIECES, second=PIECES, level=st.sampled_from(LEVELS))
def test_counted_sizes_are_zlibs(first, second, level):
    seconds = [second, b"", second + first, first, second[:5]]
    texts = pack(seconds)
    counted = PairSizer(level).sizes(np.frombuffer(first, np.uint8), texts.data, texts.offsets)
    assert counted.tolist() == [len(zlib.compress(first + text, level)) - 6 for text in seconds]


@pytest.mark.parametrize("level", LEVELS)
def test_counted_sizes_of_blocks_and_windows(level):
    """Several blocks, stored blocks, matches as far back as they go, and tables that are clean again after each text."""
    random = np.random.default_rng(level)
    noise = random.integers(0, 256, 36_000, np.uint8).tobytes()
    few = random.integers(0, 12, 40_000, np.uint8).tobytes()
    far = noise[:400]
    sizer = PairSizer(level)
    assert agrees(level)
    for first in (noise, few, far + few[:32_000], few[:16_383], b"a" * 30_000, b""):
        seconds = pack([far, few[:20_000], noise[:9000], b"a" * 600, few[-300:]])
        counted = sizer.sizes(np.frombuffer(first, np.uint8), seconds.data, seconds.offsets)
        assert counted.tolist() == [len(zlib.compress(first + bytes(text), level)) - 6 for text in seconds.pieces()]


@pytest.mark.parametrize("level", [0, 1, 6, 9])
def test_long_pairs_are_continued_and_equal(level):
    random = np.random.default_rng(0)
    first = " ".join(WORDS[int(i)] for i in random.integers(0, len(WORDS), 40_000)).encode()
    codec = Codec("zlib", level)
    seconds = [b"", first[-9000:], first[:70_000], b"z" * 40]
    for x in (first, first[: LONGEST - 100], b""):
        assert codec.pairs(x, pack(seconds)).tolist() == [len(gzip.compress(x + t, level)) for t in seconds]


def test_without_counting_the_sizes_are_the_same(monkeypatch):
    texts = pack([utf8(t) for t in TARGETS])
    counted = Codec("zlib", 6)
    monkeypatch.setattr("data_pipelines.deflate_size.agrees", lambda level: False)
    plain = Codec("zlib", 6)
    assert counted.counts and not plain.counts
    for text in TEXTS:
        assert counted.pairs(utf8(text), texts).tolist() == plain.pairs(utf8(text), texts).tolist()


def test_a_fork_of_zlib_is_noticed(monkeypatch):
    agrees.cache_clear()
    real = zlib.compress
    monkeypatch.setattr("data_pipelines.deflate_size.zlib.compress", lambda text, level: real(text, max(1, level - 3)))
    try:
        assert not agrees(6)
    finally:
        monkeypatch.undo()
        agrees.cache_clear()
    assert agrees(6)


REFUSED = [("lz4", 1), ("lz4", 2), ("lz4", 13), ("zstd", 0), ("zstd", 23), ("zlib", 10), ("zlib", -1), ("isal", 4), ("libdeflate", 0)]


@pytest.mark.parametrize(("codec", "level"), REFUSED)
def test_levels_that_a_library_ignores_are_refused(codec, level):
    with pytest.raises(ConfigError, match=f"no level {level}"):
        Codec(codec, level)
    with pytest.raises(ValueError, match=f"no level {level}"):
        config(codec=codec, level=level)


def test_refused_levels_are_indeed_ignored():
    import lz4.frame
    import zstandard

    text = utf8(TEXTS[9]) * 3
    assert len({len(lz4.frame.compress(text, compression_level=level)) for level in (0, 1, 2)}) == 1
    assert zstandard.ZstdCompressor(level=0).compress(text) == zstandard.ZstdCompressor(level=3).compress(text)


def test_a_codec_that_is_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lz4.frame", None)
    with pytest.raises(ConfigError, match=r"posttrain\[select\]"):
        Codec("lz4", 0)


def test_only_the_presets_default_to_other_bytes():
    for name, codec, level in (("zipfit-1.0.9", "zlib", 0), ("zipfit-paper", "zlib", 9), ("zipfit-head", "lz4", 0)):
        cfg = config(preset=name)
        assert (cfg.measure, cfg.codec, cfg.level, cfg.order) == ("ncd", codec, level, "source_first")
        assert cfg.max_targets is None and zipfit.clip_of(cfg) > 1 << 40
    assert config(preset="zipfit-paper", level=6).level == 6
    with pytest.raises(ValueError, match="unknown `zipfit-2`"):
        config(preset="zipfit-2")


@pytest.mark.parametrize("shards", [1, 2, 7])
def test_a_subset_of_targets_is_exact_over_shards_and_orders(shards):
    texts = [" ".join(WORDS[i : i + 30 + i % 7]) for i in range(0, 600, 3)] + ["twice", "twice"]
    cfg = config(measure="ncd", codec="lz4", max_targets=37)
    data = rows(texts, "t")
    keyed = sorted((zipfit._order_hash(row["id"], "target", 0), utf8(row["text"])) for row in data)
    expected = [text for _, text in keyed[:37]]
    for listed in (data, data[::-1]):
        parts = [zipfit.fit_shard(listed[i::shards], cfg, "target") for i in range(shards)]
        state = zipfit.merge([zipfit.fit_shard(rows(TEXTS), cfg, "raw")], [parts], cfg)
        assert [bytes(piece) for piece in codecs.Texts(state["data"], state["offsets"]).pieces()] == expected
        assert state["seen"].tolist() == [len(texts)]
    smaller = config(measure="ncd", codec="lz4", max_targets=12)
    assert fitted(smaller, targets=texts)["data"].tobytes() == b"".join(expected[:12])
    other = config(measure="ncd", codec="lz4", max_targets=37, target_seed=1)
    assert fitted(other, targets=texts)["data"].tobytes() != b"".join(expected)


def test_the_standard_error_is_that_of_the_mean():
    texts = [" ".join(WORDS[i : i + 20]) for i in range(0, 400, 4)]
    cfg, whole = (config(measure="ncd", codec="lz4", max_targets=m) for m in (25, None))
    state = fitted(cfg, targets=texts)
    kept = [bytes(piece) for piece in codecs.Texts(state["data"], state["offsets"]).pieces()]
    size = SIZES["lz4", 0]
    x = utf8(TEXTS[9])
    each = np.array([slow_score(x, [t], size) for t in kept])
    scored = zipfit.score(rows([TEXTS[9]]), state, cfg)
    assert scored["score_se"][0] == pytest.approx(each.std(ddof=1) * math.sqrt((1 - 25 / 100) / 25), rel=1e-12)
    exact = zipfit.score(rows(TEXTS[5:]), fitted(whole, targets=texts), whole)["score"][:, 0]
    subset = zipfit.score(rows(TEXTS[5:]), state, cfg)
    assert (np.abs(subset["score"][:, 0] - exact) < 4 * subset["score_se"]).all()


def test_separate_targets_are_scored_apart():
    cfg = config(targets="separate", measure="ncd", codec="zlib", level=6, max_targets=None)
    sets = [[TARGETS[0], "one more"], TARGETS[1:]]
    fit = [[zipfit.fit_shard(rows(texts, f"t{k}"), cfg, "target")] for k, texts in enumerate(sets)]
    scored = zipfit.score(rows(TEXTS), zipfit.merge([zipfit.fit_shard(rows(TEXTS), cfg, "raw")], fit, cfg), cfg)
    size = lambda s: len(gzip.compress(s, 6))  # noqa: E731
    expected = [[slow_score(utf8(x), [utf8(t) for t in texts], size) for texts in sets] for x in TEXTS]
    np.testing.assert_allclose(scored["score"], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("codec", "level"), [("zstd", 3), ("zlib", 6)])
def test_the_dictionary_measure_is_its_formula(codec, level):
    cfg = config(measure="dictionary", codec=codec, level=level, max_targets=None)
    state = fitted(cfg)
    data = state["data"].tobytes()
    scored = zipfit.score(rows(TEXTS), state, cfg)["score"][:, 0]
    for text, got in zip(map(utf8, TEXTS), scored, strict=True):
        if codec == "zstd":
            import zstandard

            known = zstandard.ZstdCompressionDict(data, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
            alone, given_it = SIZES["zstd", 3](text), len(zstandard.ZstdCompressor(level=3, dict_data=known).compress(text))
        else:
            stream = zlib.compressobj(6, zlib.DEFLATED, -15, zdict=data)
            alone, given_it = len(gzip.compress(text, 6)), 18 + len(stream.compress(text) + stream.flush())
        assert got == 1 - given_it / alone
    near, far = zipfit.score(rows([TARGETS[0], "".join(map(chr, range(200, 700)))]), state, cfg)["score"][:, 0]
    assert near > 0.8 and far < 0.1


@pytest.mark.parametrize("fields", [{"codec": "lz4"}, {"codec": "zlib", "level": 0}, {"codec": "isal"}])
def test_dictionaries_need_a_codec_that_has_them(fields):
    with pytest.raises(ValueError, match="dictionary needs codec"):
        config(measure="dictionary", **fields)
    with pytest.raises(ConfigError, match="no dictionary"):
        Dictionary(Codec(fields["codec"], fields.get("level")), pack([b"a"]))


def test_long_rows_are_clipped_to_the_window_and_counted():
    cfg = config(measure="ncd", codec="zlib", level=6)
    long = " ".join(WORDS * 9)
    clip = zipfit.clip_of(cfg)
    assert clip * 2 <= 32_768 - 262
    state = fitted(cfg, raw=[long, "short"], targets=[long, TARGETS[0]])
    scored = zipfit.score(rows([long, "short"]), state, cfg)
    assert scored["clipped"].tolist() == [len(utf8(long)) - clip, 0]
    texts = [utf8(t)[:clip] for t in (long, TARGETS[0])]
    assert scored["score"][0, 0] == pytest.approx(slow_score(texts[0], texts, lambda s: len(gzip.compress(s, 6))), abs=1e-14)
    facts = zipfit.report(state, [zipfit.fit_shard(rows([long]), cfg, "picked")], cfg)
    assert (facts["clipped_raw"], facts["clipped_targets"], facts["clipped_picked"]) == (1, 1, 1)
    own = zipfit.score(rows([long]), fitted(config(clip_bytes=10)), config(clip_bytes=10))
    assert own["clipped"].tolist() == [len(utf8(long)) - 10]


def test_a_row_of_forty_megabytes():
    """Clipped by default; whole under a preset, where zlib's state is kept instead of its output."""
    huge = {"id": "huge", "text": " ".join(WORDS) * (40_000_000 // len(" ".join(WORDS)))}
    clipped = config(measure="ncd", codec="zlib", level=1)
    scored = zipfit.score([huge], fitted(clipped), clipped)
    assert scored["clipped"][0] > 39_000_000 and np.isfinite(scored["score"]).all()
    import tracemalloc

    text = huge["text"].encode()
    tracemalloc.start()
    size = Codec("zlib", 1).pairs(text, pack([b"", b"more"]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size[0] < size[1] < len(text) and peak < 8_000_000


def test_another_build_of_the_compressor_is_refused():
    cfg = config(measure="ncd", codec="zlib", level=6)
    part, state = zipfit.fit_shard(rows(TARGETS), cfg, "target"), fitted(cfg)
    other = np.frombuffer(b"zlib 6: zlib 1.3.1.zlib-ng 0123456789ab", np.uint8)
    raw = zipfit.fit_shard(rows(TEXTS), cfg, "raw")
    with pytest.raises(ConfigError, match=r"zlib-ng.*this process has zlib 6: zlib"):
        zipfit.merge([raw], [[part, {**part, "build": other}]], cfg)
    with pytest.raises(ConfigError, match="zlib-ng"):
        zipfit.merge([{**raw, "build": other}], [[part]], cfg)
    with pytest.raises(ConfigError, match="different builds"):
        zipfit.score(rows(TEXTS), {**state, "build": other}, cfg)


def test_a_build_tells_levels_and_codecs_apart():
    builds = {Codec(name, level).build for name, level in SIZES}
    assert len(builds) == len(SIZES)
    assert Codec("zlib", 9).build.startswith(f"zlib 9: zlib {zlib.ZLIB_RUNTIME_VERSION} ")


def test_targets_without_text_are_refused():
    cfg = config()
    with pytest.raises(DataError, match="no text"):
        fitted(cfg, targets=["", ""])
    assert np.isfinite(zipfit.score(rows(TEXTS), fitted(cfg, raw=[]), cfg)["score"]).all()


def test_the_report_says_how_length_decides():
    random = np.random.default_rng(0)
    texts = [" ".join(WORDS[a : a + n]) for a, n in zip(random.integers(0, 800, 120), random.integers(5, 300, 120), strict=True)]
    cfg = config(preset="zipfit-1.0.9")
    state = fitted(cfg, raw=texts, targets=["word"])
    score = zipfit.score(rows(texts), state, cfg)["score"][:, 0]
    expected = spearmanr(score, [len(utf8(t)) for t in texts])[0]
    facts = zipfit.report(state, [zipfit.fit_shard(rows(texts[:9]), cfg, "picked")], cfg)
    assert facts["length_rho"] == pytest.approx(expected, abs=1e-12) and expected < -0.99
    assert "by length alone" in facts["warning"]
    paper = config(preset="zipfit-paper")
    rho = zipfit.report({**state, "length_rho": np.array([-0.83])}, [], paper)
    assert "give the budget in tokens" in rho["warning"]
    tokens = config(preset="zipfit-paper", budget={"tokens": 5})
    assert "warning" not in zipfit.report({**state, "length_rho": np.array([-0.83])}, [], tokens)


def test_medians_of_the_histogram():
    for size in [*range(200), 1000, 4095, 4096, 10**6, 10**9]:
        number = zipfit.length_bin(size)
        low, high = zipfit._length_of(number), zipfit._length_of(number + 1)
        assert low <= size < high and high - low <= max(1, size / 16)


class Tables:
    """Scored rows as the passes give them."""

    def __init__(self, columns, cut):
        self.columns, self.cut = columns, cut

    def batches(self):
        for part in np.array_split(np.arange(len(self.columns["row"])), self.cut):
            yield {name: values[part] for name, values in self.columns.items()}

    def target_features(self):
        return []


@pytest.mark.parametrize("cut", [1, 5])
def test_length_bins_give_each_length_its_share(cut):
    random = np.random.default_rng(3)
    size = random.integers(1, 5000, 1000)
    columns = {
        "shard": np.repeat([0, 1], 500), "row": np.tile(np.arange(500), 2), "uid": np.arange(1000, dtype=np.uint64), "bytes": size,
        "score": np.round(-size / 5000 + random.normal(0, 0.1, 1000), 2),
    }  # fmt: skip
    ranking = zipfit_bins.rank(Tables(columns, cut), {}, config(length_bins=10), 0)
    assert ranking.facts == {"length_bins": 10}
    assert ranking.shard.tolist() == columns["shard"].tolist() and ranking.row.tolist() == columns["row"].tolist()
    best = np.argsort(-ranking.key, kind="stable")[:200]
    edges = np.quantile(size, np.linspace(0, 1, 11)[1:-1], method="lower")
    assert np.abs(np.bincount(np.searchsorted(edges, size[best], side="right"), minlength=10) - 20).max() <= 1
    group = np.searchsorted(edges, size, side="right")
    for number in range(10):
        inside = np.flatnonzero(group == number)
        order = sorted(inside, key=lambda i: (-columns["score"][i], i))
        assert [ranking.key[i] for i in order] == sorted(ranking.key[inside], reverse=True)


def test_one_length_is_one_bin():
    columns = {
        "shard": np.zeros(6, np.int64),
        "row": np.arange(6),
        "uid": np.arange(6, dtype=np.uint64),
        "bytes": np.full(6, 7),
        "score": np.arange(6.0),
    }
    ranking = zipfit_bins.rank(Tables(columns, 2), {}, config(length_bins=4), 0)
    assert np.argsort(-ranking.key).tolist() == [5, 4, 3, 2, 1, 0] and ranking.facts == {"length_bins": 1}


def write(path: Path, data) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in data), encoding="utf-8")
    return path


@pytest.mark.parametrize("fields", [{}, {"codec": "zlib", "measure": "ncd", "max_targets": 9}, {"measure": "dictionary", "codec": "zstd"}])
def test_shards_and_order_never_change_the_pick(tmp_path, fields):
    random = np.random.default_rng(5)
    data = [{"id": f"r{i}", "text": " ".join(WORDS[a : a + 40])} for i, a in enumerate(random.integers(0, 900, 90))]
    target = write(tmp_path / "t.jsonl", [{"text": " ".join(WORDS[a : a + 30])} for a in range(0, 300, 15)])
    ids = []
    for number, (shards, listed) in enumerate([(1, data), (4, data), (3, data[::-1])]):
        raw = tmp_path / f"raw{number}"
        raw.mkdir()
        for i in range(shards):
            write(raw / f"{i}.jsonl", listed[i::shards])
        summary = zipfit.select(raw, target, tmp_path / f"o{number}", rows=20, suffix=".jsonl", **fields)
        assert summary["rows_out"] == 20 and summary["targets"] == (9 if "max_targets" in fields else 20)
        picked = [json.loads(line) for file in sorted((tmp_path / f"o{number}").glob("rows-*")) for line in file.read_text().splitlines()]
        ids.append(sorted((row["id"], row["score"]) for row in picked))
    assert ids[0] == ids[1] == ids[2]


def test_c88_rows_without_text_cannot_win(tmp_path):
    target = write(tmp_path / "t.jsonl", [{"text": "rivers and bridges"}])
    summary = zipfit.select(CASES / "C88-empty-texts.jsonl", target, tmp_path / "o", rows=9)
    assert summary["not_eligible"] == {"without text": 3} and summary["rows_out"] == summary["eligible"]


def test_c49_surrogates_are_refused_by_row_or_skipped(tmp_path):
    target = write(tmp_path / "t.jsonl", [{"text": "some words"}])
    with pytest.raises(DataError, match=r"C49-surrogates.jsonl:\d+"):
        zipfit.select(CASES / "C49-surrogates.jsonl", target, tmp_path / "a", rows=1)
    assert zipfit.select(CASES / "C49-surrogates.jsonl", target, tmp_path / "b", rows=1, on_bad="skip")["rows_out"] == 1


def test_length_bins_through_the_passes(tmp_path):
    raw = write(tmp_path / "r.jsonl", [{"id": f"r{i}", "text": " ".join(WORDS[i : i + 5 + i % 50])} for i in range(200)])
    target = write(tmp_path / "t.jsonl", [{"text": " ".join(WORDS[50:90])}])
    summary = zipfit.select(raw, target, tmp_path / "o", rows=40, length_bins=4)
    assert summary["rows_out"] == 40


def test_the_stage_module_is_light():
    code = "import sys, data_pipelines.zipfit; print([m for m in ('numpy', 'numba', 'scipy', 'lz4', 'torch') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"

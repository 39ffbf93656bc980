"""The labelled corpus of the selector benchmarks: disjoint, seeded, and honest about where its text came from."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
import zstandard
from benchmark_kit import load

corpus = load("_corpus")


def _prose(name: str, words: int) -> str:
    return " ".join(f"{name}{i % 37}" for i in range(words))


def _python(name: str, count: int) -> str:
    """A module of `count` documented functions with long bodies."""
    parts = [f'"""{_prose(name, 20)}"""']
    for i in range(count):
        body = "".join(f"    x{j} = {name}(x, {i}, {j})\n" for j in range(30))
        parts.append(f'def f{i}(x):\n    """{_prose(f"{name}{i}doc", 120)}"""\n{body}    return x\n')
    return "\n".join(parts)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library, packages and documents of known content in place of this machine's."""
    site, library, doc, man = (tmp_path / name for name in ("site", "library", "doc", "man"))
    for folder, names in ((site, ("alpha", "beta", "posttrain", "gamma")), (library, ("json", "test"))):
        for name in names:
            (folder / name).mkdir(parents=True)
            (folder / name / "mod.py").write_text(_python(f"{folder.name}{name}", 6))
    (site / "alpha" / "broken.py").write_text("def (")
    (site / "alpha" / "a.h").write_text(_prose("header", 900))
    (site / "alpha-1.dist-info").mkdir()
    (site / "alpha-1.dist-info" / "LICENSE").write_text(_prose("licence", 300))
    (doc / "pkg").mkdir(parents=True)
    (doc / "pkg" / "changelog.gz").write_bytes(gzip.compress(_prose("change", 500).encode()))
    (doc / "pkg" / "copyright").write_text(_prose("copyright", 90))
    (man / "man1").mkdir(parents=True)
    (man / "man1" / "tool.1.gz").write_bytes(gzip.compress(_prose("roff", 250).encode()))
    monkeypatch.setattr(corpus, "_site", lambda: site)
    monkeypatch.setattr(corpus, "_library", lambda: library)
    monkeypatch.setattr(corpus, "DOC", doc)
    monkeypatch.setattr(corpus, "MAN", man)
    corpus._files.cache_clear()
    yield tmp_path
    corpus._files.cache_clear()


SIZES = {"docstring": 12, "code": 5, "copyright": 1, "man": 1, "changelog": 1, "header": 1, "salad": 4, "target": 3, "heldout": 3}


def test_labels_sources_and_split(machine: Path) -> None:
    found = corpus.build(3, SIZES)
    counts = Counter(row["label"] for row in found.raw)
    assert counts == {name: size for name, size in SIZES.items() if name not in ("target", "heldout")}
    assert found.sources["copyright"] == {"licence files of site-packages": 1}
    assert found.sources["changelog"] == {"/usr/share/doc": 1}
    assert len(found.target) == len(found.heldout) == 3
    assert all("libraryjson" in row["text"] for row in found.target + found.heldout)
    everything = [row["text"] for row in found.raw + found.target + found.heldout]
    assert len(set(everything)) == len(everything)
    assert not any("siteposttrain" in text or "librarytest" in text for text in everything)
    docs, code = ([row["text"] for row in found.raw if row["label"] == label] for label in ("docstring", "code"))
    assert all("doc" in text and "= " not in text for text in docs)
    assert all(text.startswith("def ") and "doc" not in text for text in code)


def test_a_seed_is_a_draw_and_salad_is_made_of_the_target(machine: Path) -> None:
    one, again, other = corpus.build(0, SIZES), corpus.build(0, SIZES), corpus.build(1, SIZES)
    assert one == again
    assert [row["id"] for row in one.raw] != [row["id"] for row in other.raw]
    words = {word for row in one.target for word in row["text"].split()}
    salad = [row for row in one.raw if row["label"] == "salad"]
    assert all(set(row["text"].split()) <= words and 100 <= len(row["text"].split()) <= 400 for row in salad)
    assert len(one.without("salad").raw) == len(one.raw) - 4


def test_cache_and_shards_hold_the_same_rows(machine: Path) -> None:
    made = corpus.build(0, SIZES, cache=machine / "cache")
    assert corpus.build(0, SIZES, cache=machine / "cache") == made
    assert len(list((machine / "cache").iterdir())) == 1
    files = corpus.write(machine / "shards", made, shards=3)
    assert [path.name for path in files["raw"]] == [f"raw-{i:04d}.jsonl.zst" for i in range(3)]
    text = b"".join(zstandard.ZstdDecompressor().decompress(path.read_bytes()) for path in files["raw"])
    assert [json.loads(line) for line in text.splitlines()] == made.raw


def test_chunks_have_100_to_400_words_and_lose_only_the_rest(machine: Path) -> None:
    text = _prose("w", 950)
    found = corpus.chunks(text)
    assert [len(chunk.split()) for chunk in found] == [400, 400, 150]
    assert " ".join(found) == text
    assert [len(chunk.split()) for chunk in corpus.chunks(_prose("w", 899))] == [400, 400]
    with pytest.raises(RuntimeError, match="this machine has"):
        corpus.texts(1)
    assert sum(len(text.encode()) for text in corpus.texts(0.01)) >= 10_000


def test_a_label_without_any_source_is_an_error(machine: Path) -> None:
    (machine / "man" / "man1" / "tool.1.gz").unlink()
    corpus._files.cache_clear()
    with pytest.raises(RuntimeError, match="`man`"):
        corpus.build(0, SIZES)

"""Paths and model ids: one rule of expansion, in path fields only."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.config.paths import expand_model_id, expand_path, is_hub_id, is_local

BASE = Path("/base/dir")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("x.jsonl", "/base/dir/x.jsonl"),
        ("../d/x.jsonl", "/base/d/x.jsonl"),
        ("./a/./b//c", "/base/dir/a/b/c"),
        ("/abs/x", "/abs/x"),
        ("~/x.jsonl", "/home/u/x.jsonl"),
        ("~", "/home/u"),
        ("${HOME}/x.jsonl", "/home/u/x.jsonl"),
        ("${UNSET:-./d}/x.jsonl", "/base/dir/d/x.jsonl"),
        ("${EMPTY:-e}/x", "/base/dir/e/x"),
        ("${UNSET:-~/d}/x", "/home/u/d/x"),
        ("a/${HOME_NAME}.jsonl", "/base/dir/a/n m.jsonl"),
        ("part[0-9]%.jsonl", "/base/dir/part[0-9]%.jsonl"),
        ("price$5 (é).txt", "/base/dir/price$5 (é).txt"),
        ("a~b", "/base/dir/a~b"),
    ],
)
def test_expansion(written: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HOME": "/home/u", "EMPTY": "", "HOME_NAME": "n m"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("UNSET", raising=False)
    assert expand_path(written, BASE) == meant


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("$DATA/x", r"write `\$\{DATA\}`"),
        ("${UNSET}/x", "`UNSET` is not set"),
        ("${EMPTY}/x", "`EMPTY` is empty"),
        ("${UNSET:-}/x", "`UNSET` is not set"),
        ("${a b}/x", "is not a variable"),
        ("${x", "without a closing brace"),
        ("${MY_API_KEY}/x", "may hold a secret"),
        ("${HF_TOKEN:-d}/x", "may hold a secret"),
        ("~other/x", "your own home"),
        ("s3://b/x", "not a local path"),
        ("file:///x", "not a local path"),
        ("C:\\data\\new", "Windows path"),
        ("a\0b", "NUL"),
        ("  ", "is empty"),
    ],
)
def test_refusals(written: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("MY_API_KEY", "k")
    monkeypatch.delenv("UNSET", raising=False)
    with pytest.raises(ValueError, match=words):
        expand_path(written, BASE)


@pytest.mark.parametrize("written", ["/a/$DATA/x", "/a/${X}/b", "/a/~b", "/x"])
def test_a_resolved_path_is_taken_as_it_is(written: str) -> None:
    assert expand_path(written, None) == written


def test_a_relative_path_without_a_base_stays_relative() -> None:
    assert expand_path("a/b", None) == "a/b"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("owner/name", "owner/name"),
        ("a-b.c/D_e.1-GGUF", "a-b.c/D_e.1-GGUF"),
        ("./tiny", "/base/dir/tiny"),
        ("..", "/base"),
        ("/m", "/m"),
        ("package:some_package/models/x.gguf", "package:some_package/models/x.gguf"),
    ],
)
def test_model_ids(written: str, meant: str) -> None:
    assert expand_model_id(written, BASE) == meant


@pytest.mark.parametrize(
    "written", ["gpt2", "a/b/c", "models/x.gguf", "package:x", "package:x/../y", "https://h.co/a/b", "$M/x", "a b/c", "-a/b"]
)
def test_model_ids_refused(written: str) -> None:
    with pytest.raises(ValueError):
        expand_model_id(written, BASE)


def test_kinds_of_id() -> None:
    assert is_hub_id("a/b") and not is_hub_id("./a/b") and not is_hub_id("package:a/b") and not is_hub_id("a/b.gguf")
    assert is_local("./a") and is_local("~/a") and not is_local("a/b")

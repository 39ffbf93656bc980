"""YAML reading: scalars by the narrowed 1.2 rules, marks, merge keys, and a fuzz that only ConfigError comes out."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from testonly_methods import BASE, METHODS, hide

from posttrain.config.load import MAX_NODES, load_yaml, mark_of, parse_value, parse_yaml, scalar
from posttrain.config.pipeline import override_tree, parse_pipeline
from posttrain.core import registry
from posttrain.errors import ConfigError

hide()
FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1e-5", 1e-5), ("1E-2", 0.01), ("1.0e-5", 1e-5), (".03", 0.03), ("1.", 1.0), ("1e5", 1e5), ("-2.5e+3", -2500.0), ("0.1", 0.1)),
        *(("0", 0), ("-0", 0), ("12", 12), ("+3", 3), ("0x1F", 31), ("0o17", 15)),
        *(("true", True), ("False", False), ("null", None), ("~", None), ("", None)),
        *(
            (t, t)
            for t in (
                "on",
                "off",
                "yes",
                "No",
                "y",
                "n",
                "010",
                "1_000",
                "1:30",
                "2024-01-01",
                "12e4567",
                "1e400",
                "0b1",
                "0755.5",
                "e5",
                ".",
            )
        ),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    found = scalar(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", [".nan", ".inf", "-.INF", ".NaN"])
def test_non_finite_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a finite number"):
        parse_yaml(f"a: {text}")


def test_digits_without_end_are_text() -> None:
    digits = "9" * 5000
    assert parse_yaml(f"a: {digits}").tree["a"] == digits


def test_quoted_and_block_scalars_are_text() -> None:
    tree = parse_yaml("a: '1'\nb: \"true\"\nc: |\n  5\nd: !!str 7\ne: ! 8\n'1': x\nno: y\n").tree
    assert tree == {"a": "1", "b": "true", "c": "5\n", "d": "7", "e": "8", "1": "x", "no": "y"}


def test_language_list_stays_a_list_of_texts() -> None:
    assert parse_yaml("languages: [en, no, de]").tree["languages"] == ["en", "no", "de"]


def test_merge_keys() -> None:
    tree = parse_yaml("a: &a {x: 1, y: 2}\nb: &b {y: 3, z: 4}\nc: {<<: *a, y: 9}\nd:\n  <<: [*a, *b]\n  w: 0\n").tree
    assert tree["c"] == {"x": 1, "y": 9} and tree["d"] == {"x": 1, "y": 2, "z": 4, "w": 0}


def test_aliases_are_copies() -> None:
    tree = parse_yaml("a: &a {x: [1]}\nb: *a\n").tree
    assert tree["a"] == tree["b"] and tree["a"]["x"] is not tree["b"]["x"]


def test_marks() -> None:
    document = parse_yaml("a: 1\nb:\n  - c: 1_0\n    d: 'q'\n")
    assert mark_of(document.marks, ("b", 0, "c")).raw == "1_0"
    assert mark_of(document.marks, ("b", 0, "c")).line == 3
    assert mark_of(document.marks, ("b", 0, "d")).quoted
    assert mark_of(document.marks, ("b", 0, "gone")).line == 3
    assert mark_of(document.marks, ("nowhere",)) is None


def test_a_byte_order_mark_and_windows_lines_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbfversion: 1\r\nname: caf\xc3\xa9\r\n")
    assert load_yaml(path).tree == {"version": 1, "name": "café"}


def test_emoji_and_long_lists_within_the_limit() -> None:
    assert parse_yaml('a: "\\U0001F600"\nb: 😀').tree == {"a": "😀", "b": "😀"}
    assert len(parse_yaml("a: [" + "1, " * 5000 + "]").tree["a"]) == 5000
    with pytest.raises(ConfigError, match=str(MAX_NODES)):
        parse_yaml("a: [" + "1," * (MAX_NODES + 1) + "]")


def test_a_deep_file_is_refused_quickly() -> None:
    start = time.monotonic()
    for text in ("a: " + "[" * 100_000, "a: " + "{a: " * 50_000, "- " * 100_000):
        with pytest.raises(ConfigError):
            parse_yaml(text)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("text", ["1e-5", "[a, 1]", "{a: {b: true}}", "a text", "'1'"])
def test_values_on_the_command_line(text: str) -> None:
    assert parse_value(text) == parse_yaml(f"k: {text}").tree["k"]


def _check(refused: ConfigError) -> None:
    assert str(refused)
    assert all(p.path and p.message for p in refused.problems)


def _only_config_error(text: str, base: Path) -> None:
    try:
        parse_pipeline(parse_yaml(text).tree, base)
    except ConfigError as refused:
        _check(refused)


@pytest.fixture(scope="module", autouse=True)
def testonly() -> Any:
    """The test-only methods, for this module."""
    registry.methods()
    registry._METHODS.update(METHODS)
    yield
    hide()


@FUZZ
@given(st.text(max_size=200))
def test_fuzz_any_text(text: str) -> None:
    _only_config_error(text, Path("/base"))


@FUZZ
@given(st.text(alphabet="ab:-[]{}&*!|>'\"%@`#,? \n\t~<.0", max_size=60))
def test_fuzz_yaml_like_text(text: str) -> None:
    _only_config_error(text, Path("/base"))


@FUZZ
@given(st.integers(0, len(BASE)), st.integers(0, 12), st.text(alphabet="ab:-[]{}&*!|'\"$ \n\t~.01eé😀\x00", max_size=6))
def test_fuzz_edited_base(at: int, gone: int, new: str) -> None:
    _only_config_error(BASE[:at] + new + BASE[at + gone :], Path("/base"))


@FUZZ
@given(st.binary(max_size=120))
def test_fuzz_bytes(data: bytes) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        file.write(data)
        file.flush()
        try:
            load_yaml(file.name)
        except ConfigError as refused:
            _check(refused)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([10**400, -(10**30), "", "~", "$x", "${a", "a:b", "x" * 300])
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["id", "from", "kind", "path", "lr", "x", "best", "data", ""]), inner, max_size=3)
    ),
    max_leaves=6,
)
PLACES = [
    *(
        "version",
        "name",
        "seed",
        "model",
        "sources",
        "eval",
        "tracking",
        "limits",
        "stages",
        "model.id",
        "model.revision",
        "sources.chat",
        "sources.chat.path",
    ),
    *(
        "sources.chat.columns",
        "eval.sets",
        "eval.sets.tasks-val",
        "eval.sets.tasks-val.from",
        "eval.when",
        "stages.sft",
        "stages.sft.name",
        "stages.sft.method",
    ),
    *(
        "stages.sft.in",
        "stages.sft.in.data",
        "stages.sft.optim",
        "stages.sft.optim.lr",
        "stages.sft.launch",
        "stages.sft.trl",
        "stages.rl.commit.best",
        "stages.rl.rewards",
    ),
    *(
        "stages.sft.data.template",
        "stages.small.bits",
        "stages.small.eval.sets",
        "stages.picked.rows",
        "stages.sft.in.data.1",
        "limits.disk_gb",
    ),
]


@settings(FUZZ, max_examples=300)
@given(st.sampled_from(PLACES), VALUES)
def test_fuzz_values(place: str, value: Any) -> None:
    tree = yaml.safe_load(BASE)
    tree["stages"][1]["optim"]["lr"] = 1e-5
    at, keys = tree, place.split(".")
    for key in keys[:-1]:
        at = (
            next(s for s in at if s["name"] == key)
            if isinstance(at, list) and not key.isdigit()
            else at[int(key)]
            if isinstance(at, list)
            else at.setdefault(key, {})
        )
    last = keys[-1]
    if isinstance(at, list):
        at[next(n for n, s in enumerate(at) if s.get("name") == last) if not last.isdigit() else int(last)] = value
    else:
        at[last] = value
    try:
        pipeline = parse_pipeline(tree, Path("/base"))
        json.dumps(pipeline.dump(), allow_nan=False)
    except ConfigError as refused:
        _check(refused)


@FUZZ
@given(st.text(max_size=40), st.text(max_size=20))
def test_fuzz_overrides(key: str, value: str) -> None:
    for item in (f"{key}={value}", f"stages.sft.{key}={value}", f"model.{key}={value}", value):
        try:
            override_tree(parse_yaml(BASE).tree, [item])
        except ConfigError as refused:
            _check(refused)

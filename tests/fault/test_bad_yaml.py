"""Bad pipeline files: each ends with exit code 2, a dotted path or a line, a way to mend it, and no traceback."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from testonly_methods import BASE, METHODS, hide

from posttrain.cli import main
from posttrain.config.pipeline import load_pipeline
from posttrain.core import registry
from posttrain.errors import ConfigError, format_error

hide()
FILES = sorted((Path(__file__).parent.parent / "cases" / "bad_yaml").glob("*.yaml"))
BINARY = {"C99-utf16": (":1:1", "UTF-16")}

MUTATIONS = [
    ("version: 1", "version: 2", "version", "write 1"),
    ("version: 1", "version: '1'", "version", "got the text '1'"),
    ("version: 1\n", "", "version", "is required"),
    ("name: base", "name: 12", "name", "quote it: '12'"),
    ("name: base", "name: ''", "name", "at least 1 character"),
    ("name: base", "name:", "name", "got nothing"),
    ("seed: 3", "seed: 010", "seed", "write 10"),
    ("seed: 3", "seed: 3.0", "seed", "write 3"),
    ("seed: 3", "seed: -1", "seed", "at least 0"),
    ("seed: 3", "seed: 99999999999999999999", "seed", "less than 4294967296"),
    ("seed: 3", "sead: 3", "sead", "did you mean `seed`?"),
    ("seed: 3", "steps: 3", "steps", "`steps` belongs inside a stage"),
    ("{id: ./tiny}", "{id: gpt2}", "model.id", "write `./gpt2`"),
    ("{id: ./tiny}", "{id: owner/name}", "model.revision", "needs a revision"),
    ("{id: ./tiny}", "{id: owner/name, revision: main}", "model.revision", "40 hex digits"),
    ("{id: ./tiny}", "{id: owner/name, revision: 1234567}", "model.revision", "quote it: '1234567'"),
    ("{id: ./tiny}", "{id: owner/name, revision: 12e4567}", "model.revision", "40 hex digits"),
    ("{id: ./tiny}", "{id: 's3://bucket/m'}", "model.id", "not a local path"),
    ("{id: ./tiny}", "{id: 'package:../x'}", "model.id", "package:NAME/FILE"),
    ("{id: ./tiny}", "{id: ./tiny, dtype: fp16}", "model.dtype", "did you mean `float16`?"),
    ("{id: ./tiny}", "./tiny", "model", "keys: id, revision"),
    ("{id: ./tiny}", "{id: '${POSTTRAIN_UNSET}/m'}", "model.id", "`POSTTRAIN_UNSET` is not set"),
    ("{id: ./tiny}", "{id: '~nobody/m'}", "model.id", "your own home"),
    ("{id: ./tiny}", "{id: '${HF_TOKEN}/m'}", "model.id", "secret"),
    ("model: {id: ./tiny}\n", "", "stages.sft.in.model", "set `model.id`"),
    ("kind: messages", "kind: mesages", "sources.chat.kind", "did you mean `messages`?"),
    ("path: data/d.jsonl, ", "", "sources.chat", "exactly one of `path`"),
    ("path: data/d.jsonl", "path: $DATA/d.jsonl", "sources.chat.path", "write `${DATA}`"),
    ("path: data/d.jsonl", "path: 5", "sources.chat.path", "expected text or a list, got 5"),
    ("path: data/d.jsonl", "path: [a, 5]", "sources.chat.path.1", "quote it: '5'"),
    ("path: data/d.jsonl", "hub: a/b", "sources.chat", "full 40-hex commit"),
    ("  chat:", "  Chat:", "sources.Chat", "write `chat`"),
    ("answer: final", "answers: final", "sources.tasks.answers", "did you mean `answer`?"),
    ("validation: 0.1}}\n  tasks", "validation: 10%}}\n  tasks", "sources.chat.split.validation", "write a number"),
    ("test: 0.1}", "test: 0.95}", "sources.tasks.split", "leaves nothing to train on"),
    ("'tasks:validation'", "tasks", "eval.sets.tasks-val.from", "write `tasks:validation`"),
    ("'tasks:validation'", "'taks:validation'", "eval.sets.tasks-val.from", "known names"),
    ("'tasks:validation'", "'tasks:valid'", "eval.sets.tasks-val.from", "did you mean `tasks:validation`?"),
    ("'tasks:validation'", "'chat:validation'", "eval.sets.tasks-val.metrics", "needs verifiable rows"),
    ("'tasks:test'", "'chat:test'", "eval.sets.tasks-test.from", "set `sources.chat.split.test`"),
    ("[loss, accuracy]", "loss", "eval.sets.tasks-val.metrics", "write [loss]"),
    ("metrics: [accuracy]", "metrics: [accuracy], reward: exat", "eval.sets.tasks-test.reward", "did you mean `exact`?"),
    ("[loss, accuracy]", "[]", "eval.sets.tasks-val.metrics", "nothing to measure"),
    ("stages:", "stage:", "stages", "rename `stage` to `stages`"),
    ("method: testonly.pick", "method: testonly.pik", "stages.picked.method", "did you mean `testonly.pick`?"),
    ("    method: testonly.pick\n", "", "stages.picked.method", "is required"),
    ("name: picked", "name: Picked Rows", "stages.Picked Rows.name", "write `picked-rows`"),
    ("name: small", "name: sft", "stages.3.name", "is also called `sft`"),
    ("name: small", "name: chat", "stages.chat.name", "a source has the same name"),
    ("name: small", "name: model", "stages.model", "pipeline's own model"),
    ("    rows: 100\n", "", "stages.picked.rows", "is required"),
    ("rows: 100", "rows: 1_000", "stages.picked.rows", "write 1000"),
    ("rows: 100", "rows: 0", "stages.picked.rows", "at least 1"),
    ("rows: 100", "rows: true", "stages.picked.rows", "got true"),
    ("{raw: chat}", "{raw: sft}", "stages.picked.in.raw", "later stage"),
    ("{raw: chat}", "{raw: chta}", "stages.picked.in.raw", "no source or earlier stage is called `chta`"),
    ("{raw: chat}", "{rwa: chat}", "stages.picked.in.rwa", "did you mean `raw`?"),
    ("{raw: chat}", "{raw: 'chat:validation'}", "stages.picked.in.raw", "held out"),
    ("{raw: chat}", "{raw: ./d.jsonl}", "stages.picked.in.raw", "declare files under `sources`"),
    ("{raw: chat}", "{raw: []}", "stages.picked.in.raw", "the list is empty"),
    ("{raw: chat}", "{raw: 3}", "stages.picked.in.raw", "expected text or a list"),
    ("{raw: chat}", "{}", "stages.picked.in.raw", "these would do: chat, tasks"),
    ("repeat: 0.5", "repaet: 0.5", "stages.sft.in.data.1.repaet", "did you mean `repeat`?"),
    ("repeat: 0.5", "share: 0.5", "stages.sft.in.data", "give every part a `share`"),
    ("repeat: 0.5", "repeat: 0.5, share: 0.5", "stages.sft.in.data.1", "not both"),
    ("[picked, {from: tasks, repeat: 0.5}]", "[{from: picked, share: 0.5}, {from: tasks, share: 0.4}]", "stages.sft.in.data", "sum to 0.9"),
    ("[picked, {", "[tasks, {", "stages.sft.in.data", "named twice"),
    ("{data: tasks}", "{data: chat}", "stages.rl.in.data", "takes verifiable rows"),
    ("{data: tasks}", "{data: sft}", "stages.rl.in.data", "is a model, but port `data`"),
    ("{data: tasks}", "{data: [tasks, chat]}", "stages.rl.in.data", "takes one input"),
    ("{data: tasks}", "{data: tasks, model: picked}", "stages.rl.in.model", "is a dataset"),
    ("steps: 10", "steps: 10\n    epochs: 1", "stages.sft", "exactly one of `steps` and `epochs`"),
    ("steps: 10", "max_steps: 10", "stages.sft.max_steps", "it is called `steps` here"),
    ("lr: 1e-5", "learning_rate: 1e-5", "stages.sft.optim.learning_rate", "`lr`"),
    ("lr: 1e-5", "lr: '1e-5'", "stages.sft.optim.lr", "write 1e-5"),
    ("lr: 1e-5", "lr: 5", "stages.sft.optim.lr", "less than 1"),
    ("lr: 1e-5", "steps: 5", "stages.sft.optim.steps", "belongs directly under `stages.sft`"),
    ("    optim: {lr: 1e-5, warmup: 0.1}", "    lr: 1e-5", "stages.sft.lr", "belongs under `stages.sft.optim`"),
    ("optim: {lr: 1e-5, warmup: 0.1}", "optim: 1e-5", "stages.sft.optim", "keys: name, lr, schedule"),
    ("    batch: {rows: 8}", "    sources: {}", "stages.sft.sources", "top level of the file"),
    ("batch: {rows: 8}", "batch: {rows: 8, tokens: 8}", "stages.sft.batch", "not both"),
    ("batch: {rows: 8}", "launch: {processes: 2}", "stages.sft.launch", "torchrun"),
    ("batch: {rows: 8}", "data: {packing: Yes}", "stages.sft.data.packing", "write true"),
    ("batch: {rows: 8}", "data: {packing: 'false'}", "stages.sft.data.packing", "write false"),
    ("batch: {rows: 8}", "data: {packing: 1}", "stages.sft.data.packing", "write true"),
    ("batch: {rows: 8}", "trl: {packing: off}", "stages.sft.trl.packing", "write false"),
    ("batch: {rows: 8}", "trl: {x: 1_0}", "stages.sft.trl.x", "write 10"),
    ("batch: {rows: 8}", "eval: {sets: [tasks-vl]}", "stages.sft.eval.sets.0", "did you mean `tasks-val`?"),
    ("group: 4", "group: 1", "stages.rl.group", "at least 2"),
    ("temperature: 0.7", "temperature: 0", "stages.rl.rollout.temperature", "greater than 0"),
    ("engine: hf", "engine: vlm", "stages.rl.rollout.engine", "did you mean `vllm`?"),
    ("metric: tasks-val.accuracy", "metric: tasks-test.accuracy", "stages.rl.commit.best.metric", "not a validation set"),
    ("metric: tasks-val.accuracy", "metric: tasks-val.perplexity", "stages.rl.commit.best.metric", "does not measure `perplexity`"),
    ("metric: tasks-val.accuracy", "metric: accuracy", "stages.rl.commit.best.metric", "SET.METRIC"),
    ("bits: 4", "bits: 5", "stages.small.bits", "one of 2, 3, 4, 8"),
    ("bits: 4", "bits: 4\n    group-size: 64", "stages.small.group-size", "write `group_size`"),
    ("bits: 4", "bits: 4\n    symmetric: no", "stages.small.symmetric", "write false"),
    ("bits: 4", "bits: 4\n    seed: -1", "stages.small.seed", "from 0"),
    ("  - name: small", "  - small", "stages", "not valid YAML"),
]


@pytest.fixture(autouse=True)
def testonly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test-only methods, for this module."""
    monkeypatch.delenv("POSTTRAIN_UNSET", raising=False)
    monkeypatch.delenv("POSTTRAIN_CASE_UNSET", raising=False)
    registry.methods()
    for name, found in METHODS.items():
        monkeypatch.setitem(registry._METHODS, name, found)
    return


def _refused(path: Path, where: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(path)]) == 2
    seen = capsys.readouterr()
    assert "Traceback" not in seen.err + seen.out
    assert where in seen.err and words in seen.err, seen.err
    assert not any(word in seen.err.lower() for word in ("pydantic", "input should be", "value error", "validation error"))


def test_there_are_enough() -> None:
    assert len(FILES) + len(MUTATIONS) >= 60


def test_the_base_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "base.yaml"
    path.write_text(BASE, encoding="utf-8")
    assert [s.name for s in load_pipeline(path).stages] == ["picked", "sft", "rl", "small"]


@pytest.mark.parametrize("case", MUTATIONS, ids=lambda c: f"{c[2]}:{c[1].strip()[:30]}")
def test_one_mistake(case: tuple[str, str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new, where, words = case
    assert old in BASE
    path = tmp_path / "bad.yaml"
    path.write_text(BASE.replace(old, new, 1), encoding="utf-8")
    _refused(path, where, words, capsys)


@pytest.mark.parametrize("case", [c for c in MUTATIONS if "not valid YAML" not in c[3]], ids=lambda c: f"{c[2]}:{c[1].strip()[:30]}")
def test_the_path_is_a_problem_of_its_own(case: tuple[str, str, str, str], tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(BASE.replace(case[0], case[1], 1), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_pipeline(path)
    assert case[2] in [p.path for p in caught.value.problems]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_bad_file(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if path.stem in BINARY:
        where, words = BINARY[path.stem]
    else:
        where, words = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# expect: ").split(" | ")
    _refused(path, where, words, capsys)


def test_all_problems_are_named_at_once() -> None:
    path = next(p for p in FILES if p.stem == "all-at-once")
    with pytest.raises(ConfigError) as caught:
        load_pipeline(path)
    found = {p.path for p in caught.value.problems}
    assert {"version", "modle", "sources.d.kind", "stages.A B.name", "stages.b.method", "stages.b.steps", "stages.b.optim.lr"} <= found


def test_every_mistake_in_one_file_keeps_its_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(BASE.replace("group: 4", "group: 1").replace("bits: 4", "bits: x"), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_pipeline(path)
    lines = {p.path: p.message for p in caught.value.problems}
    assert "(line 26)" in lines["stages.rl.group"] and "(line 32)" in lines["stages.small.bits"]


@pytest.mark.parametrize("kind", ["missing", "folder", "latin1", "empty", "nul", "large", "fifo"])
def test_files_that_are_no_config(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind != "missing":
        path.write_bytes(
            {
                "latin1": "version: 1\nname: café\n".encode("latin-1"),
                "empty": b"",
                "nul": b"version: 1\nname: a\0b\n",
                "large": b"# " + b"x" * (2 << 20),
            }[kind]
        )
    words = {"missing": "does not exist", "folder": "is a folder", "latin1": ":2:10: byte 0xe9 is not UTF-8", "empty": "is empty",
             "nul": ":2:8: control character", "large": "larger than 1 MiB", "fifo": "not a regular file"}  # fmt: skip
    _refused(path, "x.yaml", words[kind], capsys)


def _limits() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (20, 20))


def test_an_alias_bomb_stays_small_and_quick() -> None:
    path = next(p for p in FILES if p.stem == "C99-bomb")
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "posttrain", "validate", str(path)], preexec_fn=_limits, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "more than 50000 values" in done.stderr and "Traceback" not in done.stderr
    assert time.monotonic() - start < 20


def test_validate_does_not_import_torch(tmp_path: Path) -> None:
    path = tmp_path / "base.yaml"
    path.write_text(BASE, encoding="utf-8")
    code = (
        "import sys; from posttrain.cli import main; code = main(['validate', sys.argv[1], '--plugin', 'testonly_methods']);"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'vllm', 'numpy', 'pyarrow'} & set(sys.modules); print(code, sorted(heavy))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout.strip().endswith("0 []"), done.stdout + done.stderr


def test_a_secret_is_not_shown_in_an_error(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    secret = "hf_" + "FAKEfake" * 4
    path.write_text(BASE.replace("bits: 4", f"bits: {secret}\n    hub_token: {secret}"), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_pipeline(path)
    assert secret not in format_error(caught.value)

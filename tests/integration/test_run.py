"""`posttrain run` and its sisters from the outside: resuming, selections, reasons, exit codes, signals, folders."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import core_kit
import pytest
from core_kit import CHAIN, Home, wait_for

from posttrain.core import process

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Home:
    core_kit.prepare(monkeypatch, tmp_path)
    return Home(tmp_path, capsys)


def attempts(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "attempts").iterdir())


def test_run_then_run_again(home: Home) -> None:
    first = home.run()
    assert first.code == 0, first.err
    assert "made: committed in" in first.err and "made: rows 5/5 rows" in first.err
    lines = first.out.splitlines()
    assert [next(line for line in lines if line.startswith(word)) for word in ("artifact ", "report ", "next ")]
    folder = home.stages()["made"]
    assert sorted(p.name for p in folder.iterdir()) == ["attempts", "config.json", "env.json", "manifest.json", "out", "work"]
    assert sorted(p.name for p in (folder / "attempts" / "1").iterdir()) == ["events.jsonl", "exit-0.json", "stdout.log"]
    assert {p.name for p in folder.parent.parent.iterdir()} >= {
        "pipeline.yaml",
        "pipeline.resolved.json",
        "lock",
        "plan.json",
        "report.html",
    }
    before = home.digests()
    start = time.process_time()
    again = home.run()
    assert again.code == 0 and "committed in" not in again.err and again.out == first.out
    assert time.process_time() - start < 2
    assert home.digests() == before and attempts(folder) == ["1"]


def test_every_line_that_is_written_is_strict_json(home: Home) -> None:
    home.run()
    refuse = lambda c: pytest.fail(f"not strict: {c}")  # noqa: E731
    for path in [p for p in home.runs.rglob("*") if p.suffix in (".json", ".jsonl")]:
        texts = path.read_text(encoding="utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text(encoding="utf-8")]
        for text in texts:
            json.loads(text, parse_constant=refuse)
    assert any('"NaN"' in p.read_text() for p in home.runs.rglob("events.jsonl"))


def test_selections(home: Home) -> None:
    assert home.run("--only", "made").code == 0 and set(home.stages()) == {"made"}
    assert home.run("--until", "used").code == 0 and set(home.stages()) == {"made", "used"}
    assert home.run("--from", "also").code == 0 and set(home.stages()) == {"made", "used", "also"}
    stamp = home.manifest("used")["ended"]
    assert home.run("--force", "used").code == 0
    assert home.manifest("used")["ended"] > stamp and home.manifest("used")["attempts"] == 2
    assert home.manifest("also")["attempts"] == 1
    bad = home.run("--only", "usd")
    assert bad.code == 2 and "did you mean `used`?" in bad.err


def test_forced_input_that_differs_makes_its_readers_again(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    home.run()
    assert home.run("--force", "made").code == 0
    assert [home.manifest(n)["attempts"] for n in ("made", "used", "also")] == [2, 1, 1], "the same bytes came out"
    monkeypatch.setenv("CORE_SALT", "changed")
    assert home.run("--force", "made").code == 0
    assert [home.manifest(n)["attempts"] for n in ("made", "used", "also")] == [3, 2, 2]
    assert "changed" in (home.stages()["used"] / "out" / "result.json").read_text()


def test_seeds(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORE_EVAL", "1")
    result = home.run("--seeds", "0,1", "--until", "used")
    assert result.code == 0, result.err
    assert {p.name for p in home.runs.iterdir()} == {"chain-seed0", "chain-seed1"}
    assert result.out.splitlines()[-1].split() == ["used", "val", "loss", "nan", "0.500", "0.000", "to", "1.000", "0.000", "1.000"]
    assert home.run("--seeds", "0,x").code == 2


def test_one_process_for_all_or_one_each_makes_no_difference(home: Home) -> None:
    """A torch stage runs after another one, and with torch imported only when it needs it."""
    home.write(
        CHAIN
        + "  - {name: numbers, method: core.torch, in: {data: made}}\n  - {name: more, method: core.torch, in: {data: made}, seed: 5}\n"
    )
    assert home.run().code == 0
    warm, logs = home.digests(), [len(list(p.glob("attempts/1/stdout.log"))) for p in home.stages().values()]
    assert logs == [1] * 5 and warm["numbers"] != warm["more"]
    shutil.rmtree(home.stages()["more"])
    result = home.run("--isolate", "--force", "used", "--force", "also")
    assert result.code == 0 and [home.manifest(n)["attempts"] for n in warm] == [1, 2, 2, 1, 1]
    assert home.digests() == warm


def test_a_kept_stage_with_other_settings_that_do_not_matter(home: Home) -> None:
    home.run("--until", "used")
    result = home.run(
        "--until", "used", "stages.made.chatty=7", "limits.wall_hours=3", "tracking={to: [jsonl]}", "stages.used.launch.timeout_s=5"
    )
    assert result.code == 0 and "started" not in result.err


def test_changed_field_makes_a_new_stage_and_leaves_the_old_one(home: Home) -> None:
    home.run()
    old = home.stages()["also"]
    assert home.plan("stages.also.factor=4.0")["also"]["why"] == "factor changed from 2.0 to 4.0"
    assert home.run("stages.also.factor=4.0").code == 0
    assert home.stages()["also"] != old and (old / "manifest.json").is_file()
    assert home.plan()["also"]["action"] == "reuse", "back to the old value: nothing to run"


def test_trackers_reach_the_worker_and_stay_out_of_the_key(home: Home) -> None:
    pytest.importorskip("tensorboard")
    key = home.plan()["used"]["key"]
    result = home.run("--until", "used", "tracking={to: [jsonl, tensorboard]}")
    assert result.code == 0, result.err
    assert list((home.stages()["used"] / "tracking").glob("events.out.tfevents*"))
    assert home.manifest("used")["key"] == key


def test_trust_is_handed_through(home: Home) -> None:
    home.run("--until", "used")
    assert home.manifest("used")["summary"]["trusted"] is False
    home.run("--until", "used", "--force", "used", "--trust-remote-code")
    assert home.manifest("used")["summary"]["trusted"] is True


def test_plan_text_and_json(home: Home) -> None:
    text = home("plan", home.file)
    assert text.code == 0 and " 2 used (core.use)  run: not made yet" in text.out and "in: " not in text.err
    assert f"3 to run, 0 not; run folder {home.runs}/chain" in text.out and "posttrain.core.worker" in text.out
    found = home.plan("--only", "made")
    assert [item["action"] for item in found.values()] == ["run", "skip", "skip"]
    assert set(found["made"]) == {"name", "method", "key", "action", "why", "command", "folder", "estimate", "data"}
    assert not home.runs.exists(), "a plan writes nothing"


# ---------------------------------------------------------------- ends that are not good


@pytest.mark.parametrize(
    ("action", "code", "words"),
    [
        ("numerics", 3, "loss is nan at step 3"),
        ("data", 4, "rows.jsonl:3: no rows\n  fix: mend the row"),
        ("reward", 5, "reward `exact` failed on 9 of 10 completions"),
        ("preempted", 75, "stopped at step 4"),
        ("bare", 1, "KeyError: 'surprise'"),
        ("memory", 1, "the machine's memory is used up\n  fix: lower batch.per_device"),
        ("kill", 1, "the stage's process was ended by SIGKILL; the kernel kills a process that runs out of memory this way"),
        ("system-exit", 1, "SystemExit: 7"),
    ],
)
def test_ends_of_a_stage(home: Home, action: str, code: int, words: str) -> None:
    home.trouble(used=action)
    result = home.run("--until", "used")
    assert result.code == code and "Traceback" not in result.err
    assert f"error: stage used: {words}" in result.err
    folder = next(home.runs.glob("chain/stages/02-used-*"))
    assert f"log: {folder}/attempts/1/stdout.log" in result.err
    if action != "kill":
        assert not (folder / "out.tmp").exists()
        assert ("Traceback" in (folder / "attempts/1/stdout.log").read_text()) == (action in ("bare", "memory", "system-exit"))
    assert set(home.stages()) == {"made"}
    if action in ("bare", "kill"):
        assert home.plan()["used"]["action"] == "resume"
        home.trouble()
        assert home.run("--until", "used").code == 0 and home.manifest("used")["attempts"] == 2


def test_config_errors_end_with_2_before_anything_is_made(home: Home) -> None:
    result = home.run("stages.made.rows=many")
    assert result.code == 2 and "stages.made.rows" in result.err and not home.runs.exists()
    assert home("validate", home.file, "stages.used.factr=2").code == 2
    assert home("validate", home.file).out.strip() == f"{home.file}: valid, 3 stages"
    missing = home("validate", home.folder / "nothing.yaml")
    assert missing.code == 2 and "Traceback" not in missing.err


def test_what_a_stage_prints_is_in_its_log(home: Home) -> None:
    home.trouble(made="print")
    result = home.run("--only", "made")
    assert "a line for the log" not in result.err
    assert "a line for the log" in (home.stages()["made"] / "attempts/1/stdout.log").read_text()


def test_quiet(home: Home) -> None:
    assert home.run("--quiet", "--only", "made").err == ""


def test_wall_hours(home: Home) -> None:
    home.trouble(used="hang")
    result = home.run("limits.wall_hours=0.0005")
    assert result.code == 75 and "stopped by limits.wall_hours" in result.err and "run the same command again" in result.err


def test_disk_limit_is_checked_before_each_stage(home: Home) -> None:
    (home.folder / "model").mkdir()
    (home.folder / "model" / "model.safetensors").write_bytes(b"0" * 5000)
    home.write(CHAIN + "  - {name: copy, method: core.model}\nmodel: {id: ./model}\nlimits: {disk_gb: 0.000001}\n")
    result = home.run()
    assert result.code == 4 and "stage copy needs about 5e-06 GB, and limits.disk_gb is 1e-06" in result.err
    assert set(home.stages()) == {"made", "used", "also"}


# ---------------------------------------------------------------- signals


def hanging(home: Home, **kwargs: Any) -> tuple[subprocess.Popen[str], int]:
    """A run whose second stage hangs; returns it and its worker's pid."""
    home.trouble(used="hang")
    parent = home.start(**kwargs)
    wait_for(lambda: any("hanging" in p.read_text() for p in home.runs.glob("chain/stages/*used*/attempts/*/events.jsonl")))
    return parent, process.descendants(parent.pid)[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_a_run_cleanly_and_it_goes_on(home: Home, number: signal.Signals) -> None:
    parent, child = hanging(home, preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))
    parent.send_signal(number)
    _, err = parent.communicate(timeout=30)
    assert parent.returncode == 75, err
    assert f"stopped by {number.name} (used: stopped by SIGTERM)" in err and "run the same command again" in err and "Traceback" not in err
    assert not process.alive(child, None)
    assert '"code": 75' in next(home.runs.glob("chain/stages/*used*/attempts/1/exit-0.json")).read_text()
    if number == signal.SIGTERM:
        home.trouble()
        assert home.run("--until", "used").code == 0 and home.manifest("made")["attempts"] == 1


def test_a_signal_that_was_ignored_stays_ignored(home: Home) -> None:
    """As under nohup."""
    parent, child = hanging(home, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    parent.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert parent.poll() is None and process.alive(child, None)
    parent.terminate()
    parent.communicate(timeout=30)
    assert parent.returncode == 75


def test_second_signal_kills_a_child_that_does_not_listen(home: Home) -> None:
    parent, child = hanging(home)
    os.kill(child, signal.SIGSTOP)
    parent.terminate()
    time.sleep(0.4)
    assert parent.poll() is None
    parent.terminate()
    _, err = parent.communicate(timeout=30)
    assert parent.returncode == 75 and not process.alive(child, None), err


def test_child_dies_with_its_killed_parent_and_the_run_goes_on(home: Home) -> None:
    parent, child = hanging(home)
    second = home.run()
    assert second.code == 4 and f"in use by process {parent.pid}" in second.err
    parent.kill()
    parent.communicate()
    home.trouble()
    assert home.run("--until", "used").code == 0
    assert not process.alive(child, None)


def test_killed_from_outside(home: Home) -> None:
    parent, child = hanging(home)
    os.kill(child, signal.SIGKILL)
    _, err = parent.communicate(timeout=30)
    assert parent.returncode == 1 and "ended by SIGKILL" in err


# ---------------------------------------------------------------- folders


def test_the_same_run_from_three_folders(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """C92: relative paths mean relative to the file; odd names; the runs folder is a link."""
    odd = home.folder / "a [1]*" / "b 100% é"
    odd.mkdir(parents=True)
    (home.folder / "real").mkdir()
    home.runs.symlink_to(home.folder / "real")
    (home.folder / "a [1]*" / "te%xts 1.jsonl").write_text((home.folder / "texts.jsonl").read_text())
    home.file = odd / "p [x].yaml"
    home.write(CHAIN.replace("name: chain", "name: 'Café [run] 1'").replace("path: texts.jsonl", "path: '../te%xts 1.jsonl'"))
    keys = []
    for place in (odd, home.folder, Path("/")):
        monkeypatch.chdir(place)
        keys.append([item["key"] for item in home.plan().values()])
    assert keys[0] == keys[1] == keys[2]
    result = home.run()
    assert result.code == 0, result.err
    monkeypatch.chdir(odd)
    assert "started" not in home.run().err
    assert (home.folder / "real" / "cafe-run-1" / "report.html").is_file()
    shutil.copytree(home.folder / "a [1]*", home.folder / "moved")
    home.file = home.folder / "moved" / odd.name / home.file.name
    assert {item["action"] for item in home.plan().values()} == {"reuse"}, "content decides, not place"


def test_hash_seed_does_not_change_results(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for seed in ("0", "4242"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        shutil.rmtree(home.runs, ignore_errors=True)
        assert home.run().code == 0
        found.append(home.digests())
    assert found[0] == found[1]
    assert home.run("seed=8").code == 0 and home.digests()["made"] != found[0]["made"]


# ---------------------------------------------------------------- looking at runs


def test_look(home: Home) -> None:
    assert "no runs in" in home("ls").out
    home.run()
    run = home.runs / "chain"
    assert "3/3" in home("ls").out
    assert "01-made-" in home("ls", "chain").out and "dataset" in home("ls", run).out
    shown = home("show", "chain", "used").out
    assert "report by core.use v1, seed 3" in shown and "in.data: made" in shown and "result.json" in shown
    assert len(home("show", "chain").out.splitlines()) > 15
    assert home("verify", "chain").out.strip() == "3 stages, every committed file is as it was"
    (run / "report.html").unlink()
    assert home("report", "chain").out.strip() == str(run / "report.html") and (run / "report.html").is_file()
    for args in (("show", "chain", "usd"), ("ls", "chian"), ("verify", "nothing"), ("prune", "nothing")):
        bad = home(*args)
        assert bad.code == 4 and "fix:" in bad.err and "Traceback" not in bad.err


def test_look_at_damage(home: Home) -> None:
    home.run()
    folder = home.stages()["used"]
    (folder / "out" / "result.json").write_bytes((folder / "out" / "result.json").read_bytes()[::-1])
    bad = home("verify", "chain")
    assert bad.code == 4 and "result.json: its bytes have changed since it was committed" in bad.err
    (folder / "out" / "result.json").write_text("short")
    assert "expected" in home("verify", "chain").err
    (folder / "manifest.json").write_text('{"name": "used"}')
    for verb in ("ls", "show", "report", "verify", "plan"):
        result = home(verb, *([home.file] if verb == "plan" else ["chain"]))
        assert result.code == (4 if verb == "verify" else 0), verb
        assert "internal error" not in result.err and "Traceback" not in result.err, verb


def test_prune(home: Home) -> None:
    home.run()
    home.run("stages.also.factor=9.0")
    old = [p for p in (home.runs / "chain" / "stages").iterdir() if p.name.startswith("03")]
    assert len(old) == 2
    dry = home("prune", "chain", "--dry-run")
    assert "would delete" in dry.out and all(p.exists() for p in old)
    assert home("prune", "chain").code == 0
    assert [p.exists() for p in old].count(True) == 1 and home.plan("stages.also.factor=9.0")["also"]["action"] == "reuse"
    assert (home.stages()["made"] / "work").exists()
    home("prune", "chain", "--work")
    assert not (home.stages()["made"] / "work").exists()
    assert {item["action"] for item in home.plan("stages.also.factor=9.0").values()} == {"reuse"}


# ---------------------------------------------------------------- one verb without a file


def rows(folder: Path) -> list[dict[str, Any]]:
    """Rows of an artifact's folder as a source would read them: without the scores beside them."""
    from posttrain.data.shards import BadRows, expand_shards, read_shard

    return [row for shard in expand_shards([str(folder)]) for _, row in read_shard(shard, on_bad="stop", bad=BadRows())]


def test_select_without_a_file(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home.folder)
    args = ("dsir", "raw=texts.jsonl", "target=texts.jsonl", "rows=3", "out=pick ed")
    result = home("select", *args)
    assert result.code == 0, result.err
    assert "copied to pick ed" in result.out and len(rows(home.folder / "pick ed")) == 3
    assert home("select", *args).code == 0, "the same command again"
    other = home("select", *args[:-2], "rows=4", "out=pick ed")
    assert other.code == 2 and "there is something else at that place" in other.err
    (home.folder / "file").write_text("x")
    assert home("select", *args[:-1], "out=file").code == 2
    assert home("select", "dsir", "raw=texts.jsonl").code == 2
    assert home("select", "dzir", "raw=texts.jsonl").code == 2
    assert home("select", *args[:-1], "nonsense").code == 2


def test_train_from_a_file_with_short_forms(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths of the file stay relative to it; those of the command line are relative to the shell."""
    (home.folder / "conf").mkdir()
    (home.folder / "shell").mkdir()
    (home.folder / "shell" / "mine.jsonl").write_text('{"text": "mine"}\n')
    home.file = home.folder / "conf" / "one.yaml"
    home.write(
        "version: 1\nname: one\nsources: {texts: {kind: text, path: ../texts.jsonl}}\n"
        "stages: [{name: used, method: core.use, in: {data: texts}}]\n"
    )
    monkeypatch.chdir(home.folder / "shell")
    assert home("train", home.file).code == 0
    assert home.manifest("used")["summary"]["rows_in"] == 12
    for form in ("in.data=mine.jsonl", "data=mine.jsonl", "sources.texts.path=mine.jsonl"):
        result = home("train", home.file, form, "factor=3.0", "out=" + form.split(".")[0])
        assert result.code == 0, result.err
        assert json.loads((Path(form.split(".")[0]) / "result.json").read_text())["texts"] == ["mine"]
        shutil.rmtree(form.split(".")[0])
    both = home("train", home.file, "data=[texts, mine.jsonl]", "stages.used.factor=5.0", "seed=4")
    assert both.code == 0 and home.manifest("used")["summary"]["rows_in"] == 13 and home.manifest("used")["seed"] == 4
    assert home("train", home.file, "factr=2").code == 2
    (home.folder / "shell" / "m").mkdir()
    (home.folder / "shell" / "m" / "model.safetensors").write_text("x")
    home.write("version: 1\nname: two\nmodel: {id: ./gone}\nstages: [{name: copy, method: core.model, epochs: 2}]\n")
    for form in ("model=m", "model.id=m", "in.model=m"):
        assert home("train", home.file, form, "steps=3").code == 0
        assert home.manifest("copy")["summary"] == {"steps": 3, "epochs": None}
    home.write(CHAIN)
    assert "expected a file with one stage, found 3" in home("train", home.file).err


@pytest.mark.parametrize(
    ("verb", "args"), [("quantize", ["rtn"]), ("generate", ["prompt=hi"]), ("eval", ["data=texts.jsonl"]), ("export", [])]
)
def test_verbs_that_need_a_model_say_so(home: Home, monkeypatch: pytest.MonkeyPatch, verb: str, args: list[str]) -> None:
    monkeypatch.chdir(home.folder)
    result = home(verb, *args)
    assert result.code == 2 and "needs `model=`" in result.err
    gone = home(verb, *args, "model=./nowhere")
    assert gone.code == 4 and "no such model folder" in gone.err


def test_generate_shows_what_the_model_said(home: Home, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path) -> None:
    monkeypatch.chdir(home.folder)
    result = home("generate", f"model={os.path.relpath(tiny_model_dir)}", "prompt=12 + 34 = ", "max_tokens=3", "out=said")
    assert result.code == 0, result.err
    row = rows(home.folder / "said")[0]
    assert row["prompt"] == "12 + 34 = " and len(row["token_ids"]) == 3
    assert f"12 + 34 = {row['completion']}".strip() in result.out


# ---------------------------------------------------------------- the command line itself


def cli(*args: object, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "posttrain", *map(str, args)], capture_output=True, text=True, **kwargs)


def test_help_is_quick_and_needs_no_torch() -> None:
    from posttrain.cli import VERBS

    code = (
        "import sys, time, resource\nfrom posttrain.cli import main\n"
        "for verb in sys.argv[1:]:\n    try: main([verb, '--help'])\n    except SystemExit as e: assert not e.code\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "heavy = [m for m in ('torch', 'transformers', 'pydantic', 'numpy', 'yaml') if m in sys.modules]\n"
        "print('CPU', used.ru_utime + used.ru_stime, heavy)"
    )
    command, seconds = [sys.executable, "-c", code, *VERBS], []
    for _ in range(4):
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "500"})
        _, used, heavy = done.stdout.splitlines()[-1].split(maxsplit=2)
        assert heavy == "[]"
        seconds.append(float(used))
    assert min(seconds) < 0.3, "all verbs together, on a machine that may be busy"
    assert all(f"example: {v.example}" in " ".join(done.stdout.split()) for v in VERBS.values())


def test_plan_and_validate_import_no_torch(home: Home) -> None:
    heavy = "assert not {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)"
    code = f"import sys\nfrom posttrain.cli import main\nassert main(sys.argv[1:]) == 0\n{heavy}"
    for verb in ("plan", "validate"):
        subprocess.run(
            [sys.executable, "-c", code, verb, str(home.file), "--plugin", "core_methods", "--runs", str(home.runs)],
            check=True,
            cwd=home.folder,
        )


def test_overrides_may_stand_behind_flags_and_be_long(home: Home) -> None:
    note = "ü✓" * 20_000
    assert home("plan", home.file, "--only", "made", "stages.made.rows=7", "--json", f"stages.made.note={note}").code == 0
    with pytest.raises(SystemExit) as caught:
        home("plan", home.file, "--nonsense")
    assert caught.value.code == 2


def test_finished_pipeline_is_passed_over_in_two_seconds(home: Home) -> None:
    home.run()
    before = os.times()
    done = home.start().wait()
    after = os.times()
    assert done == 0 and (after.children_user + after.children_system) - (before.children_user + before.children_system) < 2


def test_closed_pipe_and_unexpected_errors(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    command = f"{sys.executable} -m posttrain schema | head -c 10"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=home.folder)
    assert done.stderr == "" and len(done.stdout) == 10
    from posttrain.verbs import pipeline

    monkeypatch.setattr(pipeline, "load_pipeline", lambda *_: 1 / 0)
    result = home("validate", home.file)
    assert result.code == 1 and result.err.startswith("internal error: ZeroDivisionError: division by zero\n  fix:")
    with pytest.raises(ZeroDivisionError):
        home("validate", home.file, "--debug")
    monkeypatch.setattr(pipeline, "load_pipeline", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert home("validate", home.file).code == 75


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["quantize", "rtn"], "needs `model=`"),
        (["generate", "model=./m"], "needs `data=`"),
        (["eval", "model=./m"], "needs `data=`"),
        (["select", "dsir", "rows=3"], "needs `raw=` and `target=`"),
        (["eval", "model=./m", "data=odd.jsonl"], "sources.data.kind=verifiable"),
    ],
)
def test_verbs_without_a_file_say_what_they_need(args: list[str], words: str, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home.folder)
    (home.folder / "odd.jsonl").write_text('{"q": "1+1", "final": "2"}\n')
    result = home(*args)
    assert result.code in (2, 4) and words in result.err

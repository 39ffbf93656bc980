"""Cases that only a whole run shows: strict JSON everywhere, pads that are end tokens, refusals of TRL, no secret on disk."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from trainer_kit import CHATS, run_stage

REPO = Path(__file__).resolve().parents[2]
SECRETS = {
    "HF_TOKEN": "hf_" + "FAKEfake" * 4 + "00",
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
    "SOME_URL": "https://someone:Sup3rS3cretPassw0rd@example.org/p",
}
CHAIN = """\
version: 1
name: whole
eval: {{sets: {{tasks: {{from: tasks:test, metrics: [accuracy], samples: 1, max_tokens: 3, rows: 4}}}}}}
model: {{id: {model}}}
stages:
  - {{name: tasks, method: make.arithmetic, digits: 1, split: {{test: 0.2}}}}
  - {{name: rl, method: grpo, in: {{data: tasks}}, steps: 2, group: 2, batch: {{rows: 4, per_device: 4}}, rollout: {{max_tokens: 3}},
     data: {{max_length: 32}}, log_every: 1, rewards: [{{use: exact}}, {{use: length, weight: 0.1}}]}}
  - {{name: int8, method: quantize.rtn, bits: 8, group_size: 16}}
"""


@pytest.fixture(scope="module")
def whole_run(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder of a finished run, started by a process that holds secrets, and what the command printed."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "p.yaml").write_text(CHAIN.format(model=tiny_model_dir))
    done = subprocess.run(
        [sys.executable, "-m", "posttrain", "run", "p.yaml"],
        cwd=folder,
        env={**os.environ, **SECRETS, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "whole", done.stdout + done.stderr


def json_texts(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every JSON document of a folder, compressed or not."""
    import zstandard

    for path in sorted(folder.rglob("*")):
        if path.suffix == ".json":
            yield path, path.read_text(encoding="utf-8")
        elif path.name.endswith((".jsonl", ".jsonl.zst")):
            raw = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(path.read_bytes())) if path.suffix == ".zst" else path.open("rb")
            yield from ((path, line) for line in io.TextIOWrapper(raw, encoding="utf-8"))


def refuse(literal: str) -> None:
    """For `parse_constant`."""
    raise ValueError(f"{literal} is not JSON")


def test_all_json_of_a_run_is_strict(whole_run: tuple[Path, str]) -> None:
    """C91, output side."""
    seen = {path for path, text in json_texts(whole_run[0]) if json.loads(text, parse_constant=refuse) is not None}
    assert {"pipeline.resolved.json", "plan.json", "manifest.json", "config.json", "events.jsonl", "trainer_state.json"} <= {
        path.name for path in seen
    }


def test_no_secret_reaches_the_disk(whole_run: tuple[Path, str]) -> None:
    """C98."""
    folder, said = whole_run
    blobs = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for value in (*SECRETS.values(), "Sup3rS3cretPassw0rd"):
        assert value not in said
        assert [path for path, blob in blobs.items() if value.encode() in blob] == []


def test_the_end_token_is_learned_where_pad_is_the_same(tiny_model_dir: Path) -> None:
    """C05."""
    torch = pytest.importorskip("torch")
    import trl
    from trainer_kit import load

    from posttrain.config.common import DataConfig
    from posttrain.data.chat import encode_rows
    from posttrain.trainers._sft import SFTTrainer, encode_dataset

    model, tokenizer = load(tiny_model_dir)
    tokenizer.pad_token = tokenizer.eos_token
    eos = tokenizer.eos_token_id
    rows = [{"text": "one", "id": "a"}, {"text": "one two three four", "id": "b"}]
    dataset = encode_dataset(encode_rows(tokenizer, rows, DataConfig(max_length=64))[0])
    args = trl.SFTConfig(output_dir="unused", report_to="none", use_cpu=True, bf16=False, dataset_kwargs={"skip_prepare_dataset": True})
    trainer = SFTTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
    batch = trainer.data_collator([dataset[0], dataset[1]])
    for i, length in enumerate(len(row["input_ids"]) for row in dataset):
        real = batch["attention_mask"][i].bool()
        assert int(real.sum()) == length
        assert batch["input_ids"][i][real][-1] == batch["labels"][i][real][-1] == eos
        assert bool((batch["labels"][i][~real] == -100).all())
    assert torch.equal(batch["labels"] == eos, batch["labels"].eq(eos)) and int((batch["labels"] == eos).sum()) == 2


def test_what_trl_refuses_names_the_block(tiny_model_dir: Path, tmp_path: Path) -> None:
    from posttrain.errors import ConfigError

    with pytest.raises(ConfigError, match=r"stages\.train\.trl: TRL refuses it: .*</s>"):
        run_stage(tmp_path, "sft", CHATS, "messages", tiny_model_dir, steps=1, data={"max_length": 64}, trl={"eos_token": "</s>"})

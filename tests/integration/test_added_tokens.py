"""C59: tokens added by a stage travel through adapter, merge, resume and quantization, and their rows are trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trainer_kit import Interrupted, at_step, digest, interrupt, make_context, make_folders, run_stage

torch = pytest.importorskip("torch")

TOKENS = ["<call>", "</call>"]
ROWS = [json.loads(line) for line in (Path(__file__).parents[1] / "cases" / "C59-added-tokens.jsonl").read_text().splitlines()]
FIELDS = {
    "steps": 6,
    "batch": {"rows": 8, "per_device": 4},
    "checkpoint": {"every": 2},
    "data": {"max_length": 64, "add_tokens": TOKENS},
    "optim": {"lr": 0.01, "schedule": "constant", "warmup": 0},
}
LORA = {**FIELDS, "lora": {"r": 4, "alpha": 8}}


@pytest.fixture(scope="module")
def untied(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with an output layer of its own."""
    from posttrain.models.load import load_model
    from posttrain.models.save import save_model

    loaded = load_model(tiny_model_dir)
    config = loaded.model.config
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = type(loaded.model)(config)
    save_model(model, loaded.tokenizer, tmp_path_factory.mktemp("untied") / "m")
    return tmp_path_factory.getbasetemp() / "untied0" / "m"


def sft(root: Path, model: Path, fields: dict[str, Any], **options: Any) -> Path:
    """The committed folder of an SFT stage."""
    run_stage(root, "sft", ROWS, "messages", model, **options, **fields)
    return root / "out"


def check(folder: Path, start: Path) -> Any:
    """Tokenizer, config and embeddings agree; the new rows have moved apart from each other, hence from their common start."""
    from posttrain.models.load import load_model

    loaded, before = load_model(folder), load_model(start)
    ids = [loaded.tokenizer.convert_tokens_to_ids(token) for token in TOKENS]
    assert [len(loaded.tokenizer(token).input_ids) for token in TOKENS] == [1, 1]
    tables = {loaded.model.get_input_embeddings().weight, loaded.model.get_output_embeddings().weight}
    for table in tables:
        assert table.shape[0] == loaded.model.config.vocab_size == max(ids) + 1
        assert (table[ids[0]] - table[ids[1]]).abs().max() > 1e-3
    assert before.model.get_input_embeddings().weight.shape[0] == min(ids)
    assert loaded.tokenizer.decode(loaded.tokenizer("<call>add(0,1)</call>").input_ids, skip_special_tokens=True) == "<call>add(0,1)</call>"
    return loaded


@pytest.mark.parametrize("lora", [False, True])
def test_rows_are_trained(untied: Path, tmp_path: Path, lora: bool) -> None:
    check(sft(tmp_path, untied, LORA if lora else FIELDS), untied)


def test_adapter_resumes_and_is_quantized(tiny_model_dir: Path, tmp_path: Path) -> None:
    from posttrain.core import registry
    from posttrain.models.load import load_model

    whole = sft(tmp_path / "a", tiny_model_dir, LORA)
    with pytest.raises(Interrupted):
        sft(tmp_path / "b", tiny_model_dir, LORA, sinks=[at_step(3, interrupt)])
    assert digest(sft(tmp_path / "b", tiny_model_dir, LORA)) == digest(whole)
    merged = check(whole, tiny_model_dir)
    assert merged.kind == "adapter" and merged.model.get_output_embeddings().weight is merged.model.get_input_embeddings().weight

    root = tmp_path / "q"
    make_folders(root, ROWS)
    ctx = make_context(root, "quantize.rtn", "messages", whole)
    method = registry.method("quantize.rtn")
    method.run(method.config.model_validate({"name": "q", "method": "quantize.rtn", "bits": 8, "group_size": 16}), ctx)
    quantized = load_model(root / "out")
    ids = torch.tensor([merged.tokenizer("<call>add(0,1)</call>").input_ids])
    assert quantized.tokenizer("<call>add(0,1)</call>").input_ids == ids[0].tolist()
    gap = (quantized.model(input_ids=ids).logits - merged.model(input_ids=ids).logits).abs().max()
    assert gap < 0.1 * merged.model(input_ids=ids).logits.abs().max()


@pytest.mark.parametrize("tokens", [["<a>", "<a>"], [" "]])
def test_odd_tokens_are_refused(tokens: list[str]) -> None:
    from pydantic import ValidationError

    from posttrain.config.common import DataConfig

    with pytest.raises(ValidationError, match="blank or named twice"):
        DataConfig(add_tokens=tokens)

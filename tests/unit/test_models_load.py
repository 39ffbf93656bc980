"""Loading, saving and merging on the tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.errors import ArtifactError
from posttrain.models.load import load_model, load_tokenizer
from posttrain.models.reload import probe_logits
from posttrain.models.save import save_model, stop_ids


def add_adapter(model: Any, seed: int = 1, **extra: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    made = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **extra))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return made.eval()


@pytest.fixture(scope="module")
def adapter_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ and adapter/ side by side."""
    folder = tmp_path_factory.mktemp("adapted")
    shutil.copytree(tiny_model_dir, folder / "base")
    loaded = load_model(folder / "base")
    save_model(add_adapter(loaded.model), loaded.tokenizer, folder / "adapter", base=loaded)
    return folder


def test_folder_round_trip_is_exact(tiny_model_dir: Path, tmp_path: Path) -> None:
    first = load_model(tiny_model_dir)
    facts = save_model(first.model, first.tokenizer, tmp_path / "a")
    again = load_model(tmp_path / "a")
    save_model(again.model, again.tokenizer, tmp_path / "b")
    assert torch.equal(probe_logits(first.model), probe_logits(again.model))
    assert facts["parameters"] == sum(p.numel() for p in first.model.parameters())
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= set(files)
    for name in files:
        data = (tmp_path / "a" / name).read_bytes()
        assert data == (tmp_path / "b" / name).read_bytes(), name
        assert str(tmp_path).encode() not in data and str(tiny_model_dir).encode() not in data and b"_name_or_path" not in data


def test_sharded_save(tiny_model_dir: Path, tmp_path: Path) -> None:
    first = load_model(tiny_model_dir)
    save_model(first.model, first.tokenizer, tmp_path, max_shard_gb=0.0001)
    assert (tmp_path / "model.safetensors.index.json").is_file() and len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(probe_logits(load_model(tmp_path).model), probe_logits(first.model))


def test_tied_embeddings_stay_tied(tiny_model_dir: Path, tmp_path: Path) -> None:
    first = load_model(tiny_model_dir)
    save_model(first.model, first.tokenizer, tmp_path)
    again = load_model(tmp_path).model
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()


def test_dtype(tiny_model_dir: Path) -> None:
    assert load_model(tiny_model_dir, dtype="bfloat16").model.dtype == torch.bfloat16
    assert load_model(tiny_model_dir).model.dtype == torch.float32


def test_all_stop_tokens_are_kept(tiny_model_dir: Path, tmp_path: Path) -> None:
    loaded = load_model(tiny_model_dir)
    loaded.model.generation_config.eos_token_id = [7, loaded.tokenizer.eos_token_id, 9]
    loaded.model.generation_config.temperature = 0.5
    save_model(loaded.model, loaded.tokenizer, tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [7, loaded.tokenizer.eos_token_id, 9] and saved["temperature"] == 0.5
    assert load_model(tmp_path).model.generation_config.eos_token_id == [7, loaded.tokenizer.eos_token_id, 9]
    loaded.model.generation_config.eos_token_id = None
    assert stop_ids(loaded.model, loaded.tokenizer) == loaded.tokenizer.eos_token_id


def test_tokenizer_cuts_as_in_its_file(tiny_model_dir: Path, tiny_tokenizer: Any) -> None:
    from tokenizers import Tokenizer

    core = Tokenizer.from_file(str(tiny_model_dir / "tokenizer.json"))
    loaded = load_tokenizer(tiny_model_dir)
    for text in ("What is 12 + 34?\n\n  don't", "é ü 数 <|im_end|>", "a  b\tc"):
        assert loaded(text).input_ids == core.encode(text).ids
    assert loaded.chat_template == tiny_tokenizer.chat_template


def test_merge_is_the_float32_sum(adapter_dir: Path) -> None:
    """W + (alpha / r) B A, against float64 numpy."""
    from safetensors.numpy import load_file

    base = load_file(adapter_dir / "base" / "model.safetensors")
    adapter = load_file(adapter_dir / "adapter" / "adapter_model.safetensors")
    merged = load_model(adapter_dir / "adapter")
    assert merged.kind == "adapter" and merged.base.path == (adapter_dir / "base").resolve() and not hasattr(merged.model, "peft_config")
    state = merged.model.state_dict()
    names = [name.removesuffix(".weight") for name in base if name.endswith("_proj.weight")]
    assert len(names) == 14
    for name in names:
        a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"].astype(np.float64) for part in "AB")
        expected = base[f"{name}.weight"].astype(np.float64) + 2.0 * b @ a
        assert np.abs(state[f"{name}.weight"].double().numpy() - expected).max() < 1e-6


def test_attached_adapter_computes_the_same(adapter_dir: Path) -> None:
    merged, attached = load_model(adapter_dir / "adapter"), load_model(adapter_dir / "adapter", merge=False)
    assert (probe_logits(merged.model) - probe_logits(attached.model)).abs().max() < 1e-5
    trainable = [name for name, p in attached.model.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)


def test_adapter_folder(adapter_dir: Path, tmp_path: Path) -> None:
    folder = adapter_dir / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "../base" and config["target_modules"] == sorted(config["target_modules"])
    assert {"base.json", "config.json", "chat_template.jinja", "tokenizer.json", "generation_config.json"} <= {
        f.name for f in folder.iterdir()
    }
    assert not (folder / "README.md").exists()
    loaded = load_model(adapter_dir / "base")
    shutil.copytree(adapter_dir / "base", tmp_path / "base")
    save_model(add_adapter(loaded.model), loaded.tokenizer, tmp_path / "adapter", base=tmp_path / "base")
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "adapter" / file.name).read_bytes(), file.name


def test_adapter_on_adapter(adapter_dir: Path) -> None:
    """A second adapter starts from the merged first one."""
    middle = load_model(adapter_dir / "adapter")
    second = add_adapter(middle.model, seed=2)
    expected = probe_logits(second)
    save_model(second, middle.tokenizer, adapter_dir / "second", base=middle.source)
    assert (probe_logits(load_model(adapter_dir / "second").model) - expected).abs().max() < 1e-5


def test_merged_to_bfloat16_keeps_rotary_tables(adapter_dir: Path) -> None:
    model = load_model(adapter_dir / "adapter", dtype="bfloat16").model
    assert model.dtype == torch.bfloat16 and model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_other_base_is_refused(adapter_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter_dir, tmp_path / "x")
    loaded = load_model(adapter_dir / "base")
    loaded.model.model.norm.weight.data += 1
    save_model(loaded.model, loaded.tokenizer, tmp_path / "x" / "base")
    with pytest.raises(ArtifactError, match="another base"):
        load_model(tmp_path / "x" / "adapter")


def test_added_tokens_travel_with_the_adapter(tiny_model_dir: Path, tmp_path: Path) -> None:
    """C59: new rows are saved with the adapter, config and tokenizer agree, and lost rows are an error."""
    loaded = load_model(tiny_model_dir)
    loaded.tokenizer.add_tokens(["<call>", "</call>"], special_tokens=True)
    rows = loaded.model.get_input_embeddings().weight.shape[0]
    loaded.model.resize_token_embeddings(len(loaded.tokenizer), mean_resizing=False)
    model = add_adapter(loaded.model, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    ids = torch.tensor([loaded.tokenizer("<call>add(0,1)</call>").input_ids])
    assert ids.max() >= rows
    expected = model(input_ids=ids).logits
    save_model(model, loaded.tokenizer, tmp_path / "adapter", base=tiny_model_dir)
    again = load_model(tmp_path / "adapter")
    assert again.model.config.vocab_size == len(loaded.tokenizer) == again.model.get_input_embeddings().weight.shape[0]
    assert (again.model(input_ids=ids).logits - expected).abs().max() < 1e-5
    save_model(again.model, again.tokenizer, tmp_path / "merged")
    assert (load_model(tmp_path / "merged").model(input_ids=ids).logits - expected).abs().max() < 1e-5


def test_lost_rows_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    loaded = load_model(tiny_model_dir)
    loaded.tokenizer.add_tokens(["<call>"], special_tokens=True)
    loaded.model.resize_token_embeddings(len(loaded.tokenizer), mean_resizing=False)
    model = add_adapter(loaded.model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded.tokenizer.save_pretrained(tmp_path)
    loaded.model.config.save_pretrained(tmp_path)
    (tmp_path / "base.json").write_text(json.dumps({"path": str(tiny_model_dir)}))
    with pytest.raises(ArtifactError, match="new rows were not saved"):
        load_model(tmp_path)


def test_tokenizer_larger_than_embedding_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "m")
    tokenizer = load_tokenizer(tiny_model_dir)
    tokenizer.add_tokens(["<call>"])
    tokenizer.save_pretrained(tmp_path / "m")
    with pytest.raises(ArtifactError, match="the embedding has 400 rows"):
        load_model(tmp_path / "m")


def test_missing_weights_are_never_made_up(tiny_model_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model_dir, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"lacks 1 weights, first model.layers.1.mlp.up_proj.weight"):
        load_model(tmp_path / "m")


def test_missing_adapter_weights_are_refused(adapter_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(adapter_dir, tmp_path / "x")
    file = tmp_path / "x" / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    del weights[sorted(weights)[0]]
    save_file(weights, file)
    with pytest.raises(ArtifactError, match="1 missing"):
        load_model(tmp_path / "x" / "adapter")


def test_hub_model_from_the_local_cache(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cached snapshot is found by its commit without the hub; an adapter over it names id and commit, not a path."""
    from huggingface_hub import constants

    revision = "a" * 40
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    shutil.copytree(tiny_model_dir, tmp_path / "models--owner--name" / "snapshots" / revision)
    loaded = load_model({"id": "owner/name", "revision": revision})
    assert torch.equal(probe_logits(loaded.model), probe_logits(load_model(tiny_model_dir).model))
    model = add_adapter(loaded.model)
    expected = probe_logits(model)
    save_model(model, loaded.tokenizer, tmp_path / "adapter", base=loaded)
    assert json.loads((tmp_path / "adapter" / "base.json").read_text()) == {
        "digest": f"hub:owner/name@{revision}",
        "id": "owner/name",
        "revision": revision,
    }
    assert (probe_logits(load_model(tmp_path / "adapter").model) - expected).abs().max() < 1e-5


def test_foreign_adapter_without_our_base_file(adapter_dir: Path, tmp_path: Path) -> None:
    """peft's own files are enough: the base is read from adapter_config.json, the tokenizer from the base."""
    shutil.copytree(adapter_dir, tmp_path / "x")
    folder = tmp_path / "x" / "adapter"
    for file in folder.iterdir():
        if not file.name.startswith("adapter_"):
            file.unlink()
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(tmp_path / "x" / "base")}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert torch.equal(probe_logits(load_model(folder).model), probe_logits(load_model(adapter_dir / "adapter").model))


def test_unreachable_hub_model() -> None:
    with pytest.raises(ArtifactError, match="local hub cache") as caught:
        load_model({"id": "nobody/nothing", "revision": "0" * 40})
    assert "model.offline" in str(caught.value)


def test_saving_an_adapter_needs_its_base(tiny_model_dir: Path, tmp_path: Path) -> None:
    loaded = load_model(tiny_model_dir)
    with pytest.raises(ValueError, match="base"):
        save_model(add_adapter(loaded.model), loaded.tokenizer, tmp_path)


def test_small_models_take_one_thread_unless_told_otherwise(tiny_model_dir, monkeypatch) -> None:
    import torch

    from posttrain.models import load

    before = torch.get_num_threads()
    try:
        monkeypatch.setattr(load, "_all_threads", lambda: 3)
        model = load.load_model(str(tiny_model_dir)).model
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        load.fit_threads(model, "cpu")
        assert torch.get_num_threads() == 1
        monkeypatch.setattr(load, "SMALL_MODEL", 1)
        load.fit_threads(model, "cpu")
        assert torch.get_num_threads() == 3
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        monkeypatch.setattr(load, "SMALL_MODEL", 10**9)
        load.fit_threads(model, "cpu")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)

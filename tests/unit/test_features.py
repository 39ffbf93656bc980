"""Features that need no language model: a column of the rows, and a sentence embedder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from data_pipelines.features import FIELDS, FeaturesConfig, feature_key, feature_maker
from posttrain.data.rows import Row
from posttrain.errors import ArtifactError, ConfigError, DataError
from posttrain.models import encoder

TEXTS = ["the cat sat on the mat", "a kitten is sitting on a rug", "stock prices fell sharply today"]


def config(**fields: Any) -> FeaturesConfig:
    return FeaturesConfig.model_validate(fields)


def test_a_column_is_taken_as_it_is():
    rows = [{"id": "0", "v": [1, 2.5, -3]}, {"id": "1", "v": [0, 0, 0]}]
    found = feature_maker(config(**{"from": "column", "column": "v"}), {})(rows)
    assert found.dtype == np.float32 and found.tolist() == [[1, 2.5, -3], [0, 0, 0]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], "has 1 numbers, other rows have 2"),
        ([1.0, "2"], "is of list, expected a list of numbers"),
        ([True, False], "expected a list of numbers"),
        ([], "expected a list of numbers"),
        (None, "is of NoneType"),
        ("1 2", "is of str"),
        ([1.0, float("nan")], "not finite"),
        ([1.0, 1e300], "not finite in float32"),
    ],
)
def test_a_bad_column_names_its_row(value, message):
    rows = [{"id": "0", "v": [1.0, 2.0]}, Row({"id": "7", "v": value}, where="rows.jsonl:8")]
    with pytest.raises(DataError, match=message) as caught:
        feature_maker(config(**{"from": "column", "column": "v"}), {})(rows)
    assert caught.value.where == "rows.jsonl:8"


def test_a_missing_column_is_said_to_be_missing():
    with pytest.raises(DataError, match="`v` is missing"):
        feature_maker(config(**{"from": "column", "column": "v"}), {})([{"id": "0"}])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"from": "column"}, "needs `column`"),
        ({"from": "embedder", "dim": 64}, "`dim` means nothing with `from: embedder`"),
        ({"column": "v"}, "`column` means nothing with `from: gradients`"),
        ({"from": "hidden", "params": "full"}, "`params` means nothing"),
        ({"from": "vectors"}, "gradients"),
    ],
)
def test_fields_of_another_kind_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        config(**fields)


@pytest.mark.parametrize("kind", FIELDS)
def test_a_config_reads_its_own_dump(kind):
    cfg = config(**{"from": kind, **({"column": "v"} if kind == "column" else {})})
    assert FeaturesConfig.model_validate(cfg.dump()) == cfg


def test_the_key_holds_what_the_vectors_depend_on_and_no_more():
    assert feature_key(config(**{"from": "embedder"})) == {"from": "embedder", "max_length": 1024, "batch": 1}
    assert feature_key(config()) != feature_key(config(dim=64))
    assert set().union(*FIELDS.values()) | {"from_"} == set(FeaturesConfig.model_fields)


@pytest.fixture(scope="module")
def packaged() -> Any:
    return feature_maker(config(**{"from": "embedder"}), {})


def rows(texts: list[str]) -> list[dict[str, Any]]:
    return [{"id": str(i), "text": text} for i, text in enumerate(texts)]


def test_the_packaged_embedder_knows_what_is_alike(packaged):
    found = packaged(rows(TEXTS))
    assert found.shape == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    assert found[0] @ found[1] > 0.5 and found[0] @ found[2] < 0.2


def test_embeddings_equal_mean_pooling_written_out(packaged):
    model, tokenizer = packaged.loaded.model, packaged.loaded.tokenizer
    for text, vector in zip(TEXTS, packaged(rows(TEXTS)), strict=True):
        with torch.no_grad():
            states = model(**tokenizer([text], return_tensors="pt")).last_hidden_state[0].double().numpy()
        np.testing.assert_allclose(vector, states.mean(0) / np.linalg.norm(states.mean(0)), atol=1e-6)


def test_batches_agree_and_single_rows_have_the_same_bits(packaged):
    texts = [text + " and more" * i for i, text in enumerate(TEXTS * 3)]
    one = packaged(rows(texts))
    batched = feature_maker(config(**{"from": "embedder", "batch": 4}), {})(rows(texts))
    np.testing.assert_allclose(batched, one, atol=1e-6)
    assert np.array_equal(packaged(rows(texts)[4:6]), one[4:6])


def test_cut_and_empty_texts_are_counted():
    maker = feature_maker(config(**{"from": "embedder", "max_length": 8}), {})
    found = maker(rows(["", " \n", "word " * 50, "short", "word " * 6]))
    assert not found[:2].any() and found[2:].any(axis=1).all()
    assert maker.notes == {"without text": 2, "cut at max_length": 1}
    np.testing.assert_allclose(found[2], found[4], atol=1e-6)


def test_a_folder_can_take_its_place(tmp_path):
    found = _own_encoder(tmp_path / "cls", "pooling_mode_cls_token")
    maker = feature_maker(config(**{"from": "embedder"}), {"embedder": [found]})
    with torch.no_grad():
        ids = torch.tensor([maker.loaded.tokenizer(TEXTS[0])["input_ids"]])
        first = maker.loaded.model(input_ids=ids).last_hidden_state[0, 0].numpy()
    np.testing.assert_allclose(maker(rows(TEXTS[:1]))[0], first / np.linalg.norm(first), atol=1e-6)


def _own_encoder(folder: Path, mode: str) -> Path:
    from transformers import BertConfig, BertModel

    tokenizer = encoder.load_encoder().tokenizer
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": len(tokenizer)}
    BertModel(BertConfig(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 8, mode: True}))
    return folder


def test_an_embedder_that_is_not_there_or_pools_otherwise_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="pooling_mode_max_tokens"):
        feature_maker(config(**{"from": "embedder"}), {"embedder": [_own_encoder(tmp_path / "max", "pooling_mode_max_tokens")]})
    with pytest.raises(ArtifactError, match="no such model folder"):
        feature_maker(config(**{"from": "embedder"}), {"embedder": [tmp_path / "none"]})
    with pytest.raises(ConfigError, match="one model, got 2"):
        feature_maker(config(**{"from": "embedder"}), {"embedder": [tmp_path, tmp_path]})
    monkeypatch.setattr(encoder, "PACKAGED", "package:no_such_package/model")
    with pytest.raises(ConfigError, match=r"posttrain\[embed\]"):
        feature_maker(config(**{"from": "embedder"}), {})

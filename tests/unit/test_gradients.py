"""Gradient and hidden-state features of a tiny Qwen2 against plain loops in float64."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipelines.features import FeaturesConfig, feature_maker
from data_pipelines.gradients import Checkpoint, GradientFeatures, trainable
from data_pipelines.projection import Projector
from posttrain.errors import ConfigError, NumericsError
from posttrain.models.create import new_model, train_tokenizer
from posttrain.models.load import load_model
from posttrain.models.save import save_model

TEXTS = [f"{'a river ' * (1 + i % 4)}runs under bridge {i * 7}" for i in range(9)]
ROWS = [{"id": str(i), "text": text} for i, text in enumerate(TEXTS)]
CHAT = [
    {"id": "c", "messages": [{"role": "user", "content": "which river?"}, {"role": "assistant", "content": "the river 7"}]},
    {"id": "v", "prompt": "which bridge?", "answer": "bridge 14"},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Two checkpoints of a tied and one of an untied model."""
    tokenizer = train_tokenizer(TEXTS, 300, 128)
    made = []
    for seed, tied in ((0, True), (1, True), (2, False)):
        sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": tied, "initializer_range": 0.2}
        model = new_model("qwen2", tokenizer, seed, **sizes)
        made.append(tmp_path_factory.mktemp("model"))
        save_model(model, tokenizer, made[-1])
    return made


@pytest.fixture(scope="module")
def adapter(folders, tmp_path_factory) -> Path:
    """A trained-looking adapter: neither A nor B is zero."""
    from peft import LoraConfig, get_peft_model

    loaded = load_model(folders[0])
    model = get_peft_model(loaded.model, LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    out = tmp_path_factory.mktemp("adapter")
    save_model(model, loaded.tokenizer, out, base=loaded.source)
    return out


def config(**fields: Any) -> FeaturesConfig:
    return FeaturesConfig.model_validate({"from": "gradients", "dim": 64, **fields})


def maker(models: list[Path], **fields: Any) -> GradientFeatures:
    return feature_maker(config(**fields), {"model": models})  # type: ignore[return-value]


def slow_gradients(features: GradientFeatures, rows: list[dict[str, Any]], pick: Any) -> np.ndarray:
    """float64[n, size]: one row at a time by torch.autograd, on the model in float64; `pick` names its parameters."""
    model = features.checkpoints[0].model.double()
    model.requires_grad_(True)
    parameters = pick(model)
    out = []
    for row in rows:
        found = features._tokens(row)
        ids = torch.tensor([found.input_ids])
        logits = model(input_ids=ids).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        carries = torch.tensor(found.loss_mask[1:]).double()
        grads = torch.autograd.grad((loss * carries).sum() / carries.sum(), parameters)
        out.append(torch.cat([g.flatten() for g in grads]).numpy())
    model.float()
    return np.stack(out)


def lora_parameters(model: Any) -> list[Any]:
    return [p for name, p in model.named_parameters() if "lora_B" in name]


CASES = {
    "full": (0, "full", lambda m: list(m.parameters())),
    "untied": (2, "full", lambda m: list(m.parameters())),
    "last_layer": (2, "last_layer", lambda m: [m.get_output_embeddings().weight]),
    "lora": (0, "lora", lora_parameters),
}


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_equals_a_loop_of_autograd(folders, case, batch):
    which, params, pick = CASES[case]
    features = maker([folders[which]], params=params, batch=batch)
    found = features([*ROWS, *CHAT])
    slow = slow_gradients(features, [*ROWS, *CHAT], pick)
    assert slow.shape[1] == features.checkpoints[0].size
    expected = slow @ features.projector.matrix().T
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    assert np.linalg.norm(slow, axis=1).min() > 1e-3


def test_the_head_of_a_tied_model_counts_its_use_as_output_only(folders):
    features = maker([folders[0]], params="last_layer")
    model = features.checkpoints[0].model
    apart = torch.nn.Parameter(model.get_output_embeddings().weight.detach().clone())
    model.get_output_embeddings().weight = apart
    found, expected = features(ROWS), slow_gradients(features, ROWS, lambda _: [apart]) @ features.projector.matrix().T
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_a_head_in_pieces_gives_the_same(folders, monkeypatch):
    from data_pipelines import gradients

    whole = maker([folders[2]], params="last_layer")(ROWS)
    monkeypatch.setattr(gradients, "HEAD_ROWS", 100)
    np.testing.assert_allclose(maker([folders[2]], params="last_layer")(ROWS), whole, rtol=1e-5, atol=1e-7)


def test_a_trained_adapter_gives_both_matrices(adapter):
    features = maker([adapter], params="lora")
    assert any("lora_A" in name for name in features.checkpoints[0].names)

    def pick(model: Any) -> list[Any]:
        return [p for name, p in model.named_parameters() if "lora_" in name]

    expected = slow_gradients(features, ROWS, pick) @ features.projector.matrix().T
    np.testing.assert_allclose(features(ROWS), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_a_new_adapter_follows_its_seed_and_is_never_zero(folders):
    found = [maker([folders[0]], seed=seed)(ROWS) for seed in (0, 0, 1)]
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])
    assert np.linalg.norm(found[0], axis=1).min() > 1e-3
    assert all("lora_B" in name for name in maker([folders[0]]).checkpoints[0].names)


@pytest.mark.parametrize("normalise", [False, True])
def test_checkpoints_are_averaged_after_one_projection(folders, normalise):
    parts = [maker([folder], params="full", normalise=normalise)(ROWS).astype(np.float64) for folder in folders[:2]]
    both = maker(folders[:2], params="full", normalise=normalise)(ROWS)
    np.testing.assert_allclose(both, (parts[0] + parts[1]) / 2, rtol=1e-6, atol=1e-7 * np.abs(both).max())
    assert np.abs(parts[0] - parts[1]).max() > 0.1 * np.abs(parts[0]).max()
    if normalise:
        np.testing.assert_allclose(np.linalg.norm(parts[0], axis=1), 1, rtol=1e-6)


def test_trak_scale_is_that_of_signs_over_the_root_of_the_parameters(folders):
    ours, theirs = (maker([folders[0]], params="full", projection="rademacher", scale=scale) for scale in ("norm", "trak"))
    size = ours.checkpoints[0].size
    signs = np.sign(Projector(size, 64, "rademacher").matrix())
    expected = slow_gradients(ours, ROWS[:2], lambda m: list(m.parameters())) @ signs.T / np.sqrt(size)
    np.testing.assert_allclose(theirs(ROWS[:2]), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("params", ["full", "last_layer", "lora"])
def test_one_row_at_a_time_gives_the_same_bits_beside_any_rows(folders, params):
    features = maker([folders[0]], params=params)
    together = features(ROWS)
    order = [3, 0, 8, 1]
    assert np.array_equal(features([ROWS[i] for i in order]), together[order])
    assert np.array_equal(maker([folders[0]], params=params)(ROWS[5:6]), together[5:6])


def test_batches_agree_up_to_rounding(folders):
    for params in ("full", "last_layer", "lora"):
        one = maker([folders[0]], params=params)(ROWS)
        for batch in (2, 100):
            np.testing.assert_allclose(maker([folders[0]], params=params, batch=batch)(ROWS), one, atol=1e-6 * np.abs(one).max())


def test_only_the_answer_carries_loss(folders):
    features, everywhere = maker([folders[0]], params="full"), maker([folders[0]], params="full", loss_on="all")
    assert features._tokens(CHAT[0]).supervised < everywhere._tokens(CHAT[0]).supervised
    assert not np.allclose(features(CHAT), everywhere(CHAT))
    assert np.array_equal(features(ROWS), everywhere(ROWS))


def test_rows_with_nothing_to_learn_are_zero_and_counted(folders):
    features = maker([folders[0]], params="last_layer", max_length=12)
    rows = [{"id": "e", "text": ""}, ROWS[0], {"id": "p", "prompt": "which river is it, and where does it run to?", "answer": "7"}]
    found = features([*rows, {"id": "q", "prompt": "a prompt alone"}, ROWS[3]])
    assert [bool(x.any()) for x in found] == [False, True, False, False, True]
    assert features.notes == {"nothing to learn": 1, "prompt too long": 1, "no answer text": 1, "cut at max_length": 1}


def test_a_preference_row_stands_for_its_chosen_answer(folders):
    row = {"id": "p", "prompt": "which river?", "chosen": "the river 7", "rejected": "none"}
    assert trainable(row)["messages"] == CHAT[0]["messages"]
    features = maker([folders[0]], params="full")
    assert np.array_equal(features([row]), features(CHAT[:1]))


def test_a_gradient_that_is_not_finite_names_its_row(folders):
    features = maker([folders[0]], params="last_layer")
    with torch.no_grad():
        features.checkpoints[0].model.get_output_embeddings().weight[0] = float("nan")
    with pytest.raises(NumericsError, match="row 4"):
        features(ROWS[4:5])


def test_checkpoints_must_be_of_one_model(folders, adapter):
    with pytest.raises(ConfigError, match="checkpoint 2 has other parameters"):
        maker([folders[0], folders[2]], params="full")
    with pytest.raises(ConfigError, match="other parameters"):
        maker([folders[0], adapter], params="lora")


def test_what_cannot_be_differentiated_is_refused(folders):
    with pytest.raises(ConfigError, match="need a model"):
        maker([])
    with pytest.raises(ConfigError, match="features.lora.targets"):
        maker([folders[0]], lora={"targets": ["no_such_module"]})


def test_threads_and_modes_are_left_alone(folders):
    checkpoint = Checkpoint(folders[0], config(params="last_layer"))
    assert not checkpoint.model.training and not any(p.requires_grad for p in checkpoint.model.parameters())
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("pooling", "layer", "batch"), [*itertools.product(["mean", "position"], [-1, 0, 1], [1, 5])])
def test_hidden_states_equal_a_loop(folders, pooling, layer, batch):
    features = feature_maker(
        FeaturesConfig.model_validate({"from": "hidden", "pooling": pooling, "layer": layer, "batch": batch}), {"model": [folders[0]]}
    )
    found = features([*ROWS, *CHAT])
    model = load_model(folders[0]).model.double()
    for row, vector in zip([*ROWS, *CHAT], found, strict=True):
        ids = torch.tensor([features._tokens(row).input_ids])
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states[layer][0].numpy()
        weight = np.arange(1, len(states) + 1.0) if pooling == "position" else np.ones(len(states))
        np.testing.assert_allclose(vector, weight @ states / weight.sum(), rtol=0, atol=3e-6 * np.abs(states).max())


def test_hidden_states_need_one_model_and_a_layer_it_has(folders):
    with pytest.raises(ConfigError, match="one model, got 2"):
        feature_maker(FeaturesConfig.model_validate({"from": "hidden"}), {"model": folders[:2]})
    with pytest.raises(ConfigError, match="layer 5 of a model with 2"):
        feature_maker(FeaturesConfig.model_validate({"from": "hidden", "layer": 5}), {"model": folders[:1]})

"""SFT: at the neutral setting every number is TRL's, bit by bit; row weights, packing and accumulation keep their promises."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from trainer_kit import COMMON, curve, lora, rng, same, sft_trainer, weights

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_ten_steps_equal_trl_bitwise(tiny_model_dir: Path, tmp_path: Path, adapter: bool) -> None:
    import trl

    from posttrain.core.events import Events
    from posttrain.trainers.sft import SFTTrainer

    seen: list[Any] = []
    for name, cls, extra in (("trl", trl.SFTTrainer, {}), ("ours", SFTTrainer, {"events": Events(None)})):
        trainer = sft_trainer(cls, tiny_model_dir, tmp_path / name, peft=lora() if adapter else None, extra=extra, save_steps=4)
        trainer.train()
        seen.append((weights(trainer), curve(trainer), rng()))
    (w0, c0, r0), (w1, c1, r1) = seen
    assert len(c0) == 10
    assert c0 == c1
    assert same(w0, w1)
    assert r0 == r1


def test_accumulation_does_not_change_the_step(tiny_model_dir: Path, tmp_path: Path) -> None:
    from posttrain.trainers.sft import SFTTrainer

    curves = []
    for per_device, accumulation in ((8, 1), (1, 8)):
        trainer = sft_trainer(
            SFTTrainer,
            tiny_model_dir,
            tmp_path / str(per_device),
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulation,
            max_steps=3,
        )
        trainer.train()
        curves.append([loss for loss, _ in curve(trainer)])
    assert curves[0] == pytest.approx(curves[1], abs=2e-6)


def test_row_weights_scale_each_rows_loss(tiny_model_dir: Path, tmp_path: Path) -> None:
    """One batch: L = sum_i w_i * nll_i / N, against log-probabilities of a plain forward pass."""
    import trl
    from trainer_kit import load

    from posttrain.trainers._sft import SFTTrainer, encode_dataset

    model, tokenizer = load(tiny_model_dir)
    rows = [SimpleNamespace(input_ids=list(range(5, 5 + n)), loss_mask=[0] * 2 + [1] * (n - 2)) for n in (6, 9, 12, 7)]
    given = [1.0, 0.0, 3.0, 2.0]
    dataset = encode_dataset(rows, given)
    counts = [len(row.input_ids) - 2 for row in rows]
    scale = sum(counts) / sum(w * n for w, n in zip(given, counts, strict=True))
    with torch.no_grad():
        nll = []
        for row in rows:
            ids = torch.tensor([row.input_ids])
            logp = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            nll.append(-logp[1:].sum().item())
    expected = sum(w * scale * value for w, value in zip(given, nll, strict=True)) / sum(counts)
    args = trl.SFTConfig(
        output_dir=str(tmp_path),
        dataset_kwargs={"skip_prepare_dataset": True},
        **{**COMMON, "max_steps": 1, "gradient_accumulation_steps": 1},
    )
    trainer = SFTTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    assert curve(trainer)[0][0] == pytest.approx(expected, rel=1e-5)
    assert sum(w * n for w, n in zip(dataset["loss_weight"], counts, strict=True)) == pytest.approx(sum(counts))


def test_packed_rows_do_not_see_one_another(tiny_model_dir: Path) -> None:
    from trainer_kit import load
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from posttrain.trainers._sft import encode_dataset, pack

    model, tokenizer = load(tiny_model_dir)
    second = list(range(30, 40))
    outputs = []
    for first in (list(range(5, 15)), list(range(105, 115))):
        rows = [SimpleNamespace(input_ids=ids, loss_mask=[1] * 10) for ids in (first, second)]
        packed = pack(encode_dataset(rows), 32)
        batch = DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=True)([packed[0]])
        batch.pop("labels")
        place = batch["input_ids"][0].tolist().index(30)
        with torch.no_grad():
            outputs.append(model(**batch, use_cache=False).logits[0, place : place + 10])
    alone = model(torch.tensor([second])).logits[0]
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)
    assert torch.allclose(outputs[0], alone, atol=1e-5)


def test_nothing_supervised_is_refused() -> None:
    from posttrain.errors import DataError
    from posttrain.trainers._sft import encode_dataset

    with pytest.raises(DataError, match="carries loss"):
        encode_dataset([SimpleNamespace(input_ids=[1, 2, 3], loss_mask=[1, 0, 0])])


@pytest.mark.parametrize("given", [[0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0]])
def test_bad_row_weights_are_refused(given: list[float]) -> None:
    from posttrain.errors import DataError
    from posttrain.trainers._sft import encode_dataset

    rows = [SimpleNamespace(input_ids=[1, 2, 3], loss_mask=[1, 1, 1])] * 2
    with pytest.raises(DataError, match="weights"):
        encode_dataset(rows, given)

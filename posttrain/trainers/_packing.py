"""Packing: several rows in one sequence, and the proof on the model at hand that they do not see one another.

TRL fills sequences best-fit and lays the sequences of a pass end to end in one row (1, sum T). Flash attention reads the
bounds of the documents from that row. Attention with a mask (`sdpa`, `eager`) takes the square of the row's length for it, so
there the sequences stay apart, (B, T) with positions that begin again at each document: the same loss for less work.

Which of the two a model may be given is found by trying: a document is changed, and the logits of the documents around it
must stay as they are. A model on which neither holds (state-space layers, code of its own that ignores positions) is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import trl
from datasets import Dataset

from posttrain.errors import ConfigError
from posttrain.models.rng import preserved_rng

IGNORED = -100
Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]
MASKED = ("sdpa", "eager")
LIMIT = {torch.float32: 1e-4, torch.float64: 1e-8}
COARSE = 2e-2
"""Largest change of a logit, in standard deviations of the logits: rounding. A document that is seen changes them by far more."""
PROBE_TOKENS = 48


def pack(dataset: Dataset, max_length: int) -> Dataset:
    """TRL's best-fit packing into sequences of at most `max_length` tokens; `seq_lengths` keeps the rows apart."""
    return trl.pack_dataset(dataset.select_columns(["input_ids", "labels"]), max_length, "bfd")


def collate_apart(pad_id: int, multiple: int | None = None) -> Collate:
    """Collator that keeps packed sequences apart.

    Args:
        pad_id: fills the end of shorter sequences.
        multiple: of which the width is one, TRL's `pad_to_multiple_of`.

    Returns:
        A function of packed examples (`input_ids`, `labels`, `seq_lengths`) to `input_ids`, `labels` and `position_ids`, each
        (B, T). Positions begin at 0 in every document, and at each token of the padding, which so sees nothing but itself; the
        first token of a document and the padding carry no loss. There is no attention mask: with one, transformers would not
        look for documents.
    """

    def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        width = max(len(example["input_ids"]) for example in examples)
        width = -(-width // (multiple or 1)) * (multiple or 1)
        batch = {
            "input_ids": torch.full((len(examples), width), pad_id),
            "labels": torch.full((len(examples), width), IGNORED),
            "position_ids": torch.zeros((len(examples), width), dtype=torch.long),
        }
        for row, example in enumerate(examples):
            size = len(example["input_ids"])
            batch["input_ids"][row, :size] = torch.tensor(example["input_ids"])
            batch["labels"][row, :size] = torch.tensor(example["labels"])
            batch["position_ids"][row, :size] = torch.cat([torch.arange(length) for length in example["seq_lengths"]])
        batch["labels"][batch["position_ids"] == 0] = IGNORED
        return batch

    return collate


def leak(model: Any, collate: Collate, rows: Sequence[Sequence[int]], to_device: Callable[[Any], Any] = lambda batch: batch) -> float:
    """How far a change of document 1 moves the logits of document 2 behind it and of a document in the next sequence.

    Args:
        model: a causal language model; it is called in eval mode without gradient.
        collate: of packed examples.
        rows: token ids of three documents.
        to_device: moves a batch to the model.

    Returns:
        The largest change in standard deviations of the logits; 0 or rounding where documents are apart.
    """
    first, second, third = (list(row[:PROBE_TOKENS]) for row in rows)
    size = model.get_input_embeddings().weight.shape[0]
    other = [(token + 1 + place) % size for place, token in enumerate(first)]
    logits = []
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), preserved_rng():
            for start in (first, other):
                packed = [_packed(start, second), _packed(third)]
                batch = to_device(collate(packed))
                batch.pop("labels")
                logits.append(model(**batch, use_cache=False).logits.double().flatten(0, 1))
    finally:
        model.train(training)
    change = (logits[0] - logits[1])[len(first) :].abs().max()
    return float(change / logits[0].std())


def _packed(*documents: list[int]) -> dict[str, Any]:
    ids = [token for document in documents for token in document]
    return {"input_ids": ids, "labels": ids, "seq_lengths": [len(document) for document in documents]}


def isolate(trainer: Any, rows: Sequence[Sequence[int]], where: str, apart: bool = True) -> str:
    """Gives the trainer a collator under which packed documents do not see one another, found by trying on its model.

    Args:
        trainer: an SFTTrainer with `packing`, before its model is wrapped.
        rows: token ids of documents of the data.
        where: dotted path of the stage.
        apart: whether sequences may be kept apart where attention has a mask.

    Returns:
        `apart` or `end to end`.

    Raises:
        ConfigError: documents see one another either way.
    """
    model = trainer.model
    attention = str(getattr(model.config.get_text_config(), "_attn_implementation", None) or "unknown")
    layouts: dict[str, Collate] = {"end to end": trainer.data_collator}
    if apart and attention in MASKED:
        given = trainer.data_collator
        layouts = {"apart": collate_apart(given.pad_token_id, given.pad_to_multiple_of), **layouts}
    documents = [row if len(row) > 1 else [*row, *row] for row in (rows[place % len(rows)] for place in range(3))]
    limit = LIMIT.get(model.dtype, COARSE)
    leaks = {}
    for name, collate in layouts.items():
        leaks[name] = leak(model, collate, documents, trainer._prepare_inputs)
        if leaks[name] <= limit:
            trainer.data_collator = collate
            return name
    worst = min(leaks.values())
    raise ConfigError(
        f"packed documents see one another: a change of one moves the logits of the next by {worst:.2g} standard deviations, expected at "
        f"most {limit:g} ({model.config.model_type}, attention {attention})",
        where=f"{where}.data.packing",
        fix="set data.packing: false with data.group_by_length: true, or another model.attn",
    )

"""Sequence classifiers on conversations: reward models (one number a conversation) and classifiers of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import ArtifactError, ConfigError
from posttrain.models.check import check_folder
from posttrain.models.load import EXPECTED, _torch_dtype, checkpoint_dtype, default_device, fetch, load_tokenizer
from posttrain.models.quiet import quiet
from posttrain.models.source import resolve_model


@dataclass(frozen=True)
class LoadedClassifier:
    """A live classifier in eval mode.

    Args:
        model: transformers sequence-classification model.
        tokenizer: its tokenizer, with a padding token.
        label: column of the logits that is the score.
        max_length: tokens read of a conversation; of a longer one the end is read.
        device: where it is.
    """

    model: Any
    tokenizer: Any
    label: int
    max_length: int
    device: str

    def token_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation: by the chat template where there is one, else its texts joined by blank lines."""
        if self.tokenizer.chat_template:
            ids = self.tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=False)
        else:
            ids = self.tokenizer("\n\n".join(str(turn["content"] or "") for turn in messages))["input_ids"]
        return [int(token) for token in ids][-self.max_length :]

    def logits(self, conversations: Sequence[Sequence[Mapping[str, Any]]], batch: int = 16) -> list[list[float]]:
        """Logits of all labels, in float32, for each conversation; NaN where the tokenizer makes nothing of it.

        Args:
            conversations: lists of `{role, content}`.
            batch: conversations in one pass, longest together.
        """
        import torch

        ids = [self.token_ids(messages) for messages in conversations]
        order = sorted((i for i, found in enumerate(ids) if found), key=lambda i: -len(ids[i]))
        values = [[float("nan")] * self.model.config.num_labels] * len(ids)
        with torch.inference_mode():
            for rows in _chunks(order, batch):
                longest = len(ids[rows[0]])
                pad = self.tokenizer.pad_token_id
                tokens = torch.tensor([ids[i] + [pad] * (longest - len(ids[i])) for i in rows], device=self.device)
                mask = torch.tensor([[1] * len(ids[i]) + [0] * (longest - len(ids[i])) for i in rows], device=self.device)
                for i, value in zip(rows, self.model(input_ids=tokens, attention_mask=mask).logits.float().tolist(), strict=True):
                    values[i] = value
        return values

    def scores(self, conversations: Sequence[Sequence[Mapping[str, Any]]], batch: int = 16) -> list[float]:
        """The logit of `label` for each conversation; see `logits`."""
        return [found[self.label] for found in self.logits(conversations, batch)]

    @property
    def names(self) -> list[str]:
        """Names of the labels, in the order of the logits."""
        return [str(self.model.config.id2label[number]) for number in range(self.model.config.num_labels)]


def _chunks(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (order[at : at + size] for at in range(0, len(order), size))


def load_classifier(
    ref: Any, *, label: int | None = None, dtype: str = "auto", device: str | None = None, max_length: int | None = None
) -> LoadedClassifier:
    """Loads a classifier from a folder of safetensors; the process's random state stays as it was.

    Args:
        ref: InputRef, ModelConfig, id or path.
        label: column of the logits; needed where there is more than one.
        dtype: `auto` is float32 on a CPU, the checkpoint's own type on a GPU.
        device: default is the GPU where there is one.
        max_length: default is what model and tokenizer allow, at most 4096.

    Raises:
        ConfigError: `label` is missing or does not exist.
        ArtifactError: incomplete, damaged, or no classifier (its head would be random).
    """
    import torch

    source = fetch(resolve_model(ref))
    check_folder(source.local)
    where = device or default_device()
    with torch.random.fork_rng(devices=[]):
        model, report = _pretrained(str(source.local), _torch_dtype(dtype, checkpoint_dtype(source), where), source.where)
    if report["missing_keys"]:
        names = ", ".join(sorted(map(str, report["missing_keys"]))[:3])
        raise ArtifactError(f"no classifier: the checkpoint lacks {names}", where=source.where, fix="give a sequence-classification model")
    tokenizer = load_tokenizer(source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ArtifactError("its tokenizer has neither a padding nor an end token", where=source.where)
    model.config.pad_token_id = tokenizer.pad_token_id
    return LoadedClassifier(
        model.to(where).eval(), tokenizer, _label(model, label, source.where), max_length or _longest(model, tokenizer, source.local), where
    )


def _pretrained(folder: str, dtype: Any, where: str) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForSequenceClassification

    try:
        with quiet():
            loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
            return loaded[0], loaded[1]
    except EXPECTED as error:
        raise ArtifactError(f"transformers cannot load it: {str(error).strip().splitlines()[0][:400]}", where=where) from error


def _label(model: Any, label: int | None, where: str) -> int:
    count = model.config.num_labels
    if label is None and count != 1:
        names = ", ".join(f"{number}: {name}" for number, name in sorted(model.config.id2label.items()))
        raise ConfigError(f"the model has {count} labels ({names}); which one is the score?", where=where, fix="set `label`")
    if label is not None and not 0 <= label < count:
        raise ConfigError(f"label {label} does not exist; the model has {count}", where=where, fix=f"0 to {count - 1}")
    return label or 0


def _longest(model: Any, tokenizer: Any, folder: Path) -> int:
    positions = getattr(model.config, "max_position_embeddings", None) or 4096
    return int(min(positions, tokenizer.model_max_length, 4096))

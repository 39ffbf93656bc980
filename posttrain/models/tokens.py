"""New tokens: tokenizer, embeddings and config grow together.

A new row of the embedding, and of an output layer that is not tied to it, starts as the mean of the rows there were: a
token that is as likely as the average one, the same on every machine. The tokens are no special tokens, so they stay in
decoded text where rewards can see them, and they are never cut apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def add_tokens(model: Any, tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Adds what the tokenizer lacks, in place.

    Args:
        model: transformers model; its embeddings are resized where they have too few rows.
        tokenizer: its tokenizer.
        tokens: texts that become one token each.

    Returns:
        Ids of all `tokens`, in order.
    """
    import torch
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    fresh = [token for token in tokens if token not in known]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in fresh])
    ids = [int(i) for i in tokenizer.convert_tokens_to_ids(list(tokens))]
    new = [i for i, token in zip(ids, tokens, strict=True) if token in fresh]
    rows = model.get_input_embeddings().weight.shape[0]
    if max(ids) >= rows:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    with torch.no_grad():
        for weight in _tables(model):
            weight[new] = weight[: min(new, default=rows)].mean(dim=0)
    return ids


def _tables(model: Any) -> list[Any]:
    """Weight of the embedding, and of the output layer where it is another one."""
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings()
    return [inputs] if outputs is None or outputs.weight is inputs else [inputs, outputs.weight]


def token_rows(model: Any, ids: Sequence[int]) -> dict[str, list[int]]:
    """peft's `trainable_token_indices`: these rows of the embedding, and of an output layer that is not tied to it."""
    tables = _tables(model)
    names = {id(module.weight): name for name, module in model.named_modules() if getattr(module, "weight", None) is not None}
    return {names[id(table)].rpartition(".")[2]: list(ids) for table in tables}

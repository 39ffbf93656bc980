"""`init`: a small model from nothing, for machines without a model hub.

Trains a byte-level BPE tokenizer on the data given, sets the chat template (once for the whole chain), and makes a
Qwen2- or Llama-type decoder with random weights. Where a pretrained model can be had, leave this stage out and name it
under `model`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from posttrain.config.base import PathStr, Positive
from posttrain.config.common import StageConfig
from posttrain.core.context import StageContext
from posttrain.core.registry import data_port, stage
from posttrain.errors import ConfigError


class InitConfig(StageConfig):
    """Sizes of the new model and its tokenizer."""

    arch: Literal["qwen2", "llama"] = "qwen2"
    """Architecture, transformers' `model_type`."""
    vocab_size: Annotated[int, Field(ge=300)] = 2048
    """Most ids the tokenizer may have; 262 are special tokens and single bytes."""
    hidden_size: Positive = 128
    """Width."""
    layers: Positive = 2
    """Decoder blocks."""
    heads: Positive = 4
    """Attention heads; must divide `hidden_size` into even parts."""
    kv_heads: Positive | None = None
    """Key and value heads; must divide `heads`. Default: as many as `heads`."""
    intermediate_size: Positive | None = None
    """Width of the MLP. Default: twice `hidden_size`."""
    max_length: Positive = 1024
    """Longest sequence in tokens."""
    tie_embeddings: bool = True
    """The output layer shares the embedding's weights."""
    init_std: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Standard deviation of the random weights."""
    chat_template: PathStr | None = None
    """Jinja file with the chat template. Default: one special token a role, `<|user|>...<|assistant|>...<|im_end|>`."""
    tokenizer_rows: Positive = 20_000
    """At most this many rows train the tokenizer."""

    @model_validator(mode="after")
    def _heads_fit(self) -> InitConfig:
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise ValueError(f"hidden_size {self.hidden_size} must be an even multiple of heads {self.heads}")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"kv_heads {self.kv_heads} must divide heads {self.heads}")
        return self


@stage("init", config=InitConfig, inputs={"data": data_port("text", "messages", "verifiable", "prompt", "preference")}, output="model")
def run(cfg: InitConfig, ctx: StageContext) -> None:
    """Trains the tokenizer, makes the model, and commits both as a model folder."""
    from posttrain.data.dataset import training_rows
    from posttrain.models.create import new_model, train_tokenizer
    from posttrain.models.save import save_model

    extra = {} if cfg.chat_template is None else {"template": _read_template(cfg.chat_template)}
    rows = training_rows(ctx, "data")[: cfg.tokenizer_rows]
    tokenizer = train_tokenizer(_counted(rows, ctx), cfg.vocab_size, cfg.max_length, **extra)
    model = new_model(
        cfg.arch,
        tokenizer,
        ctx.seed,
        hidden_size=cfg.hidden_size,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.kv_heads or cfg.heads,
        intermediate_size=cfg.intermediate_size or 2 * cfg.hidden_size,
        max_position_embeddings=cfg.max_length,
        tie_word_embeddings=cfg.tie_embeddings,
        initializer_range=cfg.init_std,
    )
    facts = save_model(model, tokenizer, ctx.out, meta=ctx.meta)
    ctx.summary.update(facts, tokenizer_rows=len(rows))
    ctx.events.log(f"{cfg.arch} with {facts['parameters']:,} parameters, {facts['vocab_size']} token ids learned from {len(rows)} rows")


def row_texts(row: dict[str, Any]) -> Iterator[str]:
    """All texts of a row of any type."""
    for field in ("text", "prompt", "messages", "answer", "chosen", "rejected"):
        value = row.get(field)
        if isinstance(value, list):
            yield from (turn["content"] for turn in value if isinstance(turn, dict) and isinstance(turn.get("content"), str))
        elif value is not None:
            yield str(value)


def _counted(rows: Iterable[dict[str, Any]], ctx: StageContext) -> Iterator[str]:
    for done, row in enumerate(rows, start=1):
        yield from row_texts(row)
        ctx.events.progress("tokenizer", done, None, unit="row")


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the chat template cannot be read: {error}", where="chat_template", fix="give a UTF-8 Jinja file") from None

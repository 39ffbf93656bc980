"""What a completion must satisfy, as it is written in a config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from posttrain.config.base import Positive, Strict

SCHEMA_BYTES = 64 * 1024
REGEX_CHARS = 4096
KINDS = ("choices", "regex", "json_schema", "lark", "boxed", "banned", "uncited", "plugin", "all")


class UncitedConfig(Strict):
    """Texts that must not be cited."""

    path: str | list[str]
    """Shards, as in a source: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt; e.g. the training data."""
    ngram: Annotated[int, Field(ge=2)] = 8
    """Words in a row that are a citation."""


class ConstraintConfig(Strict):
    """Exactly one of its fields, beside `args`."""

    choices: Annotated[list[str], Field(min_length=1)] | None = None
    """One of these texts."""
    regex: Annotated[str, Field(max_length=REGEX_CHARS)] | None = None
    """The whole text matches this regular expression (Rust's syntax, without look-around)."""
    json_schema: dict[str, Any] | str | None = None
    """JSON of this schema (2020-12); or the path of a file that holds one."""
    lark: str | None = None
    """A text of this Lark grammar, whose first rule is `start`."""
    boxed: Literal[True] | None = None
    r"""The text ends with an answer in `\boxed{}`."""
    banned: Annotated[list[str], Field(min_length=1)] | None = None
    """None of these texts occurs."""
    uncited: UncitedConfig | None = None
    """No long run of words of these texts is repeated: the citation blocker of hyperfitting."""
    plugin: str | None = None
    """A Python predicate of a package named with --plugin; see `posttrain.rollout.constraints.predicate`."""
    args: dict[str, Any] = {}
    """Arguments of the predicate."""
    all: Annotated[list[ConstraintConfig], Field(min_length=1)] | None = None
    """All of these."""

    @model_validator(mode="after")
    def _one(self) -> ConstraintConfig:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(KINDS)}; got {', '.join(given) or 'none'}")
        if self.args and self.plugin is None:
            raise ValueError("`args` go with `plugin`")
        return self

    @field_validator("choices", "banned")
    @classmethod
    def _texts(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("a text is listed twice")
        if value is not None and "" in value:
            raise ValueError("a text is empty")
        return value

    @field_validator("json_schema")
    @classmethod
    def _schema(cls, value: dict[str, Any] | str | None) -> dict[str, Any] | str | None:
        if isinstance(value, dict) and len(json.dumps(value)) > SCHEMA_BYTES:
            raise ValueError(f"the schema is larger than {SCHEMA_BYTES} bytes")
        return value

    @field_validator("lark")
    @classmethod
    def _grammar(cls, value: str | None) -> str | None:
        if value is not None and len(value) > SCHEMA_BYTES:
            raise ValueError(f"the grammar is larger than {SCHEMA_BYTES} characters")
        return value

    def files(self) -> list[str]:
        """Parts that read files of this machine; what comes over a network must have none."""
        own = ["uncited"] if self.uncited is not None else ["json_schema"] if isinstance(self.json_schema, str) else []
        return own + [name for part in self.all or () for name in part.files()]

    def schema_object(self) -> dict[str, Any]:
        """The JSON schema, read from its file where it is a path.

        Raises:
            OSError, ValueError: the file cannot be read, is too large, or holds no JSON object.
        """
        if isinstance(self.json_schema, dict):
            return self.json_schema
        text = Path(str(self.json_schema)).read_text(encoding="utf-8")
        if len(text) > SCHEMA_BYTES:
            raise ValueError(f"larger than {SCHEMA_BYTES} bytes")
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
        return found


class AwrsConfig(Strict):
    """Adaptive weighted rejection sampling; see `posttrain.rollout.awrs`."""

    probes: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = "auto"
    """Tokens looked at after the accepted one, for a steadier weight."""
    max_calls: Positive = 64
    """Rejections a token after which a full mask takes over, where the constraint has one."""


class SamplerConfig(Strict):
    """How constrained completions are drawn."""

    method: Literal["awrs", "mask", "local"] = "awrs"
    """`awrs`: exact, with a weight by point queries; `mask`: exact, with the exact weight by full masks; `local`: no weight."""
    awrs: AwrsConfig = AwrsConfig()
    """Fields of `awrs`."""
    particles: Annotated[int, Field(ge=1, le=256)] = 1
    """Particles of each completion; one of them is returned, drawn by its weight."""
    ess_threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Particles are resampled where the effective sample size falls below this share of them; 0 is never."""
    resampling: Literal["systematic", "stratified", "multinomial", "residual"] = "systematic"
    """Resampling scheme."""

"""A constraint that comes with a request over the network."""

from __future__ import annotations

import functools
from typing import Any, Literal

from pydantic import model_validator

from posttrain.config.base import Strict
from posttrain.config.constraint import ConstraintConfig, SamplerConfig
from posttrain.rollout._build import build_constraint
from posttrain.rollout.constraints import Constraint


class Asked(Strict):
    """The field `awrs` of a request."""

    constraint: ConstraintConfig | None = None
    """What the completion must satisfy."""
    sampler: SamplerConfig = SamplerConfig()
    """How it is drawn."""

    @model_validator(mode="after")
    def _no_files(self) -> Asked:
        if self.constraint is not None and self.constraint.files():
            raise ValueError(f"{self.constraint.files()[0]}: a request may not name a file of the server; give the content itself")
        return self


class ResponseFormat(Strict):
    """The field `response_format` of a request."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _with_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") is not (self.json_schema is not None):
            raise ValueError("`json_schema` goes with type json_schema")
        if self.json_schema is not None and not isinstance(self.json_schema.get("schema"), dict):
            raise ValueError("json_schema.schema is missing")
        return self

    def constraint(self) -> ConstraintConfig | None:
        """What it asks of the text."""
        if self.type == "text":
            return None
        return ConstraintConfig(json_schema={"type": "object"} if self.json_schema is None else self.json_schema["schema"])


def built(constraint: ConstraintConfig) -> Constraint:
    """The constraint, built once for all requests with the same one.

    Raises:
        ConfigError: it cannot be built.
    """
    return _built(constraint.model_dump_json(exclude_none=True))


@functools.lru_cache(maxsize=256)
def _built(text: str) -> Constraint:
    return build_constraint(ConstraintConfig.model_validate_json(text), "awrs.constraint")

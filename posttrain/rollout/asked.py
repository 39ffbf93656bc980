"""A constraint that comes with a request over the network."""

from __future__ import annotations

import functools

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


def built(constraint: ConstraintConfig) -> Constraint:
    """The constraint, built once for all requests with the same one.

    Raises:
        ConfigError: it cannot be built.
    """
    return _built(constraint.model_dump_json(exclude_none=True))


@functools.lru_cache(maxsize=256)
def _built(text: str) -> Constraint:
    return build_constraint(ConstraintConfig.model_validate_json(text), "awrs.constraint")

"""The strict base of every config model.

Unknown keys are errors, values are not coerced ("12" is not 12, "false" is not false), instances are frozen, and the
string under a field is its documentation (shown by `posttrain schema` and by the errors).
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationInfo


class Strict(BaseModel):
    """Frozen, closed, uncoerced pydantic model; see the module docstring."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        populate_by_name=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    def dump(self) -> dict[str, Any]:
        """JSON-ready dict by alias (the names written in YAML)."""
        return self.model_dump(mode="json", by_alias=True)


class ReportOnly:
    """Marker in `Annotated[...]`: the field cannot change committed bytes, so it stays out of the stage key."""


REPORT_ONLY = ReportOnly()


def _expand_path(value: str, info: ValidationInfo) -> str:
    from posttrain.config.paths import expand_path

    return expand_path(value, (info.context or {}).get("base"))


def _expand_model_id(value: str, info: ValidationInfo) -> str:
    from posttrain.config.paths import expand_model_id

    return expand_model_id(value, (info.context or {}).get("base"))


PathStr = Annotated[str, StringConstraints(min_length=1), AfterValidator(_expand_path)]
"""A local path. `~`, `${VAR}` and `${VAR:-default}` are expanded; relative means relative to the YAML file."""

ModelId = Annotated[str, StringConstraints(min_length=1), AfterValidator(_expand_model_id)]
"""`owner/name` (hub id), a folder or GGUF file (a path starting with `./`, `../`, `~`, `/` or `${`), or
`package:NAME/FILE` (a file shipped inside an installed Python package)."""

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")]
"""Name of a stage, source or eval set: lower-case letters, digits, `-`, `_`, at most 40."""

Positive = Annotated[int, Field(ge=1)]
"""Integer, at least 1."""

Share = Annotated[float, Field(gt=0, le=1)]
"""Fraction in (0, 1]."""

"""JSON Schema of a pipeline file, for editors; what a stage may hold depends on its `method`."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from posttrain.config.common import StageConfig
from posttrain.config.pipeline import Pipeline
from posttrain.core.registry import methods

_REF = "#/$defs/{model}"


def _stage_rule(name: str, ref: dict[str, Any]) -> dict[str, Any]:
    return {"if": {"properties": {"method": {"const": name}}, "required": ["method"]}, "then": ref}


def json_schema() -> dict[str, Any]:
    """Draft 2020-12 schema of the whole file; every known method is a branch that `method` chooses."""
    known = methods()
    classes: list[type[StageConfig] | type[Pipeline]] = list(dict.fromkeys([Pipeline, *(m.config for m in known.values())]))
    refs, shared = models_json_schema([(c, "validation") for c in classes], ref_template=_REF, by_alias=True)
    definitions = dict(shared["$defs"])
    top = definitions.pop(refs[(Pipeline, "validation")]["$ref"].rsplit("/", 1)[-1])
    stage = {
        "type": "object",
        "required": ["name", "method"],
        "properties": {
            "method": {
                "enum": list(known),
                "description": "\n".join(f"{n}: {m.doc.splitlines()[0] if m.doc else ''}" for n, m in known.items()),
            }
        },
        "allOf": [_stage_rule(name, refs[(m.config, "validation")]) for name, m in known.items()],
    }
    definitions["Stage"] = stage
    top["properties"]["stages"] = {**top["properties"]["stages"], "minItems": 1, "items": {"$ref": "#/$defs/Stage"}}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "posttrain pipeline", **top, "$defs": definitions}

"""Shared by the tests of constraints: vocabularies, a model of bytes, schemas that must work and schemas that must be refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.config.constraint import ConstraintConfig, SamplerConfig
from posttrain.rollout._build import build_constraint
from posttrain.rollout.awrs import InverseOrder, awrs, noise
from posttrain.rollout.base import Request, Sampling, request_seed
from posttrain.rollout.constraints import Constraint, TokenChecker, Vocabulary

END = 256
PIECES = [b'{"', b'": ', b'", "', b'"}', b"true", b"false", b"null", b"\xf0\x9f", b"\x98\x80", b"10", b"ab", b'"a"', b"[", b"]]"]

SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 22]}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
JSON = {"all": [{"json_schema": SCHEMA}, {"banned": [" ", "\n", "\r", "\t"]}]}
"""Records without white space, so that a small model ends them."""
WORDS = {"regex": "[a-h]|[s-z][s-z]"}
"""Half of the first letters lead to long words, which hardly ever come, since an end is as rare as any other token."""


def sharpened(folder: Path) -> Any:
    """The tiny model, a little sharpened, so that its choices have margins."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.3)
    return model


def bound_requests(
    tokenizer: Any,
    prompts: Sequence[str],
    count: int,
    constraint: dict[str, Any],
    temperature: float = 1.0,
    max_tokens: int = 40,
    **sampler: Any,
) -> list[Request]:
    """`count` constrained requests a prompt, each with noise of its own and the id PROMPT/NUMBER."""
    found, settings = build_constraint(ConstraintConfig(**constraint)), SamplerConfig(**sampler)
    return [
        Request(tokenizer.encode(prompt), request_seed(3, prompt, k), Sampling(max_tokens, temperature), f"{prompt}/{k}", found, settings)
        for prompt in prompts
        for k in range(count)
    ]


def byte_vocabulary() -> Vocabulary:
    """256 single bytes, an end token, and some tokens of several bytes, parts of an emoji among them."""
    return Vocabulary([*(bytes([i]) for i in range(256)), b"", *PIECES], frozenset({END}))


def favourites(seed: int, size: int) -> np.ndarray:
    """(size,) a distribution that likes the signs of JSON, digits and some letters, and gives everything else a little."""
    rng = np.random.default_rng(seed)
    p = np.full(size, 1e-4)
    for sign, share in {'"': 6, "}": 4, "]": 4, ",": 1, ":": 3, "{": 2, "[": 1, " ": 0.2}.items():
        p[ord(sign)] = share
    for sign in "0123456789abcdetrufalsn.-":
        p[ord(sign)] = rng.uniform(0.1, 1.0)
    p[END] = 3.0
    return p / p.sum()


def written(constraint: Constraint, seed: int, limit: int = 400) -> tuple[bytes, bool]:
    """(text, whether it ended) of a draw by AWRS from `favourites`."""
    vocabulary = byte_vocabulary()
    checker = TokenChecker(constraint.start(), vocabulary)
    p = favourites(seed, len(vocabulary))
    for step in range(limit):
        found = awrs(InverseOrder(p, noise(seed, step)), checker.allows, probes=1)
        if found.token is None:
            return b"".join(vocabulary.pieces[t] for t in checker.tokens), False
        if found.token == END:
            return b"".join(vocabulary.pieces[t] for t in checker.tokens), True
        checker.advance(found.token)
    return b"".join(vocabulary.pieces[t] for t in checker.tokens), False


def obj(required: bool = True, **properties: Any) -> dict[str, Any]:
    """A closed object schema."""
    found = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**found, "required": list(properties)} if required else found


STR, INT, NUM, BOOL = (
    {"type": "string", "maxLength": 6},
    {"type": "integer", "minimum": 0, "maximum": 999},
    {"type": "number"},
    {"type": "boolean"},
)
GOOD: dict[str, tuple[dict[str, Any], list[Any], list[Any]]] = {
    "boolean": (BOOL, [True, False], ["true", 1, None]),
    "integer bounds": ({"type": "integer", "minimum": 5, "maximum": 17}, [5, 9, 17], [4, 18, -6, "7"]),
    "negative bounds": ({"type": "integer", "minimum": -20, "maximum": -3}, [-3, -20, -11], [-2, -21, 3]),
    "exclusive bounds": ({"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 10}, [1, 9], [0, 10]),
    "number bounds": ({"type": "number", "minimum": 0.5, "maximum": 1.5}, [0.5, 1, 1.25], [0.4, 1.6]),
    "null": ({"type": "null"}, [None], [0, ""]),
    "enum": ({"enum": ["red", "green", 3, None]}, ["red", 3, None], ["blue", "3"]),
    "const": ({"const": {"a": [1, 2]}}, [{"a": [1, 2]}], [{"a": [2, 1]}]),
    "string length": ({"type": "string", "minLength": 2, "maxLength": 4}, ["ab", "abcd"], ["a", "abcde"]),
    "string pattern": ({"type": "string", "pattern": "^[a-c]{2}[0-9]$"}, ["ab1", "cc9"], ["ab", "xb1"]),
    "date": ({"type": "string", "format": "date"}, ["2024-02-29", "1999-12-31"], ["2024-13-01", "today"]),
    "object": (obj(a=INT, b=STR), [{"a": 1, "b": "x"}], [{"a": 1}, {"a": 1, "b": "x", "c": 2}]),
    "optional keys": ({**obj(a=INT, b=BOOL), "required": ["b"]}, [{"b": True}, {"a": 3, "b": False}], [{"a": 3}]),
    "nested": (obj(a=obj(b=obj(c=INT))), [{"a": {"b": {"c": 1}}}], [{"a": {"b": {}}}]),
    "free keys": ({"type": "object", "additionalProperties": INT, "maxProperties": 2}, [{}, {"x": 1}], [{"x": "1"}]),
    "pattern keys": (
        {"type": "object", "patternProperties": {"^k[0-9]$": BOOL}, "additionalProperties": False},
        [{}, {"k1": True}],
        [{"x": True}],
    ),
    "array": ({"type": "array", "items": INT, "maxItems": 3}, [[], [1, 2, 3]], [[1, 2, 3, 4], ["1"]]),
    "array bounds": ({"type": "array", "items": BOOL, "minItems": 2, "maxItems": 2}, [[True, False]], [[True], [True] * 3]),
    "tuple": ({"type": "array", "prefixItems": [INT, BOOL], "items": False, "minItems": 2}, [[1, True]], [[True, 1], [1, True, 2]]),
    "array of objects": ({"type": "array", "items": obj(n=INT), "minItems": 1, "maxItems": 2}, [[{"n": 1}]], [[], [{"m": 1}]]),
    "types": ({"type": ["integer", "null"], "minimum": 0, "maximum": 9}, [3, None], ["3", 10]),
    "any of": ({"anyOf": [INT, {"type": "string", "maxLength": 2}]}, [7, "ab"], ["abc", None]),
    "all of": ({"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]}, [3, 5], [2, 6]),
    "references": (
        {"$defs": {"n": INT}, **obj(a={"$ref": "#/$defs/n"}, b={"$ref": "#/$defs/n"})},
        [{"a": 1, "b": 2}],
        [{"a": 1, "b": "2"}],
    ),
    "recursion": (
        {"$defs": {"t": {**obj(v=INT, next={"$ref": "#/$defs/t"}), "required": ["v"]}}, "$ref": "#/$defs/t"},
        [{"v": 1}, {"v": 1, "next": {"v": 2}}],
        [{"next": {"v": 2}}],
    ),
    "tree": (
        {"$defs": {"t": {"anyOf": [INT, {"type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": 2}]}}, "$ref": "#/$defs/t"},
        [1, [], [1, [2, 3]]],
        ["1", [1, 2, 3]],
    ),
    "multiple of": ({"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100}, [0, 95], [7, 101]),
    "unicode": ({"enum": ["héllo", "😀", "日本"]}, ["héllo", "😀"], ["hello"]),
    "escapes": ({"const": 'a"b\\c\n'}, ['a"b\\c\n'], ["abc"]),
    "titles and defaults": (
        {
            **obj(a={**INT, "title": "A", "description": "d", "default": 3}),
            "title": "T",
            "$schema": "https://json-schema.org/draft/2020-12/schema",
        },
        [{"a": 3}],
        [{}],
    ),
}
"""Name -> schema, values it has, values it has not."""

HOSTILE: dict[str, tuple[Any, str]] = {
    "unique items": ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    "not": ({"not": {"type": "string"}}, "not"),
    "conditional": ({"type": "object", "if": {"required": ["a"]}, "then": {"required": ["b"]}}, '"if"'),
    "dependent": ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    "contains": ({"type": "array", "contains": {"type": "integer"}}, "contains"),
    "property names": ({"type": "object", "propertyNames": {"pattern": "^a"}}, "propertyNames"),
    "unevaluated": ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
    "unknown format": ({"type": "string", "format": "poem"}, "poem"),
    "overlapping one of": ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}, "oneOf"),
    "switched off": ({"x-guidance": {"lenient": True}, "type": "array", "uniqueItems": True}, "x-guidance"),
    "switched off below": (obj(a={"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}), "x-guidance"),
    "empty enum": ({"enum": []}, "(?i)unsatisfiable"),
    "false": (obj(a=False), "(?i)unsatisfiable"),
    "empty bounds": ({"type": "integer", "minimum": 5, "maximum": 2}, "(?i)unsatisfiable"),
    "empty length": ({"type": "string", "minLength": 5, "maxLength": 2}, "(?i)unsatisfiable"),
    "clashing types": ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "(?i)unsatisfiable"),
    "itself": ({"$ref": "#"}, "needs itself"),
    "endless object": ({"$defs": {"t": obj(n={"$ref": "#/$defs/t"})}, "$ref": "#/$defs/t"}, "needs itself"),
    "endless array": (
        {"$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}, "minItems": 1}}, "$ref": "#/$defs/t"},
        "needs itself",
    ),
    "endless pair": (
        {"$defs": {"a": obj(b={"$ref": "#/$defs/b"}), "b": obj(a={"$ref": "#/$defs/a"})}, "$ref": "#/$defs/a"},
        "needs itself",
    ),
    "no such reference": ({"$ref": "#/$defs/nothing"}, "nothing"),
    "over the network": ({"$ref": "http://example.com/schema"}, "example.com"),
    "unknown type": ({"type": "text"}, "text"),
    "broken pattern": ({"type": "string", "pattern": "(a|"}, "unclosed group"),
    "look-around": ({"type": "string", "pattern": "^(?=a)b$"}, "look-around"),
    "missing required": ({"type": "object", "properties": {}, "required": ["b"], "additionalProperties": False}, "required property"),
}
"""Name -> schema, a word that the error must say."""


def compact(value: Any) -> bytes:
    """JSON as the grammar writes it by default."""
    return json.dumps(value, ensure_ascii=False).encode()

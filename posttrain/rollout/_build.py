"""From a ConstraintConfig to a Constraint, with the checks that need the whole grammar."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from posttrain.config.constraint import ConstraintConfig
from posttrain.errors import ConfigError
from posttrain.rollout.constraints import BOXED, All, Banned, Choices, Constraint, Grammar, Predicated, _library, find_predicate
from posttrain.rollout.uncited import Uncited

WHERE = "rollout.constraint"


_CONFIGS: WeakKeyDictionary[Constraint, ConstraintConfig] = WeakKeyDictionary()


def build_constraint(config: ConstraintConfig, where: str = WHERE) -> Constraint:
    """The constraint of a config.

    Raises:
        ConfigError: names the part, and what it cannot enforce, or that no text satisfies it.
    """
    found = _build(config, where)
    _CONFIGS[found] = config
    return found


def config_of(constraint: Constraint) -> ConstraintConfig | None:
    """The config that `build_constraint` made it from; None where something else did."""
    return _CONFIGS.get(constraint)


def _build(config: ConstraintConfig, where: str) -> Constraint:
    if config.choices is not None:
        return Choices(config.choices)
    if config.banned is not None:
        return Banned(config.banned)
    if config.uncited is not None:
        return Uncited(_texts(config.uncited.path), config.uncited.ngram)
    if config.plugin is not None:
        return Predicated(find_predicate(config.plugin), config.args, config.plugin)
    if config.all is not None:
        return All([build_constraint(part, f"{where}.all.{i}") for i, part in enumerate(config.all)])
    if config.json_schema is not None:
        return _json_schema(config, f"{where}.json_schema")
    matcher = _library().LLMatcher
    if config.lark is not None:
        _check_finite_lark(config.lark, f"{where}.lark")
        return Grammar(matcher.grammar_from_lark(config.lark), f"{where}.lark")
    if config.boxed:
        return Grammar(matcher.grammar_from_regex(BOXED), f"{where}.boxed")
    return Grammar(matcher.grammar_from_regex(config.regex), f"{where}.regex")


def _texts(path: str | list[str]) -> Iterator[str]:
    from posttrain.data.rows import row_text
    from posttrain.data.shards import expand_shards, read_shard

    for shard in expand_shards(path):
        for _, row in read_shard(shard, on_bad="skip"):
            yield row_text(row)


def _json_schema(config: ConstraintConfig, where: str) -> Constraint:
    try:
        schema = config.schema_object()
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the schema: {error}", where=where) from None
    _check_options(schema, where)
    if not _productive(schema):
        raise ConfigError("no text satisfies it: a part needs itself without end", where=where, fix="make the reference optional")
    try:
        grammar = _library().LLMatcher.grammar_from_json_schema(json.dumps(schema))
    except ValueError as error:
        raise ConfigError(f"no JSON schema: {error}", where=where) from None
    return Grammar(grammar, where)


def _check_options(schema: Any, where: str) -> None:
    """A schema must not switch the library's checks off."""
    if isinstance(schema, dict):
        if "x-guidance" in schema:
            raise ConfigError("the keyword `x-guidance` is not allowed; it could leave keywords unenforced", where=where, fix="remove it")
        for value in schema.values():
            _check_options(value, where)
    elif isinstance(schema, list):
        for value in schema:
            _check_options(value, where)


def _productive(schema: dict[str, Any]) -> bool:
    """False where every text would be infinite, because required parts refer to themselves; the least fixed point over `$ref`s."""
    known: set[str] = set()
    while True:
        before = len(known)
        for reference in _references(schema):
            target = _resolve(schema, reference)
            if target is None or _finite(target, known):
                known.add(reference)
        if len(known) == before:
            return _finite(schema, known)


def _references(node: Any) -> set[str]:
    if isinstance(node, list):
        return {found for item in node for found in _references(item)}
    if not isinstance(node, dict):
        return set()
    own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
    return own | {found for value in node.values() for found in _references(value)}


def _resolve(schema: dict[str, Any], reference: str) -> Any:
    """What a local pointer refers to; None for others, which the library judges."""
    if not reference.startswith("#"):
        return None
    node: Any = schema
    for part in filter(None, reference[1:].split("/")):
        name = part.replace("~1", "/").replace("~0", "~")
        node = node.get(name) if isinstance(node, dict) else None
    return node


def _finite(node: Any, known: set[str]) -> bool:
    """Whether the node has a finite text, if the references in `known` have one."""
    if not isinstance(node, dict):
        return True
    if isinstance(node.get("$ref"), str) and node["$ref"] not in known:
        return False
    checks: list[bool] = []
    for name in ("anyOf", "oneOf"):
        if isinstance(node.get(name), list):
            checks.append(any(_finite(item, known) for item in node[name]))
    if isinstance(node.get("allOf"), list):
        checks += [_finite(item, known) for item in node["allOf"]]
    if node.get("type") in ("object", ["object"]):
        properties = _part(node, "properties", dict)
        checks += [_finite(properties.get(name), known) for name in _part(node, "required", list) if isinstance(name, str)]
    if node.get("type") in ("array", ["array"]):
        least, first = _part(node, "minItems", int), _part(node, "prefixItems", list)
        checks += [_finite(item, known) for item in first[:least]]
        if least > len(first):
            checks.append(_finite(node.get("items"), known))
    return all(checks)


def _part(node: dict[str, Any], name: str, kind: type[Any]) -> Any:
    """The keyword's value, or an empty one where it is missing or of another kind, which the library judges."""
    value = node.get(name)
    return value if isinstance(value, kind) else kind()


def _check_finite_lark(grammar: str, where: str) -> None:
    """Every rule that `start` needs must derive a finite text. Grammars in the library's own dialect are left to the library."""
    try:
        from lark.exceptions import LarkError
        from lark.load_grammar import load_grammar
    except ImportError:
        raise ConfigError("Lark grammars need the package lark", where=where, fix="pip install 'posttrain[constraints]'") from None
    load: Callable[..., Any] = load_grammar
    try:
        loaded = load(grammar, "<grammar>", [], False)[0]
        rules = loaded.compile(["start"], "*")[1]
    except (LarkError, KeyError, ValueError, AttributeError, AssertionError):
        return
    if not _derives(rules, "start"):
        raise ConfigError("no text satisfies it: `start` needs itself without end", where=where, fix="add an alternative that ends")


def _derives(rules: Any, start: str) -> bool:
    known: set[str] = set()
    names: Mapping[str, Any] = {str(rule.origin.name): rule for rule in rules}
    while True:
        before = len(known)
        for rule in rules:
            if all(symbol.is_term or str(symbol.name) in known for symbol in rule.expansion):
                known.add(str(rule.origin.name))
        if len(known) == before:
            return start not in names or start in known

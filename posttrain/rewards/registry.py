"""Rewards found by file name, and the one way to call them.

A reward is a function with TRL's signature, `f(completions, **columns) -> list[float | None]`, declared by `@reward(name)`
in one file of `posttrain/rewards`, of an installed `posttrain.methods` package, or of a `--plugin` package. TRL accepts it
unmodified. Its keyword-only parameters are its *options*, set by `options` in YAML. None means *not applicable, or could
not be judged*; a failure is never 0.0, since a 0.0 teaches the model that its answer was wrong. Failures are counted by
reward and reason (`failures()`). A reward that is made of parts reports them with `record(part, values)`.

Mixture: for row i with weights w_k and values r_ik the total is sum of w_k * r_ik over the rewards whose value is not None;
it is None where all of them are.
"""

from __future__ import annotations

import functools
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from posttrain.core.registry import GROUP, look_up, plugins, scan_package
from posttrain.errors import ConfigError, NumericsError, PosttrainError, RewardError
from posttrain.rewards._options import check_options, declared_options, typed_options
from posttrain.rewards._parts import collecting, join, record

RewardFunction = Callable[..., list[float | None]]


@dataclass(frozen=True)
class Reward:
    """A registered reward.

    Args:
        name: as written in YAML.
        function: `f(completions, **columns)`.
        columns: dataset columns it cannot do without.
        doc: its docstring.
        module: where it is declared.
        options: option -> default, `inspect.Parameter.empty` where it must be given.
    """

    name: str
    function: RewardFunction
    columns: tuple[str, ...]
    doc: str
    module: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """What `score` returns.

    Args:
        total: weighted sum for each completion, None where no reward applied.
        parts: values of each reward, by name.
        failures: rows a reward failed on during this call, `{"name.reason": count}`.
        recorded: what rewards reported beside their values, `{"name/part": values}`.
    """

    total: list[float | None]
    parts: dict[str, list[float | None]]
    failures: dict[str, int] = field(default_factory=dict)
    recorded: dict[str, list[float | None]] = field(default_factory=dict)


_REWARDS: dict[str, Reward] = {}
_FAILURES: Counter[str] = Counter()
_LOCK = threading.Lock()


def reward(name: str, *, columns: Sequence[str] = ()) -> Callable[[RewardFunction], RewardFunction]:
    """Declares a reward under `name`; `columns` are the dataset columns it needs."""

    def register(function: RewardFunction) -> RewardFunction:
        known = _REWARDS.get(name)
        if known and known.module != function.__module__:
            raise ConfigError(f"reward `{name}` is declared twice, in {known.module} and {function.__module__}", fix="rename one of them")
        options = declared_options(function, columns)
        _REWARDS[name] = Reward(name, function, tuple(columns), (function.__doc__ or "").strip(), function.__module__, options)
        return function

    return register


@functools.cache
def _scan(extra: tuple[str, ...]) -> None:
    packages = ["posttrain.rewards", *(point.value for point in entry_points(group=GROUP)), *extra]
    for package in dict.fromkeys(packages):
        scan_package(package, marker="@reward(")


def known_rewards() -> dict[str, Reward]:
    """All rewards by name, sorted."""
    _scan(plugins())
    return dict(sorted(_REWARDS.items()))


def find_reward(name: str) -> Reward:
    """One reward with its declaration; raises ConfigError with the nearest name."""
    return look_up(name, known_rewards(), "reward")


def checked_options(name: str, options: Mapping[str, Any], base: Path | None = None) -> dict[str, Any]:
    """`options` of a reward as it takes them: names and types checked, paths expanded.

    Args:
        name: the reward.
        options: as written in YAML.
        base: folder that relative paths are relative to; None is the current one.

    Raises:
        ConfigError: no such reward or option (with the nearest name), a missing option, a wrong type.
    """
    declared = find_reward(name)
    check_options(name, declared.options, options)
    return typed_options(name, declared.function, options, base)


def count_failure(name: str, reason: str, rows: int = 1) -> None:
    """Counts rows that reward `name` could not judge; safe from any thread."""
    if rows:
        with _LOCK:
            _FAILURES[f"{name}.{reason}"] += rows


def failures(*, reset: bool = False) -> dict[str, int]:
    """`{"reward.reason": rows}` since the start of the process, or since the last reset."""
    with _LOCK:
        found = dict(_FAILURES)
        if reset:
            _FAILURES.clear()
    return found


def failed_rows(name: str) -> int:
    """Rows that reward `name` could not judge, since the start of the process or the last reset."""
    return sum(rows for key, rows in failures().items() if key.rpartition(".")[0] == name)


def completion_text(completion: Any) -> str:
    """Text of a completion: a string, or TRL's list of messages (the last one's content)."""
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Sequence) and completion and isinstance(completion[-1], Mapping):
        return str(completion[-1].get("content") or "")
    return str(completion)


def _check_values(name: str, values: Any, expected: int) -> list[float | None]:
    got = len(values) if isinstance(values, Sequence) and not isinstance(values, str) else type(values).__name__
    if got != expected:
        raise RewardError(
            f"reward `{name}` returned the wrong number of values: expected {expected}, got {got}",
            fix="return one float or None for each completion, in order",
        )
    out: list[float | None] = []
    for row, value in enumerate(values):
        try:
            number = None if value is None else float(value)
        except (TypeError, ValueError):
            raise RewardError(f"reward `{name}` returned {value!r} for completion {row}: expected a float or None") from None
        if number is not None and not math.isfinite(number):
            raise NumericsError(
                f"reward `{name}` is {number} for completion {row}", fix="return None for a completion that cannot be scored"
            )
        out.append(number)
    return out


def _check_part(name: str, part: str, values: list[float | None], expected: int) -> list[float | None]:
    if len(values) != expected:
        raise RewardError(
            f"reward `{name}` recorded {len(values)} values of `{part}`, expected {expected}",
            fix="record one float or None for each completion, in order",
        )
    return values


def _one_by_one(function: RewardFunction, name: str, completions: Sequence[Any], columns: Mapping[str, Any]) -> list[Any]:
    values: list[Any] = []
    recorded: list[dict[str, list[float | None]]] = []
    error: Exception | None = None
    failed = 0
    for row, completion in enumerate(completions):
        own = {key: [value[row]] if _is_column(value, len(completions)) else value for key, value in columns.items()}
        try:
            with collecting() as parts:
                values.append(_check_values(name, function([completion], **own), 1)[0])
            recorded.append(parts)
        except PosttrainError:
            raise
        except Exception as problem:
            failed, error = failed + 1, problem
            values.append(None)
            recorded.append({})
    if failed == len(completions):
        raise RewardError(f"reward `{name}` failed on all {failed} completions: {type(error).__name__}: {error}") from error
    count_failure(name, "error", failed)
    for part, found in join(recorded).items():
        record(part, found)
    return values


def _is_column(value: Any, rows: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == rows


def _call(function: RewardFunction, name: str, completions: Sequence[Any], columns: Mapping[str, Any]) -> list[float | None]:
    if not completions:
        return []
    try:
        with collecting() as parts:
            values = function(completions, **columns)
    except PosttrainError:
        raise
    except Exception:
        values, parts = _one_by_one(function, name, completions, columns), {}
    for part, found in parts.items():
        record(part, _check_part(name, part, found, len(completions)))
    return _check_values(name, values, len(completions))


def get_reward(name: str, options: Mapping[str, Any] | None = None) -> RewardFunction:
    """The reward, with `options` set, as a checked function with TRL's signature; its `__name__` is `name`.

    A row on which it raises becomes None and is counted; if every row raises, or the number of values is wrong, that is a
    RewardError; a NaN or an infinite value is a NumericsError. A column that is named like an option does not reach the reward.

    Raises:
        ConfigError: no such reward, or options that it does not take.
    """
    declared, settings = find_reward(name), checked_options(name, options or {})
    function = functools.partial(declared.function, **settings) if settings else declared.function

    @functools.wraps(declared.function)
    def checked(completions: Sequence[Any], **columns: Any) -> list[float | None]:
        missing = [column for column in declared.columns if columns.get(column) is None]
        if missing and completions:
            raise RewardError(
                f"reward `{name}` needs the column `{missing[0]}`; the rows have: {', '.join(sorted(columns)) or 'none'}",
                fix=f"map it with `columns: {{{missing[0]}: THEIR_NAME}}` in the source",
            )
        return _call(function, name, completions, {key: value for key, value in columns.items() if key not in declared.options})

    checked.__name__ = name
    return checked


def score(
    rewards: str | Sequence[str] | Mapping[str, float],
    completions: Sequence[Any],
    columns: Mapping[str, Any] | None = None,
    rename: Mapping[str, Mapping[str, str]] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Scores:
    """Scores completions by a weighted mixture.

    Args:
        rewards: a name, names (weight 1 each), or name -> weight.
        completions: texts, or lists of messages.
        columns: dataset columns, one value a completion.
        rename: reward -> {its column: the dataset's column}.
        options: reward -> its options.

    Returns:
        Scores; see the module's formula.
    """
    weights = {rewards: 1.0} if isinstance(rewards, str) else dict(rewards) if isinstance(rewards, Mapping) else dict.fromkeys(rewards, 1.0)
    given, before = dict(columns or {}), Counter(failures())
    parts: dict[str, list[float | None]] = {}
    recorded: dict[str, list[float | None]] = {}
    for name in weights:
        own = {ours: given.get(theirs) for ours, theirs in (rename or {}).get(name, {}).items()}
        with collecting() as found:
            parts[name] = get_reward(name, (options or {}).get(name))(completions, **{**given, **own})
        recorded |= {f"{name}/{part}": values for part, values in found.items()}
    total: list[float | None] = []
    for row in range(len(completions)):
        present = [weights[name] * value for name, values in parts.items() if (value := values[row]) is not None]
        total.append(sum(present) if present else None)
    return Scores(total, parts, dict(Counter(failures()) - before), recorded)

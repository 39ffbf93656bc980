"""The errors a person may see, each with the exit code of its kind.

Every message says what is wrong, where (dotted config path, or file and row), what was expected against what was
found, and how to mend it. `format_error` is the one place that turns an error into text for a terminal.

Exit codes: 0 done, 1 internal error, 2 config, 3 numerics, 4 data or artifact, 5 reward or rollout, 75 preempted
(run the same command again).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

EXIT_OK = 0
EXIT_PREEMPTED = 75


class PosttrainError(Exception):
    """Base of all expected errors.

    Args:
        message: what is wrong, expected against got.
        where: dotted config path, or `file:row`.
        fix: what to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(message)
        self.message, self.where, self.fix = message, where, fix

    def __str__(self) -> str:
        head = f"{self.where}: {self.message}" if self.where else self.message
        return f"{head}\n  fix: {self.fix}" if self.fix else head

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(cls: type[PosttrainError], args: tuple[Any, ...], state: dict[str, Any]) -> PosttrainError:
    error = cls.__new__(cls)
    Exception.__init__(error, *args)
    error.__dict__.update(state)
    return error


@dataclass(frozen=True)
class Problem:
    """One finding of `validate`: dotted path, message, and how to mend it."""

    path: str
    message: str
    fix: str = ""

    def __str__(self) -> str:
        head = f"{self.path}: {self.message}" if self.path else self.message
        return f"{head}\n    fix: {self.fix}" if self.fix else head


class ConfigError(PosttrainError, ValueError):
    """A config that cannot be run; holds every problem found, not only the first."""

    exit_code = 2

    def __init__(self, message: str = "", *, problems: list[Problem] | None = None, where: str = "", fix: str = "") -> None:
        super().__init__(message, where=where, fix=fix)
        self.problems = problems or []

    def __str__(self) -> str:
        if not self.problems:
            return super().__str__()
        head = self.where or "config"
        count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        return "\n".join([f"{head}: {count}", *(f"  {p}" for p in self.problems)])


class NumericsError(PosttrainError, ArithmeticError):
    """A non-finite loss, gradient, reward or log-probability, caught before it reached the weights."""

    exit_code = 3


class DataError(PosttrainError, ValueError):
    """Rows or files that cannot be used; `where` names file and row."""

    exit_code = 4


class ArtifactError(PosttrainError, RuntimeError):
    """A missing, damaged or foreign artifact, checkpoint, or model folder; also a full or read-only disk."""

    exit_code = 4


class QuantError(PosttrainError, ValueError):
    """A model that cannot be quantized or exported as asked."""

    exit_code = 4


class RewardError(PosttrainError, RuntimeError):
    """A reward that failed too often, or returned the wrong number of values."""

    exit_code = 5


class RolloutError(PosttrainError, RuntimeError):
    """A rollout engine that cannot do what was asked."""

    exit_code = 5


class Preempted(PosttrainError):
    """Stopped by a signal after a complete checkpoint; running the same command again goes on."""

    exit_code = EXIT_PREEMPTED


def format_error(error: PosttrainError) -> str:
    """The text shown to a person: `error: ...`, never a traceback."""
    return f"error: {error}"

"""Comparison of two expressions by math-verify: trusted code that may run for ever on untrusted text."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

SAMPLES = (("\\frac{1}{2}", "0.5"), ("\\sqrt{12}", "2\\sqrt{3}"), ("x^2+2x+1", "(x+1)^2"), ("(1,2)", "\\{1,2\\}"), ("x>3", "(3,\\infty)"))


def warm() -> None:
    """Imports math-verify and parses a few expressions, so that no jail pays for it."""
    import math_verify

    logging.getLogger(math_verify.__name__).setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")
    for gold, answer in SAMPLES:
        compare(gold, answer)


def compare(gold: str, answer: str) -> bool | str:
    """True or False, `gold` or `answer` for a side that cannot be parsed, `error: ...`.

    Args:
        gold, answer: LaTeX without the box.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    config = (LatexExtractionConfig(boxed_match_priority=0),)
    sides: list[Any] = []
    try:
        for name, text in (("gold", gold), ("answer", answer)):
            parsed = parse("\\boxed{" + text + "}", extraction_config=config, parsing_timeout=None)
            if not parsed or all(isinstance(item, str) for item in parsed):
                return name
            sides.append(parsed)
        return bool(verify(*sides, float_rounding=12, numeric_precision=30, timeout_seconds=None))
    except (Exception, MemoryError) as error:
        return f"error: {type(error).__name__}"


def compare_all(_argument: None, items: list[list[str]], _link: None) -> Iterator[bool | str]:
    """`compare` for each pair."""
    return (compare(gold, answer) for gold, answer in items)


def parts(_argument: Any) -> tuple[Callable[..., Any], None]:
    """A host alone."""
    return compare_all, None

"""Child process that compares expressions with math-verify, and may be killed at any moment.

Protocol, one line each: it prints `ready`; the parent sends a JSON pair `[gold, answer]`; it prints `true`, `false`, `"gold"` (the
gold cannot be parsed) or `"answer"`. The parent owns the clock: sympy cannot be interrupted from inside, and an alarm signal
works on a main thread only. A child that lost its parent ends at the end of its input, or after 300 s of processor time on one
pair; its address space is limited to 4 GiB.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time

MEMORY_BYTES = 4 << 30
PAIR_CPU_S = 300


def _limit(kind: str, value: int) -> None:
    with contextlib.suppress(Exception):
        import resource

        resource.setrlimit(getattr(resource, kind), (value, resource.RLIM_INFINITY if kind == "RLIMIT_CPU" else value))


def compare(gold: str, answer: str) -> bool | str:
    """True or False, or which side cannot be parsed: `gold`, `answer`."""
    from math_verify import LatexExtractionConfig, parse, verify

    config = (LatexExtractionConfig(boxed_match_priority=0),)
    sides = []
    for name, text in (("gold", gold), ("answer", answer)):
        parsed = parse("\\boxed{" + text + "}", extraction_config=config, parsing_timeout=None)
        if not parsed or all(isinstance(item, str) for item in parsed):
            return name
        sides.append(parsed)
    return bool(verify(*sides, float_rounding=12, numeric_precision=30, timeout_seconds=None))


def main() -> None:
    """Answers requests until its input ends."""
    _limit("RLIMIT_AS", MEMORY_BYTES)
    _limit("RLIMIT_CORE", 0)
    out, sys.stdout = sys.stdout, sys.stderr
    import math_verify

    logging.getLogger(math_verify.__name__).setLevel(logging.CRITICAL)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        gold, answer = json.loads(line)
        _limit("RLIMIT_CPU", int(time.process_time()) + PAIR_CPU_S)
        try:
            verdict: bool | str = compare(gold, answer)
        except (Exception, MemoryError) as error:
            verdict = f"error: {type(error).__name__}"
        print(json.dumps(verdict), file=out, flush=True)


if __name__ == "__main__":
    main()

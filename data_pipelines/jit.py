"""numba's compiler as the numeric modules use it: compiled once a machine, released GIL, no Python in the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def jit(function: F) -> F:
    """`function` compiled at its first call; the code is kept beside the source, else in the user's cache folder.

    Where neither can be written to (a read-only image without a home), it is compiled anew in each process.
    `NUMBA_CACHE_DIR` names another place.
    """
    return cast(F, _compiled(function))


def inlined(function: F) -> F:
    """As `jit`, put into its callers."""
    return cast(F, _compiled(function, inline="always"))


def _compiled(function: Any, **options: Any) -> Any:
    try:
        return numba.njit(cache=True, nogil=True, **options)(function)
    except RuntimeError:
        return numba.njit(nogil=True, **options)(function)

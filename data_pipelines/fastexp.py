"""exp of float64 that the compiler can lay across vector registers; numba's own calls the C library once a number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
from numba.core import types
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])

_LOG2E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.693147180369123816490, 1.90821492927058770002e-10
_ROUND = 6755399441055744.0
"""1.5 x 2^52: added to a small number, it leaves that number rounded to an integer in the low bits."""
LOWEST = -650.0
"""Smaller exponents count as this one, so that no result is zero or denormal."""


def fast(function: F, *, reorder: bool = True) -> F:
    """`function` compiled for finite numbers; sums may be added up in another order if `reorder`."""
    flags = {"contract", "nsz", "nnan", "ninf"} | ({"reassoc"} if reorder else set())
    try:
        compiled = numba.njit(cache=True, nogil=True, fastmath=flags)(function)
    except RuntimeError:
        compiled = numba.njit(nogil=True, fastmath=flags)(function)
    return cast(F, compiled)


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def _bits(typing_context: Any, value: Any) -> Any:
    """The 64 bits of a float64, as an int64."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.int64))

    return types.int64(types.float64), code


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def _number(typing_context: Any, bits: Any) -> Any:
    """The float64 of 64 bits."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float64))

    return types.float64(types.int64), code


def _exp(x: float) -> float:
    """exp(x) to 2.3e-16 relative, for x <= 709; x below `LOWEST` counts as `LOWEST`.

    x = k ln 2 + r, |r| <= ln(2)/2; a Taylor polynomial of degree 13 for exp(r), and k goes into the exponent's bits.
    """
    x = max(x, LOWEST)
    shifted = x * _LOG2E + _ROUND
    k = shifted - _ROUND
    r = (x - k * _LN2_HIGH) - k * _LN2_LOW
    p = 1.6059043836821613e-10
    p = p * r + 2.08767569878681e-09
    p = p * r + 2.505210838544172e-08
    p = p * r + 2.755731922398589e-07
    p = p * r + 2.7557319223985893e-06
    p = p * r + 2.48015873015873e-05
    p = p * r + 1.984126984126984e-04
    p = p * r + 1.388888888888889e-03
    p = p * r + 8.333333333333333e-03
    p = p * r + 4.1666666666666664e-02
    p = p * r + 1.6666666666666666e-01
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    power: float = _number((_bits(shifted) + 1023) << 52)
    return p * power


exp = fast(_exp, reorder=False)

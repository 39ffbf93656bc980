"""Numbers and signals that must stop a run cleanly: non-finite losses and gradients, SIGTERM and SIGINT.

A NaN that reaches `optimizer.step` turns all weights into NaN, and an average over finite losses hides it. So the check
comes between the backward pass and the update, on every rank, with the same verdict on all of them: the flag is
summed over ranks, and a gradient norm after the all-reduce is the same number everywhere.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from posttrain.errors import NumericsError

if TYPE_CHECKING:
    import torch


def gradient_norms(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Norm of each parameter's gradient, by name; taken before clipping, which spreads one NaN to all of them."""
    return {name: parameter.grad.norm() for name, parameter in model.named_parameters() if parameter.grad is not None}


def bad_names(norms: dict[str, torch.Tensor], limit: int = 3) -> list[str]:
    """Names of the first `limit` gradients that hold a NaN or an infinity."""
    return [name for name, norm in norms.items() if not norm.isfinite()][:limit]


def numerics_error(tensor: str, value: float, step: int, last_good: str | None) -> NumericsError:
    """The error that names tensor, step and last good checkpoint."""
    kept = f"last good checkpoint: {last_good}" if last_good else "no checkpoint was written yet"
    return NumericsError(
        f"{tensor} is {value} at step {step}; stopped before the update, the weights are as they were after step {step - 1}; {kept}",
        where=f"step {step}",
        fix="lower optim.lr, check the rows and rewards of this step, or use a wider dtype; the same command goes on from the checkpoint",
    )


class StopSignal:
    """Remembers that SIGTERM or SIGINT came; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received: str | None = None

    def __call__(self, number: int, _frame: Any) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


@contextmanager
def caught_signals(stop: StopSignal) -> Iterator[StopSignal]:
    """Routes SIGTERM and SIGINT to `stop` while the block runs; does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

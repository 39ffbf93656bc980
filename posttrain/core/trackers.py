"""Trackers besides events.jsonl: each is a function of an event, added to `events.sinks`.

Only numbers of `metrics` events and the final summary's numbers are sent; configs, prompts and completions are not.
Non-finite numbers are sent as they are, so that a NaN shows as a NaN. A tracker that fails later is reported once and
dropped: it must not end a run.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from posttrain.core.events import Events
from posttrain.errors import ConfigError

Send = Callable[[dict[str, float], int], None]


def attach(events: Events, to: list[str], project: str | None, name: str, folder: Path | None = None) -> None:
    """Adds a sink for each tracker; `jsonl` needs none. Ranks other than 0 send nothing.

    Args:
        events: of the running stage.
        to: `tracking.to`: jsonl, tensorboard, wandb, trackio.
        project: `tracking.project`; default `posttrain`.
        name: name of this stage at the tracker, e.g. `quickstart/sft`.
        folder: where tensorboard and an offline wandb write; default `runs-tracking` in the current folder.

    Raises:
        ConfigError: the tracker's package is not installed, or the tracker refuses to start.
    """
    if not events.main:
        return
    for tracker in to:
        if tracker in _OPEN:
            events.sinks.append(_sink(tracker, _open(tracker, project or "posttrain", name, folder or Path("runs-tracking")), events))


def _open(tracker: str, project: str, name: str, folder: Path) -> Send:
    package, opener = _OPEN[tracker]
    if find_spec(package) is None:
        fix = f"pip install {package} (or posttrain[track]), or take it out of `tracking.to`"
        raise ConfigError(f"the package `{package}` is not installed", where=f"tracking.to: {tracker}", fix=fix)
    try:
        return opener(project, name, folder)
    except Exception as error:
        message = f"{tracker} cannot be started: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ConfigError(message, where="tracking.to", fix=f"log in to {tracker}, or take it out of `tracking.to`") from error


def _sink(tracker: str, send: Send, events: Events) -> Callable[[dict[str, Any]], None]:
    """A sink that sends numbers, and goes quiet after its first failure."""
    state = {"step": 0, "dead": False}

    def sink(event: dict[str, Any]) -> None:
        if state["dead"] or event["kind"] not in ("metrics", "commit"):
            return
        step = int(event.get("step", state["step"]))
        state["step"] = max(state["step"], step)
        values = event["values"] if event["kind"] == "metrics" else event.get("summary") or {}
        try:
            send({key: float(value) for key, value in flat_numbers(values).items()}, step)
        except Exception as error:
            state["dead"] = True
            events.warn(f"{tracker} failed and is left out from here on: {type(error).__name__}: {error}")

    return sink


def flat_numbers(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of a nested dict under `a/b/c` names; booleans, texts and lists are left out."""
    found: dict[str, float] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            found |= flat_numbers(value, f"{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = float(value)
        elif hasattr(value, "item") and getattr(value, "size", 1) == 1:
            found |= flat_numbers({name: value.item()})
    return found


def _tensorboard(project: str, name: str, folder: Path) -> Send:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder))
    atexit.register(writer.close)

    def send(values: dict[str, float], step: int) -> None:
        import time

        items = [Summary.Value(tag=key, simple_value=value) for key, value in values.items()]
        if items:
            writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=items)))
            writer.flush()

    return send


def _wandb(project: str, name: str, folder: Path) -> Send:
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    quiet = wandb.Settings(disable_code=True, disable_git=True)
    own = {"id": _run_id(name, folder), "resume": "allow", "reinit": "create_new", "settings": quiet}
    run = wandb.init(project=project, name=name, dir=str(folder), **own)
    atexit.register(run.finish)
    return lambda values, step: run.log({**values, "step": step})


def _trackio(project: str, name: str, folder: Path) -> Send:
    import trackio

    trackio.init(project=project, name=name, resume="allow")
    atexit.register(trackio.finish)
    return lambda values, step: trackio.log(values, step=step)


def _run_id(name: str, folder: Path) -> str:
    """The same stage of the same run goes on in the same curve after a restart."""
    import hashlib

    return hashlib.sha256(f"{folder.absolute()}|{name}".encode()).hexdigest()[:16]


_OPEN: dict[str, tuple[str, Callable[[str, str, Path], Send]]] = {
    "tensorboard": ("tensorboard", _tensorboard),
    "wandb": ("wandb", _wandb),
    "trackio": ("trackio", _trackio),
}

"""The only code that knows TRL's and transformers' trainers from inside, and so the only version-aware code.

`Reliable` is mixed in before a TRL trainer and keeps TRL's own constructor:

    class SFTTrainer(Reliable, trl.SFTTrainer): ...

It adds what a long run needs and changes no number: complete checkpoints with their own rotation (`_checkpoint.py`), a
stop before the update when a loss or gradient is not finite (`_guard.py`), a checkpoint and `Preempted` after SIGTERM
or SIGINT, and events. Seams used, all checked by a contract test: `_save_checkpoint`, `_load_optimizer_and_scheduler`,
`_load_from_checkpoint`, `_clip_grad_norm`, `_get_grad_norm`, `training_step`, `log`, `train`, `create_model_card`, TrainerCallback.

Pickles: transformers writes `training_args.bin`, which is dropped here; optimizer, scheduler and generator states are
read by torch with `weights_only=True`, and only from folders that carry our marker.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import ArtifactError, Preempted

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import TrainOutput

from posttrain.trainers._checkpoint import Checkpoint, clear, latest_complete, mark_complete, read_checkpoint, rotate, save_errors
from posttrain.trainers._guard import StopSignal, bad_names, caught_signals, gradient_norms, numerics_error
from posttrain.trainers._optim import optimizer_figures

if TYPE_CHECKING:
    from posttrain.core.events import Events

TRAINING_ARGS = "training_args.bin"
_Trainer: Any = object
"""What a mixin stands before: transformers' Trainer, known only once a trainer is composed."""


class RunEvents(TrainerCallback):
    """Sends progress and metrics to `events`, tokens per second among them."""

    def __init__(self, events: Events) -> None:
        self.events = events
        self._clock: tuple[float, float] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Starts the clock."""
        self._clock = None
        self.events.progress("train", state.global_step, state.max_steps, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One progress event a step, at most five a second."""
        self.events.progress("train", state.global_step, state.max_steps, unit="step")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Metrics of the steps since the last log."""
        values = dict(logs or {})
        rate = self._tokens_per_s(values.get("num_tokens"))
        if rate is not None:
            values["tokens_per_s"] = rate
        self.events.metrics(state.global_step, values)

    def _tokens_per_s(self, tokens: float | None) -> float | None:
        now, before = time.monotonic(), self._clock
        if tokens is None:
            return None
        self._clock = (now, tokens)
        return round((tokens - before[1]) / (now - before[0]), 1) if before and now > before[0] else None


class _StopAtStepEnd(TrainerCallback):
    """Turns a received signal, on any rank, into a checkpoint and the end of training on all ranks."""

    def __init__(self, trainer: Reliable) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._trainer.stop_requested():
            self._trainer.preempted = True
            control.should_save = control.should_training_stop = True


class SafeCheckpoint(_Trainer):
    """Complete checkpoints: see `_checkpoint.py`. `save_total_limit` of the arguments becomes our own rotation."""

    state: Any
    events: Events | None = None
    keep_checkpoints: int | None = None
    _saving = False

    def own_state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """What the trainer keeps beyond transformers' state, by rank: JSON values and tensors."""
        return {}, {}

    def restore_own_state(self, values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Takes back what `own_state` gave."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's model card, except inside a checkpoint, where TRL would write one at each save."""
        if not self._saving:
            super().create_model_card(*args, **kwargs)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        step = self.state.global_step
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{step}"
        self._emit("begin", step)
        with save_errors(folder):
            self._save_and_mark(folder, step, model, trial)
        self._emit("end", step)

    def _save_and_mark(self, folder: Path, step: int, model: torch.nn.Module, trial: Any) -> None:
        if self.accelerator.is_main_process:
            clear(folder)
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        self._write_own_state(folder)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (folder / TRAINING_ARGS).unlink(missing_ok=True)
            mark_complete(folder, step, self.accelerator.num_processes)
            if self.keep_checkpoints:
                rotate(folder.parent, self.keep_checkpoints, step)
        self.accelerator.wait_for_everyone()

    def _emit(self, state: str, step: int) -> None:
        if self.events is not None:
            self.events.emit("checkpoint", state=state, step=step)

    def _own_file(self, folder: Path) -> Path:
        return folder / f"own_state_{self.accelerator.process_index}.safetensors"

    def _write_own_state(self, folder: Path) -> None:
        values, tensors = self.own_state()
        if not values and not tensors:
            return
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, self._own_file(folder), metadata={"values": json.dumps(values, sort_keys=True)})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not self._own_file(Path(checkpoint)).is_file():
            return
        with safe_open(self._own_file(Path(checkpoint)), framework="pt") as file:
            tensors = {name: file.get_tensor(name).to(self.accelerator.device) for name in file.keys()}  # noqa: SIM118
            self.restore_own_state(json.loads(file.metadata()["values"]), tensors)


class NumericsGuard(_Trainer):
    """Stops all ranks before the update when a loss or the gradient norm is not finite on any of them."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """TRL's step; the loss is remembered until the update."""
        loss = super().training_step(*args, **kwargs)
        self._window_losses = [*getattr(self, "_window_losses", []), loss.detach()]
        return loss

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        self._gradient_norms = gradient_norms(model)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None:
            self._gradient_norms = gradient_norms(model)
        norm = super()._get_grad_norm(model, grad_norm)
        losses, self._window_losses = torch.stack([loss.float().mean() for loss in self._window_losses]), []
        norm_value = torch.as_tensor(norm, dtype=torch.float32, device=losses.device)
        bad = torch.stack([(~losses.isfinite()).sum(), (~norm_value.isfinite()).sum()]).float()
        if self.accelerator.num_processes > 1:
            bad = self.accelerator.reduce(bad, reduction="sum")
        bad_losses, bad_norms = bad.tolist()
        if bad_losses or bad_norms:
            self._stop_on_numerics(losses, norm_value, bool(bad_losses))
        return norm

    def _stop_on_numerics(self, losses: torch.Tensor, norm: torch.Tensor, in_loss: bool) -> None:
        step = self.state.global_step + 1
        self.state.global_step = step
        self.log({"loss": losses.sum().item(), "grad_norm": norm.item()})
        self.state.global_step = step - 1
        if in_loss:
            here = losses[~losses.isfinite()]
            tensor, value = "the loss", here[0].item() if len(here) else float("nan")
        else:
            names = ", ".join(bad_names(getattr(self, "_gradient_norms", {}))) or "an unnamed tensor"
            tensor, value = f"the gradient norm (gradient of {names})", norm.item()
        good = latest_complete(Path(self.args.output_dir))
        raise numerics_error(tensor, value, step, good.path.name if good else None)


class Reliable(SafeCheckpoint, NumericsGuard):
    """Checkpoints, numerics, preemption and events for a TRL or transformers trainer; mix it in first.

    Args:
        events: where progress, metrics and checkpoint events go; None for nowhere.

    All other arguments are the trainer's own.
    """

    def __init__(self, *args: Any, events: Events | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.events = events
        self.keep_checkpoints, self.args.save_total_limit = self.args.save_total_limit, None
        self.args.logging_nan_inf_filter = False
        self._stop, self.preempted = StopSignal(), False
        self.seconds_before, self._train_start = 0.0, time.monotonic()
        self.facts_after: Callable[[int], dict[str, Any]] = lambda steps: {}
        self.add_callback(_StopAtStepEnd(self))
        if events is not None:
            self.add_callback(RunEvents(events))
            self.remove_callback(PrinterCallback)

    def own_state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Seconds of training so far; subclasses add to it."""
        values, tensors = super().own_state()
        return {**values, "seconds": self.seconds_trained()}, tensors

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """TRL's log, with what an optimizer of ours tells of the steps that a training log is about."""
        figures = optimizer_figures(self.optimizer) if "loss" in logs else {}
        super().log({**logs, **figures}, *args, **kwargs)

    def seconds_trained(self) -> float:
        """Seconds of training so far, those of earlier attempts included."""
        return self.seconds_before + time.monotonic() - self._train_start

    def restore_own_state(self, values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Takes back the seconds of earlier attempts."""
        super().restore_own_state(values, tensors)
        self.seconds_before = values.get("seconds", 0.0)

    def stop_requested(self) -> bool:
        """True on all ranks once any rank has received SIGTERM or SIGINT."""
        flag = float(self._stop.received is not None)
        if self.accelerator.num_processes == 1:
            return bool(flag)
        return bool(self.accelerator.reduce(torch.tensor(flag, device=self.accelerator.device), reduction="sum").item())

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any) -> TrainOutput:
        """transformers' `train`, resuming only from complete checkpoints.

        Args:
            resume_from_checkpoint: True for the newest complete checkpoint in `args.output_dir` (from the start where
                there is none), or a folder.

        Raises:
            ArtifactError: the named checkpoint is damaged, or was written by another number of processes.
            NumericsError: a loss or gradient is not finite.
            Preempted: SIGTERM or SIGINT came; a complete checkpoint of the last step is in `args.output_dir`.
        """
        checkpoint = self._find_checkpoint(resume_from_checkpoint)
        if checkpoint is not None and 0 < self.args.max_steps <= checkpoint.step:
            return self._take_finished(checkpoint)
        self._train_start = time.monotonic()
        with caught_signals(self._stop):
            output = super().train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None, **kwargs)
        if self.preempted:
            raise Preempted(
                f"stopped by {self._stop.received or 'a signal on another rank'}"
                f" after step {self.state.global_step} of {self.state.max_steps}",
                where=self.args.output_dir,
                fix="run the same command again; it goes on from this step",
            )
        return output

    def _find_checkpoint(self, wanted: str | Path | bool | None) -> Checkpoint | None:
        if not wanted:
            return None
        say = self.events.log if self.events is not None else None
        found = latest_complete(Path(self.args.output_dir), say) if wanted is True else read_checkpoint(Path(wanted))
        if found is not None and found.world_size != self.accelerator.num_processes:
            raise ArtifactError(
                f"the checkpoint was written by {found.world_size} processes, this run has {self.accelerator.num_processes}",
                where=str(found.path),
                fix=f"start it with {found.world_size} processes, or delete the checkpoints in {found.path.parent} to begin again",
            )
        return found

    def _take_finished(self, checkpoint: Checkpoint) -> TrainOutput:
        """Weights of a checkpoint at or past the last step; transformers would train on past `max_steps`."""
        self._load_from_checkpoint(str(checkpoint.path))
        self.state = type(self.state).load_from_json(str(checkpoint.path / "trainer_state.json"))
        return TrainOutput(checkpoint.step, float("nan"), {})


def spare_vllm() -> None:
    """Imports TRL's GRPO without vLLM, for a process in which TRL never generates with it.

    TRL imports vLLM (10 s on a CPU, hundreds of megabytes) wherever it is installed, asked for or not. To be removed once
    TRL imports it only for `use_vllm`.
    """
    if "trl.trainer.grpo_trainer" in sys.modules:
        return
    from trl import import_utils

    given = import_utils.is_vllm_available
    import_utils.is_vllm_available = lambda *_args, **_kwargs: False
    try:
        importlib.import_module("trl.trainer.grpo_trainer")
    finally:
        import_utils.is_vllm_available = given


def policy_logps(trainer: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probabilities (B, T) of the completion tokens under the trainer's policy at its temperature, without gradient.

    Args:
        trainer: a GRPOTrainer.
        batch: `prompt_ids`, `prompt_mask`, `completion_ids`, `completion_mask` as `_generate_and_score_completions` gives them.
    """
    return _forward(trainer, batch)[0]


def policy_entropies(trainer: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Entropies (B, T) in nats of the policy at each completion token, without gradient; see `policy_logps`."""
    return _forward(trainer, batch, compute_entropy=True)[1]


def _forward(trainer: Any, batch: dict[str, torch.Tensor], **options: Any) -> Any:
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        return trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, batch["completion_ids"].size(1), batch_size=trainer.args.per_device_train_batch_size, **options
        )


def pass_bias_on(model: Any) -> None:
    """Lets TRL's fused loss read `lm_head.bias` through peft's wrapper of trainable rows, which hands on `weight` only.

    Goes when `TrainableTokensWrapper._hasattr_wrapped` of peft knows `bias`.
    """
    head = model.get_output_embeddings()
    if head is not None and not hasattr(head, "bias"):
        object.__setattr__(head, "bias", getattr(head.original_module, "bias", None))

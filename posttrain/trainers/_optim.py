"""Which optimizer a trainer stage steps with, and where that step is not ours to choose."""

from __future__ import annotations

from typing import Any

from accelerate import DistributedType

from posttrain.config.common import TrainConfig
from posttrain.core.context import StageContext
from posttrain.errors import ConfigError


def choose_optimizer(trainer: Any, cfg: TrainConfig, ctx: StageContext) -> None:
    """Makes `trainer` build the optimizer of `cfg.optim`; transformers' groups stay (no decay on norms and biases).

    Raises:
        ConfigError: the optimizer needs whole tensors, and DeepSpeed or FSDP's first version steps on flat fragments of them.
    """
    own = cfg.optim.stable_spam
    if own is None:
        return
    _check_step_is_ours(trainer, f"stages.{ctx.name}.optim.name")
    from posttrain.optim.stable_spam import StableSPAM

    optim, steps = cfg.optim, int(trainer.args.max_steps)
    options = own.model_dump(exclude={"preset", "norm_eps"}) | ({} if own.norm_eps is None else {"norm_eps": own.norm_eps})
    options |= {"total_steps": steps} if own.decay_to < 1 else {}
    common = {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}
    trainer.optimizer_cls_and_kwargs = (StableSPAM, {**common, **options})
    if own.reset_every >= steps:
        ctx.events.log(f"optim.stable_spam.reset_every: {own.reset_every} is not reached in {steps} steps: Adam's moments are never reset")


def _check_step_is_ours(trainer: Any, where: str) -> None:
    kind, state = trainer.accelerator.distributed_type, trainer.accelerator.state
    fix = "use launch/accelerate/ddp.yaml or fsdp2.yaml, or optim.name: adamw"
    if kind == DistributedType.DEEPSPEED:
        raise ConfigError(
            "DeepSpeed makes its own step, on flat fragments of several tensors; stable_spam needs the norm of each", where=where, fix=fix
        )
    if kind == DistributedType.FSDP and state.fsdp_plugin.fsdp_version != 2:
        raise ConfigError("FSDP 1 steps on flat shards of several tensors; stable_spam needs the norm of each", where=where, fix=fix)


def optimizer_figures(optimizer: Any) -> dict[str, float]:
    """What an optimizer of ours tells of its steps since the last log, also behind accelerate's wrapper; {} for any other."""
    tell = getattr(getattr(optimizer, "optimizer", optimizer), "figures", None)
    return tell() if tell is not None else {}

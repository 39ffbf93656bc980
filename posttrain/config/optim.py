"""The `optim` block: the optimizer's name, a closed set, its own fields, and the schedule."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from posttrain.config.base import Strict
from posttrain.optim.presets import PRESETS

Decay = Annotated[float, Field(ge=0, lt=1)]


class StableSpamConfig(Strict):
    """Fields of `name: stable_spam`. A null turns a part off; with all off it is `adamw`."""

    preset: Literal["stable_spam", "gradient_stabilizer"] = "stable_spam"
    """Where the fields that are not given come from: v1 of the paper, or its later versions, which only normalise
    (norm_decays [0.6, 0.999], norm_eps 1e-12, no clip, no reset)."""
    clip_decay: Decay | None = PRESETS["stable_spam"]["clip_decay"]
    """AdaClip: decay of each tensor's average largest entry, which larger entries are cut to; null = no clip."""
    clip_limit: Annotated[float, Field(gt=1)] | None = None
    """Ours: a spike enters that average as at most so many thresholds, e.g. 10; null = whole, as published."""
    norm_decays: Annotated[list[Decay], Field(min_length=2, max_length=2)] | None = list(PRESETS["stable_spam"]["norm_decays"])
    """AdaGN: decays of each tensor's average norm and squared norm, between which its gradient is scaled; null = no scaling."""
    norm_eps: Annotated[float, Field(ge=0)] | None = PRESETS["stable_spam"]["norm_eps"]
    """Added to the root of the average squared norm; null only without `norm_decays`."""
    reset_every: Annotated[int, Field(ge=0)] = PRESETS["stable_spam"]["reset_every"]
    """MoRet: steps between resets of Adam's moments; 0 = none."""
    decay_to: Annotated[float, Field(gt=0, le=1)] = 1.0
    """A cosine over the run's steps multiplies beta1 and the first of `norm_decays`, from 1 to this; the authors' runs: 0.5."""
    compat: Literal["none", "official"] = "none"
    """`official`: the authors' step with its one counter for everything, to repeat their runs."""

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("preset", "stable_spam") not in PRESETS:
            return data
        chosen = PRESETS[data.get("preset", "stable_spam")]
        filled = {name: list(value) if isinstance(value, tuple) else value for name, value in chosen.items()} | data
        if filled["norm_decays"] is None and "norm_eps" not in data:
            filled["norm_eps"] = None
        return filled

    @model_validator(mode="after")
    def _consistent(self) -> StableSpamConfig:
        if self.clip_decay is None and self.clip_limit is not None:
            raise ValueError("clip_limit does nothing without clip_decay; remove it")
        if (self.norm_decays is None) != (self.norm_eps is None):
            raise ValueError("norm_eps belongs to norm_decays; give both or set both to null")
        if self.compat == "official" and (self.preset != "stable_spam" or self.clip_limit is not None):
            raise ValueError("compat: official is the authors' Stable-SPAM; use preset: stable_spam and no clip_limit")
        return self


class OptimConfig(Strict):
    """Optimizer and schedule."""

    name: Literal["adamw", "stable_spam"] = "adamw"
    """Optimizer; `adamw` is torch's, `stable_spam` is it behind per-tensor clips, norms and resets."""
    lr: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine", "constant_with_warmup"] = "cosine"
    """transformers' `lr_scheduler_type`."""
    warmup: Annotated[float, Field(ge=0)] = 0.03
    """Below 1: share of the steps; from 1: number of steps, fewer than all. `constant` has none."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    beta1: Decay = 0.9
    """First-moment decay."""
    beta2: Decay = 0.999
    """Second-moment decay."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Global gradient-norm clip; 0 = none, the default of `stable_spam`, which scales each tensor afterwards anyway."""
    stable_spam: StableSpamConfig | None = None
    """Fields of `name: stable_spam`."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_choices(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        filled = dict(data)
        if filled.get("schedule") == "constant":
            filled.setdefault("warmup", 0.0)
        if filled.get("name") == "stable_spam":
            filled.setdefault("max_grad_norm", 0.0)
            filled["stable_spam"] = {} if filled.get("stable_spam") is None else filled["stable_spam"]
        return filled

    @model_validator(mode="after")
    def _consistent(self) -> OptimConfig:
        if self.schedule == "constant" and self.warmup:
            raise ValueError("schedule: constant has no warm-up; use constant_with_warmup, or set warmup: 0")
        if self.name != "stable_spam" and self.stable_spam is not None:
            raise ValueError("optim.stable_spam does nothing without name: stable_spam")
        return self

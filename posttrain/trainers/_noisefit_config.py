"""Fields of NoiseFiT; no torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from posttrain.config.base import Positive, Strict

NEEDS_PLAIN = {"loss_type": "nll", "label_smoothing_factor": 0.0, "neftune_noise_alpha": None}
"""Fields of TRL's config that change the loss or add noise of their own -> the value that does neither."""


IDLE = {
    "snr": ("auto",),
    "auto": ("pick", "num_layers", "relative_std"),
    "list": ("pick", "num_layers", "auto", "min_depth"),
}
"""Selection -> fields that it does not read."""


class AutoNoiseConfig(Strict):
    """`selection: auto`, the rule of the authors' later script."""

    factors: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)] = [0.25, 0.5, 1.0, 1.5, 2.0]
    """Scales tried at each layer, rising, in units of 1 / sqrt(hidden size)."""
    max_ce_rise: Annotated[float, Field(gt=0)] = 0.02
    """A scale that raises the cross-entropy by a larger share is not taken."""
    scale_penalty: Annotated[float, Field(ge=0)] = 0.05
    """c of the score kl / (1 + rise) / (1 + c log2(factor)^2)."""
    kl_share: Annotated[float, Field(gt=0)] = 0.75
    """A chosen layer gets the smallest scale whose divergence reaches this share of the median over the chosen layers."""
    bands: Positive = 3
    """Parts of the depth that share the chosen layers."""

    @model_validator(mode="after")
    def _rising(self) -> AutoNoiseConfig:
        if sorted(set(self.factors)) != self.factors:
            raise ValueError(f"factors must rise, got {self.factors}")
        return self


class NoiseConfig(Strict):
    """Noise, the layers that get it, and the weights of the loss terms; see `losses/noisefit.py`."""

    passes: Literal[0, 1, 2] = 2
    """Noisy passes; 1 has no consistency term, 0 is plain SFT."""
    selection: Literal["snr", "auto", "list"] = "snr"
    """Layers by signal-to-noise ratio (the paper), by response to noise, with a scale for each (the authors' later script), or `layers`."""
    pick: Literal["highest", "lowest"] = "highest"
    """End of the signal-to-noise ratio that is chosen."""
    num_layers: Positive = 3
    """Layers that `snr` chooses."""
    layers: list[Annotated[int, Field(ge=0)]] = []
    """Layers of `selection: list`; noise goes on the output of each, 0 the first."""
    min_depth: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the layers, from the first on, that are not chosen: the passes share what lies before the first noisy layer."""
    relative_std: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Noise over the standard deviation of a hidden state, exact for normal features; the ratio found is logged. `auto` has its own."""
    beta: Annotated[float, Field(ge=0)] = 0.1
    """How fast noise falls off from a token's median feature."""
    factor_cap: Annotated[float, Field(ge=1)] = 5.0
    """Most that a token's variance multiplies its noise by."""
    ce_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    """a: weight of the cross-entropy; the soft cross-entropy has 1 - a. With a = 1 and no consistency it is plain SFT."""
    consistency_weight: Annotated[float, Field(ge=0, le=10)] | None = None
    """lambda: weight of the divergence between the two noisy passes; 0.1 with two passes, 0 with fewer."""
    temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    """T of all distributions that are compared."""
    calibration_rows: Positive = 8
    """Rows of the training data, from the first on, by which layers are chosen."""
    auto: AutoNoiseConfig = AutoNoiseConfig()
    """`selection: auto`."""
    share_prefix: Literal["auto", "on", "off"] = "auto"
    """Run the layers before the noise once for all passes: where the model allows it and no dropout acts there; `on`, also where
    dropout does, which the passes then have in common; never."""
    compat: Literal["none", "v1", "v2"] = "none"
    """Noise, masks, gradients and normalisation as in one of the authors' scripts, for comparisons."""

    @property
    def consistency(self) -> float:
        """lambda, with its default."""
        default = 0.1 if self.passes == 2 else 0.0
        return default if self.consistency_weight is None else self.consistency_weight

    @property
    def neutral(self) -> bool:
        """Whether nothing is added to SFT."""
        return self.passes == 0 or (self.ce_weight == 1 and self.consistency == 0)

    @model_validator(mode="after")
    def _consistent(self) -> NoiseConfig:
        if (self.selection == "list") != bool(self.layers):
            raise ValueError("give `layers` with selection: list, and only then")
        if len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers: a layer is named twice in {self.layers}")
        if self.passes < 2 and self.consistency_weight:
            raise ValueError(f"consistency_weight compares two noisy passes; set passes: 2, not {self.passes}")
        if self.selection == "auto" and self.compat == "v1":
            raise ValueError("selection: auto belongs to the later script; set compat: v2 or none")
        fields = type(self).model_fields
        unused = [name for name in IDLE[self.selection] if getattr(self, name) != fields[name].default]
        if unused:
            raise ValueError(f"selection: {self.selection} has no use for `{unused[0]}`; remove it")
        return self


def check_trl_block(trl: dict[str, Any]) -> None:
    """Raises ValueError for a field of a `trl:` block that changes the loss beside ours."""
    for name, plain in NEEDS_PLAIN.items():
        if trl.get(name, plain) not in (plain, 0):
            raise ValueError(f"trl.{name}: NoiseFiT has its own loss and noise; remove it")

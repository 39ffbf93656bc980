"""The `trl:` block of a stage against the installed TRL, without building a trainer; used by `validate --deep`."""

from __future__ import annotations

import trl

from posttrain.config.common import TrainConfig
from posttrain.errors import Problem
from posttrain.trainers._train import owned_fields
from posttrain.trainers._trl import check_trl_fields


def check_block(config: TrainConfig) -> list[Problem]:
    """Fields that the stage's TRL config lacks, that posttrain sets itself, or whose values have the wrong type.

    Args:
        config: a trainer stage; one with `rollout` is built on GRPOConfig, any other on SFTConfig.
    """
    kind = trl.GRPOConfig if hasattr(config, "rollout") else trl.SFTConfig
    return check_trl_fields(config.trl, kind, f"stages.{config.name}.trl", owned_fields(kind))

"""Calibration text as windows of tokens, a part of which never enters a fit.

Rows are ordered by a hash of seed and content, so the choice does not depend on the order of files; whole rows go to either
part, joined by end tokens and cut into windows, so that no held-out window shares a row with a fitted one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.config.common import DataConfig
from posttrain.core.context import StageContext
from posttrain.core.hashing import digest_of
from posttrain.errors import DataError
from posttrain.quant.options import CalibrationConfig

LEAST = 4


@dataclass(frozen=True)
class Windows:
    """Tokens of calibration.

    Args:
        ids: [windows, length].
        train: how many windows are fitted; the rest judge.
    """

    ids: Tensor
    train: int

    @property
    def digest(self) -> str:
        """Of the tokens and where they are cut."""
        return digest_of([self.train, self.ids.tolist()])


def load_windows(ctx: StageContext, tokenizer: Any, cfg: CalibrationConfig, longest: int | None = None) -> Windows:
    """Windows from the stage's port `data`.

    Args:
        ctx: of the stage.
        tokenizer: of the model.
        cfg: how much.
        longest: tokens the model takes, or None.

    Raises:
        DataError: the rows do not fill a few windows of either part, or a window is longer than the model takes.
    """
    from posttrain.data.dataset import training_rows
    from posttrain.data.encode import encode_row

    if longest is not None and cfg.length > longest:
        raise DataError(f"calibration.length {cfg.length} is more than the {longest} positions of the model", fix=f"set it to {longest}")
    rows = sorted(training_rows(ctx), key=lambda row: digest_of([ctx.seed, row["id"]]))
    if len(rows) < 2:
        raise DataError(
            "one row cannot be split into a fitted and a held-out part", where=f"stages.{ctx.name}.in.data", fix="give more rows"
        )
    data = DataConfig(format=cfg.format, loss_on="all", max_length=1 << 30)
    wanted = {"train": cfg.tokens // cfg.length, "held": max(cfg.held_out // cfg.length, 1)}
    ids: dict[str, list[int]] = {"train": [], "held": []}
    for row in rows:
        part = min(wanted, key=lambda part: len(ids[part]) / wanted[part])
        if len(ids[part]) >= wanted[part] * cfg.length:
            break
        ids[part] += encode_row(tokenizer, row, data).input_ids
    found = {part: min(len(tokens) // cfg.length, wanted[part]) for part, tokens in ids.items()}
    if min(found.values()) < min(LEAST, *wanted.values()):
        raise DataError(
            f"the rows give {len(ids['train']):,} tokens to fit and {len(ids['held']):,} to judge, "
            f"fewer than {LEAST} windows of {cfg.length} each",
            where=f"stages.{ctx.name}.in.data",
            fix="give more rows, or shorten calibration.length",
        )
    if found != wanted:
        fitted, held = (found[part] * cfg.length for part in ("train", "held"))
        ctx.events.warn(f"calibration: {fitted:,} tokens to fit and {held:,} to judge, asked for {cfg.tokens:,} and {cfg.held_out:,}")
    parts = [torch.tensor(ids[part][: found[part] * cfg.length]).view(-1, cfg.length) for part in ("train", "held")]
    windows = Windows(torch.cat(parts), found["train"])
    ctx.summary["calibration"] = {
        "tokens": found["train"] * cfg.length,
        "held_out": found["held"] * cfg.length,
        "length": cfg.length,
        "digest": windows.digest,
    }
    return windows

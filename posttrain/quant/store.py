"""Finished blocks on disk: `block-00003.safetensors` with the results of its layers, `block-00003.json` with their report.

The JSON file is written last, atomically; a block without it is fitted again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from posttrain.core.durable import disk_errors, write_json
from posttrain.quant.base import QTensor
from posttrain.quant.closed_form import Fitted


class Store(Mapping[str, Fitted]):
    """Layer name -> result, read from disk one at a time.

    Args:
        folder: of the block files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._where: dict[str, tuple[Path, dict[str, Any]]] = {}
        self.reports: list[dict[str, Any]] = []
        while (report := self._read(len(self.reports))) is not None:
            self._take(report)

    def __len__(self) -> int:
        return len(self._where)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __getitem__(self, name: str) -> Fitted:
        file, form = self._where[name]
        with safe_open(file, "pt") as tensors:
            held = set(tensors.keys())

            def get(part: str) -> Tensor | None:
                return tensors.get_tensor(f"{name}.{part}") if f"{name}.{part}" in held else None

            codes, scales = get("codes"), get("scales")
            assert codes is not None and scales is not None
            q = QTensor(codes, scales, get("zero_points"), form["bits"], form["group_size"], form["symmetric"])
            return Fitted(q, get("a"), get("b"))

    @property
    def done(self) -> int:
        """Blocks that are finished."""
        return len(self.reports)

    def commit(self, fitted: Mapping[str, Fitted], report: dict[str, Any]) -> None:
        """Adds the next block."""
        file = self._file(self.done)
        tensors: dict[str, Tensor] = {}
        forms: dict[str, dict[str, Any]] = {}
        for name, one in fitted.items():
            parts = {"codes": one.q.codes, "scales": one.q.scales, "zero_points": one.q.zero_points, "a": one.a, "b": one.b}
            tensors |= {f"{name}.{part}": value.detach().cpu().contiguous() for part, value in parts.items() if value is not None}
            forms[name] = {"bits": one.q.bits, "group_size": one.q.group_size, "symmetric": one.q.symmetric}
        with disk_errors(file):
            temporary = file.with_suffix(".tmp")
            save_file(tensors, temporary)
            with open(temporary, "rb") as stream:
                os.fsync(stream.fileno())
            os.replace(temporary, file)
        report = {**report, "forms": forms}
        write_json(file.with_suffix(".json"), report)
        self._take(report)

    def _take(self, report: dict[str, Any]) -> None:
        file = self._file(self.done)
        self._where |= {name: (file, form) for name, form in report["forms"].items()}
        self.reports.append(report)

    def _read(self, index: int) -> dict[str, Any] | None:
        file = self._file(index)
        if not file.is_file() or not file.with_suffix(".json").is_file():
            return None
        found: dict[str, Any] = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        return found

    def _file(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"


def rounded(one: Fitted, dtype: torch.dtype) -> Fitted:
    """The result with its adapter in the type it is stored in, as float32 values."""
    if one.a is None or one.b is None:
        return one
    return Fitted(one.q, one.a.to(dtype).float(), one.b.to(dtype).float(), one.how)

"""Files that come with the package: pipelines, stage YAMLs, launch files.

In a checkout they lie at the repository's root (`configs/`, `launch/`); in a wheel they are package data under
`posttrain/_shipped`, with the same relative names.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from posttrain.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent


def shipped_root() -> Path:
    """The folder that holds `configs/` and `launch/`: the repository's root in a checkout, package data in a wheel."""
    packaged = _PACKAGE / "_shipped"
    return packaged if packaged.is_dir() else _PACKAGE.parent


def shipped_files(under: str = "configs") -> list[str]:
    """Relative names of the shipped files below `under`, sorted; e.g. `configs/pipelines/quickstart.yaml`."""
    root = shipped_root()
    return sorted(path.relative_to(root).as_posix() for path in (root / under).rglob("*") if path.is_file())


def shipped_file(name: str) -> Path:
    """Path of one shipped file, e.g. `launch/accelerate/zero2.yaml`.

    Raises:
        ConfigError: nothing of that name is shipped; the message names the nearest.
    """
    root = shipped_root()
    path = (root / name).resolve()
    known = shipped_files("configs") + shipped_files("launch")
    if path.is_file() and path.is_relative_to(root):
        return path
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    raise ConfigError(f"no shipped file `{name}`", fix=f"did you mean `{near[0]}`?" if near else f"known files: {', '.join(known)}")

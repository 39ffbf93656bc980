"""`new`, `schema`, `env`: what a person needs around pipelines."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from posttrain.core.doctor import Finding


def schema(args: argparse.Namespace) -> int:
    """`posttrain schema`: the JSON Schema of pipeline files, for editors."""
    from posttrain.config.schema import json_schema
    from posttrain.core.events import dumps

    print(dumps(json_schema(), indent=1))
    return 0


def env(args: argparse.Namespace) -> int:
    """`posttrain env`: versions, devices, a verdict for each package; returns 1 if something is broken."""
    if args.completion:
        from posttrain.verbs.completion import bash_script

        print(bash_script())
        return 0
    from posttrain.core import doctor

    versions = doctor.installed()
    found = [
        *doctor.check_combinations(versions),
        *doctor.check_ranges(versions, doctor.declared()),
        *doctor.check_tested(versions, _constraints()),
        _sandbox(),
    ]
    print(_aligned(doctor.devices()) + "\n")
    known = [f for f in found if f.level in ("ok", "optional")]
    print(_aligned([(f.name, f.version or "-", f"{f.level}: {f.message}") for f in known]))
    wrong = [f for f in found if f.level in ("bad", "note")]
    for item in wrong:
        print(f"\n{item.level}: {item.name} {item.version}: {item.message}" + (f"\n  fix: {item.fix}" if item.fix else ""))
    bad = sum(f.level == "bad" for f in wrong)
    print(f"\n{bad} problem{'' if bad == 1 else 's'}" if bad else "\nall is well")
    return 1 if bad else 0


def _sandbox() -> Finding:
    """What this machine allows for rewards that run untrusted code."""
    from posttrain.core.doctor import Finding
    from posttrain.errors import RewardError
    from posttrain.rewards.sandbox.pool import protection

    try:
        there, missing = protection()
    except RewardError as error:
        return Finding("bad", "sandbox", "", error.message, error.fix)
    if not missing:
        return Finding("ok", "sandbox", "", f"jails have their own {', '.join(there)}")
    fix = "run in a container or virtual machine of its own, or allow user namespaces"
    return Finding("note", "sandbox", "", f"rewards that run code work with limits of time, memory and size, but {', '.join(missing)}", fix)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _constraints() -> str:
    from posttrain.shipped import shipped_root

    path = shipped_root() / "constraints.txt"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def new(args: argparse.Namespace) -> int:
    """`posttrain new WHAT NAME`: writes a shipped file, or a method, reward or selector that works at once."""
    from posttrain.verbs.scaffold import list_shipped, write_new, write_shipped

    folder = Path(args.to)
    if args.what == "config":
        print("\n".join(list_shipped() if args.name == "list" else [str(p) for p in write_shipped(args.name, folder)]))
        return 0
    print("\n".join(write_new(args.what, args.name, folder)))
    return 0

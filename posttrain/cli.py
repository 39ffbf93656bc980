"""The command line: verbs only. Nothing heavy is imported before a verb needs it.

Every verb takes dotted overrides after its file, e.g. `stages.sft.optim.lr=1e-5` or `seed=3`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from dataclasses import dataclass

from posttrain import __version__
from posttrain.errors import PosttrainError, Preempted, format_error


@dataclass(frozen=True)
class Verb:
    """One verb: where its code is, what it does, an example that works."""

    module: str
    help: str
    example: str


VERBS = {
    "run": Verb("pipeline", "run a pipeline, or go on with it", "posttrain run configs/pipelines/quickstart.yaml seed=3"),
    "plan": Verb("pipeline", "show what would run, and why", "posttrain plan configs/pipelines/quickstart.yaml"),
    "validate": Verb("pipeline", "name every error in a pipeline file", "posttrain validate configs/pipelines/quickstart.yaml --deep"),
    "select": Verb(
        "single",
        "select data: METHOD and ports; or `compare` methods by held-out loss",
        "posttrain select dsir raw='shards/*.jsonl.zst' target=target.jsonl rows=50000 out=picked",
    ),
    "train": Verb(
        "single", "run one training stage from a file", "posttrain train configs/stages/sft.yaml model.id=./model in.data=rows.jsonl"
    ),
    "generate": Verb("single", "generate from a model", "posttrain generate model=./model prompt='12+34=' max_tokens=8"),
    "eval": Verb("single", "measure a model on local rows", "posttrain eval model=./model data=rows.jsonl metrics=[loss,perplexity]"),
    "quantize": Verb(
        "single", "quantize a model: METHOD and model", "posttrain quantize rtn model=./model bits=4 group_size=32 out=model-int4"
    ),
    "export": Verb("single", "write a model as a plain folder", "posttrain export model=./model out=exported"),
    "serve": Verb("serve", "serve a model over OpenAI's HTTP interface with our constraint sampler", "posttrain serve ./model"),
    "report": Verb("look", "write a run's report.html", "posttrain report quickstart"),
    "ls": Verb("look", "list runs, or the stages of one", "posttrain ls quickstart"),
    "show": Verb("look", "show one stage: lineage, files, figures", "posttrain show quickstart sft"),
    "verify": Verb("look", "hash every committed file again", "posttrain verify quickstart"),
    "prune": Verb("look", "delete what nothing refers to", "posttrain prune quickstart --dry-run"),
    "new": Verb("tools", "write a new method, or a shipped file", "posttrain new method mymethod"),
    "schema": Verb("tools", "print the JSON Schema of pipeline files", "posttrain schema > posttrain.schema.json"),
    "env": Verb("tools", "print versions and what is wrong with them", "posttrain env"),
}


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plugin", action="append", default=[], metavar="PACKAGE", help="import this installed package's methods and rewards"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def _run_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", metavar="DIR", help="folder of all runs (default: $POSTTRAIN_RUNS or ./runs)")
    parser.add_argument("--trust-remote-code", action="store_true", help="let a model repository run its own code")
    parser.add_argument("--isolate", action="store_true", help="one process a stage")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def _selection_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", action="append", default=[], metavar="STAGE", help="only this stage (repeatable)")
    parser.add_argument("--from", dest="from_", metavar="STAGE", help="from this stage on")
    parser.add_argument("--until", metavar="STAGE", help="up to this stage")
    parser.add_argument("--force", action="append", default=[], metavar="STAGE", help="make this stage again (`all` for every one)")


def _pipeline(parser: argparse.ArgumentParser, verb: str) -> None:
    parser.add_argument("file", help="pipeline YAML")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="dotted overrides")
    if verb == "validate":
        parser.add_argument("--deep", action="store_true", help="also check rows, template, trl fields, disk and memory (imports torch)")
        parser.add_argument("--runs", metavar="DIR", help=argparse.SUPPRESS)
        return
    _run_flags(parser)
    _selection_flags(parser)
    if verb == "run":
        parser.add_argument("--seeds", metavar="0,1,2", help="run once a seed, then show an aggregated table")
    if verb == "plan":
        parser.add_argument("--json", action="store_true", help="machine-readable")


def _single(parser: argparse.ArgumentParser, verb: str) -> None:
    if verb == "train":
        parser.add_argument("file", help="YAML with one stage")
    elif verb in ("select", "quantize"):
        known = "e.g. dsir; or `compare`: train a small model on each pick" if verb == "select" else "e.g. rtn"
        parser.add_argument("name", metavar="METHOD", help=known)
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="ports (model=, data=, raw=, target=), out=, and fields of the method"
    )
    _run_flags(parser)
    parser.add_argument("--force", action="append_const", const="all", default=[], help="run again even if committed")


def _look(parser: argparse.ArgumentParser, verb: str) -> None:
    parser.add_argument("run", help="run name or folder", nargs="?" if verb == "ls" else None)
    if verb == "show":
        parser.add_argument("stage", nargs="?", help="stage name")
    if verb == "verify":
        parser.add_argument("--load", action="store_true", help="also load quantized checkpoints in transformers and vLLM (imports torch)")
    if verb == "prune":
        parser.add_argument("--dry-run", action="store_true", help="only say what would go")
        parser.add_argument("--work", action="store_true", help="also delete checkpoints of committed stages")
    parser.add_argument("--runs", metavar="DIR", help="folder of all runs")


def _serve(parser: argparse.ArgumentParser, _verb: str) -> None:
    parser.add_argument("model", help="folder, artifact, adapter, GGUF file or hub id")
    parser.epilog = f"what stands after `--` is handed to vLLM's server as it is\n{parser.epilog}"
    parser.add_argument("--engine", choices=["vllm", "hf"], default="vllm", help="vLLM's server, or ours on transformers (default: vllm)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; any but the loopback needs a key (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port (default: 8000)")
    parser.add_argument("--name", help="name that requests ask for (default: the folder's)")
    parser.add_argument("--api-key-file", metavar="FILE", help="file with the key that clients must send (default: $POSTTRAIN_API_KEY)")
    parser.add_argument("--lora", action="append", default=[], metavar="NAME=FOLDER", help="also serve this adapter (repeatable)")
    parser.add_argument("--dtype", default="auto", help="type of weights and activations (default: auto)")
    parser.add_argument("--max-batch", type=int, default=64, help="most sequences at once (default: 64)")
    parser.add_argument("--max-model-len", type=int, help="longest prompt and completion together, in tokens")
    parser.add_argument("--max-body", type=int, default=4 * 2**20, metavar="BYTES", help="largest request (default: 4 MiB)")
    parser.add_argument("--max-waiting", type=int, default=256, help="requests that may wait with --engine hf; more get 429 (default: 256)")
    parser.add_argument("--drain", type=int, default=30, metavar="SECONDS", help="time for running requests after SIGTERM (default: 30)")
    parser.add_argument("--trust-remote-code", action="store_true", help="let a model repository run its own code")


def _tools(parser: argparse.ArgumentParser, verb: str) -> None:
    if verb == "new":
        parser.add_argument("what", choices=["method", "reward", "selector", "config"], help="what to write")
        parser.add_argument("name", help="its name; for `config`, a shipped file such as pipelines/quickstart.yaml (or `list`)")
        parser.add_argument("--to", metavar="DIR", default=".", help="folder to write below (default: here)")
    if verb == "env":
        parser.add_argument("--completion", choices=["bash"], help="print a completion script instead")


_ARGUMENTS = {"pipeline": _pipeline, "single": _single, "look": _look, "serve": _serve, "tools": _tools}


class _Plain(argparse.RawDescriptionHelpFormatter):
    """Leaves the example on one line, so that it can be copied."""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(prog="posttrain", description="Post-training for language models from one YAML file.",
                                     epilog="example: posttrain run configs/pipelines/quickstart.yaml")  # fmt: skip
    parser.add_argument("--version", action="version", version=f"posttrain {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, verb in VERBS.items():
        sub = verbs.add_parser(name, help=verb.help, description=verb.help + ".", epilog=f"example: {verb.example}", formatter_class=_Plain)
        _ARGUMENTS[verb.module](sub, name)
        _common(sub)
    return parser


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments with overrides gathered from anywhere on the line, also behind flags."""
    parser, argv = build_parser(), sys.argv[1:] if argv is None else argv
    own = argv.index("--") if "serve" in argv[:1] and "--" in argv else len(argv)
    args, rest = parser.parse_known_args(argv[:own])
    args.engine_args = argv[own + 1 :]
    strays = [text for text in rest if text.startswith("-") or "=" not in text]
    if strays or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(strays or rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _raise_preempted(number: int, _frame: object) -> None:
    raise Preempted(f"stopped by {signal.Signals(number).name}", fix="run the same command again; it goes on where it was")


def main(argv: list[str] | None = None) -> int:
    """Runs a verb; returns the exit code. A person's mistake never ends in a traceback."""
    args = _parse(argv)
    try:
        signal.signal(signal.SIGTERM, _raise_preempted)
        from posttrain.core.registry import use_plugins

        use_plugins(args.plugin)
        compared = args.verb == "select" and args.name == "compare"
        module = importlib.import_module(f"posttrain.verbs.{'compare' if compared else VERBS[args.verb].module}")
        code = int(getattr(module, args.verb)(args) or 0)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 75
    except Exception as error:
        if args.debug:
            raise
        return _report(error)


def _report(error: Exception) -> int:
    """Prints one error without a traceback; returns its exit code."""
    if isinstance(error, PosttrainError):
        print(format_error(error), file=sys.stderr)
        return error.exit_code
    if isinstance(error, OSError) and error.filename:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 4
    print(f"internal error: {type(error).__name__}: {error}\n  fix: run it again with --debug and report the traceback", file=sys.stderr)
    return 1

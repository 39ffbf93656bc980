"""A nested JSON schema over 128,000 tokens: what building the constraint costs, and what copying a particle's state costs.

    python benchmarks/awrs_compile.py            # about three minutes on one core, most of it for the tokenizer, which is kept
    python benchmarks/awrs_compile.py --quick    # 8,000 tokens

The schema has objects in arrays in objects, enums, optional fields and strings with a length. `build` is a new constraint from the
schema's text to its first state, the vocabulary known; the peer is xgrammar's compiler on one thread, without its cache, and a
matcher. `fork` copies a state after half of a text; the peer is xgrammar's `fork`. The tokenizer is a byte-level BPE trained on the
sources of the standard library and of installed packages.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from _harness import arguments, compare, finish, speed

from posttrain.config.constraint import ConstraintConfig
from posttrain.rollout._build import build_constraint
from posttrain.rollout.constraints import TokenChecker, Vocabulary

ADDRESS = {
    "type": "object",
    "properties": {"street": {"type": "string", "maxLength": 40}, "city": {"type": "string"}, "kind": {"enum": ["home", "work", "other"]}},
    "required": ["street", "kind"],
    "additionalProperties": False,
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 60},
        "age": {"type": "integer"},
        "scores": {"type": "array", "items": {"type": "number"}, "maxItems": 8},
        "addresses": {"type": "array", "items": ADDRESS, "maxItems": 4},
        "friends": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"name": {"type": "string"}, "address": ADDRESS, "close": {"type": "boolean"}},
                "required": ["name", "close"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["name", "age", "addresses", "friends"],
    "additionalProperties": False,
}
TEXT = '{"name": "Ada", "age": 36, "scores": [1.5, 2], "addresses": [{"street": "12 Long Lane", "kind": "ho'
FORKS = 2_000


def tokenizer_of(size: int) -> Any:
    """A byte-level BPE of the size, trained once."""
    from transformers import AutoTokenizer

    folder = Path(tempfile.gettempdir()) / f"posttrain-bpe-{size}"
    if not (folder / "done").exists():
        from _records import _sources

        from posttrain.models.create import train_tokenizer

        texts = _sources(4_000_000 if size < 10_000 else 14_000_000)
        if size > 10_000:
            packages = Path(json.__file__).parent, *(Path(entry) for entry in sys.path if entry.endswith("site-packages"))
            files = sorted(file for entry in packages for file in entry.glob("*/*.py"))
            texts += [file.read_text(encoding="utf-8", errors="ignore") for file in files][:12_000]
        train_tokenizer(texts, size, 512).save_pretrained(folder)
        (folder / "done").touch()
    return AutoTokenizer.from_pretrained(folder)


def main() -> None:
    """Both costs."""
    import xgrammar

    args = arguments(__doc__ or "")
    tokenizer = tokenizer_of(8_000 if args.quick else 128_000)
    vocabulary = Vocabulary.of(tokenizer, frozenset({tokenizer.eos_token_id}))
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer)
    text, ids, number = json.dumps(SCHEMA), tokenizer.encode(TEXT, add_special_tokens=False), [0]

    def ours_build() -> None:
        number[0] += 1  # another schema each time, so that nothing can be remembered
        config = ConstraintConfig(json_schema={**json.loads(text), "description": str(number[0])})
        checker = TokenChecker(build_constraint(config).start(), vocabulary)
        assert checker.allows(ids[0])

    def peer_build() -> None:
        compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        assert xgrammar.GrammarMatcher(compiler.compile_json_schema(text)).accept_token(ids[0])

    build = speed(compare(peer_build, ours_build, pairs=2 if args.quick else 20, warmup=1))
    checker = TokenChecker(build_constraint(ConstraintConfig(json_schema=SCHEMA)).start(), vocabulary)
    matcher = xgrammar.GrammarMatcher(xgrammar.GrammarCompiler(info, max_threads=1).compile_json_schema(text))
    for token in ids:
        assert checker.allows(token) and matcher.accept_token(token)
        checker.advance(token)

    def ours_fork() -> None:
        for _ in range(FORKS):
            checker.fork()

    def peer_fork() -> None:
        for _ in range(FORKS):
            matcher.fork()

    fork = speed(compare(peer_fork, ours_fork, pairs=2 if args.quick else 20, warmup=1))
    ms = {"ours": build["ours"] * 1e3, "peer": build["peer"] * 1e3}
    us = {"ours": fork["ours"] / FORKS * 1e6, "peer": fork["peer"] / FORKS * 1e6}
    said = f"build {ms['ours']:.1f} ms, xgrammar {ms['peer']:.1f}; fork {us['ours']:.1f} us, xgrammar {us['peer']:.1f}"
    print(f"{len(tokenizer)} tokens; {said}")
    finish("awrs_compile", {**build, "unit": "seconds to build", "tokens": len(tokenizer), "fork": {**fork, "us": us}}, args)


if __name__ == "__main__":
    main()

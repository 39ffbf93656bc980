"""Constraints: point queries against whole texts, thirty schemas against an independent validator, hostile ones, tokens and bytes."""

from __future__ import annotations

import itertools
import json
import time

import jsonschema
import numpy as np
import pytest
from pydantic import ValidationError

from posttrain.config.constraint import ConstraintConfig
from posttrain.errors import ConfigError, RolloutError
from posttrain.rollout._build import build_constraint
from posttrain.rollout.constraints import Constraint, State, TokenChecker, Vocabulary, complete, predicate, prefix
from tests.constraint_kit import END, GOOD, HOSTILE, byte_vocabulary, compact, written


def built(**fields) -> Constraint:
    return build_constraint(ConstraintConfig(**fields))


@pytest.mark.parametrize("name", GOOD)
def test_good_schemas_take_what_an_independent_validator_takes(name):
    schema, right, wrong = GOOD[name]
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    constraint = built(json_schema=schema)
    for value in right:
        assert validator.is_valid(value)
        text = compact(value)
        assert complete(constraint, text), text
        assert all(prefix(constraint, text[:i]) for i in range(len(text) + 1))
    for value in wrong:
        assert not validator.is_valid(value)
        assert not complete(constraint, compact(value)), value
    ended = 0
    for seed in range(6):
        text, end = written(constraint, seed)
        if end:
            ended += 1
            assert validator.is_valid(json.loads(text)), text
    assert ended


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_are_refused_by_what_is_wrong(name):
    schema, word = HOSTILE[name]
    start = time.monotonic()
    with pytest.raises(ConfigError, match=word) as error:
        built(json_schema=schema)
    assert "rollout.constraint.json_schema" in str(error.value)
    assert time.monotonic() - start < 2


def test_enough_schemas():
    assert len(GOOD) >= 30 and len(HOSTILE) >= 20


@pytest.mark.parametrize(
    "fields",
    [
        {"regex": r"\d{4}-\d\d"},
        {"choices": ["yes", "yes, but", "no"]},
        {"lark": 'start: "a" start "b" | "c"'},
        {"boxed": True},
        {"banned": ["bad", "worse"]},
        {"all": [{"regex": "[a-z]+"}, {"banned": ["aa"]}]},
        {"json_schema": {"type": "array", "items": {"type": "integer"}}},
    ],
)
def test_states_keep_the_contract(fields):
    """A beginning of a text is allowed, in whatever pieces; queries change nothing; forks are independent."""
    constraint = built(**fields)
    rng = np.random.default_rng(0)
    texts = {
        "regex": b"2024-11",
        "choices": b"yes, but",
        "lark": b"aacbb",
        "boxed": b"so $\\boxed{7}$.",
        "banned": b"wors\xc3\xa9 ba d",
        "all": b"abcab",
        "json_schema": b"[1, 20]",
    }[next(iter(fields))]
    assert complete(constraint, texts)
    for _ in range(20):
        cuts = sorted({0, len(texts), *rng.integers(1, len(texts), 2).tolist()})
        state = constraint.start()
        assert isinstance(constraint, Constraint) and isinstance(state, State)
        for low, high in itertools.pairwise(cuts):
            fork = state.fork()
            for piece in (b"\xff\xfe", b"zzz", texts[low:high]):
                state.allows(piece)
            assert state.allows(texts[low:high]) and fork.allows(texts[low:high])
            state.advance(texts[low:high])
            assert fork.allows(texts[low:high]) and fork.complete() == complete(constraint, texts[:low])
        assert state.complete()


def test_what_each_kind_refuses():
    cases = [
        ({"regex": r"\d{4}"}, [b"20245", b"20a"], []),
        ({"choices": ["yes", "no"]}, [b"maybe", b"yess"], [b"ye", b""]),
        ({"lark": 'start: "a" start "b" | "c"'}, [b"acbb", b"b"], [b"aac", b"ac"]),
        ({"boxed": True}, [], [b"the answer is 7", b"\\boxed{7} or so", b"\\boxed{}"]),
        ({"banned": ["bad"]}, [b"a bad one", b"bad"], []),
        ({"all": [{"choices": ["ab", "cd"]}, {"banned": ["b"]}]}, [b"ab"], [b"a"]),
    ]
    for fields, never, unfinished in cases:
        constraint = built(**fields)
        assert not any(prefix(constraint, text) for text in never)
        assert all(prefix(constraint, text) and not complete(constraint, text) for text in unfinished)
    cut = built(banned=["bad"]).start()
    cut.advance(b"b")
    cut.advance(b"a")
    assert not cut.allows(b"d") and cut.allows(b"t")


def test_code_points_may_be_split_over_tokens():
    vocabulary = byte_vocabulary()
    first, second = vocabulary.pieces.index(b"\xf0\x9f", 257), vocabulary.pieces.index(b"\x98\x80", 257)
    for fields in ({"regex": "😀+"}, {"choices": ["😀"]}, {"json_schema": {"enum": ["😀"]}}):
        checker = TokenChecker(built(**fields).start(), vocabulary)
        quoted = "json_schema" in fields
        if quoted:
            checker.advance(ord('"'))
        assert checker.allows(first) and not checker.allows(second) and not checker.allows(END)
        checker.advance(first)
        assert checker.allows(second) and checker.allows(0x98) and not checker.allows(0x41)
        checker.advance(second)
        if quoted:
            checker.advance(ord('"'))
        assert checker.allows(END)


def test_tokens_without_bytes_are_never_text():
    vocabulary = Vocabulary([b"a", b"", b"", b"b"], frozenset({1}))
    checker = TokenChecker(built(regex="(?s:.*)").start(), vocabulary)
    assert [checker.allows(i) for i in range(6)] == [True, True, False, True, False, False]
    assert checker.mask().tolist() == [True, True, False, True]
    checker.advance(1)
    assert checker.tokens == ()


def test_masks_of_forks_go_on_by_themselves(tiny_tokenizer):
    """A mask goes on from the last one of its text; what a fork takes must not reach its origin, nor the other way round."""
    vocabulary = Vocabulary.of(tiny_tokenizer, frozenset({tiny_tokenizer.eos_token_id}))
    origin = TokenChecker(built(regex="[a-c]{2}[0-9]|[x-z]+").start(), vocabulary)

    def asked(checker):
        return [checker.allows(token) for token in range(len(vocabulary))]

    def token(text):
        return vocabulary.pieces.index(text)

    assert origin.mask().tolist() == asked(origin)
    forks = [origin.fork(), origin.fork()]
    forks[0].advance(token(b"a"))
    forks[1].advance(token(b"x"))
    again = forks[0].fork()
    for checker in (forks[1], origin, forks[0], again, forks[0]):
        assert checker.mask().tolist() == asked(checker)
    again.advance(token(b"b"))
    forks[0].advance(token(b"c"))
    for checker in (again, forks[0], origin, forks[1]):
        assert checker.mask().tolist() == asked(checker) and any(asked(checker))


def test_the_vocabulary_and_the_mask_of_a_real_tokenizer(tiny_tokenizer):
    ends = frozenset({tiny_tokenizer.eos_token_id})
    vocabulary = Vocabulary.of(tiny_tokenizer, ends)
    ids = tiny_tokenizer("Größe: 12 😀 {}", add_special_tokens=False)["input_ids"]
    assert b"".join(vocabulary.pieces[i] for i in ids).decode().strip() == "Größe: 12 😀 {}"
    assert not any(vocabulary.pieces[i] for i in tiny_tokenizer.all_special_ids)
    checker = TokenChecker(
        built(json_schema={"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}).start(), vocabulary
    )
    for step in range(60):
        asked = np.array([checker.allows(token) for token in range(len(vocabulary))])
        assert checker.has_mask and (checker.mask() == asked).all()
        allowed = [int(token) for token in np.flatnonzero(asked) if token not in ends]
        if not allowed:
            break
        checker.advance(allowed[step * 7 % len(allowed)])
    fork = checker.fork()
    assert fork.tokens == checker.tokens and fork.tokens is not None


def test_citations_are_blocked_where_a_word_is_complete(tmp_path):
    """Against brute force on random words, in pieces that cut words anywhere."""
    rng = np.random.default_rng(0)
    letters = ["a", "bb", "c", "dé"]
    texts = [" ".join(rng.choice(letters, 12)) for _ in range(3)]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    constraint = built(uncited={"path": str(path), "ngram": 3})
    grams = {tuple(words[i : i + 3]) for words in map(str.split, texts) for i in range(10)}
    refused = 0
    for _ in range(300):
        words = rng.choice(letters, 5).tolist()
        text = ("  ".join(words) + rng.choice(["", " ", "\n"])).encode()
        state, good = constraint.start(), True
        cuts = sorted({0, len(text), *rng.integers(0, len(text), 4).tolist()})
        for low, high in itertools.pairwise(cuts):
            good = good and state.fork().allows(text[low:high])
            if not good:
                break
            state.advance(text[low:high])
        ended = text.decode().endswith((" ", "\n"))
        done = words if ended else words[:-1]
        want = not any(tuple(done[i : i + 3]) in grams for i in range(len(done) - 2))
        assert good == want
        if good:
            assert state.complete() == (tuple(words[-3:]) not in grams)
        refused += not good
    assert 20 < refused < 280
    assert prefix(constraint, texts[0].encode()[:4]) and not prefix(constraint, texts[0].encode())


def test_predicates_come_from_plugins_and_their_faults_are_not_refusals():
    @predicate("test-vowels")
    def vowels(text: bytes, ends: bool, least: int = 0) -> bool:
        if text == b"boom":
            raise KeyError("inside")
        if text == b"odd":
            return "yes"  # type: ignore[return-value]
        return not ends or sum(text.count(v) for v in b"aeiou") >= least

    constraint = built(plugin="test-vowels", args={"least": 2})
    assert complete(constraint, b"aXe") and prefix(constraint, b"X") and not complete(constraint, b"aX")
    with pytest.raises(RolloutError, match="`test-vowels` raised KeyError: 'inside'"):
        prefix(constraint, b"boom")
    with pytest.raises(RolloutError, match="answered 'yes', expected True or False"):
        prefix(constraint, b"odd")
    with pytest.raises(ConfigError, match=r"no checker is called `test-vowel`; known: .*test-vowels"):
        built(plugin="test-vowel")
    with pytest.raises(ConfigError, match="declared twice"):
        predicate("test-vowels")(lambda text, ends: True)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"regex": "(a|"}, "unclosed group"),
        ({"regex": r"[^\s\S]"}, "no text satisfies it"),
        ({"regex": r"(?=a)b"}, "look-around"),
        ({"lark": 'start: "x" start'}, "needs itself without end"),
        ({"lark": "start: x\nx: y\ny: x"}, "needs itself without end"),
        ({"lark": "start: nothing"}, "unknown name"),
        ({"lark": 'begin: "a"'}, "start"),
        ({"json_schema": "/no/such/file.json"}, "cannot read the schema"),
    ],
)
def test_grammars_that_cannot_be_are_refused_when_built(fields, words):
    with pytest.raises(ConfigError, match=words):
        built(**fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "exactly one"),
        ({"regex": "a", "boxed": True}, "exactly one"),
        ({"regex": "a", "args": {"x": 1}}, "`args` go with `plugin`"),
        ({"choices": ["a", "a"]}, "listed twice"),
        ({"choices": []}, "at least 1 item"),
        ({"banned": [""]}, "empty"),
        ({"regex": "a" * 5000}, "at most 4096"),
        ({"json_schema": {"enum": ["x" * 70_000]}}, "larger than 65536"),
        ({"lark": "x" * 70_000}, "larger than 65536"),
        ({"regexp": "a"}, "regex"),
    ],
)
def test_configs_are_checked(fields, words):
    with pytest.raises(ValidationError, match=words):
        ConstraintConfig(**fields)


def test_schemas_from_files(tmp_path):
    path = tmp_path / "s.json"
    path.write_text('{"type": "boolean"}')
    assert complete(built(json_schema=str(path)), b"true")
    path.write_text("[1]")
    with pytest.raises(ConfigError, match="not a JSON object"):
        built(json_schema=str(path))


def test_queries_and_copies_are_cheap():
    """Tens of microseconds would make a token dear; the bound is loose, since the machine may be busy."""
    state = built(json_schema=GOOD["recursion"][0]).start()
    state.advance(b'{"v": 1')
    for call in (lambda: state.allows(b"2"), state.fork):
        start = time.process_time()
        for _ in range(2000):
            call()
        assert (time.process_time() - start) / 2000 < 200e-6

"""A program that is not trusted, and the tests that judge it, in two jails.

The judge runs the test text as it stands, in its own process. Names of the program are stand-ins there: calling one sends
the arguments over, runs the program's function in the program's process, and brings a plain value back (numbers, texts,
lists, dicts, ...; see `wire`). So the expected values never enter the program's process, and nothing the program does to
its own interpreter (exit codes, patched builtins, printed verdicts, objects that equal everything) reaches the judge.

Objects without a plain form stay in the program and are used through the stand-in: attributes, items, calls, truth, length,
text. Two of them are compared by the program; one of them and a plain value are never equal, cannot be ordered, and their
sum or difference cannot be a plain value. Arguments that the program changes in place (lists, dicts, sets) are changed
in the test, too. Functions of the test can be passed to the program; other objects of the test's own cannot.

Programs that are judged by what they print run alone, as `__main__`, with the test's text as standard input.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import json
import operator
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

from posttrain.rewards.sandbox.wire import Closed, Link, decode, encode

PASSED, FAILED, UNSUPPORTED = "passed", "failed", "unsupported"
_ORDER = ("lt", "le", "gt", "ge")
_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor", "lshift", "rshift")
_UNARY = ("neg", "pos", "abs", "invert")
_ACTIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in (*_ORDER, *_BINARY, *_UNARY, "eq", "getitem", "setitem", "delitem", "contains")},
    **{f.__name__: f for f in (getattr, setattr, delattr, bool, len, iter, next, str, repr, float, int, format, isinstance, hash)},
    "enter": lambda it: type(it).__enter__(it),
    "exit": lambda it: type(it).__exit__(it, None, None, None),
}


class Unsupported(BaseException):
    """The test passes something to the program that cannot be passed."""


class _ProgramError(Exception):
    """An exception of the program that has no builtin name."""


def warm() -> None:
    """Imports what programs often need, so that no jail pays for it."""
    import collections  # noqa: F401
    import functools  # noqa: F401
    import heapq  # noqa: F401
    import itertools  # noqa: F401
    import math  # noqa: F401
    import re  # noqa: F401
    import typing  # noqa: F401

    sys.set_int_max_str_digits(0)


def parts(argument: dict[str, Any]) -> tuple[Any, Any]:
    """Judge and program, or a program alone where `argument` says `alone`."""
    return (None, run_alone) if argument.get("alone") else (judge, serve)


def _module(name: str) -> dict[str, Any]:
    module = types.ModuleType(name)
    sys.modules[name] = module
    return vars(module)


def run_alone(argument: dict[str, Any], _link: None) -> int:
    """Runs the program as a script; returns its exit code."""
    space = _module("__main__")
    try:
        exec(compile(argument["program"], "program.py", "exec"), space)
    except SystemExit as stop:
        return stop.code & 255 if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        with contextlib.suppress(BaseException):
            traceback.print_exc(limit=-5)
        return 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
    return 0


def serve(argument: dict[str, Any], descriptor: int) -> int:
    """Runs the program, then does in its process what the judge asks for."""
    link = Link(descriptor)
    objects: list[Any] = []
    numbers: dict[int, int] = {}

    def refer(value: Any) -> list[Any]:
        number = numbers.setdefault(id(value), len(objects))
        if number == len(objects):
            objects.append(value)
        return ["o", number]

    def resolve(message: list[Any]) -> Any:
        if message[0] == "o":
            return objects[message[1]]
        return lambda *args, **named: _ask(link, ["call", message[1], *_arguments(args, named, refer)], resolve)

    with contextlib.suppress(Closed):
        space = _module("program")
        exec(compile(argument["program"], "program.py", "exec"), space)
        link.send("ready")
        while True:
            action, *rest = link.receive()
            link.send(_answer(action, rest, space, refer, resolve))
    return 0


def _arguments(args: Any, named: dict[str, Any], refer: Any) -> list[Any]:
    return [[encode(value, refer) for value in args], {name: encode(value, refer) for name, value in named.items()}]


def _ask(link: Link, message: Any, resolve: Any) -> Any:
    link.send(message)
    kind, *rest = link.receive()
    if kind == "value":
        return decode(rest[0], resolve)
    raise RuntimeError("the test's function failed")


def _answer(action: str, rest: list[Any], space: dict[str, Any], refer: Any, resolve: Any) -> list[Any]:
    try:
        if action == "name":
            return ["value", encode(space[rest[0]], refer), {}] if rest[0] in space else ["missing"]
        args = [decode(item, resolve) for item in rest[0]]
        before = {i: json.dumps(item) for i, item in enumerate(rest[0]) if isinstance(args[i], list | dict | set | bytearray)}
        if action == "call":
            named = {name: decode(item, resolve) for name, item in rest[1].items()}
            value = args[0](*args[1:], **named)
        else:
            value = _ACTIONS[action](*args)
        after = {i: encode(args[i], refer) for i in before}
        return ["value", encode(value, refer), {i: item for i, item in after.items() if json.dumps(item) != before[i]}]
    except Exception as error:
        names = [kind.__name__ for kind in type(error).__mro__]
        return ["error", names, str(error)[:1000]]


class _Judge:
    """The test's side: asks the program, and serves the functions that it was given."""

    def __init__(self, descriptor: int) -> None:
        self.link = Link(descriptor)
        self.functions: list[Any] = []
        self.remotes: dict[int, Remote] = {}

    def refer(self, value: Any) -> list[Any]:
        """The reference to a stand-in or to a function of the test."""
        if type(value) is Remote:
            return ["o", object.__getattribute__(value, "_number")]
        if isinstance(value, types.FunctionType | types.BuiltinFunctionType | types.MethodType):
            self.functions.append(value)
            return ["f", len(self.functions) - 1]
        raise Unsupported

    def resolve(self, message: list[Any]) -> Any:
        """The stand-in for an object of the program."""
        if message[0] != "o" or type(message[1]) is not int:
            raise Closed
        return self.remotes.setdefault(message[1], Remote(self, message[1]))

    def ask(self, action: str, *args: Any, named: dict[str, Any] | None = None) -> Any:
        """What the program gives; its exception under the same builtin name."""
        self.link.send([action, *_arguments(args, named or {}, self.refer)])
        return self.hear(args)

    def name(self, name: str) -> Any:
        """A global name of the program; raises KeyError where it has none."""
        self.link.send(["name", name])
        return self.hear(())

    def hear(self, args: Any) -> Any:
        """Answers questions about the test's functions until the answer comes."""
        while True:
            message = self.link.receive()
            kind = message[0] if isinstance(message, list) and message else None
            if kind == "call" and len(message) == 4 and type(message[1]) is int and message[1] >= 0:
                self.link.send(self._call(*message[1:]))
            elif kind == "value" and len(message) == 3 and isinstance(message[2], dict):
                self._write_back(args, message[2])
                return decode(message[1], self.resolve)
            elif kind == "error" and len(message) == 3:
                raise _error(message[1], str(message[2]))
            elif kind == "missing":
                raise KeyError
            else:
                raise Closed

    def _call(self, number: Any, args: Any, named: Any) -> list[Any]:
        try:
            function = self.functions[number]
            given = [decode(item, self.resolve) for item in args]
            value = function(*given, **{str(name): decode(item, self.resolve) for name, item in named.items()})
            return ["value", encode(value, self.refer)]
        except Closed:
            raise
        except Exception:
            return ["failed"]

    def _write_back(self, args: Any, changed: dict[str, Any]) -> None:
        for place, message in changed.items():
            if not place.isdigit() or int(place) >= len(args):
                raise Closed
            mine, theirs = args[int(place)], decode(message, self.resolve)
            if type(theirs) is not type(mine):
                continue
            if isinstance(mine, list | bytearray):
                mine[:] = theirs
            elif isinstance(mine, dict | set):
                mine.clear()
                mine.update(theirs)


def _error(names: Any, text: str) -> Exception:
    for name in names if isinstance(names, list) else []:
        kind = getattr(builtins, name, None) if isinstance(name, str) else None
        if isinstance(kind, type) and issubclass(kind, Exception):
            with contextlib.suppress(TypeError):
                return kind(text)
    return _ProgramError(text)


def _plain(value: Any) -> bool:
    return type(value) is not Remote


class Remote:
    """Stand-in, in the test's process, for an object of the program."""

    __slots__ = ("_judge", "_number")

    def __init__(self, judge: _Judge, number: int) -> None:
        object.__setattr__(self, "_judge", judge)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: Any, **named: Any) -> Any:
        return _of(self).ask("call", self, *args, named=named)

    def __getattr__(self, name: str) -> Any:
        return _of(self).ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _of(self).ask("setattr", self, name, value)

    def __delattr__(self, name: str) -> None:
        _of(self).ask("delattr", self, name)

    def __eq__(self, other: object) -> bool:
        return not _plain(other) and _of(self).ask("eq", self, other) is True

    def __hash__(self) -> int:
        return hash(("remote", object.__getattribute__(self, "_number")))

    def __instancecheck__(self, other: Any) -> bool:
        return not _plain(other) and _of(self).ask("isinstance", other, self) is True

    def __iter__(self) -> Iterator[Any]:
        items = _of(self).ask("iter", self)
        if _plain(items):
            raise TypeError("not an iterator")
        while True:
            try:
                yield _of(self).ask("next", items)
            except StopIteration:
                return

    def __enter__(self) -> Any:
        return _of(self).ask("enter", self)

    def __exit__(self, *error: Any) -> None:
        _of(self).ask("exit", self)

    def __format__(self, form: str) -> str:
        text: str = _exact(str, _of(self).ask("format", self, form))
        return text


def _of(remote: Remote) -> _Judge:
    judge: _Judge = object.__getattribute__(remote, "_judge")
    return judge


def _exact(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}")
    return value


def _forward(action: str, kind: type | None = None) -> Callable[..., Any]:
    def method(self: Remote, *args: Any) -> Any:
        value = _of(self).ask(action, self, *args)
        return value if kind is None else _exact(kind, value)

    return method


def _operator(action: str, swapped: bool = False) -> Callable[..., Any]:
    def method(self: Remote, other: Any) -> Any:
        value = _of(self).ask(action, other, self) if swapped else _of(self).ask(action, self, other)
        if _plain(other) and _plain(value):
            raise TypeError("an object of the program and a plain value do not give a plain value")
        return value

    return method


def _complete(stand_in: type) -> None:
    """Gives the stand-in its operators."""
    for name in ("getitem", "setitem", "delitem", "contains", "next", *_UNARY):
        setattr(stand_in, f"__{name}__", _forward(name, bool if name == "contains" else None))
    for name, kind in (("bool", bool), ("len", int), ("str", str), ("repr", str), ("float", float), ("int", int)):
        setattr(stand_in, f"__{name}__", _forward(name, kind))
    for name in _ORDER:
        setattr(stand_in, f"__{name}__", _operator(name))
    for name in _BINARY:
        bare = name.rstrip("_")
        setattr(stand_in, f"__{bare}__", _operator(name))
        setattr(stand_in, f"__r{bare}__", _operator(name, swapped=True))


_complete(Remote)


def free_names(tree: ast.AST) -> set[str]:
    """Names that a test reads and does not bind anywhere."""
    read: set[str] = set()
    bound: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.ExceptHandler):
            bound.add(node.name or "")
    return read - bound


def judge(_argument: dict[str, Any], tests: list[str], descriptor: int) -> Iterator[str]:
    """Runs each test; yields `passed`, `failed` or `unsupported`."""
    asking = _Judge(descriptor)
    space: dict[str, Any] = {"__name__": "test"}
    try:
        alive = asking.link.receive() == "ready"
    except Closed:
        alive = False
    for test in tests:
        verdict = FAILED
        if alive:
            try:
                _run_test(test, asking, space)
                verdict = PASSED
            except Unsupported:
                verdict = UNSUPPORTED
            except Closed:
                alive = False
            except BaseException:
                verdict = FAILED
        yield verdict


def _run_test(test: str, asking: _Judge, space: dict[str, Any]) -> None:
    tree = ast.parse(test)
    names = free_names(tree)
    own = {name for name in names if not hasattr(builtins, name)}
    for name in own or names:
        if name not in space:
            with contextlib.suppress(KeyError):
                space[name] = asking.name(name)
    imported = types.ModuleType("solution")
    imported.__getattr__ = _importer(asking)  # type: ignore[method-assign]
    sys.modules["solution"] = imported
    exec(compile(tree, "test.py", "exec"), space)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            space[node.name]()


def _importer(asking: _Judge) -> Callable[[str], Any]:
    def get(name: str) -> Any:
        try:
            return asking.name(name)
        except KeyError:
            raise AttributeError(name) from None

    return get

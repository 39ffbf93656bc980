"""Programs for the reward `code_tests`: right ones with their tests, and those that try to pass without being right."""

from __future__ import annotations

SQUARE = """
def f(n):
    return n * n
"""

PASSES = {
    "loop in a function": (
        """
def f(n):
    return n * n
""",
        """
def check(candidate):
    for i in range(5):
        assert candidate(i) == i * i
check(f)
""",
    ),
    "pytest style": (
        """
def f(n):
    return n * n
""",
        """
from solution import f
def test_f():
    assert f(2) == 4

""",
    ),
    "module": (
        """
def f(n):
    return n * n
""",
        """
import solution
assert solution.f(2) == 4
""",
    ),
    "tolerance": (
        """
def f(n):
    return n / 3
""",
        "assert abs(f(1) - 0.333333) < 1e-5",
    ),
    "isclose": (
        """
def f(n):
    return n / 3
""",
        """
import math
assert math.isclose(f(1), 1 / 3)
""",
    ),
    "exception": (
        """
def f(n):
    raise ValueError('no')
""",
        """
try:
    f(1)
except ValueError as e:
    assert str(e) == 'no'
else:
    assert 0
""",
    ),
    "own exception": (
        """
class E(KeyError): pass
def f(n):
    raise E('k')
""",
        """
try:
    f(1)
except KeyError:
    pass
else:
    assert 0
""",
    ),
    "changed in place": (
        """
def f(x):
    x.sort()
    return None
""",
        """
a = [3, 1, 2]
assert f(a) is None
assert a == [1, 2, 3]
""",
    ),
    "dict in place": (
        """
def f(d):
    d['n'] = 1
""",
        """
d = {'m': 0}
f(d)
assert d == {'m': 0, 'n': 1}
""",
    ),
    "test's function": (
        """
def f(g, x):
    return [g(i) for i in x]
""",
        "assert f(lambda i: i + 1, [1, 2]) == [2, 3]",
    ),
    "builtin function": (
        """
def f(g, x):
    return g(x)
""",
        "assert f(len, [1, 2]) == 2 and f(int, '3') == 3",
    ),
    "counter": (
        """
from collections import Counter
def f(s):
    return Counter(s)
""",
        "assert f('aab') == {'a': 2, 'b': 1}",
    ),
    "named tuple": (
        """
from typing import NamedTuple
class P(NamedTuple):
    x: int
def f():
    return P(3)
""",
        "assert f() == (3,)",
    ),
    "sets and bytes": (
        """
def f():
    return {1, (2, 3)}, b'ab', 1j, 10**5000
""",
        "assert f() == ({1, (2, 3)}, b'ab', 1j, 10**5000)",
    ),
    "infinity": (
        """
def f():
    return float('inf')
""",
        "assert f() == float('inf')",
    ),
    "dates": (
        """
import datetime
def f():
    return datetime.date(2020, 1, 2)
""",
        """
import datetime
assert f() == datetime.date(2020, 1, 2)
""",
    ),
    "fractions": (
        """
from fractions import Fraction
def f():
    return Fraction(1, 3)
""",
        """
from fractions import Fraction
assert f() * 3 == 1
""",
    ),
    "generator": (
        """
def f(n):
    yield from range(n)
""",
        "assert list(f(3)) == [0, 1, 2] and sum(f(4)) == 6",
    ),
    "variable": (
        "answer = 42",
        "assert answer == 42",
    ),
    "dataclass": (
        """
from dataclasses import dataclass
@dataclass
class P:
    x: int
    def twice(self):
        return P(2 * self.x)
""",
        """
p = P(3)
assert p.twice() == P(6) and p.twice().x == 6 and p != P(4)
p.x = 5
assert p.x == 5 and isinstance(p, P)
""",
    ),
    "stack": (
        """
class S:
    def __init__(self): self.v = []
    def push(self, x): self.v.append(x)
    def pop(self): return self.v.pop()
    def __len__(self): return len(self.v)
    def __getitem__(self, i): return self.v[i]
    def __contains__(self, x): return x in self.v
""",
        """
s = S()
assert not s
s.push(3)
s.push([1])
assert len(s) == 2 and s[0] == 3 and 3 in s and 4 not in s
assert s.pop() == [1]
s.pop()
try:
    s.pop()
except IndexError:
    pass
else:
    assert False
""",
    ),
    "operators": (
        """
class V:
    def __init__(self, x): self.x = x
    def __add__(self, o): return V(self.x + o.x)
    def __mul__(self, k): return V(k * self.x)
    __rmul__ = __mul__
    def __eq__(self, o): return self.x == o.x
    def __lt__(self, o): return self.x < o.x
    def __str__(self): return f'V{self.x}'
""",
        """
assert V(1) + V(2) == V(3) and V(2) * 2 == 2 * V(2) == V(4) and V(1) < V(2) and str(V(1)) == 'V1' and f'{V(2)}' == 'V2'
""",
    ),
    "context": (
        """
class C:
    def __enter__(self):
        return 5
    def __exit__(self, *a): pass
""",
        """
with C() as c:
    assert c == 5
""",
    ),
    "own builtin": (
        """
def sum(x):
    return 7
""",
        "assert sum([1]) == 7",
    ),
    "node": (
        """
class Node:
    def __init__(self, v, n=None): self.v, self.n = v, n
def rev(h):
    p = None
    while h: h.n, p, h = p, h, h.n
    return p
""",
        """
h = rev(Node(1, Node(2)))
assert h.v == 2 and h.n.v == 1 and h.n.n is None
""",
    ),
}
"""Name -> a right program and a test that it passes."""

CHEATS = {
    "exits": """
import sys
sys.exit(0)
""",
    "exits in the call": """
def f(n):
    raise SystemExit(0)
""",
    "exits hard": """
import os
def f(n):
    os._exit(0)
""",
    "equals everything, a number": """
class E(int):
    def __eq__(s, o): return True
    def __ne__(s, o): return False
    __hash__ = int.__hash__
def f(n):
    return E(0)
""",
    "equals everything, an object": """
class E:
    def __eq__(s, o): return True
    def __ne__(s, o): return False
    def __sub__(s, o): return 0
    __rsub__ = __sub__
    def __abs__(s): return 0
    def __lt__(s, o): return True
    __le__ = __gt__ = __ge__ = __lt__
def f(n):
    return E()
""",
    "patches builtins": """
import builtins
builtins.abs = lambda x: 0
builtins.AssertionError = Exception
builtins.compile = builtins.exec = print
def f(n): return 0
""",
    "shadows abs": """
def abs(x):
    return 0
def f(n):
    return 0
""",
    "prints a verdict": """
def f(n):
    print('"passed"')
    return 0
print('["passed", "passed"]')
""",
    "writes to every descriptor": r"""
import os
for fd in range(64):
    try:
        for _ in range(3): os.write(fd, b'"passed"\n')
    except OSError: pass
def f(n): return 0
""",
    "answers for the runner": r"""
import json, os
while True:
    line = os.read(3, 65536)
    if not line: break
    os.write(3, json.dumps(['value', True, {}]).encode() + b'\n')
""",
    "looks into frames": """
import sys
def f(n):
    frame = sys._getframe()
    while frame:
        for v in frame.f_locals.values():
            if isinstance(v, str) and 'assert' in v:
                return eval(v.split('==')[1])
        frame = frame.f_back
""",
    "searches its memory": """
import gc
def f(n):
    texts = [v for o in gc.get_objects() if isinstance(o, (dict, list, tuple)) for v in (o.values() if isinstance(o, dict) else o)
             if isinstance(v, (str, bytes))]
    for v in texts:
        v = v if isinstance(v, str) else v.decode('latin1')
        if f'assert f({n}) == ' in v: return int(v.split(f'assert f({n}) == ')[1].split('"')[0])
""",
    "reads raw memory": r"""
import re
def f(n):
    for line in open('/proc/self/maps'):
        a, b = [int(x, 16) for x in line.split()[0].split('-')]
        with open('/proc/self/mem', 'rb') as m:
            m.seek(a)
            try: hit = re.search(rb'assert f\(%d\) == (\d+)' % n, m.read(b - a))
            except (OSError, ValueError, OverflowError): continue
            if hit: return int(hit[1])
""",
    "reads files": """
import os
def f(n):
    for root, _, names in os.walk('/tmp'):
        for name in names:
            try: text = open(os.path.join(root, name)).read()
            except Exception: continue
            if f'assert f({n})' in text: return 9 if n == 3 else 16
""",
    "replaces the module": """
import sys
sys.modules['test'] = sys.modules['__main__'] = None
def f(n): return None
""",
    "never answers": """
import time
def f(n):
    time.sleep(100)
""",
    "starts a thread that answers": r"""
import threading, os
def t():
    while True: os.write(3, b'["value", 9, {}]\n')
threading.Thread(target=t, daemon=True).start()
def f(n): return 0
""",
}
"""Name -> a wrong program that tries to pass `assert f(3) == 9` and `assert abs(f(-4) - 16) < 1e-6`."""

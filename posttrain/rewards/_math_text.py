r"""Equivalence of simple mathematical answers, decided from their text alone.

`decide(gold, answer)` returns True or False where the spelling settles it, and None where algebra is needed. Policies, the
same everywhere:

- numbers: `1,000`, `1{,}000`, `23,\!450,\!600`, `1e3`, `10^{3}`, `1/2`, `\frac12`, `1\frac{1}{2}`, `.5` are exact rationals; equality is
  exact, so 0.333 is not 1/3. `1{,}5` (a decimal comma) is not a number and never 15.
- a percent sign on one side only matches either reading: `50\%` equals `0.5` and `50`.
- units and words in `\text{}` after a number, written-out degrees, dollars, percent and the like, `$`, font commands and one outer
  `(...)` round a number are ignored; words in `\text{}` with a digit, `or`, `and`, `not` are no unit.
- `x=5` equals `5`; `x=5` and `y=5` differ. Likewise `0<x\le 1` equals `(0,1]`.
- `47_9` (base 9) equals only itself and `47_{9}`, not 479 and not 43.
- `(a,b)`, `[a,b)`: ordered, brackets count. `\{a,b\}`, `{a,b}`, `a, b`, `a` and `b`, `a` or `b`: unordered.
- a gold that is one capital letter is a choice: `B`, `(B)`, `b.`, `B)` match it, nothing else does.
- an answer with words (`not B`, `answer`) matches only the same words.
"""

from __future__ import annotations

import re
from fractions import Fraction

_FRAC = re.compile(r"\\[dtc]?frac(?![a-zA-Z])")
_WRAPPER = re.compile(r"\\(?:mathbf|mathrm|mathit|mathsf|boldsymbol|bm|textbf|textit|text|mbox|operatorname)\s*\{([^{}]*)\}")
_TRAILING_UNIT = re.compile(
    r"(?<=[\d}%])\s*\\(?:text|mathrm|mbox|textbf)\s*\{(?![^{}]*\b(?:or|and|not|to)\b)[^{}\d]*\}(?:\^\{?\d\}?)?\s*\.?$"
)
_PLAIN_UNIT = re.compile(
    r"(?<=\d) (?:degrees?|radians?|dollars?|cents?|euros?|(?:square |cubic )?(?:units?|feet|inch(?:es)?|miles?|[cmk]?m|meters?|metres?)"
    r"|[mk]?g|hours?|minutes?|seconds?|days?|weeks?|months?|years?|people|ways|times|km/h|mph|m/s)$",
    re.IGNORECASE,
)
_TEXT_JOIN = re.compile(r"\\(?:text|mathrm|mbox|textbf) ?\{ ?(and|or) ?\}")
_JOIN = re.compile(r" ?,? ?\b(?:and|or)\b ?")
_SPACES = re.compile(
    r"(?<!\\)\\[!,;: ]|~|\\q?quad(?![a-zA-Z])|\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\(?:displaystyle|limits)(?![a-zA-Z])"
)
_THOUSANDS = re.compile(r"^[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?$")
_DECIMAL = re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,4})?$")
_RATIO = re.compile(r"^([-+]?)\\frac\{([-+]?[\d.,]+)\}\{([-+]?[\d.,]+)\}$")
_SLASH = re.compile(r"^([-+]?[\d.,]+)/([-+]?[\d.,]+)$")
_MIXED = re.compile(r"^([-+]?)(\d+)(?:\\frac\{(\d+)\}\{(\d+)\}| (\d+)/(\d+))$")
_REPEATING = re.compile(r"^([-+]?)(\d*)\.(\d*)\\overline\{(\d{1,20})\}$")
_POWER = re.compile(r"^([-+]?\d{1,6})\^\{?([-+]?\d{1,3})\}?$")
_BASED = re.compile(r"^\(?([0-9A-Za-z]+)\)?_\{?(\d+)\}?$")
_NAMED = re.compile(r"^([a-zA-Z](?:_\{?\w+\}?)?)\s*=\s*([^=<>]+)$")
_CHAIN = re.compile(r"^([^<>=]+?)(<|\\leq?(?![a-zA-Z]))([a-zA-Z])(<|\\leq?(?![a-zA-Z]))([^<>=]+)$")
_CHOICE = re.compile(r"^\(?([A-Za-z])[).]?\.?$")
_COMMANDS = re.compile(r"\\[a-zA-Z]+")
_WORD = re.compile(r"[A-Za-z]{3,}|\b(?:or|is)\b")
_TRIGONOMETRIC = ("sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh")
_FUNCTIONS = frozenset((*_TRIGONOMETRIC, "log", "exp", "sqrt", "max", "min", "mod", "gcd", "lcm", "det", "abs", "inf"))
_SPELLINGS = {
    "−": "-", "–": "-", "∞": r"\infty", "π": r"\pi", "√": r"\sqrt", "×": r"\times", r"\$": "", r"\%": "%",
    r"\lbrace": r"\{", r"\rbrace": r"\}", r"\varnothing": r"\emptyset", "∅": r"\emptyset", "≤": r"\le ", r"\leqslant": r"\le ",
    "bmatrix": "pmatrix",
}  # fmt: skip
_BRACKETS = {"(": ")", "[": "]", "{": "}"}
MAX_CHARS = 2000


def normalise(text: str) -> str:
    """`text` with notation that carries no meaning removed; the string two equal answers usually share."""
    text = text.strip().strip("$").strip()
    for spelling, plain in _SPELLINGS.items():
        text = text.replace(spelling, plain)
    text = re.sub(r"(?<=\d)\{,\}(?=\d{3}(?!\d))", ",", text)
    text = _SPACES.sub(lambda match: "" if match.group()[:2] in (r"\!", r"\l", r"\r", r"\d") else " ", text)
    text = _TRAILING_UNIT.sub("", text)
    text = _TEXT_JOIN.sub(r" \1 ", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-zA-Z])|°", "", text)
    for _ in range(3):
        text = _WRAPPER.sub(r"\1", text)
    text = _braced_fractions(_FRAC.sub(r"\\frac", text))
    text = re.sub(r"\\sqrt\s*(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"\s+", " ", text).strip()
    text = _PLAIN_UNIT.sub("", re.sub(r"(?<=\d) (?:percent|per cent)$", "%", text))
    joined = _JOIN.sub(",", text)
    text = text if has_words(joined) else joined
    text = re.sub(r"\s*([-+=,()\[\]{}/^_<>|*])\s*", r"\1", text)
    return text[:-1].rstrip() if text.endswith(".") else text


def _braced_fractions(text: str) -> str:
    out, position = [], 0
    for match in re.finditer(r"\\frac", text):
        if match.start() < position:
            continue
        out.append(text[position : match.start()] + r"\frac")
        position = match.end()
        for _ in range(2):
            argument = re.match(r"\s*(\\[a-zA-Z]+|[0-9a-zA-Z])", text[position:])
            if argument:
                out.append("{" + argument.group(1) + "}")
                position += argument.end()
                continue
            group = re.match(r"\s*\{[^{}]*\}", text[position:])
            if not group:
                break
            out.append(group.group().strip())
            position += group.end()
    return "".join([*out, text[position:]])


def number(text: str) -> Fraction | None:
    """The exact value of a normalised plain number, without a percent sign; None if it is something else."""
    if len(text) > 2 and text[0] == "(" and text[-1] == ")":
        text = text[1:-1]
    if len(text) > 2 and text[0] == "{" and text[-1] == "}":
        text = text[1:-1]
    try:
        return _number(text)
    except (ValueError, ZeroDivisionError):
        return None


def _number(text: str) -> Fraction | None:
    if _THOUSANDS.match(text):
        return Fraction(text.replace(",", ""))
    if _DECIMAL.match(text):
        return Fraction(text)
    if found := _RATIO.match(text):
        return _ratio(found.group(2), found.group(3), found.group(1))
    if found := _SLASH.match(text):
        return _ratio(found.group(1), found.group(2))
    if found := _MIXED.match(text):
        sign, whole, a, b, c, d = found.groups()
        value = int(whole) + Fraction(int(a or c), int(b or d))
        return -value if sign == "-" else value
    if found := _REPEATING.match(text):
        sign, whole, fixed, again = found.groups()
        period: Fraction = (int(whole or 0) * 10 ** len(fixed) + int(fixed or 0) + Fraction(int(again), 10 ** len(again) - 1)) / 10 ** len(
            fixed
        )
        return -period if sign == "-" else period
    if found := _POWER.match(text):
        return Fraction(int(found.group(1))) ** int(found.group(2))
    return None


def _ratio(top: str, bottom: str, sign: str = "") -> Fraction | None:
    upper, lower = _number(top), _number(bottom)
    if upper is None or lower is None:
        return None
    return -upper / lower if sign == "-" else upper / lower


def _percent(text: str) -> tuple[Fraction | None, bool]:
    if text.endswith("%"):
        return number(text[:-1].rstrip()), True
    return number(text), False


def parts(text: str) -> tuple[str, list[str]] | None:
    """Top-level list: (kind, items) with kind `()`, `[)`, ... for ordered and `{}` for unordered; None if it is no list."""
    kind, inner = "{}", text
    if text.startswith(r"\{") and text.endswith(r"\}"):
        inner = text[2:-2]
    elif len(text) >= 2 and text[0] in _BRACKETS and text[-1] in ")]}" and _spans(text):
        kind, inner = text[0] + text[-1], text[1:-1]
    items = _split(inner)
    if items is None or (len(items) < 2 and inner is text):
        return None
    return kind, items


def _spans(text: str) -> bool:
    depth = 0
    for index, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0 and index < len(text) - 1:
            return False
    return depth == 0


def _split(text: str) -> list[str] | None:
    items, depth, start = [], 0, 0
    for index, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth < 0:
            return None
        if char == "," and depth == 0:
            items.append(text[start:index].strip())
            start = index + 1
    items.append(text[start:].strip())
    return items if depth == 0 and all(items) else None


def has_words(text: str) -> bool:
    """True where a normalised answer holds prose rather than a formula."""
    bare = _COMMANDS.sub(" ", text)
    return any(word.lower() not in _FUNCTIONS for word in _WORD.findall(bare))


def _fold(text: str) -> str:
    return re.sub(r"\s+", "", text).casefold()


def decide(gold: str, answer: str) -> bool | None:
    """True or False where the text of the two answers settles it, None where algebra has to.

    Args:
        gold, answer: as written, without the box.
    """
    gold, answer = normalise(gold), normalise(answer)
    if not answer:
        return False
    if re.fullmatch(r"[A-Z]", gold):
        choice = _CHOICE.match(answer)
        return choice is not None and choice.group(1).upper() == gold
    return _decide(gold, answer)


def _decide(gold: str, answer: str) -> bool | None:
    if re.sub(r"\s", "", gold) == re.sub(r"\s", "", answer):
        return True
    if len(answer) > MAX_CHARS:
        return False
    if "_" in gold + answer and ((based := _BASED.match(gold)) or _BASED.match(answer)):
        other = _BASED.match(answer)
        return based is not None and other is not None and based.groups() == other.groups()
    left, right = _named(gold), _named(answer)
    if left or right:
        if left and right and left[0] != right[0]:
            return False
        return _decide(left[1] if left else gold, right[1] if right else answer)
    if has_words(gold) or has_words(answer):
        return _fold(gold) == _fold(answer)
    return _decide_values(gold, answer)


def _named(text: str) -> tuple[str, str] | None:
    """(variable, what it is) of `x=5`, and of `0<x<1`, which is the interval `(0,1)`."""
    if found := _NAMED.match(text):
        return found.group(1), found.group(2)
    if found := _CHAIN.match(text):
        low, left, name, right, high = (part.strip() for part in found.groups())
        return name, f"{'(' if left == '<' else '['}{low},{high}{')' if right == '<' else ']'}"
    return None


def _decide_values(gold: str, answer: str) -> bool | None:
    (a, a_percent), (b, b_percent) = _percent(gold), _percent(answer)
    if a is not None and b is not None:
        return a == b if a_percent == b_percent else a == b or (a / 100 == b if a_percent else a == b / 100)
    left = None if a is not None else parts(gold)
    right = None if b is not None else parts(answer)
    if (a is not None and right) or (b is not None and left):
        return False
    if left and right:
        return _decide_lists(left, right)
    return None


def _decide_lists(left: tuple[str, list[str]], right: tuple[str, list[str]]) -> bool | None:
    (kind, a), (other, b) = left, right
    if kind == other == "{}":
        return _decide_sets(a, b)
    if len(a) != len(b):
        return False
    if "{}" in (kind, other):
        return None
    verdicts = [_decide(x, y) for x, y in zip(a, b, strict=True)]
    return False if kind != other or False in verdicts else None if None in verdicts else True


def _decide_sets(left: list[str], right: list[str]) -> bool | None:
    a, b = [number(item) for item in left], [number(item) for item in right]
    if None not in a and None not in b:
        return set(a) == set(b)
    return True if sorted(map(_fold, left)) == sorted(map(_fold, right)) else None

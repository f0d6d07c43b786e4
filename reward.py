r"""Rewards for mathematical answers, and a pool of processes that scores them.

The way of an answer: `extract_answer` finds its text in a response, `tokenise` rewrites LaTeX,
words and signs to tokens, `Reader` makes a tree of them, `settle` turns the tree into an answer (a
value, a list, an equation, ...), `same` compares two answers: structure first, then values, which
are Fractions while they can be and 100-digit numbers else; formulas are equal when they agree at
fixed points. `is_worked_out` and `is_copied` refuse answers that repeat the question. Nothing is
ever handed to eval or sympify; sizes are checked before any arithmetic; in doubt the reward is 0.

Who calls what: ghpo.py makes a VerifierPool, rollout.collect submits texts to it and polls rewards;
a Worker of the pool is this file run as a program (`serve`); configs/data.py asks `gold_answer` and
`gold_fault` which rows have a gold that can be judged.

More notation goes into configs/verifier.yaml, another reward into REWARDS, or into the config as
"path/to/file.py:function": f(response, gold) -> float, with the names of further columns if wanted.
"""

import contextlib
import faulthandler
import functools
import inspect
import itertools
import json
import math
import os
import re
import runpy
import signal
import socket
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any, NamedTuple

import yaml
from mpmath.ctx_mp import MPContext

from configs import UserError

NOTATION = yaml.safe_load((Path(__file__).parent / "configs/verifier.yaml").read_text("utf-8"))
MAX_CHARS = 3000  # of an answer that is read
MAX_ITEMS = 60  # of a list, and ends of a region
# At most: bits of exact operands, natural logarithm of another power, argument of a function.
MAX_SIZE = 60_000
# What an answer that means nothing may raise; of TypeError and LookupError: "not comparable", for
# trees of different kinds have other parts.
REFUSED = (RecursionError, ValueError, ArithmeticError, TypeError, LookupError)

Tree = tuple  # see Reader
Number = Any  # a Fraction while it is exact, else an mpf or mpc of 100 digits


# ---- where the answer stands in a response ----

PATTERNS = {name: re.compile(pattern) for name, pattern in NOTATION["responses"].items()}
STRAY_END = re.compile(PATTERNS["stray"].pattern + r"\Z")
MAX_OPEN_BLOCK = 200  # characters of an <answer> that is never closed
BLOCK = re.compile(r"<answer>((?:(?!<answer>).)*?)(</answer>|\Z)", re.DOTALL)
MIN_WORDS = 3  # of a sentence
NUMERAL = re.compile(r"-?\d+(?:\.\d+)?")  # the 9 of \boxed 9
TEXT_COMMAND = re.compile(r"\\text\w*|\\mathrm")
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")  # "so" and "is" of: so \sin x is 1
CALCULATION = re.compile(r"\d.*[-+*/×÷]")  # 330 km / 110 km/h
FORMULA_SIGNS = tuple("+-*/^_{")  # beside what is no whole answer
UNIT_AFTER = re.compile(r"\s*(?:\\text\w*\s*\{[^{}]*\}|[A-Za-z/]+)?")  # km/h, \text{ cats}


def join_boxes(joint: re.Match) -> str:
    """Two boxes of one answer: "and" and commas make a list, "or" makes what cannot be read."""
    if joint["or"]:
        return r"\or "
    if joint["and"]:
        return ","
    return joint[0]


def boxed(text: str) -> str | None:
    r"""The last \boxed{..} that holds something and those joined to it.

    "" when it is never closed; None without a box, or with nothing but \boxed in prose.
    """
    text = PATTERNS["same_box"].sub("", text.replace("\\fbox", "\\boxed"))
    text = PATTERNS["joint"].sub(join_boxes, text)
    _, *boxes = text.split("\\boxed")
    for box in reversed(boxes):
        box = box.lstrip()
        numeral = NUMERAL.match(box)
        if numeral:
            return numeral[0]
        if box.startswith("{"):
            end = closing(box, r"\\.|[{}]")
            if end is None:
                end = closing(box, "[{}]")  # as if no brace were written \{
            if end is None:
                return ""
            if box[1:end].strip():
                return box[1:end].rstrip("\\")  # the \ of a \} that closed it
    return None


def closing(box: str, brace: str) -> int | None:
    """Where the brace that opens `box` is closed; `brace` finds braces and what to skip."""
    depth = 0
    for match in re.finditer(brace, box, re.DOTALL):
        if match[0] == "{":
            depth += 1
        if match[0] == "}":
            depth -= 1
        if depth == 0:
            return match.start()
    return None


def without_stray(body: str) -> str:
    """Without tags, fences and end markers at its beginning and in its last 200 characters."""
    end = STRAY_END.sub("", body[-MAX_OPEN_BLOCK:])
    body = body[:-MAX_OPEN_BLOCK] + end
    return body[PATTERNS["stray"].match(body).end() :]


def from_sentence(text: str) -> str:
    """The result that a sentence tells, if it neither negates nor hedges: the $formula$ after its
    last "is", what a calculation equals, its one number. What is no sentence, itself."""
    if len(text) > MAX_CHARS or PATTERNS["hedges"].search(text):
        return text
    words = WORD.findall(TEXT_COMMAND.sub("", text))
    told = PATTERNS["result"].search(text)
    if told:
        return told[1]
    calculation, _, result = text.rpartition("=")
    if words and CALCULATION.search(calculation):  # 330 km / 110 km/h = 3 hours
        return result
    numbers = list(PATTERNS["number"].finditer(text))
    if calculation or len(words) < MIN_WORDS or len(numbers) != 1:
        return text
    (number,) = numbers
    before, after = text[: number.start()].rstrip(), text[number.end() :].lstrip()
    if before.endswith(FORMULA_SIGNS) or after.startswith(FORMULA_SIGNS):  # the 4 of \pi + 4
        return text
    unit = UNIT_AFTER.match(text, number.end())
    return number[0] + unit[0]


def announced(text: str) -> str | None:
    """What follows the last "the answer is" or its like, up to the end of the clause."""
    *before, last = PATTERNS["phrase"].split(text)
    if not before:
        return None
    start = PATTERNS["before"].match(last).end()
    line, _, _ = last[start : start + MAX_CHARS].partition("\n")
    clause, *_ = PATTERNS["after"].split(line + " ")
    return from_sentence(clause.strip(" *,"))


def extract_answer(response: str) -> str | None:
    r"""The one final answer in `response`, or None.

    What is judged is the text after the last </think>; of a <think> that is never closed only an
    <answer> block at its end. Two different blocks are no answer. In a block: the last \boxed{},
    else the one number of a sentence, else all of it. Without a block: a line "Answer: .." after
    the last box, the last \boxed{} (or a list of boxes joined by "," or "and"), else what follows
    the usual phrases.
    """
    _, _, text = response.rpartition("</think>")
    found = list(BLOCK.finditer(text))
    if "<think>" in text:
        found = found[-1:]
        if not found or not PATTERNS["stray"].fullmatch(text, found[0].end()):
            return None
        text = ""  # no other place counts
    bodies = set()
    for body, end in (block.groups() for block in found):
        body = body.strip()
        if end or len(body) <= MAX_OPEN_BLOCK:
            bodies.add(without_stray(body))
    if len(bodies) > 1:
        return None
    if bodies:
        (body,) = bodies
        box = boxed(body)
        if box is None:
            return announced(body) or from_sentence(body)
        return box or None
    text = text.replace("\\fbox", "\\boxed")
    box = boxed(text)
    _, _, after_box = text.rpartition("\\boxed")
    if box is None or PATTERNS["answer_line"].search(after_box):
        return announced(text)
    return box or None


def gold_answer(text: str) -> str:
    """The answer part of a data set's gold column, which may hold a whole solution.

    What follows the last "####", else the last box, else all of the text.
    """
    _, mark, answer = text.rpartition("####")
    if mark:
        return answer.strip()
    return boxed(text) or text


# ---- from text to a tree ----


def by_word(table: dict[str, str]) -> dict[str, str]:
    """{word: sign} of a table {sign: "word word .."}."""
    sign_of_word = {}
    for sign, words in table.items():
        for word in words.split():
            sign_of_word[word] = sign
    return sign_of_word


def by_unit(measures: dict[str, dict]) -> dict[str, tuple[str, Tree]]:
    """{unit: (what it measures, its size)} of a table {measure: {unit: size}}."""
    found = {}
    for measure, sizes in measures.items():
        for unit, size in sizes.items():
            found[unit] = measure, ("num", Fraction(size))
    return found


COMMANDS, UNITS = by_word(NOTATION["commands"]), by_word(NOTATION["units"])
FUNCTIONS, PAIRS = NOTATION["functions"], NOTATION["pairs"]
INFIX, BRACKETS = NOTATION["infix"], NOTATION["brackets"]
NUMBERS = NOTATION["numbers"]
MULTIPLIERS = {word: Fraction(factor) for word, factor in NOTATION["multipliers"].items()}
NUMBER_WORDS = {*NUMBERS, *MULTIPLIERS}
CLOSERS = {token for closers, _ in BRACKETS.values() for token in closers}
REWRITES = [(re.compile(pattern), new) for pattern, new in NOTATION["rewrites"]]
NAME = re.compile(r"[^\W_]|∅|∞|" + NOTATION["tokens"]["opaque"])  # begins with: x, θ, \vec{v}
TOKEN = re.compile("|".join(NOTATION["tokens"].values()))
COMMAND = re.compile(r"\\([A-Za-z]+)")  # \dfrac
REPEATING = re.compile(r"(\d*)\.(\d*)\((\d+)\)")  # 0.1(6)
ITEM = re.compile(
    r"\\[{}]|(?:\([^()]*\)|\\[^{}]|[^,\\])+"
)  # of a list: 5, x, (a, b); \{ alone, for ± must not double it
UPPER, LOWER = str.maketrans("±∓", "+-"), str.maketrans("±∓", "-+")


def sign_of(command: re.Match) -> str:
    return COMMANDS.get(command[1], command[0] + " ")


def both_signs(item: re.Match) -> str:
    """An item with ± stands for two."""
    upper, lower = item[0].translate(UPPER), item[0].translate(LOWER)
    return upper if upper == lower else f"{upper},{lower}"


def is_quoted(token: str) -> bool:
    """Is the token words, which stand in quotes?"""
    return token.startswith('"')


def tokenise(text: str) -> list[str]:
    if not text.isascii():
        for pattern, new in NOTATION["unicode"]:
            text = re.sub(pattern, new, text)
        text = unicodedata.normalize("NFKC", text)
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    text = COMMAND.sub(sign_of, text)
    if "±" in text:
        text = ITEM.sub(both_signs, text)
    return [token.lower() if is_quoted(token) else token for token in TOKEN.findall(text)]


CHAINS = {"sum", "product", "list", "and", "or", "∧", "∨", "row", "cell", "ratio", "relation"}
# Strengths beside those of verifier.yaml's infix table. A unit binds less than + (14): it belongs
# to the whole sum before it. An ARGUMENT without brackets is the product up to the next function.
UNIT, PRODUCT, ARGUMENT, POWER, DEGREE = 13, 15, 16, 17, 18
ZERO, ONE, TEN = [("num", Fraction(n)) for n in (0, 1, 10)]
FACTORS = {"%": ("num", Fraction(1, 100)), "°": ("°",)}  # units that are numbers
NO_UNITS = {*NOTATION["not_units"], *NUMBER_WORDS}
SIZES = by_unit(NOTATION["measures"])  # of units that measure the same


class Reader:
    r"""Precedence climbing over tokens. A tree is (kind, *parts), its leaves ("num", Fraction),
    ("var", name), ("word", words) and constants such as ("π",). The parts of a unit are its value,
    its name or measure, and its size in that measure. Eight examples:

    text                        tokens                     tree, numbers written plainly
    \frac12                     \frac { 1 } { 2 }          (quotient 1 2)
    -x^2                        - x ^ 2                    (negative (power x 2))
    2\sin 3x                    2 \sin 3 x                 (product 2 (sin (product 3 x)))
    \sqrt[3]{2}                 \root { 3 } { 2 }          (root 3 2)
    (1, \infty)                 ( 1 , ∞ )                  (tuple "()" 1 ∞)
    1 < x \le 2                 1 < x ≤ 2                  (relation 1 "<" x "≤" 2)
    5\text{ cats} \text{ or } 7 5 "cats" "or" 7            (or (unit 5 "cat" 1) 7)
    \frac12 \text{ or } x<3     \frac {1} {2} "or" x < 3   (or (quotient 1 2) (relation x "<" 3))
    """

    def __init__(self, tokens: list[str]):
        self.tokens = ["", *reversed(tokens)]  # the next one last; "" ends them all
        self.in_bars = False

    def read_all(self) -> Tree:
        """All tokens: as if "" were the bracket that the last one, "", closes."""
        return self.bracket("")

    def tree(self, level: int = 1) -> Tree:
        """A prefix and all operators of at least this strength; two factors are a product."""
        left = self.prefix(level)
        while True:
            token = self.tokens[-1]
            if token in CLOSERS and (token != "|" or self.in_bars):
                return left
            strength, kind = self.operator(token, level)
            if strength < level:
                return left
            if kind == "unit":
                self.tokens.pop()
                left = self.measured(left, token.strip('"'))
                continue
            if token in INFIX:
                self.tokens.pop()
            if kind == "power":  # 2^3^4 is 2^(3^4)
                right = self.tree(strength)
            else:
                right = self.tree(strength + 1)
            left = linked(left, kind, token, right)

    def operator(self, token: str, level: int) -> tuple[int, str]:
        """How strongly a token binds to what stands before it, and the kind of tree it makes."""
        if token in INFIX:
            strength, kind = INFIX[token]
            return strength, kind
        if token == '"°"':
            return DEGREE, "unit"
        if is_quoted(token):
            return UNIT, "unit"
        ends_argument = token in ("(", "[", "|") or token[1:] in FUNCTIONS
        if level == ARGUMENT and not ends_argument:
            return ARGUMENT, "product"
        return PRODUCT, "product"

    def prefix(self, level: int = POWER) -> Tree:
        """What begins with the next token: a sign and its operand, brackets, a function, a name."""
        token = self.tokens.pop()
        if token == "+":
            return self.tree(max(level, PRODUCT))
        if token == "-":
            return ("negative", self.tree(max(level, PRODUCT)))
        if token in BRACKETS:
            return self.bracket(token)
        if token in PAIRS:
            return (PAIRS[token], self.prefix(), self.prefix())
        if token[1:] in FUNCTIONS:
            return self.function(token[1:])
        if REPEATING.fullmatch(token) or token.replace(".", "", 1).isdecimal():
            return ("num", number(token))
        if is_quoted(token):
            return self.words(token.strip('"').split())
        if not NAME.match(token):
            raise ValueError(token)
        if token in CONSTANTS:
            return (token,)
        name, mark, index = re.sub('[{} "]', "", token).partition("_")
        index = NUMBERS.get(index, index)  # x_one is x_1
        return ("var", f"{name}{mark}{index}")

    def function(self, name: str) -> Tree:
        """f_b^n x: a logarithm's base, a power of the function, its argument."""
        base = self.script("_")
        exponent = self.script("^")
        has_bracket = self.tokens[-1] in ("(", "{")
        argument = self.prefix() if has_bracket else self.tree(ARGUMENT)
        tree = (name, argument)
        if base and name != "ln":
            raise ValueError(f"{name} with an index")
        if base:
            tree = ("quotient", ("ln", argument), ("ln", base))
        if exponent:
            tree = ("power", tree, exponent)
        return tree

    def script(self, mark: str) -> Tree | None:
        """The index or exponent that comes next, if one does."""
        if self.tokens[-1] != mark:
            return None
        self.tokens.pop()
        return self.prefix()

    def words(self, words: list[str]) -> Tree:
        """Words that stand where a value should: a number, perhaps with its unit, or just words."""
        if words[0] not in NUMBERS:
            return ("word", unit_name(" ".join(words)))
        length = 1
        while length < len(words) and words[length] in NUMBER_WORDS:
            length += 1
        value = ("num", spelled(words[:length]))
        return self.measured(value, " ".join(words[length:]))

    def measured(self, value: Tree, words: str) -> Tree:
        """A value and the words after it: a unit, or a multiplier and perhaps a unit."""
        if not words:
            return value
        first, _, rest = words.partition(" ")
        factor = MULTIPLIERS.get(first.rstrip("s"))
        if factor:
            return self.measured(("magnitude", value, ("num", factor)), rest)
        if PATTERNS["hedges"].search(words) or not NO_UNITS.isdisjoint(words.split()):
            raise ValueError(words)
        name = unit_name(words)
        measure, size = SIZES.get(name, (name, ONE))
        return ("unit", value, measure, size)

    def bracket(self, opening: str) -> Tree:
        """What stands in brackets, up to and with the closing one."""
        closers, kind = BRACKETS[opening]
        outside = self.in_bars
        self.in_bars = opening == "|"
        inner = ("list",)  # nothing in the brackets
        if self.tokens[-1] not in CLOSERS or self.tokens[-1] == "|":  # here a | opens
            inner = self.tree()
        self.in_bars = outside
        closer = self.tokens.pop()
        if closer not in closers:
            raise ValueError(f"{opening} is closed by {closer}")
        if opening in ("(", "[") and inner[0] == "list":
            return ("tuple", opening + closer, *inner[1:])
        if kind == "set":
            items = inner[1:] if inner[0] == "list" else (inner,)
            return ("set", *map(as_element, items))
        if kind:
            return (kind, inner)
        return inner


def linked(left: Tree, kind: str, token: str, right: Tree) -> Tree:
    """Two trees under the operator between them; a + b + c is one sum of three."""
    if kind == "difference":
        kind, right = "sum", ("negative", right)
    link = (token, right) if kind == "relation" else (right,)
    if kind in CHAINS and kind == left[0]:
        return (*left, *link)
    return (kind, left, *link)


def as_element(item: Tree) -> Tree:
    """An item of a set; a set in a set is one element: {{1}} is not {1}."""
    if item[0] == "set" or item == ("var", "∅"):
        return ("element", item)
    return item


def spelled(words: list[str]) -> Fraction:
    """The value of "two thousand three hundred forty five", of "one third"."""
    largest = max(words, key=lambda word: MULTIPLIERS.get(word, 0), default="")
    if largest in MULTIPLIERS:
        place = words.index(largest)
        after = Fraction(0)
        if words[place + 1 :]:
            after = spelled(words[place + 1 :])
        if after < MULTIPLIERS[largest]:  # else NUMBERS refuses it: two thousand three thousand
            return spelled(words[:place]) * MULTIPLIERS[largest] + after
    values = [NUMBERS[word] for word in words]
    is_one_number = len(values) < 2
    if len(values) == 2:  # forty five, not five forty
        tens, ones = values
        is_one_number = tens >= 20 and 0 < ones < 10
    if not is_one_number:
        raise ValueError("several numbers")
    return Fraction(sum(values))


def unit_name(words: str) -> str:
    """The name of a unit, or words in the singular: "square metres" was rewritten to metres2."""
    plain = re.sub(r"[\^{}]", "", words)
    return re.sub(r"[^\W\d_]+", lambda run: UNITS.get(run[0], run[0].rstrip("s")), plain)


def number(token: str) -> Fraction:
    """The value of a numeral; 0.1(6) is 0.1666..."""
    match = REPEATING.fullmatch(token)
    if not match:
        return Fraction(token)
    whole, fixed, cycle = match.groups()
    repeated = Fraction(int(cycle), 10 ** len(cycle) - 1)
    return Fraction(f"0{whole}.{fixed}") + repeated / 10 ** len(fixed)


# ---- values ----

MP = MPContext()
MP.dps = 100
TOLERANCE = MP.mpf(10) ** -60  # relative, of numbers that are not exact
CONSTANTS = {"π": +MP.pi, "e": +MP.e, "i": MP.j, "∞": MP.inf, "°": MP.pi / 180}


def bits(value: Number) -> int:
    """The size of an exact number."""
    if not isinstance(value, Fraction):
        return 0
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def is_integer(value: Number) -> bool:
    """Is it a whole number, exactly?"""
    return getattr(value, "denominator", 0) == 1


def power(base: Number, exponent: Number) -> Number:
    """Exact where base and exponent say so, after a look at the size of the result; real where it
    can be: (-8)^(2/3) is 4, the third root of -8 is -2."""
    if base == 0 and exponent > 0:
        return base
    is_exact = isinstance(base, Fraction) and is_integer(exponent)
    has_odd_root = isinstance(exponent, Fraction) and exponent.denominator % 2 == 1
    if has_odd_root and not is_exact and is_real(base) and base < 0:
        size = power(-base, exponent)
        return size if exponent.numerator % 2 == 0 else -size
    size = bits(base) if is_exact else abs(MP.ln(base))
    if abs(exponent) * size > MAX_SIZE:
        raise ValueError("power too large")
    if is_exact:
        return base ** int(exponent)
    return MP.power(base, exponent)


SUMS, PRODUCTS = {"sum", "mixed"}, {"product", "magnitude"}
COUNTS = {"fac": math.factorial, "binomial": math.comb}
MAX_COUNT = 3000  # whose factorial is computed
COUNTED = set(range(MAX_COUNT + 1))
UNBOUNDED = {"ln", "fabs", "floor", "ceil"}  # their arguments may have any size
# Where a variable is sampled: near and far, negative and positive, so that |x - 5| is not 5 - x
# and floor(x/5) not floor(x/6).
RANGES = [(0, 1), (1, 4), (-2.5, -0.5), (100, 500), (-9000, -2000), (10**7, 10**8)]
SHARES = 9973  # a prime: variables take one of so many places of a range


def sample(name: str, point: int) -> Fraction:
    """A variable's fixed value, within RANGES[point]."""
    low, high = map(Fraction, RANGES[point])
    code = int.from_bytes(f"{name} {point}".encode(), "big")
    share = Fraction(code % SHARES + 1, SHARES + 1)
    return low + share * (high - low)


class NoPiece(ValueError):
    """A function by pieces has no value here."""


def evaluate(tree: Tree, point: int = 0, x: Number | None = None) -> Number:
    """The value at a sample point, or with all variables equal to the number x."""
    kind, *parts = tree
    if kind == "num":
        return parts[0]
    if kind == "var":
        return sample(parts[0], point) if x is None else x
    if kind in CONSTANTS:
        return CONSTANTS[kind]
    if kind == "unit":  # only of percent and degrees
        return evaluate(("product", parts[0], FACTORS[parts[1]]), point, x)
    if kind == "scaled":  # 2x - 2 and x - 1 become the same
        return evaluate(parts[0], point, x) * (1 / evaluate(parts[0]))
    if kind == "piecewise":
        for value, when in zip(parts[::2], parts[1::2]):
            if holds(when, point, x):
                return evaluate(value, point, x)
        raise NoPiece("no piece holds")
    return operate(kind, [evaluate(part, point, x) for part in parts])


def operate(kind: str, values: list[Number]) -> Number:
    """The value of one operation or function, after a look at the size of its operands."""
    if sum(map(bits, values)) > MAX_SIZE:
        raise ValueError("too large")
    if kind in SUMS:
        return sum(values)
    if kind in PRODUCTS:
        return math.prod(values)
    if kind == "negative":
        return -values[0]
    if kind == "quotient":
        return values[0] * (1 / values[1])  # a Fraction cannot be divided by an mpf
    if kind == "power":
        return power(*values)
    if kind == "root":
        index, base = values
        return power(base, 1 / index)
    if kind in COUNTS and COUNTED.issuperset(values):
        return Fraction(COUNTS[kind](*map(int, values)))
    if kind not in FUNCTIONS:
        raise ValueError(f"{kind} has no value")
    limit = MAX_COUNT if kind in COUNTS else MAX_SIZE
    if kind not in UNBOUNDED and any(abs(value) > limit for value in values):
        raise ValueError(f"too large an argument of {kind}")
    return getattr(MP, kind)(*map(MP.convert, values))


def near(a: Number, b: Number) -> bool:
    """Equal: exactly for Fractions, else to 60 digits."""
    if a == b:
        return True
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return False
    return MP.almosteq(MP.convert(a), MP.convert(b), TOLERANCE, 0)


def is_real(value: Number) -> bool:
    return not MP.im(MP.convert(value))


def walk(tree: Tree) -> Iterator[Tree]:
    """All subtrees of a tree, itself first."""
    yield tree
    for part in tree[1:]:
        if isinstance(part, tuple):
            yield from walk(part)


def with_parts(tree: Tree, function: Callable) -> tuple:
    """The tree with function(part) in the place of each part that is a tree itself."""
    kind, *parts = tree
    changed = [function(part) if isinstance(part, tuple) else part for part in parts]
    return (kind, *changed)


def variables(tree: Tree) -> set[str]:
    """The names in a tree, and the words, which have no value either."""
    return {part[1] for part in walk(tree) if part[0] in ("var", "word")}


@functools.lru_cache(maxsize=4096)
def equal(a: Tree, b: Tree) -> bool:
    """The same value wherever both have one; with variables at two sample points at least."""
    names = variables(a)
    if names != variables(b):
        return False
    n_points = len(RANGES) if names else 1
    agreements = 0
    for point in range(n_points):
        try:
            x, y = evaluate(a, point), evaluate(b, point)
        except (ValueError, ArithmeticError, LookupError):
            continue
        if near(x, y):
            agreements += 1
        elif is_real(x) or is_real(y):  # two complex values may be branches of one
            return False
    return agreements >= min(2, n_points)


def substituted(tree: Tree, tree_of_name: dict[str, Tree]) -> Tree:
    """The tree with trees in place of variables, by their names."""
    if tree[0] == "var":
        return tree_of_name.get(tree[1], tree)
    return with_parts(tree, lambda part: substituted(part, tree_of_name))


# ---- from a tree to an answer ----

REGIONS = {"relation", "union", "intersection", "without"}
LOGIC = {"∧", "∨"}
ITEMS = {"list", "set", "and", "or"} | LOGIC
STRUCTURES = REGIONS | ITEMS | {"tuple", "matrix", "cases", "cells", "ratio", "mod", "element"}
BASIS = "𝐢𝐣𝐤"
FLIPPED = {">": "<", "≥": "≤"}
QUANTITIES = {"quotient", "ratio", *FUNCTIONS}  # cos A = 1/2 is an answer of 1/2, xy = 5 a curve


class Equation(NamedTuple):
    """The tree of name = value, as of x = 5; `whole` is left - right side, of lines and conics."""

    kind: str  # "equation"
    name: Tree | None
    value: Tree | None
    whole: Tree | None


Answer = Tree  # a settled one: its parts are answers, or the signs of a relation


def settle(tree: Tree) -> Answer:
    """The tree as an answer: lists opened, equations set apart, matrices carried out."""
    kind, *parts = tree
    if kind in ("matrix", "cases"):
        return settle_rows(kind, parts[0])
    if kind not in STRUCTURES:
        return settle_value(tree)
    settled = with_parts(tree, settle)
    if kind == "relation":
        return settle_relation(settled[1:])
    if kind in ITEMS:
        return settle_items(kind, settled[1:])
    return settled


def settle_value(tree: Tree) -> Answer:
    """A value; what multiplies a matrix or transposes it is carried out, i + 2j is a vector."""
    kind, *parts = tree
    if not variables(tree).isdisjoint(BASIS):
        return vector(tree)
    if kind == "unit" and parts[1] == "transposed":
        return transposed(settle(parts[0]))
    has_matrix = any(part[0] == "matrix" for part in walk(tree))
    if has_matrix and kind == "negative":
        return times(settle(parts[0]), ("num", Fraction(-1)))
    if has_matrix and kind == "product":
        return times(settle(parts[-1]), ("product", *parts[:-1]))
    return tree


def times(matrix: Tree, factor: Tree) -> Tree:
    """A settled matrix or vector with all its cells multiplied."""
    if matrix[0] not in ("matrix", "cells", "tuple"):
        return worked_out(("product", factor, matrix))
    return with_parts(matrix, lambda part: times(part, factor))


def transposed(matrix: Tree) -> Tree:
    """A column is a tuple, and so is what a row becomes."""
    if matrix[0] != "matrix":
        return matrix
    rows = [row[1:] for row in matrix[1:]]
    if len(rows) == 1:
        return ("tuple", "()", *rows[0])
    return as_matrix(zip(*rows))


def as_matrix(rows: Any) -> Tree:
    return ("matrix", *(("cells", *row) for row in rows))


def vector(tree: Tree) -> Tree:
    """2i - 3j + k as the tuple (2, -3, 1)."""
    size = 3 if BASIS[2] in variables(tree) else 2
    nothing = dict.fromkeys(BASIS, ZERO)
    if not equal(substituted(tree, nothing), ZERO):
        raise ValueError("a vector and a number")
    axes = [substituted(tree, nothing | {axis: ONE}) for axis in BASIS[:size]]
    return ("tuple", "()", *map(worked_out, axes))


def worked_out(tree: Tree) -> Tree:
    """A number for a tree that has an exact value."""
    value = None if variables(tree) else evaluate(tree)
    return ("num", value) if isinstance(value, Fraction) else tree


def settle_rows(kind: str, tree: Tree) -> Answer:
    """A matrix; a vector is a tuple; a system is a list of its equations."""
    lines = tree[1:] if tree[0] == "row" else [tree]
    rows = [line[1:] if line[0] == "cell" else (line,) for line in lines]
    if kind == "cases" and all(len(row) == 2 for row in rows):
        pieces = [(value, settle_condition(condition)) for value, condition in rows]
        return ("piecewise", *itertools.chain(*pieces))
    rows = [[settle(cell) for cell in row] for row in rows]
    cells = list(itertools.chain(*rows))
    if kind == "cases" or any(isinstance(cell, Equation) for cell in cells):
        return settle_items("and", cells)
    if len(cells) == len(rows):
        return ("tuple", "()", *cells)
    return as_matrix(rows)


def settle_condition(tree: Tree) -> Tree:
    """Of a piece: "x > 0, x < 3" is both, "x = 1 or x = 2" either."""
    if tree[0] == "relation":
        return tree
    settled = settle(tree)
    if settled[0] == "list":
        return ("union", *(as_condition(item, item) for item in settled[1:]))
    return settled


def settle_items(kind: str, parts: Any) -> Answer:
    """A list or set of several items; conditions are a region; 2 h and 15 min are one value."""
    items = []
    for part in parts:
        if part[0] == "list":
            items += part[1:]
        else:
            items.append(part)
    if not 0 < len(items) <= MAX_ITEMS:
        raise ValueError("no items, or too many")
    kinds = [item[0] for item in items]
    if not REGIONS.isdisjoint(kinds):
        # a bare 1/2, as in "1/2 or x < 3", stays: for `holds` it is x = 1/2
        conditions = [as_condition(item, items[0]) for item in items]
        return ("union" if kind in ("or", "∨") else "intersection", *conditions)
    if kind in LOGIC and "equation" not in kinds:  # p ∧ q stays; x = 1 ∨ x = 2 is a list
        return (kind, *parts)
    if len(items) == 1:
        return items[0]
    if kind == "and" and set(kinds) == {"unit"}:
        total = total_of_units(items)
        if total:
            return total
    return ("set" if kind == "set" else "list", *items)


def total_of_units(items: list[Tree]) -> Tree | None:
    """2 hours and 15 minutes as one value in seconds; None if they are no parts of one measure."""
    measures = {measure for _, _, measure, _ in items}
    sizes = {size for _, _, _, size in items}
    if len(measures) != 1 or len(sizes) < 2:
        return None
    total = sum(evaluate(("product", value, size)) for _, value, _, size in items)
    return ("unit", ("num", total), *measures, ONE)


def as_condition(item: Answer, first: Answer) -> Tree:
    """An item among conditions: x = 2 as a region; the 3 after "x != 2," as x != 3."""
    if isinstance(item, Equation) and item.value:
        if item.value[0] in STRUCTURES:
            return item.value
        return ("relation", item.name, "=", item.value)
    is_exclusion = first[0] == "relation" and first[2] == "≠"
    if is_exclusion and item[0] not in STRUCTURES:
        return ("relation", first[1], "≠", item)
    return item


def settle_relation(parts: tuple) -> Answer:
    """An inequality as it is; an equation with its name, if a side is one, and its value.

    x = 5                  name x, value 5
    A = 2 * 3 = 6          name A, value 6, the last; 2 * 3 = 7 has none, for it is wrong
    x + y = 5              no name, value 5
    x^2 - 5x + 6 = 0       neither: an equation is no answer of 0
    cos A = 1/2            name cos A, value 1/2
    x = y                  name x, value y
    """
    sides, signs = parts[::2], parts[1::2]
    if set(signs) <= set(">≥"):  # y > x is x < y
        parts = [FLIPPED.get(part, part) for part in reversed(parts)]
    if set(signs) - set("=≡∈≈"):
        return ("relation", *parts)
    names = [side for side in sides if side[0] in ("var", "word")]
    values = [side for side in sides if side not in names]
    if not values:
        values = names[-1:]
    if not names and len(sides) == 2 and sides[0][0] in QUANTITIES and not variables(sides[1]):
        names = [sides[0]]
    name = names[0] if names else None
    if name and name[0] == "word" and PATTERNS["hedges"].search(name[1]):  # not: 5
        raise ValueError(name[1])
    value = values[-1]
    numbers = [side for side in values if not variables(side)]
    is_wrong = any(not same(numbers[0], other) for other in numbers[1:])  # 7 = 5
    if is_wrong or (name is None and value == ZERO):
        value = None
    whole = None
    if list(signs) == ["="] and any(map(variables, sides)):
        whole = ("scaled", ("sum", sides[0], ("negative", sides[1])))
    return Equation("equation", name, value, whole)


# ---- when two answers are the same ----


def same(answer: Answer, gold: Answer) -> bool:
    """Do two settled trees mean the same?"""
    if answer == gold:
        return True
    if isinstance(answer, Equation) or isinstance(gold, Equation):
        return same_equation(answer, gold)
    if isinstance(answer, str) or isinstance(gold, str):
        return False
    kinds = {answer[0], gold[0]}
    if kinds & REGIONS:
        return same_region(answer, gold)
    if kinds <= {"list", "tuple", "set"} or kinds in ({"∧"}, {"∨"}):
        return same_sequence(answer, gold)
    if kinds == {"mod"}:
        return same_residue(answer, gold)
    if kinds & STRUCTURES == {"ratio"}:
        return same_ratio(answer, gold)
    if kinds & STRUCTURES:
        return same_parts(answer, gold)
    if "piecewise" in kinds:
        return same_pieces(answer, gold)
    return same_value(answer, gold)


def same_parts(answer: Tree, gold: Tree) -> bool:
    return len(answer) == len(gold) and all(map(same, answer, gold))


def same_ratio(answer: Tree, gold: Tree) -> bool:
    """3:4 is 6:8, and 3/4; what may be a time is itself only."""
    if is_time(answer) or is_time(gold):
        return same_parts(answer, gold)
    (a, *others), (b, *gold_others) = terms_of(answer), terms_of(gold)
    if len(others) != len(gold_others):
        return False
    pairs = zip(others, gold_others)
    return all(equal(("quotient", x, a), ("quotient", y, b)) for x, y in pairs)


def is_time(tree: Tree) -> bool:
    """Two integers, the second one 0 or of two digits: 4:30 is not 2:15."""
    if tree[0] != "ratio" or any(part[0] != "num" for part in tree[1:]):
        return False
    last = tree[-1][1]
    return len(tree) == 3 and (last == 0 or 10 <= last < 60)


def terms_of(tree: Tree) -> tuple:
    """3 and 4 of 3:4 and of 3/4, 3 and 1 of 3."""
    kind, *parts = tree
    return tuple(parts) if kind in ("ratio", "quotient") else (tree, ONE)


def same_residue(answer: Tree, gold: Tree) -> bool:
    """9 mod 7 is 2 mod 7."""
    _, a, modulus = answer
    _, b, other = gold
    steps = evaluate(("quotient", ("sum", a, ("negative", b)), modulus))
    return equal(modulus, other) and is_integer(steps)


def same_equation(answer: Answer, gold: Answer) -> bool:
    """x = 5 is 5 and 5 = x; x + y = 5 is 5 as an answer, but as a gold it is an equation."""
    if not isinstance(gold, Equation):
        return answer.value is not None and same(answer.value, gold)
    is_named = gold.name is not None and gold.value is not None
    if not isinstance(answer, Equation):
        return is_named and same(answer, gold.value)
    if answer.whole and gold.whole and equal(answer.whole, gold.whole):
        return True
    if not is_named or answer.value is None:
        return False
    if answer.name and answer.name[0] == gold.name[0] and answer.name != gold.name:
        return False  # two variables, two words
    return same(answer.value, gold.value)


def by_name(answer: Tree) -> Tree | None:
    """x = 3, y = -4 as the tuple of its values in the order of the names."""
    kind, *items = answer
    if kind != "list" or not all(isinstance(item, Equation) for item in items):
        return None
    value_of_name = {}
    for item in items:
        if item.name and item.name[0] == "var":
            value_of_name[item.name[1]] = item.value
    if len(value_of_name) < len(items):
        return None
    values = [value_of_name[name] for name in sorted(value_of_name)]
    return ("tuple", "()", *values)


def same_sequence(answer: Tree, gold: Tree) -> bool:
    """Lists and sets in any order, tuples and named values in theirs."""
    named, gold_named = by_name(answer), by_name(gold)
    if named and gold[0] == "tuple":
        return same_parts(named, gold)
    if gold_named and not named and answer[0] != "set":
        items = answer[1:] if answer[0] == "list" else answer[2:]
        return same_parts(("tuple", "()", *items), gold_named)
    if "tuple" in (answer[0], gold[0]):
        return same_parts(answer, gold)
    return same_items(answer[1:], gold[1:])


def same_items(items: tuple, gold_items: tuple) -> bool:
    """Has each item its own equal among those of the gold, and none is left over?"""
    if len(items) != len(gold_items):
        return False
    left = list(gold_items)
    for item in items:
        match = next((other for other in left if same(item, other)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def quantity(tree: Tree) -> tuple[Tree, Tree, set[str]]:
    """A value and its units: of 5 % the 5, the product of 5 and 1/100, and {"%"}."""
    if tree[0] != "unit":
        return tree, tree, set()
    _, value, name, size = tree
    bare, sized, units = quantity(value)
    return bare, ("product", sized, FACTORS.get(name, size)), units | {name}


def same_value(answer: Tree, gold: Tree) -> bool:
    """With units ignored when one side has none; a % or ° may also be a factor."""
    a, sized_a, units_a = quantity(with_names_of(gold, answer))
    b, sized_b, units_b = quantity(gold)
    if units_a and units_b:
        is_comparable = units_a <= units_b or units_b <= units_a
    elif equal(a, b):
        return True
    else:
        is_comparable = units_a | units_b <= FACTORS.keys()
    return is_comparable and equal(sized_a, sized_b)


INTEGER_NAMES, CONSTANT_NAMES = set("kmnl"), set("CcKk")


def with_names_of(gold: Tree, answer: Tree) -> Tree:
    """Another letter for the integer of k pi, or for the constant of an integral, is no matter."""
    ours, theirs = variables(answer) - variables(gold), variables(gold) - variables(answer)
    if len(ours) != 1 or len(theirs) != 1:
        return answer
    (name,), (other,) = ours, theirs
    is_period = {name, other} <= INTEGER_NAMES and ("π",) in walk(gold)
    is_constant = other == "C" and name in CONSTANT_NAMES
    are_sums = gold[0] == answer[0] == "sum" and ("var", other) in gold and ("var", name) in answer
    if is_period or (is_constant and are_sums):
        return substituted(answer, {name: ("var", other)})
    return answer


# ---- regions of the real line, and functions by pieces ----


def same_region(answer: Tree, gold: Tree) -> bool:
    """Do they agree at all their ends, between them and beyond?"""
    names = variables(answer) | variables(gold)
    kinds = {answer[0], gold[0]}
    if len(names) > 1 and kinds == {"intersection"}:  # x > 0, y > 0 in any order
        return same_items(answer[1:], gold[1:])
    if len(names) > 1 or (not names and kinds == {"relation"}):
        return same_parts(answer, gold)
    points = spread(ends(answer) + ends(gold))
    in_answer = [holds(answer, x=x) for x in points]
    in_gold = [holds(gold, x=x) for x in points]
    return any(in_gold) and in_answer == in_gold


def same_pieces(answer: Tree, gold: Tree) -> bool:
    """Are they the same function of their variable: at the sample points, where the pieces end and
    in each of them? What is not by pieces may have values where the other has none."""
    if len(variables(answer) | variables(gold)) > 1:
        return same_value(answer, gold)
    try:
        points = spread(ends_of_pieces(answer) + ends_of_pieces(gold))
    except ValueError:  # a condition is not linear
        return same_value(answer, gold)
    points += [sample("x", point) for point in range(len(RANGES))]
    pairs = [(value_at(answer, x), value_at(gold, x)) for x in points]
    if answer[0] != gold[0]:
        pairs = [pair for pair in pairs if None not in pair]
    return bool(pairs) and all(same_or_none(*pair) for pair in pairs)


def same_or_none(a: Number | None, b: Number | None) -> bool:
    if a is None or b is None:
        return a is b
    return near(a, b)


def ends_of_pieces(tree: Tree) -> list[Number]:
    """Of a function by pieces; "otherwise" has none."""
    found = []
    if tree[0] == "piecewise":
        for condition in tree[2::2]:
            if variables(condition):
                found += ends(condition)
    return found


def value_at(tree: Tree, x: Number) -> Number | None:
    """None where there is no value: between pieces, at a pole."""
    try:
        return evaluate(tree, x=x)
    except (NoPiece, ArithmeticError):
        return None


def spread(marks: list[Number]) -> list[Number]:
    """The finite marks, and a point between any two neighbours and beyond the outermost."""
    marks = sorted(mark for mark in marks if abs(mark) < MP.inf)
    if len(marks) > MAX_ITEMS:
        raise ValueError("too many ends")
    between = [(low + high) / 2 for low, high in itertools.pairwise(marks)]
    outside = [marks[0] - 1, marks[-1] + 1] if marks else [MP.zero]
    return [*marks, *between, *outside]


def ends(tree: Tree) -> list[Number]:
    """All points where the region may begin or end; ValueError when a condition is not linear."""
    kind, *parts = tree
    found = []
    if kind in ("union", "intersection", "without", "list", "set", "tuple"):
        for part in parts:
            if isinstance(part, tuple):
                found += ends(part)
        return found
    if (kind == "relation") != bool(variables(tree)):
        raise ValueError("neither a condition on a variable nor a number")
    if kind == "relation":
        for left, right in itertools.pairwise(parts[::2]):
            found += roots(left, right)
        return found
    return [MP.convert(evaluate(tree))]


def roots(left: Tree, right: Tree) -> list[Number]:
    """Where two sides are equal, |u| = v at u = v and u = -v."""
    if right[0] == "fabs":
        left, right = right, left
    if left[0] == "fabs":
        return roots(left[1], right) + roots(left[1], ("negative", right))
    difference = ("sum", left, ("negative", right))
    if degree(difference) > 1:
        raise ValueError("not linear")
    at_0, at_1 = evaluate(difference, x=Fraction(0)), evaluate(difference, x=Fraction(1))
    if at_0 == at_1:
        return []
    return [MP.convert(at_0 * (1 / (at_0 - at_1)))]


def degree(tree: Tree) -> int:
    """0 of a constant, 1 of what is linear in its variable, more of all else."""
    kind, *parts = tree
    if not variables(tree):
        return 0
    if kind == "var":
        return 1
    if kind in ("sum", "negative"):
        return max(map(degree, parts))
    if kind == "product":
        return sum(map(degree, parts))
    if kind == "quotient" and not variables(parts[1]):
        return degree(parts[0])
    return 2


def holds(tree: Tree, point: int = 0, x: Number | None = None) -> bool:
    """Is the number x in the region? Conditions of pieces are also asked at sample points."""
    kind, *parts = tree
    if kind in ("union", "list", "set"):
        return any(holds(part, point, x) for part in parts)
    if kind == "intersection":
        return all(holds(part, point, x) for part in parts)
    if kind == "without":
        return holds(parts[0], point, x) and not holds(parts[1], point, x)
    if kind == "tuple" and len(parts) == 3:  # [2, 3) is 2 ≤ x < 3
        brackets, low, high = parts
        above = "≤" if brackets[0] == "[" else "<"
        below = "≤" if brackets[1] == "]" else "<"
        parts = [low, above, ("var", ""), below, high]
    elif kind != "relation":
        parts = [("var", ""), "=", tree]
    values = [evaluate(side, point, x) for side in parts[::2]]
    steps = zip(values, parts[1::2], values[1:])
    return all(compares(a, sign, b) for a, sign, b in steps)


def compares(a: Number, sign: str, b: Number) -> bool:
    """Does a stand so to b?"""
    if near(a, b):
        return sign in "=≤≥"
    if MP.convert(a) < MP.convert(b):
        return sign in "<≤≠"
    return sign in ">≥≠"


# ---- an answer must be as worked out as the gold ----


MANY_DIVISORS = math.lcm(*range(1, 21))  # times it, a fraction over up to 20 is whole


def is_number(tree: Answer | str, with_pi: bool = False) -> bool:
    """A numeral, fraction, mixed number or a times a power of ten, with sign, unit or percent."""
    if not isinstance(tree, tuple):
        return False
    kind, *parts = tree
    if kind == "num":
        return True
    if kind == "π":
        return with_pi
    if kind in ("negative", "unit", "magnitude"):
        return is_number(parts[0], with_pi)
    if kind == "power":
        return parts[0] == TEN and is_number(parts[1])
    if kind == "sum" and len(parts) == 2:  # 3 + 1/8, not 48 + 48/2
        whole, rest = parts
        is_mixed = whole[0] == "num" and rest[0] == "quotient" and is_number(rest)
        return is_mixed and evaluate(rest) < 1
    is_wanted = kind in ("quotient", "mixed")
    if kind == "product" and len(parts) == 2:  # 5 * 10^3
        is_wanted = parts[1] == TEN or parts[1][0] == "power"
    if kind == "product" and with_pi:
        is_wanted = True
    return is_wanted and all(is_number(part, with_pi) for part in parts)


def is_solved(answer: Answer) -> bool:
    """x = 5 is. y = 2x + 3 is not: any form of that line may answer it. With a quotient as value,
    y = (7 - 2x)/3, it is: y was asked for. In inequalities the variable stands alone or with a
    sign, or all that it stands in is in one |..|."""
    kind, *parts = answer
    if isinstance(answer, Equation):
        if answer.name is None or answer.value is None:
            return False
        return answer.value[0] == "quotient" or not variables(answer.value)
    if kind == "relation":
        for side in parts[::2]:
            bare = side[1] if side[0] == "negative" else side
            if variables(side) and bare[0] not in ("var", "fabs"):
                return False
        return True
    return all(is_solved(part) for part in parts if isinstance(part, tuple))


def has_numerals(tree: Answer) -> bool:
    """Is a number wherever one stands: as the answer, an item, an end of an interval, a side?"""
    kind, *parts = tree
    if kind == "equation":
        return tree.value is None or has_numerals(tree.value)
    if kind in STRUCTURES:
        return all(has_numerals(part) for part in parts if isinstance(part, tuple))
    return is_number(tree) or bool(variables(tree)) or ("∞",) in walk(tree)


def has_like_terms(tree: Tree) -> bool:
    """Has it a sum with terms whose quotient is a rational number, such as 3x + 2x, or a product
    with several numbers, such as 3 * 4x?"""
    for part in walk(tree):
        kind, *parts = part
        if is_number(part):
            continue
        if kind == "sum":
            pairs = itertools.combinations(parts, 2)
            if any(is_rational_quotient(a, b) for a, b in pairs):
                return True
        if kind == "product":
            numbers = [factor for factor in factors(part) if is_rational(factor)]
            if len(numbers) > 1:
                return True
    return False


def factors(tree: Tree) -> list[Tree]:
    """Those of a product, and of the products in it."""
    kind, *parts = tree
    if kind != "product":
        return [tree]
    return [factor for part in parts for factor in factors(part)]


def is_rational(factor: Tree) -> bool:
    """Has it a rational value? Powers of ten do not count."""
    if variables(factor) or factor[:2] == ("power", TEN):
        return False
    try:
        return isinstance(evaluate(factor), Fraction)
    except REFUSED:
        return False


def is_rational_quotient(a: Tree, b: Tree) -> bool:
    """Is a / b the same rational number at two sample points, and not 0?"""
    try:
        quotient, other = [evaluate(a, point) * (1 / evaluate(b, point)) for point in (1, 2)]
    except REFUSED:
        return False
    if quotient == 0 or not near(quotient, other):
        return False
    if isinstance(quotient, Fraction):
        return True
    multiple = MANY_DIVISORS * quotient
    return is_real(multiple) and near(multiple, MP.nint(multiple))


def is_worked_out(answer: Answer, gold: Answer) -> bool:
    """A number wants a number, also as an item or an end; what is solved for its variable wants
    something solved; like terms are collected."""
    if isinstance(gold, Equation):
        if not is_solved(gold):
            return True
        if isinstance(answer, Equation) and not is_solved(answer):  # 3x + 1 = 16 for x = 5
            return False
        gold = gold.value
    value = answer.value if isinstance(answer, Equation) else answer
    if is_number(gold):
        is_angle = any(part[:1] == ("unit",) and part[2] == "°" for part in walk(gold))
        return is_number(value, with_pi=is_angle)
    if has_numerals(gold) and not has_numerals(value):
        return False
    if has_like_terms(value) and not has_like_terms(gold):
        return False
    if gold[0] in REGIONS or value[0] in REGIONS:
        return is_solved(value) or not is_solved(gold)
    return True


def is_plain(tree: Answer | str) -> bool:
    """Has it no operator and no function: a number, a letter, words, or several of these?"""
    if isinstance(tree, Equation):
        return bool(tree.name and tree.value) and is_plain(tree.value)
    if isinstance(tree, str) or is_number(tree):
        return True
    kind, *parts = tree
    if kind in ("var", "word") or not parts:
        return True
    return kind in STRUCTURES and all(map(is_plain, parts))


def is_copied(answer: str, gold: str, problem: str) -> bool:
    """Does the answer, or its last side, stand in the problem's text as it is, and the gold not?"""
    problem, answer = squeezed(problem), squeezed(answer)
    _, _, side = answer.rpartition("=")
    bare = side.strip("$").removeprefix("(").removesuffix(")")
    copies = [text for text in (answer, side, bare) if stands_in(problem, text)]
    return bool(copies) and not stands_in(problem, squeezed(gold))


def stands_in(problem: str, answer: str) -> bool:
    """Is the answer in the text, not as a part of a word or number? Both are squeezed."""
    answer = re.escape(answer.strip("$"))
    return bool(re.search(rf"(?<![A-Za-z0-9\\]){answer}(?![A-Za-z0-9])", problem))


def squeezed(text: str) -> str:
    """Without blanks, braces and sizes, dollars around all formulas."""
    text = re.sub(r"\\[()\[\]]", "$", text)
    text = re.sub(r"\\(?:left|right|displaystyle|[,;:! ])|[\s{}]", "", text)
    return re.sub(r"\\[dtc]frac", r"\\frac", text)


# ---- the rewards ----


class Reading(NamedTuple):
    """What an answer may stand for: words, a settled tree, and the letter of "(B) 17"."""

    text: str
    tree: Answer | None
    choice: str | None


LETTERS = re.compile(r"[A-J](?:(?:,|and)+[A-J])+|\([A-J]\)")  # A,B,andD of several choices; (B)
CHOICE = re.compile(r"\(([A-J])\)|([A-J])[).:]")  # (B) or B. before its text
SIMPLE = re.compile(r"-?\d{1,40}(?:\.\d{1,40})?\Z")  # 17, -0.5
MAX_DIGITS = 12  # a gold of more may be answered by a formula, as 2^100


def split_choice(tokens: list[str]) -> tuple[str | None, list[str]]:
    """The letter of "(B) 17" or "B: 17" and the other tokens; not of A:B, (B) or C, (B) maybe."""
    size = 3 if tokens[:1] == ["("] else 2
    start = CHOICE.fullmatch("".join(tokens[:size]))
    rest = "".join(tokens[size:])
    if not start or PATTERNS["hedges"].search(rest) or PATTERNS["no_choice"].search(rest):
        return None, tokens
    return start[1] or start[2], tokens[size:]


@functools.lru_cache(maxsize=4096)
def read(text: str) -> Reading:
    """Any text; what is too long, or no mathematics, has no tree; a placeholder has no text."""
    tokens = tokenise(text) if len(text) <= MAX_CHARS else []
    choice, tokens = split_choice(tokens)
    plain = re.sub('[" ]', "", "".join(tokens))
    if not re.search(r"[\w∅∞]", plain):
        return Reading("", None, None)
    if LETTERS.fullmatch(plain):  # A, B and D are \text{ABD}
        plain = re.sub(r"[(),]|and", "", plain)
        if len(plain) > 1:  # as tokenise does with words
            plain = plain.lower()
    tree = None
    with contextlib.suppress(*REFUSED):
        tree = settle(Reader(tokens).read_all())
    return Reading(plain, tree, choice)


def gold_fault(gold: str) -> str | None:
    """Why `gold` cannot be compared as mathematics or as words, or None when it can."""
    answer = gold_answer(gold).strip()
    if not answer:
        return "no answer"
    if len(answer) > MAX_CHARS:
        return f"answer longer than {MAX_CHARS} characters"
    has_words = re.search("[A-Za-z]{2}", COMMAND.sub("", answer))
    if has_words or read(answer).tree is not None:
        return None
    return "answer not read"


def is_right(answer: str, gold: str, problem: str | None, strict: bool) -> bool:
    """Does the answer mean what the gold does? strict: and as worked out, and not copied."""
    ours, theirs = read(answer), read(gold)
    if not ours.text or not theirs.text:
        return False
    if ours.choice and theirs.choice:
        return ours.choice == theirs.choice
    if theirs.text == ours.text:
        return True
    if theirs.text == ours.choice or theirs.choice == ours.text:  # one of them is the letter alone
        return True
    if ours.tree is None or theirs.tree is None or not same(ours.tree, theirs.tree):
        return False
    if not strict:
        return True
    if problem and not is_plain(ours.tree) and is_copied(answer, gold, problem):
        return False
    n_digits = len([char for char in theirs.text if char.isdigit()])
    is_long = is_number(theirs.tree) and n_digits > MAX_DIGITS
    return is_long or is_worked_out(ours.tree, theirs.tree)


def accuracy_reward(
    response: str, gold: str, problem: str | None = None, strict_answers: bool = True
) -> float:
    """1.0 when the answer in `response` (see extract_answer) has the value of `gold`, else 0.0.

    A list or set needs all elements of the gold and no others: naming candidates earns nothing.
    With strict_answers the answer must be as worked out as the gold, and not be an expression that
    stands in the `problem`; evaluations whose numbers are compared with others' do without.
    """
    answer, gold = (extract_answer(response) or "").strip(), gold_answer(gold).strip()
    is_correct = False
    if SIMPLE.match(answer) and SIMPLE.match(gold):
        is_correct = Fraction(answer) == Fraction(gold)
    else:
        with contextlib.suppress(*REFUSED):
            is_correct = is_right(answer, gold, problem, strict_answers)
    return 1.0 if is_correct else 0.0


def format_reward(response: str, gold: str = "") -> float:
    """1.0 for exactly <think>..</think><answer>..</answer> with two non-blank bodies, else 0.0."""
    parts = re.split("(</?think>|</?answer>)", response)
    texts, tags = parts[::2], parts[1::2]
    if tags != ["<think>", "</think>", "<answer>", "</answer>"]:
        return 0.0
    before, thought, between, answer, after = map(str.strip, texts)
    is_right_shape = thought and answer and not (before or between or after)
    return 1.0 if is_right_shape else 0.0


REWARDS = {"accuracy": accuracy_reward, "format": format_reward}
ADAPTER = (
    "def mine(response, gold, **row): "
    "return theirs(completions=[response], prompts=[row['problem']], "
    "**{name: [value] for name, value in row.items()})[0]"
)
MAX_REWARD = 1e9  # larger ones would not stay finite in sums


def resolve_reward(name: str) -> Callable:
    """The f(response, gold) -> float behind a key of REWARDS or "path/to/file.py:function"."""
    source, _, function = name.rpartition(":")
    try:
        if name in REWARDS:
            reward = REWARDS[name]
        else:
            reward = runpy.run_path(source)[function]
    except (Exception, SystemExit) as error:  # whatever the user's file does when it is imported
        raise UserError(f"reward {name!r}: none of {', '.join(REWARDS)}; {error!r}") from error
    parameters = list(inspect.signature(reward).parameters)
    if parameters and parameters[0] in ("completions", "prompts"):
        raise UserError(f"reward {name!r} is written for TRL; wrap it: {ADAPTER}")
    return reward


# ---- workers: one line of JSON in, one out ----


def score(reward: Callable, text: str, gold: str, row: dict) -> tuple[float, str | None]:
    """The reward of one text, or 0.0 and what went wrong. The reward gets the columns that it names
    after (response, gold), all of them as **row."""
    parameters = list(inspect.signature(reward).parameters.values())
    taken = {parameter.name for parameter in parameters[:2]}
    columns = {name: value for name, value in row.items() if name not in taken}
    if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
        names = [parameter.name for parameter in parameters[2:]]
        columns = {name: row[name] for name in names if name in row}
    try:
        value = float(reward(text, gold, **columns))
        if not abs(value) <= MAX_REWARD:
            raise ValueError(f"the reward is {value}")
    except Exception as error:  # a user's function may raise anything
        return 0.0, repr(error)
    return value, None


def serve(pipe: str, timeout: str, *names: str) -> None:
    """A worker's life at its end of a socket. It first tells why it cannot start, or that nothing
    is {"refused": null}; {"gold", "row"} opens a group, and each text of it is answered by
    {"rewards", "errors"}."""
    lines = socket.socket(fileno=int(pipe)).makefile("rw")

    def reply(**message) -> None:
        print(json.dumps(message, allow_nan=False), file=lines, flush=True)

    try:
        rewards = [resolve_reward(name) for name in names]
    except UserError as error:
        reply(refused=str(error))
        return
    reply(refused=None)
    group = {}
    for line in lines:
        message = json.loads(line)
        if isinstance(message, dict):
            group = message
            continue
        # only should the caller be gone: its own deadline is the earlier one
        faulthandler.dump_traceback_later(float(timeout) + 2 * GRACE, exit=True)
        scores = [score(reward, message, group["gold"], group["row"]) for reward in rewards]
        faulthandler.cancel_dump_traceback_later()
        values, errors = zip(*scores)
        reply(rewards=values, errors=errors)


GRACE = 0.25  # seconds for a reply on its way
START = 60.0  # seconds for a worker to start
PIPE_BYTES = 1 << 16  # read at a time


class Worker:
    """A process in a group of its own, so that whatever it forks is killed with it."""

    def __init__(self, arguments: list[str]):
        self.pipe, theirs = socket.socketpair()
        with theirs:
            end = theirs.fileno()
            self.process = Popen(
                [sys.executable, os.path.abspath(__file__), str(end), *arguments],
                stdin=DEVNULL,
                stdout=2,  # what functions print goes to stderr
                pass_fds=[end],
                start_new_session=True,
            )
        self.group = None  # the last one whose gold and row it got
        try:
            hello = self.ask(b"", START)
        except (OSError, ValueError):
            hello = {"refused": "a worker does not start"}
        if hello["refused"]:
            self.kill()
            raise UserError(hello["refused"])

    def ask(self, request: bytes, seconds: float) -> dict:
        """Its reply. TimeoutError when it is late, never later; another OSError when it died, a
        ValueError when a reward wrote into the socket."""
        deadline = time.monotonic() + seconds
        self.pipe.settimeout(seconds)  # of all that is sent
        self.pipe.sendall(request)
        reply = b""
        while not reply.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self.pipe.settimeout(left)
            part = self.pipe.recv(PIPE_BYTES)
            if not part:
                raise ConnectionError
            reply += part
        return json.loads(reply)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class VerifierPool:
    """Scores groups of texts in worker processes; nothing that a text does reaches the caller.

    A text that takes longer than `timeout` s costs its worker its life and scores 0; when a worker
    dies otherwise its text is tried once more. `stats` counts both and the rewards that raise or
    are no finite number; `error` is the last of them.
    """

    def __init__(self, reward_funcs: list[str], workers: int, timeout: float = 5.0):
        self.names = list(reward_funcs)
        self.timeout = timeout
        self.stats = {"timeouts": 0, "errors": 0}
        self.error = None
        self.groups = []  # (key, the futures of its texts)
        self.is_closed = False
        self.threads = ThreadPoolExecutor(workers)
        self.workers = []  # one for each thread
        starts = [self.threads.submit(self._start) for _ in range(workers)]
        try:
            self.idle = [start.result() for start in starts]
        except UserError:
            self.close()
            raise

    def submit(self, key: Any, texts: list[str], gold: str, row: dict | None = None) -> None:
        """Queue the G `texts` of one problem; returns at once. `row`: JSON values by name, the
        "problem", the data's columns, strict_answers (see rollout.row_of)."""
        self.groups.append((key, self._ask_all(texts, gold, row or {})))

    def poll(self, wait: bool) -> list[tuple]:
        """(key, rewards_GF) of the groups that are ready; with `wait`, of all submitted ones."""
        ready, waiting = [], []
        for key, futures in self.groups:
            if not wait and not all(future.done() for future in futures):
                waiting.append((key, futures))
                continue
            replies = [future.result() for future in futures]
            ready.append((key, [reply["rewards"] for reply in replies]))
            for reply in replies:
                errors = [error for error in reply["errors"] if error]
                if errors:
                    self.stats[reply.get("kind", "errors")] += 1
                    self.error = errors[0]
        self.groups = waiting
        return ready

    def probe(self, examples: list[tuple[str, dict]]) -> None:
        """Try the rewards on the (gold, row) of some problems, with the gold and with nothing as
        response; UserError names one that fails every time."""
        futures = []
        for gold, row in examples:
            futures += self._ask_all([gold, ""], gold, row)
        replies = [future.result() for future in futures]
        for index, name in enumerate(self.names):
            errors = [reply["errors"][index] for reply in replies]
            if errors and all(errors):
                raise UserError(
                    f"reward {name!r} failed in all {len(errors)} trials: {errors[0]}; "
                    "f(response, gold) -> float is wanted, or columns by their names"
                )

    def close(self) -> None:
        """Drop what is still queued and stop the workers. Can be called twice."""
        self.is_closed = True
        self.threads.shutdown(wait=False, cancel_futures=True)
        for worker in list(self.workers):
            worker.kill()
        self.threads.shutdown()

    def _ask_all(self, texts: list[str], gold: str, row: dict) -> list[Future]:
        group = json.dumps({"gold": gold, "row": row}).encode() + b"\n"
        return [self.threads.submit(self._ask, text, group) for text in texts]

    def _ask(self, text: str, group: bytes, may_retry: bool = True) -> dict:
        """In a thread: {"rewards", "errors"} of one text."""
        worker = self.idle.pop()
        request = json.dumps(text).encode() + b"\n"
        if worker.group is not group:
            request = group + request
        worker.group = group
        try:
            reply = worker.ask(request, self.timeout + GRACE)
            self.idle.append(worker)
            return reply
        except TimeoutError:  # a process that has ended may have left its socket to a child
            is_late = worker.process.poll() is None
        except (OSError, ValueError):
            is_late = False
        worker.kill()
        self.workers.remove(worker)
        if not self.is_closed:
            self.idle.append(self._start())
        if is_late:
            kind, error = "timeouts", f"no reply within {self.timeout} s"
        elif may_retry and not self.is_closed:
            return self._ask(text, group, may_retry=False)
        else:
            kind, error = "errors", "its worker died"
        n = len(self.names)
        return {"rewards": [0.0] * n, "errors": [error] * n, "kind": kind}

    def _start(self) -> Worker:
        worker = Worker([str(self.timeout), *self.names])
        self.workers.append(worker)
        if self.is_closed:
            worker.kill()
        return worker


if __name__ == "__main__":
    serve(*sys.argv[1:])

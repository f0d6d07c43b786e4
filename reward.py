r"""Rewards for mathematical answers, and a pool of processes that scores them.

A recursive-descent reader turns model text into exact numbers and expression trees; nothing is
ever handed to eval, sympify or parse_expr. Structure (set, tuple, interval, equation, matrix) is
compared before value; values are Fractions while they can be and 100-digit mpmath numbers after
that; expressions are equal when they agree at fixed sample points. Sizes are checked before any
arithmetic. What cannot be read is compared as text; in doubt the reward is 0. A forker adds to
REWARDS, or names a function f(response, gold) -> float as "path/to/file.py:function".
"""
import functools
import importlib
import importlib.util
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import queue
import re
import resource
import select
import subprocess
import sys
import threading
import unicodedata
import zlib
from fractions import Fraction

MAX_CHARS, MAX_DEPTH, MAX_ITEMS = 3000, 60, 60  # beyond: compared as strings only
MAX_BITS, MAX_POWER, MAX_ARGUMENT = 60_000, 4000, 10**5  # exact powers; mpmath's arguments
TAGS = ("<think>", "</think>", "<answer>", "</answer>")

def table(rows: str) -> dict[str, str]:
    """{word: first word of its row} for rows "new word word; new word"."""
    return {word: row.split()[0] for row in rows.split(";") for word in row.split()[1:]}

SMALL, DIGITS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ₀₁₂₃₄₅₆₇₈₉", "0123456789+-n0123456789"
UNICODE = str.maketrans(dict(zip("−–—·×⋅∗÷′’‘⟨⟩≦≧", "---****/'''()≤≥"))
                        | {"√": r"\sqrt ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}"}
                        | {char: f" {char}" for char in "½⅓⅔¼¾⅕⅛"})
SYNONYMS = table(
    r"\frac dfrac tfrac cfrac; ≤ le leq leqslant leqq; ≥ ge geq geqslant geqq; < lt; > gt; ≠ ne"
    r" neq; ∈ in; ∪ cup bigcup; ∩ cap; ∖ setminus backslash; ∞ infty infinity; * cdot times ast;"
    r" / div; ± pm; ∓ mp; ≈ approx simeq; : colon; | mid vert lvert rvert; \{ lbrace; \} rbrace;"
    r' ( langle; ) rangle; ∅ emptyset varnothing; ° degree; "and" land; "or" lor; \ln log; ℓ ell;'
    r" \binom dbinom tbinom; \fabs abs; \asin arcsin; \acos arccos; \atan arctan; \asec arcsec;"
    r" \acsc arccsc; \acot arccot; ε varepsilon; φ varphi; λ lambda; ℏ hbar") | dict.fromkeys((
        "left right middle big Big bigg Bigg bigl bigr Bigl Bigr displaystyle textstyle limits"
        " quad qquad mathbf boldsymbol bm mathit mathcal mathsf rm bf it angle triangle").split(), "")
UNITS = table(
    "% percent percents pct; ° degrees degree deg; $ dollars dollar usd; cent cents; mm mm; ft ft"
    " feet foot; cm cm centimeters centimetres centimeter; m meters metres meter; km km kilometers;"
    " in in inches inch; kg kg; hour hours hrs hr; minute minutes min mins; second seconds sec;"
    " unit units; day day days; mile miles mi; pound pounds lbs")
FUNCTIONS = set("sin cos tan sec csc cot sinh cosh tanh asin acos atan asec acsc acot ln exp lg"
                " fabs".split())
PLAIN = FUNCTIONS | set("sqrt log pi abs infty infinity arcsin arccos arctan".split())
OPAQUE = set("sum prod int oint lim vec overline bar hat tilde dot ddot overrightarrow".split())

def quote(run: re.Match, always: bool = False) -> str:
    """A run of letters: a function or constant, a word in quotes, or letters to be multiplied."""
    word = run[0]
    if word in PLAIN:
        return f"\\{word} "
    is_unit = word.lower() in UNITS and run.string[:run.start()].rstrip()[-1:] in tuple('0123456789})"')
    is_word = len(word) > 3 or word in ("or", "and", "to", "not", "the", "for")
    return f' "{word.lower()}" ' if always or is_unit or is_word else word

def quote_text(group: re.Match) -> str:
    r"""The inside of a \text{}: words in quotes; a lone letter after a number is a unit."""
    content = WORD.sub(functools.partial(quote, always=True), group[1]).strip()
    before = group.string[:group.start()].rstrip()[-1:]
    is_unit = before in tuple("0123456789})") and re.fullmatch("[A-Za-df-hj-z]", content)
    return f' "{content}" ' if is_unit else f" {content} "

def repeating(run: re.Match) -> str:
    r"""0.1\overline{6} as a fraction."""
    tail = Fraction(int(run[3]), 10 ** len(run[2]) * (10 ** len(run[3]) - 1))
    return f"({Fraction(f'{run[1]}.{run[2]}0') + tail})"

def symbol(run: re.Match) -> str:
    """A LaTeX command as its synonym, a Greek letter, or itself."""
    size = "CAPITAL" if run[1][0].isupper() else "SMALL"
    try:
        return SYNONYMS.get(run[1]) or unicodedata.lookup(f"GREEK {size} LETTER {run[1].upper()}")
    except KeyError:
        return "" if run[1] in SYNONYMS else run[0] + " "

WORD = re.compile(r"""(?<![\\A-Za-z"])[A-Za-z]{2,}""")
REWRITES = tuple((re.compile(pattern), new) for pattern, new in (
    (r"(?<!\\)\\[()\[\]]|(?<!\\)\$|\*\*(?=[A-Z])|(?<!\\)\\$", " "),
    (r"-?\s*\\\$", lambda run: ' "$" ' + run[0][:-2]), (r"[€£]", ' "€" '),
    (r"\*\*", "^"), (r"<=|=<", "≤"), (r">=", "≥"), (r"(\d+)⁄(\d+)", r"\\frac{\1}{\2}"),
    (r"(?<=\d)\s*(?:\\[,!]\s*)+(?=\d)", ""),  # 5\,040, then 5{,}040 and 5,\!040
    (r"(?<=\d)\s*(?:\{\s*,\s*\}|,\s*\\!)\s*(?=\d{3}(?!\d))", ""),
    (r"(?<!\\)\\[,;:!\s]|~", " "), (r"[\s.,;]+$", ""), (r"\\?%", ' "%" '), (r"\^\s*\{?\s*\\circ\s*\}?", "°"),
    (r"\^\s*\{?\s*\\prime\s*\}?", "'"), (r"\\mathbb\s*\{?\s*([A-Z])\s*\}?", r" \\bb\1 "),
    (r"\\begin\s*\{(?:[pb]|small)?(?:matrix|array)\}\s*(?:\{[clr|\s]*\})?", " ⟦ "),
    (r"(?:\\\\\s*)?\\end\s*\{(?:[pb]|small)?(?:matrix|array)\}", " ⟧ "),
    (r"\\operatorname\*?\s*\{\s*([a-z]+)\s*\}", r"\\\1 "), (r"\b([ap])\.\s?m\b\.?", r'"\1m"'),
    (r"(?:(?<=1)st|(?<=2)nd|(?<=3)rd|(?<=\d)th)\b|\^\s*\{\s*\\\w+\{(?:st|nd|rd|th)\}\s*\}", ""),
    (r"(?<=\d)[eE]([-+]?\d+)\b", r"*10^{\1}"), (r"(\\[dtc]?frac)\s*(\d)\s*(\d)", r"\1{\2}{\3}"),
    (r"(?<![\d.}^_/])(\d+)\s*(\\[dtc]?frac\s*\{\d+\}\s*\{\d+\})", r"(\1+\2)"),  # mixed numbers
    (r"(?<![\d.}^_/])(\d+)\s+(\d+)\s*/\s*(\d+)", r"(\1+\2/\3)"),
    (r"(\d+)\.(\d*)\\overline\s*\{(\d+)\}", repeating), (r"(?<=\d)\s+(?=[\d.])", " ␣ "),
    (r"\\(?:text(?:bf|it|rm|normal|tt|sf|up)?|mathrm|mbox|emph)\s*\{([^{}]*)\}", quote_text),
    (WORD.pattern, quote), (r"\\([A-Za-z]+)", symbol),
    (r'"(?:only|option|choice|answer|is|the|approximately|about|exactly)"', " "),
    (r'"(?:for|where|if|when|with)"[^,;]*?(?=,|;|"and"|$)', " "), (r',\s*"and"', ' "and"'),
    (r'"([a-z]+)"\s*\^\s*\{?\s*(\d)\s*\}?', r'"\1\2"'),
    (r'(?<=[a-z\d])(?<!"or)(?<!"and)(?<!"to)"\s*(/?)\s*"(?!or"|and"|to")(?=[a-z])', r" \1")))
TOKEN = re.compile(r'"[^"]*"|\\[A-Za-z]+|\\.|\d+(?:\.\d*)?|\.\d+|\S')
SIMPLE = re.compile(r"-?\d{1,40}(?:\.\d{1,40})?\Z")
THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")
INFIX = {token: (strength, kind) for strength, kind, *tokens in (
    (1, "row", r"\\"), (2, "cell", "&"), (3, "or", '"or"'), (4, "and", '"and"'), (5, ";", ";"),
    (6, "list", ","), (8, "/", r"\over"), (8, "binomial", r"\choose"), (9, "rel", *"=<>≤≥≠∈≈"),
    *((10, sign, sign) for sign in "∪∩∖"), (11, ":", ":", '"to"'), (14, "*", "*"), (14, "/", "/"),
    *((13, sign, sign) for sign in "+-±∓"), (16, "power", "^"), (17, "fac", "!"), (17, "deg", "°"))
    for token in tokens}
CLOSING = {"(": ")]", "[": ")]", "{": "}", r"\{": r"\}", "⟦": "⟧", "|": "|",
           r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
ENDS = {"", *")]}⟧", r"\}", r"\rfloor", r"\rceil"}
WRAPS = {"|": "fabs", r"\lfloor": "floor", r"\lceil": "ceil", "⟦": "matrix"}
FLIPPED = str.maketrans("<>≤≥", "><≥≤")
ZERO, TWO, REALS = ("num", Fraction(0)), ("num", Fraction(2)), ("var", r"\bbR")
LOCAL = threading.local()  # an mpmath context per thread: its precision is not thread-safe

class Unreadable(Exception):
    """The text is not mathematics that the reader knows, or goes over one of the limits."""

class Reader:
    """Precedence climbing over tokens. A tree is (kind, *parts), its leaves ("num", Fraction)."""

    def __init__(self, tokens: list[str]):
        self.tokens, self.at, self.brackets = [*tokens, ""], 0, [""]

    def take(self, wanted: str = "") -> str:
        self.at += 1
        if not self.next(-1) or self.next(-1) not in (wanted or self.next(-1)):
            raise Unreadable(f"{wanted or 'more'} expected")
        return self.next(-1)

    def next(self, offset: int = 0) -> str:
        return self.tokens[self.at + offset]

    def infix(self) -> tuple[int, str]:
        """(strength, kind) of what comes next, seen as an operator."""
        token, innermost = self.next(), self.brackets[-1]
        if token in ENDS or token == innermost == "|":
            return 0, ""
        if token in "|:" and innermost == r"\{":
            return 7, "builder"
        if token[0] == '"' and token not in INFIX:
            return 12, "unit"
        return INFIX.get(token, (14, "product"))

    def tree(self, level: int = 1):
        left = self.prefix(level)
        while self.infix()[0] >= level:
            strength, kind = self.infix()
            token = "" if kind == "product" else self.take()
            if kind == "unit":
                left = ("unit", left, unit(token))
            elif kind in ("fac", "deg"):
                left = (kind, left)
            else:
                left = joined(kind, token, left, self.tree(strength + (kind != "power")))
        return left

    def prefix(self, level: int = 16):
        token = self.take()
        if token in "+-±∓":
            tree = self.tree(max(level, 14))
            return {"+": tree, "-": negative(tree)}.get(token, (token, ZERO, tree))
        if token[0] in "0123456789.":  # a number with a base is a name of its own
            return ("var", token + self.script()) if self.next() == "_" else ("num", Fraction(token))
        if token[0] == '"':
            return ("unit", self.tree(13), unit(token)) if token in ('"$"', '"€"') else ("text", token)
        if token in CLOSING:
            return self.bracket(token)
        if token in "fghFGHPT" and self.next() == "(":
            return ("call", ("var", token), self.bracket(self.take()))
        if token[0].isalpha() or token in "∞∅" or token.startswith(r"\bb"):
            while self.next() in ("_", "'"):
                token += self.script() if self.next() == "_" else self.take()
            return (token,) if token in CONSTANTS else ("var", token)
        return self.command(token)

    def bracket(self, opening: str):
        self.brackets.append(opening)
        if len(self.brackets) > MAX_DEPTH:
            raise Unreadable("too deep")
        inner = self.tree() if self.next() not in ENDS else ("list",)
        self.brackets.pop()
        closing = self.take(CLOSING[opening])
        if inner[0] == "builder" and is_name(inner[1]):
            return inner[2]
        if opening in "([" and inner[0] in ("list", ";"):
            return ("tuple", opening + closing, *inner[1:])
        if opening == r"\{" and inner[0] != "list":
            return ("list", inner)
        return (WRAPS[opening], inner) if opening in WRAPS else inner

    def command(self, token: str):
        if token in (r"\frac", r"\binom"):
            return joined("/" if token == r"\frac" else "binomial", "", self.digit(), self.digit())
        if token == r"\sqrt":
            index = self.bracket(self.take()) if self.next() == "[" else TWO
            return ("power", self.prefix(), ("inv", index))
        if token[1:] in FUNCTIONS:
            return self.function(token[1:])
        if token[1:] not in OPAQUE:
            raise Unreadable(token)
        while self.next() in ("_", "^", "{"):  # \sum_{k=1}^n, \vec{v}: a name, never evaluated
            token += self.script()
        return ("var", token)

    def digit(self):
        r"""An argument of \frac: a group, one token, or the first digit of a number."""
        if self.next().isdigit() and len(self.next()) > 1:
            self.tokens[self.at:self.at + 1] = self.next()[0], self.next()[1:]
        return self.prefix()

    def script(self) -> str:
        """The raw text of a subscript, a limit or a group."""
        start, depth = self.at, 0
        if self.next() != "{":
            self.take()
        while True:
            depth += {"{": 1, "}": -1}.get(self.take(), 0)
            if depth <= 0:
                return re.sub('[{}" ]', "", "".join(self.tokens[start:self.at]))

    def function(self, name: str):
        """f^n_b x: without a bracket its argument is the product up to the next function."""
        exponent = base = None
        while self.next() in ("^", "_"):
            if self.take() == "^":
                exponent = self.prefix()
            else:
                base = self.prefix()
        if self.next() in ("(", "{"):
            tree = self.bracket(self.take())
        else:
            tree = self.tree(15)
            while self.infix()[1] == "product" and self.next()[1:] not in FUNCTIONS and (
                    self.next() not in "(["):
                tree = ("*", tree, self.tree(15))
        if exponent == ("num", Fraction(-1)):
            return ("a" + name, tree)
        base = ("num", Fraction(10)) if name == "lg" else base
        tree = ("*", ("ln", tree), ("inv", ("ln", base))) if base else (name, tree)
        return ("power", tree, exponent) if exponent else tree

def unit(token: str) -> str:
    words = token.strip('"').split()
    return " ".join(UNITS.get(word, word.rstrip("s") if len(word) > 3 else word) for word in words)

def negative(tree):
    if tree[0] == "num":
        return ("num", -tree[1])
    if tree[0] in ("unit", "deg"):
        return (tree[0], negative(tree[1]), *tree[2:])
    return ("*", ("num", Fraction(-1)), tree)

def joined(kind: str, token: str, left, right):
    if kind == "-" and right[0] != "list":
        kind, right = "+", negative(right)
    elif kind == "-":
        kind = "∖"
    elif kind in ("/", "product"):
        kind, right = "*", ("inv", right) if kind == "/" else right
    if kind == "rel":
        signs, *sides = left[1:] if left[0] == "rel" else ("", left)
        return ("rel", signs + token, *sides, right)
    many = kind in ("+", "*", "list", ";", "and", "or", "row", "cell", ":") and left[0] == kind
    return (*left, right) if many else (kind, left, right)

# ---- values: Fractions, or 100-digit mpmath numbers ----
def context():
    if not hasattr(LOCAL, "mp"):
        from mpmath.ctx_mp import MPContext  # late: most answers never need it
        LOCAL.mp = MPContext()
        LOCAL.mp.dps = 100
    return LOCAL.mp

def exact_power(base: Fraction, exponent: Fraction):
    """base ** exponent when it is rational for sure; None otherwise."""
    if exponent.denominator > 1 or abs(exponent) > MAX_POWER or base == 0 and exponent <= 0:
        return None
    if (base.numerator.bit_length() + base.denominator.bit_length()) * abs(exponent) > MAX_BITS:
        raise Unreadable("power too large")
    return base ** int(exponent)

def whole(function):
    """`function` for the integers 0..3000; None otherwise."""
    return lambda *values: Fraction(function(*map(int, values))) if all(
        value.denominator == 1 and 0 <= value <= 3000 for value in values) else None

def real_power(base, exponent):
    mp = LOCAL.mp
    if base == 0 or abs(exponent * mp.ln(base)) > MAX_ARGUMENT:
        raise Unreadable("power too large")
    root = mp.nint(mp.re(1 / exponent))  # a negative number has a real odd root
    odd = mp.re(base) < 0 and not mp.im(base) and root % 2 and abs(exponent * root - 1) < 1e-50
    return -mp.power(-base, exponent) if odd else mp.power(base, exponent)

EXACT = {"+": lambda *values: sum(values), "*": lambda *values: math.prod(values),
         "inv": lambda value: 1 / value, "power": exact_power, "fabs": abs,
         "fac": whole(math.factorial), "binomial": whole(math.comb), "unit": lambda value: value,
         "floor": lambda value: Fraction(math.floor(value)),
         "ceil": lambda value: Fraction(math.ceil(value))}
INEXACT = {kind: EXACT[kind] for kind in ("+", "*", "inv", "unit")} | {
    "power": real_power, "deg": lambda value: value * LOCAL.mp.pi / 180,
    "call": lambda name, value: LOCAL.mp.sin(value + name) + value**2 * name,
    "π": lambda: +LOCAL.mp.pi, "e": lambda: +LOCAL.mp.e, "i": lambda: LOCAL.mp.j,
    "∞": lambda: LOCAL.mp.inf}
CONSTANTS = set("πei∞")
NUMERIC = FUNCTIONS | set("fac binomial floor ceil".split())

def sample(name: str, point: int) -> Fraction:
    """A variable's fixed value at point 0..3: in (0, 1), in (1, 4), negative, of mixed sign."""
    seed = zlib.crc32(f"{name} {point}".encode())
    share = Fraction(seed % 996 + 1, 997)
    return (share, 1 + 3 * share, -2 * share - Fraction(1, 2),
            (3 * share + Fraction(1, 3)) * (1 if seed & 4096 else -1))[point]

def evaluate(tree, point: int):
    """The value at a sample point. Raises Unreadable or ArithmeticError where there is none."""
    kind, *parts = tree
    if kind == "num":
        return parts[0]
    if kind == "var":
        return sample(parts[0], point)
    values = [evaluate(part, point) for part in parts if isinstance(part, tuple)]
    if kind in EXACT and all(isinstance(value, Fraction) for value in values):
        if (result := EXACT[kind](*values)) is not None:
            return result
    mp = context()
    values = [mp.convert(value) for value in values]
    if kind == "+":  # what is left after a cancellation is noise of this size
        LOCAL.scale = max(LOCAL.scale, *map(abs, values))
    if kind in INEXACT:
        return INEXACT[kind](*values)
    if kind not in NUMERIC or kind != "ln" and any(abs(value) > MAX_ARGUMENT for value in values):
        raise Unreadable(kind)
    return getattr(mp, kind)(*values)

def variables(tree) -> set[str]:
    if tree[0] == "var":
        return {tree[1]}
    return set().union(*(variables(part) for part in tree[1:] if isinstance(part, tuple)))

def values_of(tree) -> list:
    """The values at the sample points (at one, without variables); None where there is none."""
    found = []
    for point in range(4 if variables(tree) else 1):
        try:
            value = evaluate(tree, point)
            found.append(value if value == value else None)
        except (Unreadable, ArithmeticError):
            found.append(None)
    return found

def near(a, b) -> bool:
    """Equal: exactly for Fractions, else to 60 digits of the larger, or of the terms summed."""
    if a == b or isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    a, b = context().convert(a), LOCAL.mp.convert(b)
    error = LOCAL.mp.mpf(10) ** -60 * max(abs(a), abs(b), LOCAL.scale)
    return abs(a - b) <= error < LOCAL.mp.inf

def is_real(value) -> bool:
    return isinstance(value, Fraction) or abs(LOCAL.mp.im(value)) <= 1e-60 * abs(value)

@functools.lru_cache(maxsize=4096)
def equal(a, b) -> bool:
    """Equal at every sample point where both are real, and at two of the points at least."""
    if variables(a) != variables(b):
        return False
    LOCAL.scale = 0
    pairs = [(x, y) for x, y in zip(values_of(a), values_of(b)) if x is not None and y is not None]
    agreed = [near(x, y) for x, y in pairs]
    decisive = all(yes or not (is_real(x) and is_real(y)) for yes, (x, y) in zip(agreed, pairs))
    return decisive and sum(agreed) >= (2 if variables(a) else 1)

def ratio(a, b):
    """c when a = c * b for one constant c != 0 at the sample points, else None."""
    LOCAL.scale = 0
    if variables(a) != variables(b) or not variables(a):
        return None
    ratios = [evaluate(("*", ("num", x), ("inv", ("num", y))), 0) for x, y in zip(values_of(a), values_of(b))
              if x is not None and y is not None and not near(x, ZERO[1]) and not near(y, ZERO[1])]
    return ratios[0] if len(ratios) > 2 and all(near(c, ratios[0]) for c in ratios) else None

# ---- answers: what a tree means, and when two mean the same ----
def is_name(tree) -> bool:
    """x, x_1, f(x), AB, AB/CD, V_1:V_2, (x, y), or words: what may stand before a "= value"."""
    kind, *parts = tree
    if kind in ("*", "inv", ":"):
        return all(is_name(part) and (part[0] in ("inv", "*") or part[0] == "var" and (
            kind == ":" or part[1].isupper())) for part in parts)
    if kind == "tuple":
        return all(map(is_name, parts[1:]))
    return kind in ("var", "call", "text", "e", "i")

def settle(tree):
    """The tree as an answer: names set apart, lists opened, ± written out."""
    kind, *parts = tree
    if kind not in STRUCTURES:
        plus, minus = signed(tree, 1), signed(tree, -1)
        return tree if plus == minus else ("list", plus, minus)
    parts = [settle(part) if isinstance(part, tuple) else part for part in parts]
    if kind == ";":  # a=1,b=2; a=3,b=4
        parts = [("tuple", "()", *part[1:]) if part[0] == "list" else part for part in parts]
    if kind in ("and", "or") and all(part[0] in REGIONS for part in parts):
        return functools.reduce(lambda a, b: ("∪" if kind == "or" else "∩", a, b), parts)
    if kind in ("list", ";", "and", "or"):
        parts = [item for part in parts for item in (part[1:] if part[0] == "list" else [part])]
        if len(parts) > MAX_ITEMS:
            raise Unreadable("too many items")
        return ("list", *parts)
    if kind == "rel":
        return relation(*parts)
    if kind == ":" and len(parts) == 2 and is_name(parts[0]) and not is_name(parts[1]):
        return ("named", parts[0], parts[1], None)
    return (kind, *parts)

STRUCTURES = {"list", ";", "and", "or", "tuple", "∪", "∩", "∖", "row", "cell", "matrix", "rel", ":"}
REGIONS = {"rel", "∪", "∩", "∖", "tuple"}

def signed(tree, sign: int):
    kind, *parts = tree
    parts = [signed(part, sign) if isinstance(part, tuple) else part for part in parts]
    if kind in "±∓":
        return ("+", parts[0], parts[1] if (kind == "±") == (sign > 0) else negative(parts[1]))
    return (kind, *parts)

def relation(signs: str, *sides):
    """name = value, an equation (as left - right), or a chain of inequalities."""
    name = None
    while len(sides) > 1 and signs[0] in "=∈≈" and is_name(sides[0]) and set(signs) <= set("=∈≈"):
        whole = ("+", sides[0], negative(sides[1])) if signs == "=" else None
        name, signs, sides = sides[0], signs[1:], sides[1:]
    if "≈" in signs:
        signs, sides = signs[:signs.index("≈")], sides[:signs.index("≈") + 1]
    if not signs:
        return ("named", name, sides[0], whole) if name else sides[0]
    if signs == "=":
        whole = ("+", sides[0], negative(sides[1]))
        return ("named", sides[1], sides[0], whole) if is_name(sides[1]) else ("equation", whole)
    return ("rel", signs, *sides)

def same(a, b) -> bool:
    """Do two settled trees mean the same answer? Symmetric."""
    if a == b:
        return True
    if not (isinstance(a, tuple) and isinstance(b, tuple)):
        return False
    (kind_a, *x), (kind_b, *y) = a, b
    kinds = {kind_a, kind_b}
    if kinds & {"named", "equation"}:
        equations = [t[-1] if t[0] in ("named", "equation") else None for t in (a, b)]
        if all(equations) and ratio(*equations) is not None:
            return True
        bases = {base_name(t[1]) for t in (a, b) if t[0] == "named"} - {""}
        values = [t[2] if t[0] == "named" else t for t in (a, b)]
        return "equation" not in kinds and len(bases) < 2 and same(*values)
    if kinds & {"rel", "∪", "∩", "∖"} or REALS in (a, b):
        return same_chain(a, b) or same_region(a, b)
    if kinds == {"list"}:
        return same_set(x, list(y))
    for t, other in ((a, b), (b, a)):
        if t[0] == "list" and len(t) == 2:
            return same(t[1], other)
    if kinds == {"list", "tuple"}:
        (_, *x), (_, brackets, *y) = sorted((a, b), key=lambda t: t[0])
        return brackets == "()" and len(x) == len(y) and all(map(same, x, y))
    if kinds & {"tuple", "matrix", "row", "cell", "list"}:
        return kind_a == kind_b and len(x) == len(y) and all(map(same, x, y))
    if kinds == {":"}:
        return same_ratio(x, y)
    return same_value(*(joined("/", "", *t[1:]) if t[0] == ":" and len(t) == 3 else t for t in (a, b)))

def base_name(tree) -> str:
    return re.sub(r"_.*|'", "", tree[1] if tree[0] == "var" else "").lower()

def same_set(left, right) -> bool:
    for item in left:
        match = next((other for other in right if same(item, other)), None)
        if match is None:
            return False
        right.remove(match)
    return not right

def same_ratio(x, y) -> bool:
    clock = all(t[0] == "num" and t[1] >= 10 for t in (*x[1:], *y[1:]))  # 4:30 is not 2:15
    return len(x) == len(y) and not clock and not any(equal(t, ZERO) for t in (*x, *y)) and all(
        equal(("*", x[0], q), ("*", y[0], p)) for p, q in zip(x[1:], y[1:]))

def same_value(a, b) -> bool:
    units = [t[2] if t[0] == "unit" else "°" if t[0] == "deg" else "" for t in (a, b)]
    bare = [t[1] if name else t for t, name in zip((a, b), units)]
    if all(units) and units[0] != units[1]:
        return False
    if equal(*bare) or printed(*bare) or printed(*bare[::-1]):
        return True
    scale = {"%": ("num", Fraction(1, 100)), "°": ("deg", ("num", Fraction(1)))}
    scaled = [("*", t, scale[name]) if name in scale else t for t, name in zip(bare, units)]
    return not all(units) and equal(*scaled)

def printed(literal, tree) -> bool:
    """Is the literal a float's printout (15 digits or more) of the value of the tree?"""
    if literal[0] != "num" or literal[1].denominator < 10**13 or variables(tree):
        return False
    value = values_of(tree)[0]
    return value is not None and is_real(value) and abs(
        context().convert(value) - LOCAL.mp.convert(literal[1])) < 1 / literal[1].denominator

def same_chain(a, b) -> bool:
    if not a[0] == b[0] == "rel" or len(a) != len(b):
        return False
    (_, signs, *sides), turned = a, ("rel", b[1].translate(FLIPPED)[::-1], *b[:1:-1])
    if any(signs == other[1] and all(map(equal, sides, other[2:])) for other in (b, turned)):
        return True
    c = ratio(*(("+", t[2], negative(t[3])) for t in (a, b))) if len(a) == 4 else None
    return c is not None and is_real(c) and b[1] == (a[1] if c > 0 else a[1].translate(FLIPPED))

def number(tree):
    """The real value of a tree without variables; raises Unreadable."""
    value = context().convert(evaluate(tree, 0))
    if variables(tree) or not is_real(value) or value != value:
        raise Unreadable("not a number")
    return value.real

def ends(tree, names: set) -> list:
    """The numbers in a region of the real line; its variable is added to `names`."""
    kind, *parts = tree
    if kind == "tuple" and (len(parts) != 3 or number(parts[1]) >= number(parts[2])):
        raise Unreadable("not an interval")
    if kind in REGIONS or kind in ("list", "named"):
        parts = [part for part in parts if isinstance(part, tuple)]
        return [end for part in parts for end in ends(part, names)]
    if kind in ("var", "call"):
        names |= {tree} - {REALS}
        return []
    return [number(tree)] if abs(number(tree)) < LOCAL.mp.inf else []

def inside(tree, x) -> bool:
    kind, *parts = tree
    if kind in "∪∩∖":
        left, right = (inside(part, x) for part in parts)
        return left or right if kind == "∪" else left and right == (kind == "∩")
    if kind == "rel":
        sides = [x if is_name(side) else number(side) for side in parts[1:]]
        return all(map(holds, sides, sides[1:], parts[0]))
    if kind == "tuple":
        brackets, low, high = parts[0], number(parts[1]), number(parts[2])
        return holds(low, x, "<≤"[brackets[0] == "["]) and holds(x, high, "<≤"[brackets[1] == "]"])
    return tree == REALS or kind == "list" and any(near(number(part), x) for part in parts)

def holds(left, right, sign: str) -> bool:
    if near(left, right):
        return sign in "=≤≥"
    return sign == "≠" or left < right and sign in "<≤" or left > right and sign in ">≥"

def same_region(a, b) -> bool:
    """Do two regions of the line agree at their ends, between them and outside?"""
    LOCAL.scale = 0
    names = set()
    marks = sorted(ends(a, names) + ends(b, names)) or [0]
    if len(names) > 1:
        return False
    tests = [marks[0] - 1, *marks, marks[-1] + 1, *((x + y) / 2 for x, y in zip(marks, marks[1:]))]
    return all(inside(a, x) == inside(b, x) for x in tests)

# ---- the final answer in a response ----
def boxed(text: str) -> str | None:
    """The last box; or all of the last boxes with only "," or "and" between them."""
    contents, end = [], len(text)
    while (start := text.rfind("\\boxed", 0, end)) >= 0 and len(contents) <= MAX_ITEMS:
        opening = re.compile(r"\\boxed\s*\{").match(text, start)
        close = opening and closing_brace(text, opening.end() - 1)
        between = re.sub(r"\\text|\\quad|\\[()\[\] ,;]|[${}\s.]", "", text[close or 0:end][:80])
        if contents and between in ("or", ",or"):
            return None
        if not close or contents and between not in ("and", ",and", ",", ";"):
            break
        contents.insert(0, text[opening.end():close - 1].rstrip("\\"))
        end = start
    return ",".join(contents) or None

def closing_brace(text: str, start: int) -> int:
    """The index after the brace that closes text[start], or 0. Linear in the text."""
    for pattern in (r"\\.|[{}]", r"[{}]"):  # then once more with \{ taken for a bare brace
        depth = 0
        for match in re.compile(pattern, re.DOTALL).finditer(text, start):
            depth += {"{": 1, "}": -1}.get(match[0], 0)
            if depth == 0:
                return match.end()
    return 0

def stated(text: str) -> str | None:
    """What follows the last of the usual final-answer phrases, up to the end of its sentence."""
    lower = text.lower()
    at = max(lower.rfind(mark) + len(mark) if mark in lower else 0 for mark in PHRASES)
    line = text[at:at + MAX_CHARS].lstrip(" :*\n").partition("\n")[0].partition("<|")[0]
    return re.split(r"\.\s", line + " ")[0].strip(" *") or None if at else None

PHRASES = ("####", "answer is", "answer:", "answer:**")

def extract_answer(response: str) -> str | None:
    """The one final answer in `response`, or None.

    Only what follows the last </think> counts; a <think> that is never closed has no answer. In
    that part: the <answer> block when there is one (two different blocks are no answer), in it
    the last \\boxed{}, else the whole block; without a block the last \\boxed{}, else the usual
    phrases. An unclosed last box is no answer. Boxes joined by "," or "and" are one set; by "or"
    they are a hedge, which is no answer.
    """
    _, think, text = response.rpartition("</think>")
    if not think and "<think>" in response:
        return None
    blocks = [block.partition("</answer>") for block in text.split("<answer>")[1:]]
    contents = {content.strip() for content, tag, _ in blocks if tag}
    if len(contents) > 1 or len(blocks) > 1 and not all(tag for _, tag, _ in blocks):
        return None
    text = contents.pop() if contents else text
    return boxed(text) if "\\boxed" in text else stated(text) or (text if blocks else None)

# ---- rewards ----
REFUSED = (Unreadable, RecursionError, ValueError, ArithmeticError, TypeError)

@functools.lru_cache(maxsize=4096)
def tokenise(text: str) -> tuple[str, ...]:
    """Canonical tokens of an answer; raises Unreadable over the limit of size."""
    if len(text) > MAX_CHARS:
        raise Unreadable("too long")
    for mark, run in (("^", SMALL[:13]), ("_", SMALL[13:])):
        text = re.sub(f"[{run}]+", lambda match: mark + "{%s}" % "".join(
            DIGITS[SMALL.index(char)] for char in match[0]), text)
    text = unicodedata.normalize("NFKC", text.strip().translate(UNICODE))
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    return tuple(TOKEN.findall(text))

@functools.lru_cache(maxsize=4096)
def readings(text: str) -> tuple:
    """The settled trees an answer may stand for: 1,234 is a number or, in doubt, a list."""
    found = []
    joined = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    for variant in {text: 0} if re.search(r"[(\[]|\\\{", text) else {joined: 0, text: 0}:
        try:
            reader = Reader(tokenise(variant))
            found.append(settle(reader.tree()))
            if reader.next():
                found.pop()
        except REFUSED:
            continue
    return tuple(found)

def same_text(a: str, b: str) -> bool:
    """The same string: spaces do not count, nor does the case of letters where there are words."""
    a, b = ("".join(tokenise(text)) for text in (a, b))
    if '"' in a + b or a.isalpha() and len(a) > 2:
        a, b = a.lower(), b.lower()
    a, b = (re.sub('[" ]', "", text) for text in (a, b))
    return a == b and any(char.isalnum() or char == "∞" for char in a)

def parse_gold(gold: str) -> str | None:
    """Why `gold` cannot be compared as mathematics or as words, or None when it can."""
    if not gold.strip() or len(gold) > MAX_CHARS:
        return "empty" if not gold.strip() else f"longer than {MAX_CHARS} characters"
    if readings(gold) or re.sub(r"\\text|[${}.\s]", "", gold).isalpha():
        return None
    return "not read as mathematics: compared as text"

def accuracy_reward(response: str, gold: str) -> float:
    """1.0 when the final answer of `response` (see extract_answer) equals `gold`, else 0.0.

    One answer has to be given: an unordered list or a set is right when it has all the elements
    of the gold and no others, an ordered tuple when the elements agree in order; listing
    candidates, "A or B" for a gold of B, and two different <answer> blocks earn nothing. Values
    are compared exactly; units, degree and percent signs are ignored when one side has none.
    """
    answer, gold = (extract_answer(response) or "").strip(), gold.strip()
    if not answer or not gold:
        return 0.0
    if SIMPLE.match(answer) and SIMPLE.match(gold):
        return float(Fraction(answer) == Fraction(gold))
    if max(len(answer), len(gold)) > MAX_CHARS:
        return float(answer == gold)
    try:
        if same_text(answer, gold):
            return 1.0
    except REFUSED:
        return 0.0
    for a in readings(answer):
        for b in readings(gold):
            try:
                if same(a, b):
                    return 1.0
            except REFUSED:
                continue
    return 0.0

def format_reward(response: str, gold: str = "") -> float:
    """1.0 for exactly `<think>..</think><answer>..</answer>` with two non-blank bodies, else 0.0."""
    text = response.strip()
    if any(text.count(tag) != 1 for tag in TAGS):
        return 0.0
    before, think, between, answer, after = re.split("|".join(TAGS), text)
    in_order = sorted(TAGS, key=text.find) == list(TAGS)
    return float(in_order and not (before or between.strip() or after)
                 and bool(think.strip()) and bool(answer.strip()))


REWARDS = {"accuracy": accuracy_reward, "format": format_reward}


def resolve_reward(name: str):
    """The function f(response, gold) -> float called `name`.

    `name` is a key of REWARDS, "path/to/file.py:function" or "module:function".
    Raises ValueError when there is no such function.
    """
    if name in REWARDS:
        return REWARDS[name]
    source, _, function = name.rpartition(":")
    try:
        if source.endswith(".py"):
            spec = importlib.util.spec_from_file_location("user_reward", source)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
        return getattr(module, function)
    except (ImportError, OSError, AttributeError, ValueError) as error:
        known = ", ".join(REWARDS)
        raise ValueError(f"no reward {name!r}: use one of {known}, or file.py:function "
                         f"({error})") from error


def worker_loop(reward_funcs: list[str], memory_gb: float) -> None:
    """A worker's life: a batch per line on stdin, one line per text on stdout, until EOF."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a user's function prints must not mix with the replies
    if memory_gb:
        limit = int(memory_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        functions = [resolve_reward(name) for name in reward_funcs]
    except Exception as error:
        print(json.dumps(str(error)), file=replies, flush=True)
        return
    print(json.dumps("ready"), file=replies, flush=True)
    for line in sys.stdin:
        texts, gold = json.loads(line)
        for text in texts:
            try:
                rewards = [float(function(text, gold)) for function in functions]
                reply = rewards if all(map(math.isfinite, rewards)) else None
            except Exception:
                reply = None
            print(json.dumps(reply), file=replies, flush=True)


class Worker:
    """One process and its pipes; used by one thread of the pool only."""

    def __init__(self, command: list[str]):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.buffer = b""
        hello = self.reply(60.0)
        if hello != "ready":
            self.kill()
            raise ValueError(hello or "a reward worker did not start")

    def send(self, texts: list[str], gold: str) -> None:
        self.process.stdin.write(json.dumps([texts, gold]).encode() + b"\n")
        self.process.stdin.flush()

    def reply(self, timeout: float):
        """The next reply. Raises TimeoutError, or EOFError when the process is gone."""
        while b"\n" not in self.buffer:
            if not select.select([self.process.stdout], [], [], timeout)[0]:
                raise TimeoutError
            chunk = os.read(self.process.stdout.fileno(), 1 << 16)
            if not chunk:
                raise EOFError
            self.buffer += chunk
        line, _, self.buffer = self.buffer.partition(b"\n")
        return json.loads(line)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        try:
            self.process.stdin.close()
        except OSError:  # unsent bytes for a process that is gone
            pass


class VerifierPool:
    """Scores groups of texts in worker processes; nothing that a text does reaches the caller.

    A text that takes longer than `timeout` seconds costs its worker its life and scores 0. A
    worker that dies is replaced and the text it was at is tried once more, then scores 0. Both
    are counted in `stats`. Rewards are F floats per text, in the order of `reward_funcs`.
    Raises ValueError at start when a reward cannot be found.
    """

    def __init__(self, reward_funcs: list[str], workers: int, timeout: float = 5.0,
                 memory_gb: float = 8.0):
        self.command = [sys.executable, os.path.abspath(__file__), "--worker",
                        json.dumps([reward_funcs, memory_gb])]
        self.zeros = [0.0] * len(reward_funcs)
        self.timeout = timeout
        self.stats = {"timeouts": 0, "crashes": 0}
        self.pending = 0  # groups submitted and not yet returned by poll
        self.lock = threading.Lock()
        self.jobs = queue.SimpleQueue()
        self.done = queue.SimpleQueue()
        self.closed = False
        started = [Worker(self.command) for _ in range(max(1, workers))]
        self.threads = [threading.Thread(target=self._serve, args=(worker,), daemon=True)
                        for worker in started]
        for thread in self.threads:
            thread.start()

    def submit(self, key, texts: list[str], gold: str) -> None:
        """Queue the G `texts` of one problem; returns at once."""
        self.pending += 1
        self.jobs.put((key, list(texts), gold))

    def poll(self, wait: bool) -> list[tuple]:
        """(key, rewards_GF) of the groups that are ready; with `wait`, of all submitted ones."""
        ready = []
        while self.pending and (wait or not self.done.empty()):
            ready.append(self.done.get())
            self.pending -= 1
        return ready

    def close(self) -> None:
        """Stop the workers; what is still queued scores 0. Can be called twice."""
        self.closed = True
        for _ in self.threads:
            self.jobs.put(None)
        for thread in self.threads:
            thread.join()
        self.threads = []

    def _serve(self, worker) -> None:
        for key, texts, gold in iter(self.jobs.get, None):
            unique = list(dict.fromkeys(texts))
            rewards = {}
            retried = None
            while len(rewards) < len(unique) and not self.closed:
                waiting = unique[len(rewards):]
                try:
                    worker = worker or Worker(self.command)
                    worker.send(waiting, gold)
                    for text in waiting:
                        reply = worker.reply(self.timeout)
                        rewards[text] = self._count("crashes") if reply is None else reply
                except (TimeoutError, EOFError, OSError, ValueError) as error:
                    if worker:
                        worker.kill()
                    worker = None
                    stuck = unique[len(rewards)]
                    if isinstance(error, TimeoutError) or stuck == retried:
                        late = isinstance(error, TimeoutError)
                        rewards[stuck] = self._count("timeouts" if late else "crashes")
                    retried = stuck
            self.done.put((key, [rewards.get(text, self.zeros) for text in texts]))
        if worker:
            worker.kill()

    def _count(self, what: str) -> list[float]:
        with self.lock:
            self.stats[what] += 1
        return self.zeros


if __name__ == "__main__" and sys.argv[1:2] == ["--worker"]:
    worker_loop(*json.loads(sys.argv[2]))

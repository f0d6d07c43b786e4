r"""Rewards for mathematical answers, and a pool of processes that scores them.

A recursive-descent reader turns model text into trees of exact numbers; nothing is ever handed to
eval, sympify or parse_expr. Structure (set, tuple, interval, equation, matrix) is compared before
value: Fractions while they can be, then 100-digit mpmath numbers; expressions are equal when they
agree at fixed sample points. Sizes are checked before any arithmetic; what cannot be read is
compared as text; in doubt the reward is 0. A forker adds to REWARDS, or names a function
f(response, gold) -> float in the config as "path/to/file.py:function".
"""
import functools
import importlib.util
import json
import math
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import unicodedata
from fractions import Fraction
from multiprocessing.connection import Connection, Pipe

from mpmath.ctx_mp import MPContext

MAX_CHARS, MAX_DEPTH, MAX_ITEMS = 3000, 60, 60  # beyond: compared as strings only
MAX_BITS, MAX_POWER, MAX_ARGUMENT = 60_000, 4000, 10**5  # exact powers; mpmath's arguments

def table(rows: str) -> dict[str, str]:
    """{word: first word of its row} for rows "new word word; new word"."""
    return {word: row.split()[0] for row in rows.split(";") for word in row.split()[1:]}

SUPER, SUB = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "₀₁₂₃₄₅₆₇₈₉"
SMALL = str.maketrans(SUPER + SUB, "0123456789+-n0123456789")
UNICODE = str.maketrans(dict(zip("−–—·×⋅∗÷′’‘⟨⟩≦≧", "---****/'''()≤≥"))
                        | {"√": r"\sqrt ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}"}
                        | {char: f" {char}" for char in "½⅓⅔¼¾⅕⅛"})
GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau phi chi"
    " psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega ell hbar pi infty infinity")
SYNONYMS = dict(zip(GREEK.split(), "αβγδεζηθικλμνξρστφχψωΓΔΘΛΞΣΦΨΩℓℏπ∞∞")) | table(
    r"\frac dfrac tfrac cfrac; ≤ le leq leqslant leqq; ≥ ge geq geqslant geqq; < lt; > gt; ≠ ne"
    r" neq; ∈ in; ∪ cup bigcup; ∩ cap; ∖ setminus backslash; * cdot times ast; / div; ± pm; ∓ mp;"
    r" ≈ approx simeq; : colon; | mid vert lvert rvert; \{ lbrace; \} rbrace; ( langle; ) rangle;"
    r' ∅ emptyset varnothing; ° degree; "and" land; "or" lor; \ln log; \binom dbinom tbinom; \fabs'
    r" abs; \asin arcsin; \acos arccos; \atan arctan; \asec arcsec; \acsc arccsc; \acot arccot;"
    r" … ldots dots cdots; ε varepsilon; φ varphi") | dict.fromkeys(
    ("left right middle big Big bigg Bigg bigl bigr Bigl Bigr displaystyle textstyle limits quad"
     " qquad mathbf boldsymbol bm mathit mathcal mathsf rm bf it angle triangle").split(), "")
UNITS = table(
    "% percent percents pct; ° degrees degree deg; $ dollars dollar usd; cent cents; mm mm; ft ft"
    " feet foot; cm cm centimeters centimetres centimeter; m meters metres meter; km km kilometers;"
    " in in inches inch; kg kg; hour hours hrs hr; minute minutes min mins; second seconds sec;"
    " unit units; day day days; mile miles mi; pound pounds lbs")
FUNCTIONS = set("sin cos tan sec csc cot sinh cosh tanh asin acos atan asec acsc acot ln exp"
                " fabs".split())
PLAIN = FUNCTIONS | set("sqrt log pi abs infty infinity arcsin arccos arctan".split())

def quote(run: re.Match, always: bool = False) -> str:
    """A run of letters: a function or constant, a word in quotes, or letters to be multiplied."""
    word, before = run[0], run.string[:run.start()].rstrip()[-1:]
    is_unit = word.lower() in UNITS and before and before in '0123456789})"'
    if word in PLAIN:
        return f"\\{word} "
    is_word = len(word) > 3 or word in ("or", "and", "to", "not", "the", "for", "no", "No")
    return f' "{word.lower()}" ' if always or is_unit or is_word else word

def quote_text(group: re.Match) -> str:
    r"""The inside of a \text{}: words in quotes; a lone letter after a number is a unit."""
    content = WORD.sub(functools.partial(quote, always=True), group[1]).strip()
    before = group.string[:group.start()].rstrip()[-1:]
    is_unit = re.fullmatch("[A-Za-df-hj-z](/[a-z]+)?", content)
    return f' "{content}" ' if is_unit and before and before in "0123456789})" else f" {content} "

WORD = re.compile(r"""(?<![\\A-Za-z"])[A-Za-z]{2,}""")
REWRITES = tuple((re.compile(pattern), new) for pattern, new in (
    (r"(?<!\\)\\[()\[\]]|(?<!\\)\$|\*\*(?=[A-Z])|(?<!\\)\\$", " "),
    (r"-?\s*\\\$", lambda run: ' "$" ' + run[0][:-2]), (r"[€£]", ' "€" '), (r"\b(?:np|math)\.", ""),
    (r"^\s*(?:=|≈|\\approx)", ""), (r"\*\*", "^"), (r"<=|=<", "≤"), (r">=", "≥"),
    (r"(?<!\d)(\d+)⁄(\d+)", r"\\frac{\1}{\2}"),
    (r"(?<=\d)\s*(?:\\[,!]\s*)+(?=\d)", ""),  # 5\,040, then 5{,}040 and 5,\!040
    (r"(?<=\d)\s*(?:\{\s*,\s*\}|,\s*\\!)\s*(?=\d{3}(?!\d))", ""),
    (r"(?<!\\)\\[,;:!\s]|~", " "), (r"[\s.,;]+$", ""),
    (r"\\?%", ' "%" '), (r"\^\s*\{?\s*\\circ\s*\}?", "°"),
    (r"\^\s*\{?\s*\\prime\s*\}?", "'"), (r"\\mathbb\s*\{?\s*([A-Z])\s*\}?", r" \\bb\1 "),
    (r"\\begin\s*\{(?:[pb]|small)?(?:matrix|array)\}\s*(?:\{[clr|\s]*\})?", " ⟦ "),
    (r"(?:\\\\\s*)?\\end\s*\{(?:[pb]|small)?(?:matrix|array)\}", " ⟧ "),
    (r"\\operatorname\*?\s*\{\s*([a-z]+)\s*\}", r"\\\1 "), (r"\b([ap])\.\s?m\b\.?", r'"\1m"'),
    (r"(?:(?<=1)st|(?<=2)nd|(?<=3)rd|(?<=\d)th)\b|\^\s*\{\s*\\\w+\{(?:st|nd|rd|th)\}\s*\}", ""),
    (r"(?<=\d)[eE]([-+]?\d+)\b", r"*10^{\1}"), (r"(\\[dtc]?frac)\s*(\d)", r"\1{\2}"),
    (r"(\\[dtc]?frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),
    (r"(?<![\d.}^_/])(\d+)\s*(\\[dtc]?frac\s*\{\d+\}\s*\{\d+\})", r"(\1+\2)"),  # mixed numbers
    (r"(?<![\d.}^_/])(\d+)\s+(\d+)\s*/\s*(\d+)", r"(\1+\2/\3)"),
    (r"(?<!\d)(\d+)\.(\d*)\\(?:overline|bar|dot)\s*\{(\d+)\}", lambda run: "(%s)" % (
        Fraction(int(run[3]), 10 ** len(run[2]) * (10 ** len(run[3]) - 1))
        + Fraction(f"{run[1]}.{run[2]}0"))),
    (r"(?<![_^]\d)(?<=\d)\s+(?=[\d.])", " ␣ "),
    (r"\\(?:text(?:bf|it|rm|normal|tt|sf|up)?|mathrm|mbox|emph)\s*\{([^{}]*)\}", quote_text),
    (WORD.pattern, quote), (r"\\([A-Za-z]+)", lambda run: SYNONYMS.get(run[1], run[0] + " ")),
    (r'"(?:only|option|choice|answer|is|the|approximately|about|exactly)"', " "),
    (r'"(?:for|where|if|when|with)"[^,;]*?(?=,|;|"and"|$)', " "), (r',\s*"and"', ' "and"'),
    (r'"([a-z]+)"\s*\^\s*\{?\s*(\d)\s*\}?', r'"\1\2"'), (r'(?<=[a-z\d])(?<!"or)(?<!"and)(?<!"to)'
     r'"\s*(/?)\s*"(?!or"|and"|to")(?=[a-z])', r" \1")))
OPAQUE = (r"\\(?:bb[A-Z]|(?:d?dot|vec|bar|hat|tilde|overline)\b\s*(?:\{[^{}]*\}|\w)"
          r"|(?:sum|prod|int|lim)(?![a-z])(?:\s*[_^]\s*(?:\{[^{}]*\}|\w))*)")
TOKEN = re.compile(r'"[^"]*"|' + OPAQUE + r"|\\[A-Za-z]+|\\.|(?:\d+(?:\.\d*)?|\.\d+|[^\W\d_])"
                   r"(?:\s*_\s*(?:\{[^{}]*\}|\d+|[^\W\d_]))?'*|\S")
INFIX = {token: (strength, kind) for strength, kind, *tokens in (
    (1, "row", r"\\"), (2, "cell", "&"), (3, "or", '"or"'), (4, "and", '"and"'), (5, ";", ";"),
    (6, "list", ","), (8, "/", r"\over"), (8, "binomial", r"\choose"), (9, "rel", *"=<>≤≥≠∈≈"),
    *((10, sign, sign) for sign in "∪∩∖"), (11, ":", ":", '"to"'), (14, "*", "*"), (14, "/", "/"),
    *((13, sign, sign) for sign in "+-±∓"), (16, "power", "^"), (17, "fac", "!"), (17, "deg", "°"))
    for token in tokens}
CLOSING = {"(": ")]", "[": ")]", "{": "}", r"\{": r"\}", "⟦": "⟧", "|": "|",
           r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
WRAPS = {"|": "fabs", r"\lfloor": "floor", r"\lceil": "ceil", "⟦": "matrix"}
ENDS = {"", *")]}⟧", r"\}", r"\rfloor", r"\rceil"}

def tokenise(text: str) -> list[str]:
    for mark, run in (("^", SUPER), ("_", SUB)):
        text = re.sub(f"[{run}]+", lambda small: mark + "{%s}" % small[0].translate(SMALL), text)
    text = unicodedata.normalize("NFKC", text.strip().translate(UNICODE))
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    return TOKEN.findall(text)

class Unreadable(Exception):
    """The text is not mathematics that the reader knows, or goes over one of the limits."""

class Reader:
    """Precedence climbing over tokens. A tree is (kind, *parts), its leaves ("num", Fraction)."""

    def __init__(self, tokens: list[str]):
        self.tokens, self.brackets = ["", *reversed(tokens)], [""]

    def take(self, wanted: str = "") -> str:
        token = self.tokens.pop()
        if not token or token not in (wanted or token):
            raise Unreadable(f"{wanted or 'more'} expected")
        return token

    def infix(self) -> tuple[int, str]:
        """(strength, kind) of the next token as an operator; two factors in a row are a product."""
        token, innermost = self.tokens[-1], self.brackets[-1]
        in_function = innermost == "function"
        if token in ENDS or token == innermost == "|" or in_function and (
                token in "([" or token[1:] in FUNCTIONS):
            return 0, ""
        if token in "|:" and innermost == r"\{":
            return 7, "builder"
        default = (12, "unit") if token[0] == '"' else (14 + in_function, "product")
        return INFIX.get(token, default)

    def tree(self, level: int = 1):
        left = self.prefix(level)
        while self.infix()[0] >= level:
            strength, kind = self.infix()
            token = "" if kind == "product" else self.take()
            right = kind not in ("unit", "fac", "deg") and self.tree(strength + (kind != "power"))
            left = joined(kind, left, right, token)
        return left

    def prefix(self, level: int = 16):
        token = self.take()
        if token in "+-±∓":
            tree = self.tree(max(level, 14))
            return {"+": tree, "-": negative(tree)}.get(token, (token, ZERO, tree))
        if token in CLOSING:
            return self.bracket(token)
        if token in (r"\frac", r"\binom"):
            return joined("/" if token == r"\frac" else "binomial", self.prefix(), self.prefix())
        if token == r"\sqrt":
            index = self.bracket(self.take()) if self.tokens[-1] == "[" else TWO
            return ("power", self.prefix(), ("inv", index))
        if token[1:] in FUNCTIONS:
            return self.function(token[1:])
        if token in ('"$"', '"€"'):
            return joined("unit", self.tree(13), None, token)
        if token in "fghFGHPT" and self.tokens[-1] == "(":
            return ("call", ("var", token), self.bracket(self.take()))
        if token.replace(".", "", 1).isdecimal():
            return ("num", Fraction(token))
        if token in CONSTANTS or token[0] == '"' and token[1].isalpha():
            return (token,) if token in CONSTANTS else ("text", token)
        if not (token[0].isalnum() or token == "∅" or re.match(OPAQUE, token)):
            raise Unreadable(token)
        return ("var", re.sub('[{}" ]', "", token))  # a name, with its subscript or its base

    def bracket(self, opening: str):
        self.brackets.append(opening)
        if len(self.brackets) > MAX_DEPTH:
            raise Unreadable("too deep")
        inner = self.tree() if self.tokens[-1] not in ENDS else ("list",)
        self.brackets.pop()
        closing = self.take(CLOSING[opening])
        if inner[0] == "builder" and (is_name(inner[1]) or inner[1][-1] == REALS):
            return inner[2]
        if opening in "([" and inner[0] in ("list", ";"):
            return ("tuple", opening + closing, *inner[1:])
        if opening == r"\{":
            return ("set", *inner[1:]) if inner[0] == "list" else ("set", inner)
        return (WRAPS[opening], inner) if opening in WRAPS else inner

    def function(self, name: str):
        """f^n_b x: without a bracket the argument is the product up to the next function."""
        scripts = {}
        while self.tokens[-1] in ("^", "_"):
            mark = self.take()
            scripts[mark] = self.prefix()
        is_open = self.tokens[-1] not in ("(", "{")
        self.brackets.append("function")
        tree = self.tree(15) if is_open else self.bracket(self.take())
        self.brackets.pop()
        if scripts.get("^") == ("num", Fraction(-1)):
            return ("a" + name, tree)
        tree = joined("/", ("ln", tree), ("ln", scripts["_"])) if "_" in scripts else (name, tree)
        return ("power", tree, scripts["^"]) if "^" in scripts else tree

ZERO, TWO, REALS = ("num", Fraction(0)), ("num", Fraction(2)), ("var", r"\bbR")
CONSTANTS = set("πei∞")

def negative(tree):
    if tree[0] in ("unit", "deg"):
        return (tree[0], negative(tree[1]), tree[2])
    return ("num", -tree[1]) if tree[0] == "num" else ("*", ("num", Fraction(-1)), tree)

def joined(kind: str, left, right, token: str = ""):
    if kind in ("unit", "fac", "deg"):
        words = token.strip('"').split()
        names = (UNITS.get(word, word[:3] + word[3:].rstrip("s")) for word in words)
        return (kind, left, " ".join(names))
    is_long = len(left) > MAX_ITEMS and kind not in ("+", "-", "product")
    if is_long or kind == "product" and left[0] == "unit":
        raise Unreadable("too many items, or 5 cm 3")
    if kind == "rel":
        signs, *sides = left[1:] if left[0] == "rel" else ("", left)
        return ("rel", signs + token, *sides, right)
    if kind == "-":
        kind, right = ("∖", right) if right[0] == "set" else ("+", negative(right))
    if kind in ("/", "product"):
        kind, right = "*", ("inv", right) if kind == "/" else right
    return (*left, right) if kind == left[0] and kind in MANY else (kind, left, right)

MANY = {"+", "*", "list", ";", "and", "or", "row", "cell", ":"}

class Local(threading.local):
    """One mpmath context per thread (its precision is not thread-safe), and the size of noise."""

    def __init__(self):
        self.mp, self.scale = MPContext(), 0
        self.mp.dps = 100

LOCAL = Local()

def exact_power(base: Fraction, exponent: Fraction):
    """The power when it is rational for sure, None when mpmath has to find it."""
    if exponent.denominator > 1 or abs(exponent) > MAX_POWER or base == 0:
        return base if base == 0 < exponent else None
    if max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(exponent) > MAX_BITS:
        raise Unreadable("power too large")
    return base ** int(exponent)

def real_power(base, exponent):
    if base == 0 or abs(exponent * LOCAL.mp.ln(base)) > MAX_ARGUMENT:
        raise Unreadable("power too large")
    return LOCAL.mp.power(base, exponent)

def whole(function):
    """`function` for the integers 0..3000; None otherwise."""
    return lambda *values: Fraction(function(*map(int, values))) if all(
        value.denominator == 1 and 0 <= value <= 3000 for value in values) else None

EXACT = {
    "+": lambda *values: sum(values), "*": lambda *values: math.prod(values), "fabs": abs,
    "inv": lambda value: 1 / value, "power": exact_power, "unit": lambda value: value,
    "fac": whole(math.factorial), "binomial": whole(math.comb),
    "floor": lambda value: Fraction(math.floor(value)),
    "ceil": lambda value: Fraction(math.ceil(value))}
INEXACT = {kind: EXACT[kind] for kind in ("+", "*", "inv", "unit")} | {
    "power": real_power, "deg": lambda value: value * LOCAL.mp.pi / 180,
    "call": lambda name, value: LOCAL.mp.sin(value + name) + value**2 * name,
    "π": lambda: +LOCAL.mp.pi, "e": lambda: +LOCAL.mp.e, "i": lambda: LOCAL.mp.j,
    "∞": lambda: LOCAL.mp.inf}
NUMERIC = FUNCTIONS | set("fac binomial floor ceil".split())

@functools.lru_cache(maxsize=4096)
def sample(name: str, point: int) -> Fraction:
    """A variable's fixed value at point 0..3: in (0, 1), in (1, 4), negative, of mixed sign."""
    seed = int.from_bytes(f"{name} {point}".encode(), "big") % 1_000_003
    share = Fraction(seed % 996 + 1, 997)
    return (share, 1 + 3 * share, -2 * share - Fraction(1, 2),
            (3 * share + Fraction(1, 3)) * (-1) ** seed)[point]

def evaluate(tree, point: int = 0):
    """The value at a sample point. Raises Unreadable or ArithmeticError where there is none."""
    kind, *parts = tree
    if kind in ("num", "var"):
        return parts[0] if kind == "num" else sample(parts[0], point)
    values = [evaluate(part, point) for part in parts if isinstance(part, tuple)]
    if kind in EXACT and all(isinstance(value, Fraction) for value in values):
        if (result := EXACT[kind](*values)) is not None:
            return result
    values = [LOCAL.mp.convert(value) for value in values]
    if kind == "+":  # what is left after a cancellation is noise of this size
        LOCAL.scale = max(LOCAL.scale, *map(abs, values))
    if kind in INEXACT:
        return INEXACT[kind](*values)
    if kind not in NUMERIC or kind != "ln" and any(abs(value) > MAX_ARGUMENT for value in values):
        raise Unreadable(kind)
    return getattr(LOCAL.mp, kind)(*values)

def variables(tree) -> set[str]:
    return {tree[1]} if tree[0] == "var" else set().union(
        *(variables(part) for part in tree[1:] if isinstance(part, tuple)))

def value_pairs(a, b) -> list[tuple]:
    """The values of two trees in the same variables at the points where both have one."""
    LOCAL.scale, pairs = 0, []
    for point in range(4 if variables(a) else 1) if variables(a) == variables(b) else ():
        try:
            pairs.append((evaluate(a, point), evaluate(b, point)))
        except (Unreadable, ArithmeticError):
            continue
    return pairs

def near(a, b) -> bool:
    """Equal: exactly for Fractions, else to 60 digits of the larger, or of the terms summed."""
    if a == b or isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    a, b = LOCAL.mp.convert(a), LOCAL.mp.convert(b)
    error = LOCAL.mp.mpf(10) ** -60 * max(abs(a), abs(b), LOCAL.scale)
    return abs(a - b) <= error < LOCAL.mp.inf

def is_real(value) -> bool:
    return isinstance(value, Fraction) or abs(LOCAL.mp.im(value)) <= 1e-60 * abs(value)

@functools.lru_cache(maxsize=4096)
def equal(a, b) -> bool:
    """Equal at every sample point where both are real, and at two of the points at least."""
    pairs = value_pairs(a, b)
    agreed = [near(x, y) for x, y in pairs]
    decisive = all(yes or not (is_real(x) and is_real(y)) for yes, (x, y) in zip(agreed, pairs))
    return decisive and sum(agreed) >= (2 if variables(a) else 1)

def ratio(a, b):
    """c when a = c * b for one constant c != 0 at the sample points, else None."""
    found = [evaluate(("*", ("num", x), ("inv", ("num", y)))) for x, y in value_pairs(a, b)
             if not near(x, 0) and not near(y, 0)]
    return found[0] if len(found) > 2 and all(near(c, found[0]) for c in found) else None

SETS = {"list", "set"}  # 1, 2 and {1, 2}
REGIONS = {"rel", "∪", "∩", "∖", "tuple"}
STRUCTURES = REGIONS | {*SETS, ";", "and", "or", "row", "cell", "matrix", ":"}

def is_name(tree) -> bool:
    """x, f(x), AB, V_1:V_2, (x, y) or words: what may stand before "= value"."""
    kind, *parts = tree
    if kind == "*":
        return all(part[0] == "var" and part[1].isupper() for part in parts)
    return kind in ("var", "call", "text", "e", "i") or kind in ("tuple", ":") and all(
        is_name(part) for part in parts if isinstance(part, tuple))

def settle(tree):
    """The tree as an answer: names set apart, lists opened, ± written out."""
    kind, *parts = tree
    if kind not in STRUCTURES:
        plus, minus = signed(tree, "±"), signed(tree, "∓")
        return tree if plus == minus else ("list", plus, minus)
    parts = [settle(part) if isinstance(part, tuple) else part for part in parts]
    if kind == ";":  # a=1,b=2; a=3,b=4
        parts = [("tuple", "()", *part[1:]) if part[0] == "list" else part for part in parts]
    if kind in ("and", "or") and all(part[0] in REGIONS - {"tuple"} for part in parts):
        return functools.reduce(lambda a, b: ("∪" if kind == "or" else "∩", a, b), parts)
    if kind in ("list", "set", ";", "and", "or"):
        parts = [item for part in parts for item in (part[1:] if part[0] == "list" else [part])]
        if not 0 < len(parts) <= MAX_ITEMS:
            raise Unreadable("no items, or too many")
        return ("set" if kind == "set" else "list", *parts)
    if kind == ":" and len(parts) == 2 and is_name(parts[0]) and not is_name(parts[1]):
        return ("named", parts[0], parts[1], None)
    return relation(*parts) if kind == "rel" else (kind, *parts)

def signed(tree, plus: str):
    """The tree with the signs ± and ∓ replaced, `plus` by + and the other by -."""
    kind, *parts = tree
    parts = [signed(part, plus) if isinstance(part, tuple) else part for part in parts]
    if kind in "±∓":
        return ("+", parts[0], parts[1] if kind == plus else negative(parts[1]))
    return (kind, *parts)

def relation(signs: str, *sides):
    """name = value, an equation (as left - right), or a chain of inequalities."""
    name, whole = None, ("+", sides[0], negative(sides[1])) if signs == "=" else None
    while len(sides) > 1 and is_name(sides[0]) and set(signs) <= set("=∈≈"):
        name, signs, sides = sides[0], signs[1:], sides[1:]
    if "≈" in signs:
        signs, sides = signs[:signs.index("≈")], sides[:signs.index("≈") + 1]
    if set(signs) == {"="} and not any(map(variables, sides)):  # 3/4 = 0.75, but not 7 = 5
        signs, sides = ("", sides[:1]) if all(equal(sides[0], t) for t in sides) else (signs, sides)
    if not signs:
        return ("named", name, sides[0], whole) if name else sides[0]
    if signs == "=":
        return ("named", sides[1], sides[0], whole) if is_name(sides[1]) else ("equation", whole)
    return ("rel", signs, *(("var", str(side)) if side[0] == "call" else side for side in sides))

def same(a, b) -> bool:
    """Do two settled trees mean the same answer? Symmetric."""
    if a == b or isinstance(a, str) or "text" in (a[0], b[0]):
        return a == b
    kinds, x, y = {a[0], b[0]}, a[1:], b[1:]
    if kinds & {"named", "equation"}:
        wholes = [t[-1] if t[0] in ("named", "equation") else None for t in (a, b)]
        if all(wholes) and ratio(*wholes) is not None:
            return True
        names = {re.sub("_.*|'", "", t[1][1]).lower() for t in (a, b) if t[0] == "named"
                 and t[1][0] in ("var", "text")}
        values = [t[2] if t[0] == "named" else t for t in (a, b)]
        return "equation" not in kinds and len(names) < 2 and same(*values)
    for t, other in ((a, b), (b, a)):
        if t[0] in SETS and len(t) == 2 and other[0] not in SETS:
            return same(t[1], other)
    if kinds & (REGIONS - {"tuple"}) or REALS in (a, b):
        return same_chain(a, b) or same_region(a, b)
    if kinds <= SETS:  # every item of the one takes its own item of the other
        rest = list(y)
        matches = (next((other for other in rest if same(item, other)), None) for item in x)
        return len(x) == len(y) and all(match and not rest.remove(match) for match in matches)
    if kinds == {"list", "tuple"}:  # a bare list and (..): in the same order
        x, y = (t[1:] if t[0] == "list" else t[2:] if t[1] == "()" else () for t in (a, b))
    elif kinds & STRUCTURES and len(kinds) > 1:
        return False
    if kinds & STRUCTURES:
        return len(x) == len(y) and all(map(same, x, y))
    return same_value(a, b)

def same_value(a, b) -> bool:
    """Values, with units ignored when one side has none; a % or ° may also be a factor."""
    units = [t[2] if t[0] in ("unit", "deg") else "" for t in (a, b)]
    bare = [t[1] if name else t for t, name in zip((a, b), units)]
    if all(units) and units[0] != units[1]:
        return False
    scale = {"%": ("num", Fraction(1, 100)), "°": ("deg", ("num", Fraction(1)), "°")}
    scaled = [("*", t, scale[name]) if name in scale else t for t, name in zip(bare, units)]
    if equal(*bare) or not all(units) and equal(*scaled):
        return True
    digits = max(t[1].denominator if t[0] == "num" else 1 for t in bare)
    return digits > 10**13 and any(  # a float printed with 15 digits or more
        abs(LOCAL.mp.convert(x) - LOCAL.mp.convert(y)) * digits < 1 for x, y in value_pairs(*bare))

def same_chain(a, b) -> bool:
    """The same sides in the same order, or one inequality that is a multiple of the other."""
    if not a[0] == b[0] == "rel" or len(a) != len(b):
        return False
    if a[1] == b[1] and all(map(equal, a[2:], b[2:])):
        return True
    c = ratio(*(("+", t[2], negative(t[3])) for t in (a, b))) if len(a) == 4 else None
    return c is not None and is_real(c) and b[1] == (a[1] if c > 0 else a[1].translate(FLIPPED))

FLIPPED = str.maketrans("<>≤≥", "><≥≤")

def number(tree):
    """The real value of a tree without variables; raises Unreadable."""
    value = LOCAL.mp.convert(evaluate(tree))
    if variables(tree) or not is_real(value) or value != value:
        raise Unreadable("not a number")
    return value.real

def ends(tree) -> list:
    """The finite numbers in a region of the real line."""
    kind, *parts = tree
    if kind == "tuple" and (len(parts) != 3 or number(parts[1]) >= number(parts[2])):
        raise Unreadable("not an interval")
    if kind in REGIONS | SETS | {"named"}:
        return [end for part in parts if isinstance(part, tuple) for end in ends(part)]
    return [] if is_name(tree) or abs(number(tree)) == LOCAL.mp.inf else [number(tree)]

def inside(tree, x) -> bool:
    kind, *parts = tree
    if kind in "∪∩∖":
        left, right = (inside(part, x) for part in parts)
        return left or right if kind == "∪" else left and right == (kind == "∩")
    if kind == "tuple":
        signs = "".join("≤" if bracket in "[]" else "<" for bracket in parts[0])
        kind, parts = "rel", [signs, parts[1], ("var", "x"), parts[2]]
    if kind == "rel":
        sides = [x if is_name(side) else number(side) for side in parts[1:]]
        return all(map(holds, sides, sides[1:], parts[0]))
    if kind not in SETS and tree != REALS:
        raise Unreadable("not a region")
    return tree == REALS or any(near(number(part), x) for part in parts)

def holds(left, right, sign: str) -> bool:
    if near(left, right):
        return sign in "=≤≥"
    return sign == "≠" or sign != "=" and (left < right) == (sign in "<≤")

def same_region(a, b) -> bool:
    """Do two regions of the line agree at their ends, between them and outside?"""
    LOCAL.scale = 0
    marks = sorted(ends(a) + ends(b)) or [0]
    tests = [marks[0] - 1, *marks, marks[-1] + 1, *((x + y) / 2 for x, y in zip(marks, marks[1:]))]
    return len((variables(a) | variables(b)) - {REALS[1]}) < 2 and all(
        inside(a, x) == inside(b, x) for x in tests)

def closing_brace(text: str, start: int) -> int:
    """The index after the brace that closes text[start], or 0. Linear in the text."""
    for pattern in (r"\\.|[{}]", r"[{}]"):  # then once more with \} taken for a bare brace
        depth = 0
        for match in re.compile(pattern, re.DOTALL).finditer(text, start):
            depth += {"{": 1, "}": -1}.get(match[0], 0)
            if depth == 0:
                return match.end()
    return 0

def boxed(text: str) -> str | None:
    """The last box; or all of the last boxes with only "," or "and" between them."""
    contents, end = [], len(text)
    while (start := text.rfind("\\boxed", 0, end)) >= 0 and len(contents) <= MAX_ITEMS:
        opening = re.compile(r"\\boxed\s*\{").match(text, start)
        close = closing_brace(text, opening.end() - 1) if opening else 0
        between = re.sub(r"\\text|\\quad|\\[()\[\] ,;]|[${}\s.]", "", text[close:end][:80])
        if contents and between in ("or", ",or"):
            return None
        if not close or contents and between not in ("and", ",and", ",", ";"):
            break
        contents.insert(0, text[opening.end():close - 1].rstrip("\\"))
        end = start
    return ",".join(contents) or None

def stated(text: str) -> str | None:
    """What follows the last of the usual final-answer phrases, up to the end of its sentence."""
    *before, last = re.split(r"(?i)####|\banswer is\b|\banswer:", text)
    line = last[:MAX_CHARS].lstrip(" :*\n").partition("\n")[0].partition("<|")[0]
    return re.split(r"\.\s", line + " ")[0].strip(" *") if before else None

def extract_answer(response: str) -> str | None:
    r"""The one final answer in `response`, or None.

    Only what follows the last </think> counts; a <think> that is never closed has no answer. In
    that part: the <answer> block when there is one (two different blocks are no answer), in it
    the last \boxed{}, else the whole block; without a block the last \boxed{}, else the usual
    phrases. An unclosed last box is no answer. Boxes joined by "," or "and" are one set; by "or"
    they are a hedge, which is no answer.
    """
    _, think, text = response.rpartition("</think>")
    blocks = [block.partition("</answer>") for block in text.split("<answer>")[1:]]
    contents = {content.strip() for content, tag, _ in blocks if tag}
    torn = len(blocks) > 1 and not all(tag for _, tag, _ in blocks)
    if len(contents) > 1 or torn or not think and "<think>" in response:
        return None
    text = contents.pop() if contents else text
    return boxed(text) if "\\boxed" in text else stated(text) or (text if blocks else None)

REFUSED = (Unreadable, RecursionError, ValueError, ArithmeticError, TypeError, LookupError)
SIMPLE = re.compile(r"-?\d{1,40}(?:\.\d{1,40})?\Z")
THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")

@functools.lru_cache(maxsize=4096)
def readings(text: str) -> tuple:
    """What an answer may stand for: its string, and settled trees (1,234 is a number or a list)."""
    if len(text) > MAX_CHARS:
        return (("text", text),)
    tokens = tokenise(text)
    plain = re.sub('[" ]', "", "".join(tokens))
    has_words = any(token[0] == '"' for token in tokens) or plain.isalpha() and len(plain) > 2
    found = [("text", plain.lower() if has_words else plain)] if re.search(r"\w|∞", plain) else []
    variants = [tokens]
    if THOUSANDS.search(text) and not re.search(r"[(\[]|\\\{", text):
        variants.append(tokenise(THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)))
    for variant in variants:
        try:
            reader = Reader(variant)
            tree = settle(reader.tree())
            found += [tree] if reader.tokens == [""] else []
        except REFUSED:
            continue
    return tuple(found)

def parse_gold(gold: str) -> str | None:
    """Why `gold` cannot be compared as mathematics or as words, or None when it can."""
    if not gold.strip() or len(gold) > MAX_CHARS:
        return "empty" if not gold.strip() else f"longer than {MAX_CHARS} characters"
    is_words = re.sub(r"\\text|[${}.\s]", "", gold).isalpha()
    return None if is_words or len(readings(gold)) > 1 else "not read as mathematics: only as text"

def accuracy_reward(response: str, gold: str) -> float:
    """1.0 when the final answer of `response` (see extract_answer) equals `gold`, else 0.0.

    One answer has to be given: an unordered list or a set is right when it has all the elements
    of the gold and no others, an ordered tuple when the elements agree in order; listing
    candidates, "A or B" for a gold of B, and two different <answer> blocks earn nothing. Values
    are compared exactly; units, degree and percent signs are ignored when one side has none.
    """
    answer, gold = (extract_answer(response) or "").strip(), gold.strip()
    if SIMPLE.match(answer) and SIMPLE.match(gold):
        return float(Fraction(answer) == Fraction(gold))
    for a, b in ((a, b) for a in readings(answer) for b in readings(gold)):
        try:
            if same(a, b):
                return 1.0
        except REFUSED:
            continue
    return 0.0

def format_reward(response: str, gold: str = "") -> float:
    """1.0 for exactly <think>..</think><answer>..</answer> with two non-blank bodies, else 0.0."""
    parts = re.split("(" + "|".join(TAGS) + ")", response)
    filled = [bool(part.strip()) for part in parts[::2]]
    return float(parts[1::2] == list(TAGS) and filled == [False, True, False, True, False])

REWARDS = {"accuracy": accuracy_reward, "format": format_reward}

def resolve_reward(name: str):
    """The function f(response, gold) -> float that `name` stands for: a key of REWARDS,
    "path/to/file.py:function" or "module:function". Raises ValueError when there is none."""
    if name in REWARDS:
        return REWARDS[name]
    source, _, function = name.rpartition(":")
    try:
        spec = importlib.util.find_spec(source) if not source.endswith(".py") else (
            importlib.util.spec_from_file_location("user_reward", source))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, function)
    except Exception as error:  # whatever the user's file does when it is imported
        raise ValueError(f"reward {name!r}: none of {', '.join(REWARDS)}; {error!r}") from error

def serve(connection: Connection, timeout: float, functions: list) -> None:
    """A worker's life: [text, gold] in, its rewards (None when a function raised) out."""
    connection.send_bytes(b"ready")
    while True:
        text, gold = json.loads(connection.recv_bytes())
        signal.alarm(math.ceil(timeout) + 5)  # ends a stuck worker whose parent is gone
        try:
            rewards = [float(function(text, gold)) for function in functions]
        except Exception:  # a user's function may raise anything
            rewards = [math.nan]
        signal.alarm(0)
        is_fine = all(map(math.isfinite, rewards))
        connection.send_bytes(json.dumps(rewards if is_fine else None).encode())

class VerifierPool:
    """Scores groups of texts in worker processes; nothing that a text does reaches the caller.

    A text that takes longer than `timeout` seconds costs its worker its life and scores 0. A
    worker that dies is replaced and its text is tried once more, then scores 0. Both are counted
    in `stats`, as are functions that raise. Rewards are F floats per text, in the order of
    `reward_funcs`. Raises ValueError at start when a reward cannot be found.
    """

    def __init__(self, reward_funcs: list[str], workers: int, timeout: float = 5.0):
        self.functions = [name for name in reward_funcs if resolve_reward(name)]
        self.timeout, self.zeros = timeout, [0.0] * len(reward_funcs)
        self.stats, self.lock = {"timeouts": 0, "crashes": 0}, threading.Lock()
        self.pending, self.closed = 0, False  # pending: groups that poll has not returned yet
        self.jobs, self.done = queue.SimpleQueue(), queue.SimpleQueue()
        started = [self._start() for _ in range(max(1, workers))]
        self.threads = [threading.Thread(target=self._run, args=(worker,), daemon=True)
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
        while self.threads:
            self.threads.pop().join()

    def _start(self) -> tuple[subprocess.Popen, Connection]:
        ours, theirs = Pipe()
        command = [sys.executable, os.path.abspath(__file__), str(theirs.fileno()),
                   str(self.timeout), *self.functions]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        theirs.close()
        if not ours.poll(60) or ours.recv_bytes() != b"ready":
            process.kill()
            raise OSError("a reward worker did not start")
        return process, ours

    def _run(self, worker) -> None:
        for key, texts, gold in iter(self.jobs.get, None):
            rewards = {}
            for text in dict.fromkeys(texts):
                rewards[text], worker = self._judge(worker, text, gold)
            self.done.put((key, [rewards[text] for text in texts]))
        stop(worker)

    def _judge(self, worker, text: str, gold: str) -> tuple:
        """The rewards of one text, and the worker to go on with (None: a new one is due)."""
        fate = "crashes"
        for _ in range(0 if self.closed else 2):
            try:
                worker = worker or self._start()
                worker[1].send_bytes(json.dumps([text, gold]).encode())
                if worker[1].poll(self.timeout):
                    rewards = json.loads(worker[1].recv_bytes())
                    if rewards:
                        return rewards, worker
                    break
                fate = "timeouts"
            except (OSError, EOFError):
                pass
            worker = stop(worker)
            if fate == "timeouts":
                break
        with self.lock:
            self.stats[fate] += not self.closed
        return self.zeros, worker

def stop(worker) -> None:
    if worker:
        worker[0].kill()
        worker[0].wait()
        worker[1].close()

if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    try:
        descriptor, limit, *names = sys.argv[1:]
        serve(Connection(int(descriptor)), float(limit), list(map(resolve_reward, names)))
    except EOFError:  # the parent is gone
        pass

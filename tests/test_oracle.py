"""The verifier's positive verdicts against sympy, on answers of every kind.

tests/oracle_pairs.tsv holds pairs of our own: label, kind, gold, answer. The verdict must be the
label; and whatever the verifier calls the same, sympy must not call different. sympy gets objects
built node by node from the verifier's trees, and compares values with `equals` (and far out, where
its random points do not go), regions as sets. On all labelled answers, which takes minutes:

    python tests/test_oracle.py [verifier_dev.jsonl ...]
"""

import itertools
import json
import sys
from fractions import Fraction
from pathlib import Path

import pytest

sympy = pytest.importorskip("sympy")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import reward  # noqa: E402
from reward import Equation, accuracy_reward, extract_answer, gold_answer, read  # noqa: E402

DATA = ROOT.parent / "shared" / "data"
LINES = (ROOT / "tests" / "oracle_pairs.tsv").read_text("utf-8").splitlines()[1:]
PAIRS = [line.split("\t") for line in LINES]

FUNCTIONS = {"fabs": sympy.Abs, "ceil": sympy.ceiling, "fac": sympy.factorial, "ln": sympy.log}
CONSTANTS = {"π": sympy.pi, "e": sympy.E, "i": sympy.I, "∞": sympy.oo, "°": sympy.pi / 180}
FAR = [
    sympy.Rational(*point)
    for point in [(1, 3), (7, 3), (-11, 5), (1234, 7), (-98765, 3), (10**9 + 1, 2)]
]


class Undecided(Exception):
    """sympy has no object for this tree."""


def expression(tree):
    """The sympy object of a value; its variables are real."""
    kind, *parts = tree
    if kind == "num":
        return sympy.Rational(parts[0].numerator, parts[0].denominator)
    if kind == "var":
        return sympy.Symbol("x" if parts[0] == "" else parts[0], real=True)
    if kind in CONSTANTS:
        return CONSTANTS[kind]
    if kind == "piecewise":
        pairs = zip(parts[::2], parts[1::2])
        return sympy.Piecewise(*((expression(value), condition(when)) for value, when in pairs))
    if kind == "unit":
        if parts[1] not in reward.FACTORS:
            raise Undecided(parts[1])
        return expression(parts[0]) * expression(reward.FACTORS[parts[1]])
    values = [expression(part) for part in parts]
    if kind in ("sum", "mixed"):
        return sympy.Add(*values)
    if kind in ("product", "magnitude"):
        return sympy.Mul(*values)
    if kind == "negative":
        return -values[0]
    if kind == "quotient":
        return values[0] / values[1]
    if kind == "power":
        if values[0].is_Rational and values[1].is_Rational and abs(values[1]) > 2000:
            raise Undecided("too large")
        return values[0] ** values[1]
    if kind == "root":
        is_odd = values[0].is_Integer and values[0] % 2 == 1
        size = sympy.Abs(values[1]) ** (1 / values[0])
        return sympy.sign(values[1]) * size if is_odd else values[1] ** (1 / values[0])
    if kind == "expj":
        return sympy.exp(sympy.I * values[0])
    function = FUNCTIONS.get(kind) or getattr(sympy, kind, None)
    if function is None:
        raise Undecided(kind)
    return function(*values)


RELATIONS = {
    "<": sympy.Lt,
    ">": sympy.Gt,
    "≤": sympy.Le,
    "≥": sympy.Ge,
    "=": sympy.Eq,
    "≠": sympy.Ne,
}


def condition(tree):
    """A chain of (in)equalities as a sympy boolean."""
    kind, *parts = tree
    if kind != "relation":
        raise Undecided(kind)
    sides = [expression(side) for side in parts[::2]]
    steps = zip(sides, parts[1::2], sides[1:])
    return sympy.And(*(RELATIONS[sign](left, right) for left, sign, right in steps))


def region(tree):
    """The sympy set of a region of the real line."""
    kind, *parts = tree
    if kind == "union" or kind in ("list", "set"):
        return sympy.Union(*map(region, parts))
    if kind == "intersection":
        return sympy.Intersection(*map(region, parts))
    if kind == "without":
        return region(parts[0]) - region(parts[1])
    if kind == "tuple" and len(parts) == 3:
        low, high = map(expression, parts[1:])
        return sympy.Interval(low, high, parts[0][0] == "(", parts[0][1] == ")")
    if kind == "relation":
        boolean = condition(tree)
        return sympy.S.Reals if boolean == True else boolean.as_set()  # noqa: E712
    return sympy.FiniteSet(expression(tree))


def agree(a, b) -> bool:
    """Does sympy call two settled trees the same? Undecided is raised when it cannot tell."""
    if isinstance(a, Equation) or isinstance(b, Equation):
        return agree_equations(a, b)
    a, b = as_tuple(a, b), as_tuple(b, a)
    kinds = {a[0], b[0]}
    if "word" in kinds:
        raise Undecided("words")
    if kinds == {"mod"}:
        steps = (expression(a[1]) - expression(b[1])) / expression(a[2])
        return expression(a[2]) == expression(b[2]) and steps.is_integer
    if kinds & reward.REGIONS:
        return region(a).symmetric_difference(region(b)) == sympy.S.EmptySet
    if kinds <= {"list", "set"} or kinds <= reward.LOGIC and a[0] == b[0]:
        return len(a) == len(b) and any(
            all(agrees_or_unknown(x, y) for x, y in zip(a[1:], order))
            for order in itertools.permutations(b[1:])
        )
    if "ratio" in kinds and kinds & reward.STRUCTURES == {"ratio"} and a[0] != b[0]:
        return sympy.simplify(quotient_of(a) - quotient_of(b)) == 0
    if kinds == {"ratio"} and not reward.is_time(a) and not reward.is_time(b):
        first, second = ([expression(term) for term in tree[1:]] for tree in (a, b))
        return len(first) == len(second) and all(
            x * second[0] == y * first[0] for x, y in zip(first, second)
        )
    if kinds & reward.STRUCTURES:
        pairs = list(zip(a[1:], b[1:]))
        return (
            a[0] == b[0]
            and len(a) == len(b)
            and all(x == y if isinstance(x, str) else agree(x, y) for x, y in pairs)
        )
    return agree_values(a, b)


def quotient_of(tree):
    """3:4 as 3/4."""
    if tree[0] != "ratio":
        return expression(tree)
    if len(tree) != 3:
        raise Undecided("a ratio of three")
    return expression(tree[1]) / expression(tree[2])


def agrees_or_unknown(x, y) -> bool:
    try:
        return agree(x, y)
    except Undecided:
        return True


def agree_equations(a, b) -> bool:
    """By their values, or as curves: the ratio of left - right sides is a constant."""
    values = [side.value if isinstance(side, Equation) else side for side in (a, b)]
    if None not in values and agrees_or_unknown(*values):
        return True
    wholes = [side.whole for side in (a, b) if isinstance(side, Equation)]
    if len(wholes) < 2 or None in wholes:
        return False
    ratio = sympy.simplify(expression(wholes[0][1]) / expression(wholes[1][1]))
    return ratio.is_number and ratio != 0


def as_tuple(tree, other):
    """x = 3, y = -4 beside (3, -4): the values in the order of the names."""
    if not (tree[0] == "list" and all(isinstance(item, Equation) for item in tree[1:])):
        return tree
    names = [item.name for item in tree[1:]]
    if other[0] == "list" and all(isinstance(item, Equation) for item in other[1:]):
        return ("list", *sorted(tree[1:], key=lambda item: str(item.name)))
    values = [item.value for item in sorted(tree[1:], key=lambda item: str(item.name))]
    is_ordered = len(set(names)) == len(names) and other[0] == "tuple"
    return ("tuple", "()", *values) if is_ordered else ("list", *values)


def agree_values(a, b) -> bool:
    """Without their units or, as percent and degrees, with them."""
    bare_a, sized_a, units_a = reward.quantity(a)
    bare_b, sized_b, units_b = reward.quantity(b)
    pairs = [(sized_a, sized_b)]
    if not units_a or not units_b:
        pairs.append((bare_a, bare_b))
    return any(is_zero(expression(left) - expression(right)) for left, right in pairs)


def is_zero(difference) -> bool:
    """By `equals`; where it is not proven, by values far out too."""
    if difference == 0 or difference.equals(0) is True:
        return True
    names = sorted(difference.free_symbols, key=str)
    if not names:
        return abs(sympy.N(difference, 60)) < 10**-40
    for shift, point in enumerate(FAR):
        values = {name: point + shift * index for index, name in enumerate(names)}
        value = sympy.N(difference.subs(values), 60)
        if value.is_number and value.is_real and abs(value) > abs(point) * 10**-30:
            return False
    return True


def judge(answer: str, gold: str) -> bool | None:
    """sympy's verdict on two texts; None when it has none."""
    ours, theirs = read(answer), read(gold)
    a, b = ours.tree, theirs.tree
    if a is None or b is None or theirs.text in (ours.text, ours.choice):
        return None  # words, or a choice
    if a == b:  # also what is too large for both
        return True
    try:
        return bool(agree(reward.with_names_of(b, a) if is_value(a) and is_value(b) else a, b))
    except (Undecided, NotImplementedError, TypeError, ValueError, AttributeError):
        return None


def is_value(tree) -> bool:
    return tree is not None and tree[0] not in {*reward.STRUCTURES, "equation"}


@pytest.mark.parametrize("label, kind, gold, answer", PAIRS)
def test_verdicts_of_our_own_pairs(label, kind, gold, answer):
    assert accuracy_reward("\\boxed{%s}" % answer, gold) == float(label)


def test_sympy_contradicts_no_positive_verdict():
    decided = 0
    for _, kind, gold, answer in PAIRS:
        if accuracy_reward("\\boxed{%s}" % answer, gold, strict_answers=False):
            verdict = judge(answer, gold)
            assert verdict is not False, (kind, gold, answer)
            decided += verdict is True
    assert len(PAIRS) >= 200 and decided >= 400


SAMPLED_NEAR = [
    ("5-x", "|x-5|"),
    ("x+3", "\\sqrt{(x+3)^2}"),
    ("\\lfloor x/5\\rfloor", "\\lfloor x/6\\rfloor"),
    ("2020-m", "|m-2020|"),
]
SEEN_LINEAR = [("(1,\\infty)", "|x-2|<1"), ("x>2", "|x-4|<2"), ("x<3", "x(x-1)(x-2)+x<3")]


@pytest.mark.parametrize("gold, answer", SAMPLED_NEAR)
def test_the_oracle_sees_sample_points_that_are_only_near(gold, answer, monkeypatch):
    reward.equal.cache_clear()
    assert not accuracy_reward("\\boxed{%s}" % answer, gold)
    monkeypatch.setattr(reward, "RANGES", reward.RANGES[:3])  # the fault, put back
    reward.equal.cache_clear()
    assert accuracy_reward("\\boxed{%s}" % answer, gold)
    assert judge(answer, gold) is False
    reward.equal.cache_clear()


def root_by_three_points(left, right) -> list:
    """Linear, it seems, when x = 0, 1 and 2 are on a line."""
    difference = ("sum", left, ("negative", right))
    u, v, w = (reward.MP.convert(reward.evaluate(difference, x=Fraction(x))) for x in range(3))
    if not reward.near(u + w, 2 * v):
        raise ValueError("not linear")
    return [] if reward.near(u, v) else [u / (u - v)]


@pytest.mark.parametrize("gold, answer", SEEN_LINEAR)
def test_the_oracle_sees_linearity_tested_at_three_points(gold, answer, monkeypatch):
    assert not accuracy_reward("\\boxed{%s}" % answer, gold)
    monkeypatch.setattr(reward, "roots", root_by_three_points)  # the fault, put back
    assert accuracy_reward("\\boxed{%s}" % answer, gold, strict_answers=False)
    assert judge(answer, gold) is False


def main() -> None:
    """All positive verdicts of the labelled files that sympy contradicts."""
    names = sys.argv[1:] or [
        "verifier_dev.jsonl",
        "verifier_fresh_dev.jsonl",
        "adversarial_dev.jsonl",
    ]
    for name in names:
        counts = {True: 0, False: 0, None: 0}
        for line in (DATA / name).open(encoding="utf-8"):
            item = json.loads(line)
            answer, gold = extract_answer(item["response"]) or "", gold_answer(item["gold"])
            if accuracy_reward(item["response"], item["gold"], strict_answers=False):
                verdict = judge(answer.strip(), gold.strip())
                counts[verdict] += 1
                if verdict is False:
                    print("different:", repr(gold), repr(answer))
        print(name, "same", counts[True], "different", counts[False], "undecided", counts[None])


if __name__ == "__main__":
    main()

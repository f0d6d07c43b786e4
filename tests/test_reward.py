"""reward.py: what is the final answer, when two answers are the same, and the pool of workers."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import reward  # noqa: E402
from reward import (  # noqa: E402
    UserError,
    VerifierPool,
    accuracy_reward,
    extract_answer,
    format_reward,
    gold_answer,
    gold_fault,
    resolve_reward,
)

DATA = Path(__file__).parents[2] / "shared" / "data"
FAST = settings(max_examples=60, deadline=None)


def equal(a: str, b: str) -> bool:
    """accuracy_reward in both directions, which must agree."""
    forth = accuracy_reward("\\boxed{%s}" % a, b, strict_answers=False)
    back = accuracy_reward("\\boxed{%s}" % b, a, strict_answers=False)
    assert forth == back, (a, b)
    return forth == 1.0


def load(name: str) -> list[dict]:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not here")
    return [json.loads(line) for line in path.open(encoding="utf-8")]


# ---- what is the answer ----
@pytest.mark.parametrize(
    "response, answer",
    [
        ("<think>a</think><answer>42</answer>", "42"),
        ("<think>a</think><answer>so \\boxed{42}</answer>", "42"),
        ("<think>\\boxed{1}</think> the rest \\boxed{2}", "2"),
        ("<think>\\boxed{1}</think> nothing", None),  # the reasoning is not the answer
        ("<think>never closed \\boxed{5}", None),
        ("<think>a <answer>5</answer> hm, <answer>" + "no. " * 60, None),  # the last is no block
        ("Answer: 4\nNo: \\fbox{5}", "5"),
        ("first \\boxed{7}, then \\boxed{5}", "5"),
        ("\\boxed{5} but then \\boxed{6", None),  # never an earlier draft
        ("\\boxed{\\frac{1}{2}", None),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed {7}", "7"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{1} and \\boxed{2}", "1,2"),
        ("$\\boxed{1}$, $\\boxed{2}$ and $\\boxed{3}$", "1,2,3"),
        ("\\boxed{1}\n\\boxed{2}", "2"),
        ("either \\boxed{1} or \\boxed{2}", "1\\or 2"),
        ("<answer>1</answer><answer>2</answer>", None),
        ("<answer>1</answer> <answer> 1 </answer>", "1"),
        ("<answer><answer>1</answer></answer>", "1"),  # badly formed is the format's business
        ("<think>a <answer>7</answer> \n<|im_end|>", "7"),  # never closed, but the block is last
        ("<think>a <answer>7</answer> and so on", None),
        ("<think>a</think> <answer>7<|im_end|>", "7"),
        ("<think>a</think> <answer>%s7" % ("so " * 99), None),
        ("<think>a</think><answer> 7 \\end{answer}</answer>", "7"),
        ("<answer>\nTogether they are 1500 feet high.\n</answer>", "1500 feet"),
        ("<answer>330 km / 110 km/h = 3 hours</answer>", "3 hours"),
        ("The answer is 72, in total.", "72"),
        ("The final answer is $5$. I hope it is correct.", "$5$"),
        ("work\n#### 12", "12"),
        ("**Answer:** 3/4", "3/4"),
        ("The correct option is **C**.", "C"),
        ("So, the answer is $7\\sqrt{2}$, approximately 9.9.", "$7\\sqrt{2}$"),
        ("<answer>9*2=18. Final answer: 18</answer>", "18"),
        ("<answer>The range of $a$ is $(-\\infty,-1]$.</answer>", "$(-\\infty,-1]$"),
        ("no phrase, no box, 5", None),
        ("", None),
    ],
)
def test_extract(response, answer):
    found = extract_answer(response)
    assert (found.strip() if found else None) == answer


# ---- when are two answers the same; every pair is also tried the other way round ----
SAME = [
    ("3 ft and 2 in", "38 in"),
    # numbers of every form
    ("1000", "1,000"),
    ("1000", "1{,}000"),
    ("1000", "1\\,000"),
    ("32349", "32,\\!349"),
    ("7", "007"),
    ("0.5", ".5"),
    ("0.5", "\\frac12"),
    ("0.5", "1/2"),
    ("5", "5."),
    ("5", "5.00"),
    ("-3", "−3"),
    ("1.5", "1\\frac{1}{2}"),
    ("1.25", "1 1/4"),
    ("1/3", "⅓"),
    ("7/2", "3½"),
    ("123", "１２３"),
    ("1/3", "0.\\overline{3}"),
    ("1/6", "0.1\\overline{6}"),
    ("1.04e-3", "10.4 \\times 10^{-4}"),
    ("4.45e15", "4.45E15"),
    ("7e37", "7\\cdot10^{37}"),
    ("10^{5000}", "100^{2500}"),
    ("\\frac{1}{2^{99}}", "2^{-99}"),
    ("24", "4!"),
    ("10", "\\binom{5}{2}"),
    ("{1 \\over 2}", "\\tfrac12"),
    ("2", "\\lfloor 2.5 \\rfloor"),
    ("10", "\\text{10}"),
    # constants, roots, functions
    ("\\sqrt{8}", "2\\sqrt2"),
    ("\\frac{1}{\\sqrt3}", "\\frac{\\sqrt{3}}{3}"),
    ("5\\sqrt[3]{4}", "5\\cdot2^{2/3}"),
    ("48π", "48\\pi"),
    ("√5", "\\sqrt{5}"),
    ("3", "\\log_2 8"),
    ("e^{-1}", "\\frac1e"),
    ("\\frac{\\ln 2}{\\ln 3}", "\\log_3 2"),
    ("\\frac{\\pi}{6}", "\\arcsin\\frac12"),
    ("1/sqrt(3)", "\\frac{\\sqrt{3}}{3}"),
    ("2+4*sqrt(7)", "4\\sqrt7 + 2"),
    ("|{-3}|", "3"),
    # expressions
    ("x^2+2x+1", "(1+x)^2"),
    ("x/2", "\\frac{1}{2}x"),
    ("\\sec^2(y)", "\\tan^2 y+1"),
    ("x²", "x^2"),
    ("2\\sin b\\cos a", "2 \\cos a \\sin b"),
    ("\\ln x^4", "2\\ln x^2"),
    ("\\frac{x^3-1}{x-1}", "x^2+x+1"),
    ("\\sum_{k=1}^n k x_k", "\\sum_{k=1}^{n} x_k k"),
    ("m\\ddot{x}+kx", "kx + m \\ddot x"),
    ("\\arcsin(10/13)", "np.arcsin(10/13)"),
    ("x_1+x_{2}", "x_{2}+x_1"),
    ("9i+5", "5+9 i"),
    ("2^{k+1}", "2\\cdot 2^k"),
    ("\\theta", "θ"),
    # names and equations
    ("5", "x = 5"),
    ("5", "5 = x"),
    ("x+1", "f(x) = x+1"),
    ("(1,2)", "(x, y) = (1, 2)"),
    ("5", "x \\approx 5"),
    ("2x+4y-3=0", "y = -\\frac12 x + \\frac34"),
    ("x+y=1", "2x+2y=2"),
    ("7", "\\angle A = 7"),
    ("\\frac{\\sqrt2}{2}", "x = y = \\frac{\\sqrt2}{2}"),
    ("\\frac{1+\\sqrt5}{2} \\approx 1.618", "\\frac{1+\\sqrt5}{2}"),
    # sets, tuples, matrices
    ("1, 2", "2, 1"),
    ("\\{1,2\\}", "2 \\text{ and } 1"),
    ("1,2", "x=1 \\text{ or } x=2"),
    ("\\pm 4", "4,-4"),
    ("1 \\pm \\sqrt{2}", "1-\\sqrt2, 1+\\sqrt2"),
    ("5", "\\{5\\}"),
    ("(1/2, 3)", "\\left(0.5,\\ 3\\right)"),
    ("(1,2),(3,4)", "(3,4) \\text{ and } (1,2)"),
    ("(0;1)", "(0,1)"),
    ("(7,2,4)", "(7, 2, 4)"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{bmatrix} 1 \\\\ 2/1 \\\\ \\end{bmatrix}"),
    ("\\begin{pmatrix}1 & 2\\end{pmatrix}", "\\left[\\begin{array}{cc}1&2\\end{array}\\right]"),
    # intervals, inequalities, unions
    ("[0,1)", "0 \\le x < 1"),
    ("(-\\infty,-5)", "k < -5"),
    ("x>5", "5<x"),
    ("x<1", "-x>-1"),
    ("(-\\infty,-4)\\cup(4,\\infty)", "x<-4 \\text{ or } x>4"),
    ("\\{x|-2<x<3\\}", "(-2, 3)"),
    ("(-\\infty,2)\\cup(2,\\infty)", "x \\ne 2"),
    ("\\mathbb{R}", "(-\\infty,\\infty)"),
    ("\\{x \\mid x<1\\} - \\{0\\}", "(-\\infty,0)\\cup(0,1)"),
    ("[0,2]\\cap[1,3]", "[1,2]"),
    ("x>4 \\text{ and } x<6", "(4,6)"),
    ("\\{-1\\}\\cup[0,7)", "[0,7) \\cup \\{-1\\}"),
    ("(-∞, 3]", "x \\leqslant 3"),
    ("\\sin 2 > \\cos 2", "\\sin(2)>\\cos(4/2)"),
    ("a+b<c", "b+a<c"),
    # units, degrees, percent, money
    ("10", "10\\text{ cm}^2"),
    ("10", "10 square units"),
    ("30", "30^\\circ"),
    ("30", "30°"),
    ("\\frac\\pi6", "30^\\circ"),
    ("62.5\\%", "5/8"),
    ("10\\%", "10"),
    ("28\\%", "28 percent"),
    ("\\$5", "5"),
    ("\\$0.50", "0.50 dollars"),
    ("5\\text{ km}", "5 \\mathrm{km}"),
    ("12", "12^{\\mathrm{th}}"),
    ("-60", "-60^\\circ"),
    # words, choices, bases, ratios, times
    ("\\text{Evelyn}", "evelyn."),
    ("yes", "\\text{Yes}"),
    ("C", "\\text{(C)}"),
    ("C", "\\textbf{(C) }"),
    ("C", "\\text{Option } C"),
    ("204_5", "204_{\\text{5}}"),
    ("1:2", "1 \\text{ to } 2"),
    ("\\text{4:30 p.m.}", "4:30 \\text{ p.m.}"),
    ("line segment, circle", "\\text{line segment and circle}"),
]
DIFFERENT = [
    ("7 and 3 ft and 2 in", "3 ft and 2 in"),
    ("5", "5.0000001"),
    ("50", "0.5"),
    ("10^{20}", "10^{20}+1"),
    ("10^{5000}", "10^{5001}"),
    ("1e-400", "1e-500"),
    ("\\frac1{2^{99}}", "\\frac1{2^{98}}"),
    ("5", "4.999999999999999"),
    ("0.3", "0.\\overline{3}"),
    ("52", "5²"),
    ("52", "5₂"),
    ("12", "½"),
    ("1,2", "12"),
    ("32349", "32, 349"),
    ("6\\frac34", "\\frac{18}{4}"),
    ("\\sqrt2", "2"),
    ("4", "4\\sqrt{2}"),
    ("2\\sqrt2", "2\\sqrt[3]{2}"),
    ("\\pi", "3.14159"),
    ("3", "\\pi"),
    ("2", "2+0.00001i"),
    ("12", "12\\pi"),
    ("x+1", "y+1"),
    ("x", "|x|"),
    ("\\frac1{\\sin x}", "\\sin^{-1}x"),
    ("\\sin x^2", "\\sin^2 x"),
    ("(-x)^2", "-x^2"),
    ("x^2", "x^3"),
    ("a_1", "a_2"),
    ("\\vec{v}", "v"),
    ("\\sum_{k=1}^n k", "\\sum_{k=1}^{m} k"),
    ("5", "5x"),
    ("5", "f(5)"),
    ("2x", "2y"),
    ("8", "∞"),
    ("5", "7=5"),
    ("2.5", "1\\text{ cm } 2.5"),
    ("3/4", "3/4=0.8"),
    ("Minimum: 1, Maximum: 3", "Minimum: 3, Maximum: 1"),
    ("5", "x \\ne 5"),
    ("5", "\\neq 5"),
    ("5", "x<5"),
    ("x+y=0", "0=0"),
    ("x=3", "y=3"),
    ("\\ln x^2", "2\\ln x"),
    ("\\sqrt{|x|}", "\\sqrt{x}"),
    ("x+y=1", "x+y=2"),
    ("\\infty", "-\\infty"),
    ("5", "\\frac50"),
    ("1", "I"),
    ("2", "E"),
    ("1, 2", "1"),
    ("1, 2", "1, 2, 3"),
    ("1,1,2", "1,2,2"),
    ("6", "\\pm 6"),
    ("6", "5 \\text{ or } 6"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "\\{1,2\\}"),
    ("(1,2)", "(1,2]"),
    ("(1,2)", "[1,2]"),
    ("(1,2,3)", "(1,(2,3))"),
    ("x<-2, x>2", "x+3"),
    ("\\mathbb{R}", "3>2"),
    ("\\mathbb{R}", "E"),
    ("m>1", "m+1"),
    ("(-\\infty,0)\\cup(0,\\infty)", "\\begin{cases} 1 & x>0 \\end{cases}"),
    ("x>4", "x \\ge 4"),
    ("(2,\\infty)", "x<2"),
    ("x<3", "y<3"),
    ("(-\\infty,0)\\cup(1,2)", "(-\\infty,0)\\cap(1,2)"),
    ("[0,7)", "\\{-1\\}\\cup[0,7)"),
    ("\\mathbb{R}", "\\mathbb{Z}"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1&2\\end{pmatrix}"),
    ("0", "\\emptyset"),
    ("\\begin{pmatrix}1\\end{pmatrix}", "\\begin{vmatrix}1\\end{vmatrix}"),
    ("5\\text{ km}", "5\\text{ m}"),
    ("5\\text{ hours}", "5\\text{ minutes}"),
    ("90\\pi", "90^\\circ"),
    ("204_5", "204_6"),
    ("2:1", "1:2"),
    ("12:00", "1:00"),
    ("4:30", "2:15"),
    ("A", "ABCD"),
    ("A", "B"),
    ("B", "\\text{A or B}"),
    ("5", "\\text{not } 5"),
    ("odd", "\\text{oddd}"),
    ("ellipse", "\\text{not ellipse}"),
    ("5", "\\text{between 4 and 6}"),
    ("10^{10^{10}}", "10^{10^{10}}+1"),
]


@pytest.mark.parametrize("a, b", SAME)
def test_same(a, b):
    assert equal(a, b)


@pytest.mark.parametrize("a, b", DIFFERENT)
def test_different(a, b):
    assert not equal(a, b)


@pytest.mark.parametrize("gold", ["", " ", "\\,", "?", "...", "\\ldots", "-", "\\%"])
@pytest.mark.parametrize("answer", ["", "5", "0", "?", "...", "\\ldots", "\\%"])
def test_empty_and_placeholder_answers_never_match(gold, answer):
    assert accuracy_reward("\\boxed{%s}" % answer, gold) == 0.0


# ---- where the answer is, as models write it ----
@pytest.mark.parametrize(
    "response, gold, score",
    [
        ("### Final Answer\n\n**58**", "58", 1),
        ("So we are done.\n\n**Final Answer:** 58", "58", 1),
        ("## Answer\n\n$58$", "58", 1),
        ("The final result.\n\n**Final answer**\n\n58", "58", 1),
        ("✅ Answer: **58**", "58", 1),
        ("Answer: `58`", "58", 1),
        ("**Answer:**\n$$58$$", "58", 1),
        ("### Final Answer\n\n**59**", "58", 0),
        ("Therefore the answer is 58 apples, all together.", "58", 1),
        ("The answer is 58 since 29*2=58.", "58", 1),
        ("The answer is 58, as required.", "58", 1),
        ("So the final answer is \\$58.", "58", 1),
        ("the answer is $58$ dollars.", "58", 1),
        ("So the answer is $58.50.", "58", 0),
        ("The answer is 59, not 58.", "58", 0),
        ("The answer is not 58.", "58", 0),
        ("I put my answer in \\boxed{}. It is \\boxed{58}", "58", 1),
        ("\\boxed{58}. I used \\boxed as you said.", "58", 1),
        ("\\boxed{58} (given with \\boxed{}, as asked)", "58", 1),
        ("we get $\\boxed 58$", "58", 1),
        ("Hence $\\boxed 5$.", "5", 1),
        ("$\\fbox{58}$", "58", 1),
        ("The roots are $\\boxed{2}$ and $\\boxed{3}$.", "2, 3", 1),
        ("The roots are $x=\\boxed{2}$ and $x=\\boxed{3}$.", "2", 0),
        ("Thus $x=\\boxed{2}$ or $x=\\boxed{3}$", "3", 0),
        ("It is $\\boxed{2}$ or possibly $\\boxed{3}$.", "3", 0),
        ("\\boxed{2} is wrong. \\boxed{3}", "2", 0),
        ("\\boxed{007}, that is \\boxed{007}", "7", 1),
        ("It follows that \\boxed{x>2}.\n\n**Answer: C**", "C", 1),
        ("The answer is (C).", "C", 1),
        ("The correct option is **C**.\n\nAnswer: C", "C", 1),
        ("\\boxed{x>2}\n\nAnswer: A", "C", 0),
        ("9", "9", 0),
        ("We get 4+5=9 and go on", "9", 0),
        ("So it is \\boxed{9", "9", 0),
        ("<think>\\boxed{9} looks right", "9", 0),
        ("<think>4+5=9\n<answer>9</answer>", "9", 1),
        ("<think>4+5=9\n<answer>9 apples</answer>\n<|im_end|>", "9", 1),
        ("<think>4+5=9\n<answer>9</answer> wait no, I think", "9", 0),
        ("reasoning here</think><answer>\\boxed{9}</answer>", "9", 1),
        ("<think>x</think>\n<answer>9 \\end{answer}", "9", 1),
        ("<think>x</think>\n<answer>9</ answer>", "9", 1),
        ("<think>x</think>\n<answer>\nShe has 9 apples left.\n</answer>", "9", 1),
        ("<think>x</think>\n<answer>\nShe has 9 apples and 3 pears.\n</answer>", "9", 0),
        ("<think>x</think>\n<answer>\nIt is not 9.\n</answer>", "9", 0),
        ("<think>x</think>\n<answer>81 / 9 = 9</answer>", "9", 1),
        ("<think>x</think>\n<answer>\n27 miles / 3 mph = 9 hours\n</answer>", "9", 1),
        ("<think>x</think>\n<answer>81 / 9 = 9</answer>", "81", 0),
        ("<think>x</think>\n<answer>Total = 4 + 5 = 9 apples</answer>", "9", 1),
        ("<think>x</think><answer>The probability is $\\boxed{\\frac14}$.</answer>", "1/4", 1),
        ("<think>x</think><answer>The probability is 1/4</answer>", "1/4", 1),
        ("<think>x</think><answer>The probability is \\frac{1}{4}.</answer>", "1/4", 1),
        ("<think>a <think>b</think> c</think> \\boxed{9}", "9", 1),
        ("<think>a</think> \\boxed{8} <think>b</think> \\boxed{9}", "9", 1),
        ("\\boxed{9}<|endoftext|>", "9", 1),
        ("所以答案是9。", "9", 1),
        ("最终答案：9", "9", 1),
        ("答案为 $\\boxed{9}$。", "9", 1),
        ("故答案为：9个", "9", 1),
        ("\\boxed{（3，4）}", "(3,4)", 1),
        ("Thus the answer is 3/8 of the tank.", "3/8", 1),
        ("#### 3/8", "3/8", 1),
        ("The answer is\n\n$$58$$", "58", 1),
        ("The answer is:\n\\[ 58 \\]", "58", 1),
        ("**The answer is 58**", "58", 1),
        ("Therefore, the answer is", "58", 0),
        ("<think>x</think><answer>$33</answer>", "33", 1),
        ("<answer>33</answer> or <answer>34</answer>", "33", 0),
        ("<think>x</think><answer>It is either 33 or 34</answer>", "33", 0),
        ("<think>x</think><answer>It is Monday.</answer>", "\\text{Monday}", 1),
        ("## Final Answer\n**46**", "46", 1),
        ("**Final Answer**: $46$", "46", 1),
        ("Final answer: 46.", "46", 1),
        ("Thus the answer is **46**.", "46", 1),
        ("Therefore, the answer is: $\\boxed{46}$", "46", 1),
        ("The answer: 46", "46", 1),
        ("Answer = 46", "46", 1),
        ("The final answer is 46 cookies in total.", "46", 1),
        ("So, the correct answer is 46.", "46", 1),
        ("The answer is 46; we are done.", "46", 1),
        ("I think the answer is 46 or 47.", "46", 0),
        ("The answer is greater than 46.", "46", 0),
        ("$$\\boxed{46}$$ is what we put in \\boxed{}", "46", 1),
        ("\\fbox{46}", "46", 1),
        ("\\boxed{45}\n\\boxed{46", "46", 0),
        ("\\boxed{5} and \\boxed{7}", "5, 7", 1),
        ("$\\boxed{5}$, $\\boxed{7}$", "5, 7", 1),
        ("Either $\\boxed{5}$ or $\\boxed{7}$", "5", 0),
        ("$x = \\boxed{5}$ or $x = \\boxed{7}$.", "7", 0),
        ("Thus \\boxed{12}.\n\nAnswer: (B)", "B", 1),
        ("The answer is B.", "B", 1),
        ("The answer is **(B)** 12", "B", 1),
        ("<think>\n40+6\n<answer>\n46\n</answer></s>", "46", 1),
        ("<think>\n40+6\n<answer>\nThere are 46 apples in the basket.\n</answer>", "46", 1),
        ("<think>\n40+6\n<answer>46</answer>\nBut wait", "46", 0),
        ("<think>x</think><answer>46<|endoftext|>", "46", 1),
        ("<think>x</think>\n<answer>\n```\n46\n```\n</answer>", "46", 1),
        (
            "<think>x</think>\n<answer> \\boxed{46} </answer>\n<answer> \\boxed{46} </answer>",
            "46",
            1,
        ),
        ("<think>x</think>\n<answer>46</answer>\n<answer>47</answer>", "46", 0),
        ("<think>x</think>\n<answer>40 + 6 = 46</answer>", "46", 1),
        ("<think>x</think>\n<answer>x = 46</answer>", "46", 1),
        ("<think>x</think>\n<answer>92 / 2 = 46 dollars</answer>", "46", 1),
        ("<think>x</think>\n<answer>40 + 6 = 46</answer>", "40", 0),
        ("<think>x</think>\n<answer>The total cost is $46.</answer>", "46", 1),
        ("<think>x</think>\n<answer>The total cost is \\$46.</answer>", "46", 1),
        (
            "<think>x</think>\n<answer>The cost is at most 46 dollars but maybe less.</answer>",
            "46",
            0,
        ),
        ("<think>x</think>\n<answer>From 40 to 46 it grows by 6.</answer>", "46", 0),
        ("<think>x</think>\n<answer>It takes 2.5 hours.</answer>", "2.5", 1),
        ("<think>x</think>\n<answer>The value of x is -3.</answer>", "-3", 1),
        (
            "<think>x</think>\n<answer>The probability is $\\frac{2}{3}$.</answer>",
            "\\frac{2}{3}",
            1,
        ),
        ("<think>x</think>\n<answer>He earns 1,200 dollars a month.</answer>", "1,200", 1),
        ("<think>x</think>\n<answer>The rate is 75%.</answer>", "75\\%", 1),
        ("<think>x</think>\n<answer>It isn't 75.</answer>", "75", 0),
        ("答案是：46", "46", 1),
        ("因此，答案为46。", "46", 1),
        ("所以最终答案是 $\\boxed{46}$ 元。", "46", 1),
        ("\\boxed{46元}", "46", 1),
        ("The answer is 9/16 of a mile.", "9/16", 1),
        ("The answer is \\(46\\).", "46", 1),
        ("The answer is $46$ because $40+6=46$.", "46", 1),
        ("#### 46 apples", "46", 1),
    ],
)
def test_responses(response, gold, score):
    assert accuracy_reward(response, gold) == score


# ---- an answer must be as worked out as the gold ----
@pytest.mark.parametrize(
    "gold, answer, strict, loose",
    [
        ("408", "17\\cdot 24", 0, 1),
        ("\\frac12", "\\cos 60^\\circ", 0, 1),
        ("7", "\\sqrt{49}", 0, 1),
        ("70", "\\binom84", 0, 1),
        ("1500", "1.5\\times10^3", 1, 1),
        ("100", "10^2", 1, 1),
        ("-\\frac34", "-\\frac{6}{8}", 1, 1),
        ("1.5", "1\\frac12", 1, 1),
        ("50\\%", "\\frac12", 1, 1),
        ("60^\\circ", "\\frac\\pi3", 1, 1),
        ("1234567890123", "1234567890122+1", 1, 1),
        ("12x^3+345x^2+6789x+10111", "12x^3+345x^2+5000x+1789x+10111", 0, 1),
        ("\\{1234568,2345678,1\\}", "\\{1234567+1,2345678,1\\}", 0, 1),
        ("x=5", "3x+1=16", 0, 1),
        ("x>5", "2x-3>7", 0, 1),
        ("[-2,3)", "-3\\le 2x+1<7", 0, 1),
        ("x=5", "x=\\frac{10}{2}", 1, 1),
        ("x=5", "x=2+3", 0, 1),
        ("x<1", "-x>-1", 1, 1),
        ("(1,3)", "|x-2|<1", 1, 1),
        ("y=2x-3", "2x-y=3", 1, 1),
        ("y=\\frac{7-2x}{3}", "2x+3y=7", 0, 1),
        ("\\sqrt{48}", "4\\sqrt3", 1, 1),
        ("x+y=5", "5", 0, 0),
        ("5", "x+y=5", 1, 1),
        ("x^2+y^2=25", "25", 0, 0),
        ("0", "x^2-4x-2=0", 0, 0),
        ("0", "\\cos A=0", 1, 1),
        ("\\cos A=\\frac12", "\\frac12", 1, 1),
    ],
)
def test_worked_out(gold, answer, strict, loose):
    assert accuracy_reward("\\boxed{%s}" % answer, gold) == strict
    assert accuracy_reward("\\boxed{%s}" % answer, gold, strict_answers=False) == loose


@pytest.mark.parametrize(
    "problem, gold, answer, score",
    [
        ("Expand $(x+1)^2$.", "x^2+2x+1", "(x+1)^2", 0),
        ("Expand $(x+1)^2$.", "x^2+2x+1", "1+2x+x^2", 1),
        ("Expand $\\left( x + 1 \\right)^2$.", "x^2+2x+1", "(x+1)^{2}", 0),
        ("Is $(x+1)^2$ or $x^2+2x+1$ ...", "x^2+2x+1", "(x+1)^2", 1),  # the gold stands there too
        ("It rains with probability 0.5.", "\\frac12", "0.5", 1),
        ("Is it A or B?", "A", "A", 1),
        ("The point $(2/4, 1)$ is reflected.", "(\\frac12, 1)", "(2/4, 1)", 1),
        ("Simplify $\\frac{3}{\\sqrt{27}}$.", "\\frac{\\sqrt3}{3}", "\\frac{3}{\\sqrt{27}}", 0),
        ("Let $2x+10$ be a length.", "1+2x", "2x+1", 1),  # a part of a number is no copy
    ],
)
def test_copies_of_the_problem(problem, gold, answer, score):
    assert accuracy_reward("\\boxed{%s}" % answer, gold, problem) == score
    for written in ("\\(%s\\)", "\\[%s\\]", "$%s$", "\\left(%s\\right)", "y = %s"):
        if not score:
            response = f"<answer>{written % answer}</answer>"
            assert accuracy_reward(response, gold, problem) == score, written
    assert accuracy_reward("\\boxed{%s}" % answer, gold, problem, strict_answers=False) == 1


# ---- several answers ----
@pytest.mark.parametrize(
    "response, gold, score",
    [
        ("\\boxed{1} and \\boxed{2}", "1, 2", 1),
        ("\\boxed{1}, \\boxed{2}", "1", 0),
        ("\\boxed{1} or \\boxed{2}", "1, 2", 0),
        ("\\boxed{1}, \\boxed{2}, \\boxed{3}", "1, 2", 0),
        ("\\boxed{%s}" % ", ".join(map(str, range(1000))), "204", 0),
        (" ".join("\\boxed{%d}" % n for n in range(999)), "5", 0),
        ("<answer>3 4 5 6</answer>", "5", 0),
        ("<answer>The answer is one of 3, 4, 5</answer>", "5", 0),
        ("<answer>5</answer> <answer>6</answer>", "5", 0),
        ("<answer>7</answer> actually 5", "5", 0),
        ("The answer is 5. \\boxed{6}", "5", 0),
        ("\\boxed{6}. On checking it is \\boxed{5}", "5", 1),
    ],
)
def test_several_answers(response, gold, score):
    assert accuracy_reward(response, gold) == score


# ---- nothing hangs, raises or runs ----
HOSTILE = [
    "9^{9^{9^9}}",
    "10^{10^{10}}",
    "((((10!)!)!)!)!",
    "1000000000!",
    "9**9**9**9",
    "e^{e^{e^{e^{10}}}}",
    "(1+10^{-9})^{10^{18}}",
    "(x+1)^{100000}",
    "(x+y+z+w)^{200}-(x+y+z+w)^{200}",
    "x^{x^{x^{x^x}}}",
    "\\binom{10^9}{10^8}",
    "2^{-10^{9}}",
    "\\sin(10^{10^6})",
    "\\tan(\\tan(\\tan(\\tan x)))",
    "1" * 5000,
    "9" * 2900 + "!",
    "{" * 5000 + "5" + "}" * 5000,
    "(" * 5000 + "5",
    "\\frac{1}" * 700 + "2",
    "\\sqrt" * 400 + "2",
    "-" * 2500 + "5",
    "-" * 100_000 + "5",
    "1+" * 1400 + "1",
    "x=" * 1000 + "4",
    "\\frac" * 500,
    "2^" * 1000 + "2",
    "|" * 2000,
    "!" * 2000,
    "\\{" * 2000,
    "1," * 1400 + "1",
    "1<" * 900 + "2",
    "\\begin{pmatrix}" + "1&" * 900 + "1\\end{pmatrix}",
    "a" * 3000,
    "\\text{" * 700,
    "_" * 2000,
    "\\sum_" * 500,
    "3000!" * 500,
    "2^{59000}" * 300,
    "\x00\ud800",
    "٥",
    "①",
    "\u202e24",
    "__import__('os').system('touch {}')",
    "open('{}','w')",
    "(lambda: open('{}','w'))()",
    "\\immediate\\write18{touch {}}",
    "[c for c in ().__class__.__bases__]",
]


@pytest.mark.parametrize("answer", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_are_quick_and_wrong(answer, tmp_path):
    marker = tmp_path / "executed"
    answer = answer.replace("{}", str(marker))
    start = time.process_time()
    for gold in ("5", "x^2+1", "(1,2)", "\\sqrt{2}", answer[:-1] or "1"):
        assert accuracy_reward("\\boxed{%s}" % answer, gold) in (0.0, 1.0)
    assert accuracy_reward("\\boxed{%s}" % answer, "7/3") == 0.0
    assert time.process_time() - start < 2.0
    assert not marker.exists()


@pytest.mark.parametrize(
    "text",
    [
        " " * 1_000_000,
        "\\" * 200_000,
        "\\boxed{" * 30_000,
        "\\boxed{5}" * 100_000,
        "<think>" * 50_000,
        "{" * 1_000_000,
        "<answer>" * 50_000 + "5" + "</answer>" * 50_000,
        "the answer is " * 70_000,
        "</think>" * 100_000,
        "$" * 1_000_000,
        "\\boxed{" + "{" * 500_000 + "}" * 500_000 + "}",
        "\\boxed{0." + "0" * 300_000 + "1}",
        "answer:" * 100_000,
    ],
)
def test_long_texts_take_linear_time(text):
    start = time.process_time()
    accuracy_reward(text, "5")
    format_reward(text)
    assert time.process_time() - start < 2.0


@FAST
@given(st.text(max_size=80), st.text(max_size=40))
def test_any_text(response, gold):
    for text in (response, "\\boxed{%s}" % response, "<answer>%s</answer>" % response):
        assert accuracy_reward(text, gold) in (0.0, 1.0)
        assert format_reward(text) in (0.0, 1.0)
    assert gold_fault(gold) is None or isinstance(gold_fault(gold), str)


PIECES = (
    "\\frac",
    "\\sqrt",
    "{",
    "}",
    "(",
    ")",
    "[",
    "]",
    "1",
    "2.5",
    "x",
    "y",
    "+",
    "-",
    "^",
    "_",
    ",",
    ";",
    "=",
    "<",
    "|",
    "\\{",
    "\\}",
    "\\pi",
    "\\infty",
    "\\pm",
    "\\cup",
    "\\text{ or }",
    "\\text{cm}",
    "!",
    "\\sin",
    "\\log",
    " ",
    "\\le",
    "\\begin{pmatrix}",
    "\\end{pmatrix}",
    "&",
    "\\\\",
    ":",
    "\\%",
    "^\\circ",
    "\\in",
    "e",
    "i",
    "\\sum",
    "\\overline",
    "'",
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(PIECES), max_size=14).map("".join),
    st.lists(st.sampled_from(PIECES), max_size=14).map("".join),
)
def test_any_latex_is_symmetric(a, b):
    forth = accuracy_reward(f"<answer>{a}</answer>", b, strict_answers=False)
    back = accuracy_reward(f"<answer>{b}</answer>", a, strict_answers=False)
    assert forth == back or "=" in a + b  # x + y = 5 answers 5; as a gold it is an equation


# ---- rewriting rules: a gold accepts itself under each of them ----
NUMBERS = st.integers(-(10**6), 10**6)
POSITIVE = st.integers(1, 10**4)
REWRITES = {
    "spaced": lambda n, d: (f"{n}", f" {n} "),
    "boxed dollar": lambda n, d: (f"{n}", f"${n}$"),
    "thousands": lambda n, d: (f"{n}", f"{n:,}"),
    "braces": lambda n, d: (f"{n}", f"{n:,}".replace(",", "{,}")),
    "point zero": lambda n, d: (f"{n}", f"{n}.0"),
    "named": lambda n, d: (f"{n}", f"x = {n}"),
    "unit": lambda n, d: (f"{n}", f"{n} \\text{{ units}}"),
    "fraction": lambda n, d: (f"{n}/{d}", f"\\frac{{{n}}}{{{d}}}"),
    "unreduced": lambda n, d: (f"{n}/{d}", f"\\dfrac{{{7 * n}}}{{{7 * d}}}"),
    "recip": lambda n, d: (f"{n}/{d}", f"{n}\\cdot {d}^{{-1}}"),
    "decimal": lambda n, d: (f"\\frac{{{n}}}{{1000}}", f"{n / 1000:.3f}"),
    "root": lambda n, d: (f"{abs(n)}", f"\\sqrt{{{n * n}}}"),
    "under root": lambda n, d: (f"{d}\\sqrt{{{d + 1}}}", f"\\sqrt{{{d * d * (d + 1)}}}"),
    "pair": lambda n, d: (f"({n},{d})", f"\\left( {n} ,\\; {d} \\right)"),
    "set": lambda n, d: (f"{n}, {d}.5", f"\\{{{d}.5, {n}\\}}"),
    "sum": lambda n, d: (f"x+{d}", f"{d}+x"),
    "square": lambda n, d: (f"(x+{d})^2", f"x^2+{2 * d}x+{d * d}"),
    "interval": lambda n, d: (f"({n}, \\infty)", f"x > {n}"),
    "flipped": lambda n, d: (f"{d}x+y=1", f"1={d}x+y"),
    "power": lambda n, d: (f"{d}^3", f"{d**3}"),
    "percent": lambda n, d: (f"{d}\\%", f"{d}%"),
    "degree": lambda n, d: (f"{d}^\\circ", f"{d}°"),
    "mixed": lambda n, d: (f"{d}\\frac{{3}}{{7}}", f"\\frac{{{7 * d + 3}}}{{7}}"),
    "scientific": lambda n, d: (f"{d}e-7", f"{d} \\times 10^{{-7}}"),
    "matrix": lambda n, d: (
        f"\\begin{{pmatrix}}{n}\\\\{d}\\end{{pmatrix}}",
        f"\\begin{{bmatrix}} {n} \\\\ {d} \\end{{bmatrix}}",
    ),
}


@pytest.mark.parametrize("rule", REWRITES)
@settings(max_examples=25, deadline=None)
@given(n=NUMBERS, d=POSITIVE)
def test_rewriting_keeps_the_answer(rule, n, d):
    gold, rewritten = REWRITES[rule](n, d)
    assert equal(gold, rewritten)
    assert equal(gold, gold)


@FAST
@given(NUMBERS, POSITIVE, st.integers(1, 9))
def test_another_number_is_another_answer(n, d, step):
    assert not equal(f"{n}", f"{n + step}")
    assert not equal(f"\\frac{{{n}}}{{{d}}}", f"\\frac{{{n * 9 + step}}}{{{d * 9}}}")
    assert not equal(f"\\sqrt{{{d}}}+{n}", f"\\sqrt{{{d}}}+{n + step}")
    assert not equal(f"x^2+{n}x", f"x^2+{n + step}x")


@FAST
@given(st.binary(max_size=200))
def test_random_bytes(data):
    text = data.decode("latin-1")
    assert accuracy_reward("\\boxed{" + text + "}", "5") in (0.0, 1.0)


# ---- the labelled cases, where they are ----
def test_dev_set_has_no_false_positive_and_hardly_a_false_negative():
    wrong = {0: 0, 1: 0}
    items = [item for item in load("verifier_dev.jsonl") if item["label"] is not None]
    for item in items:
        wrong[item["label"]] += accuracy_reward(item["response"], item["gold"]) != item["label"]
    assert wrong[0] == 0
    assert wrong[1] <= len(items) // 500


def test_adversarial_set():
    wrong = [
        item["id"]
        for item in load("adversarial_dev.jsonl")
        if item["label"] is not None
        and accuracy_reward(item["response"], item["gold"]) != item["label"]
    ]
    assert len(wrong) <= 2


def test_equivalence_is_symmetric_on_the_dev_golds():
    golds = list(dict.fromkeys(item["gold"] for item in load("verifier_dev.jsonl")))[::4]
    for a, b in zip(golds, golds[1:]):
        equal(a, b)
        assert not a.strip() or gold_fault(a) or equal(a, a), a


@pytest.mark.parametrize(
    "name", ["math500_dev", "minerva_dev", "olympiadbench_dev", "aime24", "amc23", "gsm8k_train"]
)
def test_golds_parse_or_are_reported(name):
    golds = [item["solution"] for item in load(name + ".jsonl")]
    reported = [gold for gold in golds if gold_fault(gold)]
    assert len(reported) <= 0.08 * len(golds)
    assert all(accuracy_reward("\\boxed{%s}" % gold, gold) == 1.0 for gold in golds)


@pytest.mark.parametrize(
    "gold, answer",
    [
        ("72", "72"),
        ("\\boxed{7}", "7"),
        ("48/2 = <<48/2=24>>24\n#### 72", "72"),
        ("so $x = \\boxed{\\frac{1}{2}}$, which is right.", "\\frac{1}{2}"),
        ("x #### 1 #### 2", "2"),
        ("\\text{no box}", "\\text{no box}"),
        ("", ""),
    ],
)
def test_gold_answer(gold, answer):
    assert gold_answer(gold) == answer
    assert not answer or accuracy_reward("\\boxed{%s}" % answer, gold) == 1.0


@pytest.mark.parametrize(
    "gold, why",
    [
        ("5", None),
        ("\\text{Evelyn}", None),
        ("$x^2$", None),
        ("", "no answer"),
        ("  ", "no answer"),
        ("1" * 4000, "longer"),
        ("48/2 = 24\n#### 72", None),
        ("so it is $\\boxed{\\frac12}$.", None),
        ("\\mystery{x}", "not read"),
    ],
)
def test_gold_fault(gold, why):
    reason = gold_fault(gold)
    assert reason is None if why is None else why in reason


# ---- format ----
GOOD = "<think>\nwhy\n</think>\n<answer>\n5\n</answer>"


@pytest.mark.parametrize(
    "text, score",
    [
        (GOOD, 1),
        (GOOD.replace("\n", ""), 1),
        (GOOD + "\n", 1),
        ("", 0),
        ("text " + GOOD, 0),
        (GOOD + " text", 0),
        (GOOD + GOOD, 0),
        (GOOD.replace("5", " "), 0),
        (GOOD.replace("why", ""), 0),
        (GOOD.replace("</think>", ""), 0),
        (GOOD.replace("<answer>", ""), 0),
        (GOOD.replace("5", "<answer>5</answer>"), 0),
        (GOOD.replace("why", "<answer>5</answer>"), 0),
        ("<answer>5</answer><think>why</think>", 0),
        (GOOD.replace("think", "Think"), 0),
        (GOOD.replace("</think>", "</think> so"), 0),
    ],
)
def test_format(text, score):
    assert format_reward(text) == score
    assert format_reward(text, "any gold") == score


def test_format_dev_set():
    assert all(
        format_reward(item["response"]) == item["label"] for item in load("format_dev.jsonl")
    )


# ---- threads, registry, pool ----
def test_works_from_any_thread():
    pairs = [("\\sqrt{8}", "2\\sqrt2"), ("\\sin^2x+\\cos^2x+x", "1+x"), ("[0,1)", "0\\le x<1")] * 5
    results = []
    threads = [
        threading.Thread(target=lambda: results.append([equal(a, b) for a, b in pairs]))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[True] * len(pairs)] * 4


def test_importing_needs_no_torch_and_no_sympy():
    heavy = ("torch", "sympy", "vllm", "numpy")
    code = f"import sys, reward; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


USER = """
import os, signal, subprocess, sys, time

def length(response, gold):
    if response == "hang":
        time.sleep(60)
    if response == "exit":
        os._exit(3)
    if response == "raise":
        raise KeyError(response)
    if response == "nan":
        return float("nan")
    if response == "slow":
        time.sleep(0.4)
    if response == "deep":
        return 9 ** 9 ** 9
    print(response)
    return float(len(response))

def pid(response, gold):
    time.sleep(0.05)
    return float(os.getpid())

def forks(response, gold):
    if response == "fork":
        subprocess.Popen(["sleep", "61.75"])  # it keeps the pipe of the replies
        os._exit(0)
    if response == "fork and hang":
        subprocess.Popen(["sleep", "61.75"])
        time.sleep(60)
    if response == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if response == "exit 1":
        os._exit(1)
    return 1.0

def odd(response, gold):
    values = {"none": None, "inf": float("inf"), "huge": 1e308, "list": [1.0], "true": True}
    return values.get(response, 0.5)

def see(response, gold, problem, level=0):
    return float(len(problem) + level)

def see_all(response, gold, **row):
    return float(len(row))

def lacks(response, gold, no_such_column):
    return 1.0

def never(response, gold):
    time.sleep(60)

def nan(response, gold):
    return float("nan")

def trl(completions, **kwargs):
    return [0.0 for completion in completions]

def trl_prompts(prompts, completions):
    return [0.0 for completion in completions]

def heavy(response, gold):
    names = ("torch", "transformers", "pydantic", "numpy", "sympy", "vllm")
    return float(sum(name in sys.modules for name in names))
"""


@pytest.fixture
def user(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(USER)
    return str(path)


def test_resolve_reward(user):
    assert resolve_reward("accuracy") is accuracy_reward
    assert resolve_reward("format") is format_reward
    assert resolve_reward(user + ":length")("abc", "") == 3.0
    for name in ("nothing", user + ":nothing", "no/file.py:f", "json:loads", ""):
        with pytest.raises(UserError, match="accuracy"):
            resolve_reward(name)
    with pytest.raises(UserError):
        VerifierPool(["accuracy", "nothing"], workers=1)


@pytest.fixture
def make_pool():
    pools = []

    def make(*args, **kwargs):
        pools.append(VerifierPool(*args, **kwargs))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def test_pool_scores_groups(make_pool):
    pool = make_pool(["accuracy", "format"], workers=2)
    assert pool.poll(wait=True) == []
    for n in range(20):
        pool.submit(("key", n), [GOOD, "\\boxed{6}", GOOD, "\ud800"], str(5 + n % 2))
    done = dict(pool.poll(wait=True))
    assert pool.poll(wait=True) == [] and len(done) == 20
    assert done["key", 0] == [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    assert done["key", 1] == [[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    assert pool.stats == {"timeouts": 0, "errors": 0}
    pool.submit(0, ["\\boxed{5}"], "5")
    while not (ready := pool.poll(wait=False)):
        time.sleep(0.001)
    assert ready == [(0, [[1.0, 0.0]])]
    pool.close()
    pool.close()


def test_pool_survives_what_a_function_does(make_pool, user):
    pool = make_pool([user + ":length", "accuracy"], workers=2, timeout=0.5)
    for bad in ("hang", "exit", "raise", "nan", "deep"):
        pool.submit(bad, ["ab", bad, "abc"], "5")
    done = dict(pool.poll(wait=True))
    assert all(rewards == [[2.0, 0.0], [0.0, 0.0], [3.0, 0.0]] for rewards in done.values())
    assert len(done) == 5
    assert pool.stats == {"timeouts": 2, "errors": 3}


def output(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout


def workers_here() -> set[int]:
    me = os.getpid()
    listing = output("ps", "-ww", "--ppid", str(me), "-o", "pid=,args=")  # -ww: nothing is cut
    return {int(line.split()[0]) for line in listing.splitlines() if "reward.py" in line}


OTHERS = set()  # workers of pools that tests before this file left open


@pytest.fixture(scope="module", autouse=True)
def others():
    OTHERS.update(workers_here())


def children() -> list[int]:
    """Workers that this file's tests have started."""
    return sorted(workers_here() - OTHERS)


def test_killing_a_worker_loses_nothing(make_pool, user):
    pool = make_pool([user + ":length"], workers=2, timeout=5.0)
    for n in range(12):
        pool.submit(n, ["slow", "a" * n, "slow", "b" * (n + 1)], "5")
    time.sleep(0.2)
    victims = children()
    assert len(victims) == 2
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    done = dict(pool.poll(wait=True))
    assert done == {n: [[4.0], [float(n)], [4.0], [n + 1.0]] for n in range(12)}
    assert pool.stats == {"timeouts": 0, "errors": 0}
    assert len(children()) == 2


def test_a_text_that_kills_twice_scores_zero(make_pool, user):
    pool = make_pool([user + ":length"], workers=1)
    pool.submit("group", ["exit", "ab"], "5")
    assert pool.poll(wait=True) == [("group", [[0.0], [2.0]])]
    assert pool.stats == {"timeouts": 0, "errors": 1}


def test_workers_die_with_their_parent(user):
    code = (
        "import reward, os, sys\n"
        f"pool = reward.VerifierPool([{user + ':pid'!r}], workers=1)\n"
        "pool.submit(0, ['a'], '')\n"
        "print(int(pool.poll(True)[0][1][0][0]), flush=True)\n"
        "os._exit(0)"
    )
    pid = int(output(sys.executable, "-c", code))
    for _ in range(100):
        state = output("ps", "-o", "stat=", "-p", str(pid))
        if not state.strip() or state.startswith("Z"):
            return
        time.sleep(0.05)
    pytest.fail("the worker outlived its parent")


def test_close_with_work_left(make_pool, user):
    pool = make_pool([user + ":length"], workers=1)
    for n in range(50):
        pool.submit(n, ["slow"], "")
    start = time.perf_counter()
    pool.close()
    assert time.perf_counter() - start < 3.0
    assert children() == []


@pytest.mark.parametrize(
    "what, kind",
    [
        ("stop", "timeouts"),
        ("fork and hang", "timeouts"),
        ("fork", "errors"),
        ("exit 1", "errors"),
    ],
)
def test_the_caller_keeps_the_deadline(make_pool, user, what, kind):
    pool = make_pool([user + ":forks"], workers=1, timeout=0.4)
    start = time.perf_counter()
    pool.submit("group", ["a", what, "b"], "5")
    assert pool.poll(wait=True) == [("group", [[1.0], [0.0], [1.0]])]
    assert time.perf_counter() - start < 5.0
    assert pool.stats == {"timeouts": 0, "errors": 0} | {kind: 1}
    assert pool.error
    pool.close()
    assert children() == []
    assert "61.75" not in output("ps", "-ww", "-eo", "args=")  # no orphan is left


def test_a_stopped_worker_does_not_stop_a_long_request(make_pool, user):
    pool = make_pool([user + ":forks"], workers=1, timeout=0.4)
    for worker in children():
        os.kill(worker, signal.SIGSTOP)
    pool.submit("group", ["a" * 2_000_000], "5")  # more than a pipe holds
    assert pool.poll(wait=True) == [("group", [[0.0]])]
    assert pool.stats == {"timeouts": 1, "errors": 0}


def test_one_broken_reward_leaves_the_others_alone(make_pool, user):
    pool = make_pool(["accuracy", user + ":odd"], workers=1)
    texts = ["\\boxed{5}", "none", "inf", "huge", "list", "true"]
    pool.submit("group", texts, "5")
    rewards = [[1.0, 0.5], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 1.0]]
    assert pool.poll(wait=True) == [("group", rewards)]
    assert pool.stats == {"timeouts": 0, "errors": 4}
    assert "float" in pool.error


ROW = {"problem": "What is 2+3?", "level": 4, "secret": "x", "strict_answers": False}


def test_rewards_see_the_row(make_pool, user):
    pool = make_pool(["accuracy", user + ":see"], workers=2)
    pool.submit("group", ["\\boxed{2+3}"] * 2, "5", ROW)
    pool.submit("strict", ["\\boxed{2+3}"] * 2, "5", ROW | {"strict_answers": True})
    assert dict(pool.poll(wait=True)) == {"group": [[1.0, 16.0]] * 2, "strict": [[0.0, 16.0]] * 2}
    pool = make_pool([user + ":see_all"], workers=1)
    pool.submit("group", ["a"], "5", ROW)
    pool.submit("names", ["a"], "5", ROW | {"response": "x", "gold": "y"})  # columns so named
    assert pool.poll(wait=True) == [("group", [[4.0]]), ("names", [[4.0]])]


def test_a_group_is_sent_once(make_pool, user, monkeypatch):
    sent = []
    ask = reward.Worker.ask
    monkeypatch.setattr(
        reward.Worker,
        "ask",
        lambda self, request, seconds: (sent.append(request), ask(self, request, seconds))[1],
    )
    pool = make_pool([user + ":see_all"], workers=1)
    pool.submit("group", ["a", "b", "c"], "5", {"problem": "long " * 1000})
    pool.poll(wait=True)
    assert sum(request.count(b"long") for request in sent) == 1000
    assert sum(len(request) < 10 for request in sent) >= 2


def test_probe(make_pool, user):
    examples = [("5", ROW)] * 6
    make_pool(["accuracy", "format", user + ":see"], workers=1).probe(examples)
    pool = make_pool(["accuracy", user + ":lacks"], workers=1)
    with pytest.raises(UserError, match="lacks.*no_such_column"):
        pool.probe(examples)
    pool = make_pool([user + ":odd", user + ":length"], workers=1, timeout=0.4)
    pool.probe([("ab", ROW), ("hang", ROW), ("inf", ROW)])  # some of it works
    assert pool.stats == {"timeouts": 0, "errors": 0} and pool.error is None
    pool.probe([])
    for name, why in (("never", "no reply"), ("nan", "nan")):
        pool = make_pool([f"{user}:{name}"], workers=2, timeout=0.2)
        with pytest.raises(UserError, match=f"{name}.*{why}"):
            pool.probe([("5", ROW)])


@pytest.mark.parametrize("function", ["trl", "trl_prompts"])
def test_a_reward_of_trl_is_refused_with_its_adapter(user, function):
    with pytest.raises(UserError, match=r"TRL; wrap it: def mine\(response, gold"):
        VerifierPool([f"{user}:{function}"], workers=1)


def test_the_adapter_gives_lists_of_one():
    def theirs(completions, prompts, answer, **more):
        return [float(text == right) for text, right in zip(completions, answer)]

    scope = {"theirs": theirs}
    exec(reward.ADAPTER, scope)
    assert scope["mine"]("42", "", problem="6 * 7?", answer="42") == 1.0


def test_a_file_that_exits_when_imported_is_refused(tmp_path):
    for name, text in (("quits", "import sys; sys.exit(0)"), ("dies", "import os; os._exit(0)")):
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        with pytest.raises(UserError):
            VerifierPool([f"{path}:f"], workers=1)
    assert children() == []


def test_a_worker_loads_no_heavy_library(make_pool, user):
    pool = make_pool(["accuracy", "format", user + ":heavy"], workers=1)
    pool.submit(0, ["\\boxed{x<1}"], "(-\\infty,1)")
    assert pool.poll(wait=True) == [(0, [[1.0, 0.0, 0.0]])]

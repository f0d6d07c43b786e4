"""Statements that make a reader stop, counted by kind, with their places. By hand, no test:

python tests/plain.py [FILE ...]              by default the five modules and configs/
"""

import ast
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONGEST = 45  # lines of a function
MUTATORS = {
    *("add", "append", "appendleft", "clear", "discard", "extend", "insert", "kill", "pop"),
    *("popitem", "popleft", "remove", "reverse", "setattr", "setdefault", "sort", "update"),
    *("mkdir", "write", "write_text", "write_bytes", "print"),
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
SCOPES = (*FUNCTIONS, ast.Lambda, ast.ClassDef)


def name_of(node):
    """x of x, a.x, x() and a.x()."""
    if isinstance(node, ast.Call):
        node = node.func
    return getattr(node, "id", getattr(node, "attr", ""))


def is_boolean(node):
    if isinstance(node, ast.BoolOp):  # `x or 0` is none
        return all(map(is_boolean, node.values))
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.Not)
    is_call = isinstance(node, ast.Call) and name_of(node) in ("bool", "any", "all", "isinstance")
    is_fact = name_of(node).startswith(("is_", "has_"))
    return isinstance(node, ast.Compare) or is_call or is_fact


def inside(node):
    """Its parts, without those of functions and classes defined in it."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, SCOPES):
            yield from inside(child)


def mutates(node):
    calls = [part for part in ast.walk(node) if isinstance(part, ast.Call)]
    return not MUTATORS.isdisjoint(map(name_of, calls))


def ends(body):
    """Is the end of these statements out of reach?"""
    last = body[-1]
    if isinstance(last, ast.If):
        return bool(last.orelse) and ends(last.body) and ends(last.orelse)
    if isinstance(last, ast.With):
        return ends(last.body)
    if isinstance(last, ast.Try):
        return all(ends(part) for part in [last.body, *(one.body for one in last.handlers)])
    if isinstance(last, ast.While):
        has_break = any(isinstance(part, ast.Break) for part in inside(last))
        return getattr(last.test, "value", False) is True and not has_break
    return isinstance(last, (ast.Return, ast.Raise))


def of_function(node):
    returns = [part.value for part in inside(node) if isinstance(part, ast.Return)]
    gives = any(value is not None for value in returns)
    if gives and (None in returns or not ends(node.body)):
        yield "value on one path, nothing on another"
    if node.end_lineno - node.lineno >= LONGEST:
        yield f"function over {LONGEST} lines"


def of_signature(node):
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    arguments += [one for one in (node.args.vararg, node.args.kwarg) if one]
    bare = [one for one in arguments if not one.annotation and one.arg not in ("self", "cls")]
    if bare or (not node.returns and node.name != "__init__"):
        yield "public function without annotations"


def of_expression(node):
    if isinstance(node, ast.BinOp) and (is_boolean(node.left) or is_boolean(node.right)):
        if not isinstance(node.op, (ast.BitAnd, ast.BitOr, ast.BitXor)):
            yield "arithmetic with a boolean"
    if isinstance(node, ast.Call):
        name = name_of(node)
        if name in ("int", "float") and any(map(is_boolean, node.args)):
            yield "number made of a boolean"
        if name == "property" and isinstance(node.args[0], ast.Lambda):
            yield "property of a lambda"
        numbers = [type(getattr(one, "value", None)) for one in node.args]
        if numbers.count(float) > 1 or numbers.count(int) + numbers.count(float) > 3:
            yield "numbers by position"
    if isinstance(getattr(node, "value", None), ast.Dict):
        if isinstance(node, ast.Subscript) or getattr(node, "attr", "") == "get":
            yield "dictionary as a switch"
    if isinstance(node, (ast.If, ast.While, ast.IfExp, ast.Assert)) and mutates(node.test):
        yield "side effect in a condition"
    if isinstance(node, COMPREHENSIONS):
        if mutates(node) or any(isinstance(part, ast.NamedExpr) for part in ast.walk(node)):
            yield "side effect in a comprehension"
        if sum(1 + len(one.ifs) for one in node.generators) > 2:
            yield "comprehension of three clauses"
    if isinstance(node, ast.Compare):
        if any(isinstance(part, ast.IfExp) for part in [node.left, *node.comparators]):
            yield "conditional in a comparison"
    if isinstance(node, ast.IfExp):
        parts = [node.body, node.test, node.orelse]
        if any(isinstance(part, ast.IfExp) for part in parts):
            yield "conditional in a conditional"
        if isinstance(node.body, (ast.Compare, ast.BoolOp)) or isinstance(node.orelse, ast.BoolOp):
            yield "a == b if c else d"


def of_assignment(node, methods):
    if isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Attribute) and target.attr in methods:
                yield "assignment in the place of a method"


def of_or(node, source):
    """`a or b and c`: an `and` without brackets in an `or`."""
    lines = source.splitlines(keepends=True)
    for part in node.values:
        if isinstance(part, ast.BoolOp):
            before = "".join(lines[: part.lineno - 1]) + lines[part.lineno - 1][: part.col_offset]
            after = lines[part.end_lineno - 1][part.end_col_offset :]
            after += "".join(lines[part.end_lineno :])
            if not (before.rstrip().endswith("(") and after.lstrip().startswith(")")):
                yield "and and or without brackets"


def stops(source):
    """(kind, line) of all that a file has."""
    tree = ast.parse(source)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    defined = [node for one in [tree, *classes] for node in one.body]
    methods = {node.name for one in classes for node in one.body if isinstance(node, FUNCTIONS)}
    for node in defined:
        is_open = isinstance(node, FUNCTIONS) and not node.name.startswith("_")
        if is_open or getattr(node, "name", "") == "__init__":
            yield from ((kind, node.lineno) for kind in of_signature(node))
        if isinstance(node, ast.Assign) and name_of(node.value) in methods:
            if not isinstance(node.value, ast.Call):
                yield "method by another name", node.lineno
    for node in ast.walk(tree):
        kinds = [*of_expression(node), *of_assignment(node, methods)]
        if isinstance(node, FUNCTIONS):
            kinds += of_function(node)
        if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
            kinds += of_or(node, source)
        yield from ((kind, node.lineno) for kind in kinds)
    for number, line in enumerate(source.splitlines(), 1):
        if "# fmt: " in line:
            yield "# fmt: skip", number


def main():
    paths = [Path(name) for name in sys.argv[1:]]
    paths = paths or [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "configs").glob("*.py"))]
    found = defaultdict(list)
    for path in paths:
        # column offsets are in bytes
        source = path.read_text("utf-8").encode("ascii", "replace").decode()
        for kind, line in stops(source):
            found[kind].append(f"{path.name}:{line}")
    for kind, places in sorted(found.items()):
        print(f"{len(places):3} {kind}: {' '.join(places)}")
    print(sum(map(len, found.values())), "in all")


if __name__ == "__main__":
    main()

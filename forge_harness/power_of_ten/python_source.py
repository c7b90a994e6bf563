"""Counts over a Python file, from its syntax tree."""

from __future__ import annotations

import ast
import re
import tokenize
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path

from .measures import Count, Place
from .python_calls import Function, calls_within, dotted
from .rules import CHAIN_LENGTH, CHECKED_LINES, CHECKS_A_FUNCTION, FUNCTION_LINES

_ENDLESS = frozenset({"itertools.count", "itertools.cycle", "count", "cycle"})
_BOUNDED = {
    **dict.fromkeys(("Queue", "LifoQueue", "PriorityQueue", "lru_cache"), "maxsize"),
    "deque": "maxlen",
}
_UNBOUNDED = frozenset({"SimpleQueue", "cache"})
_BARE_CACHES = frozenset({"cache", "functools.cache", "lru_cache", "functools.lru_cache"})
"""Decorators that are no calls; `lru_cache` then has its default bound of 128."""
_MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
_MAKES_MUTABLE = frozenset(
    {"list", "dict", "set", "bytearray", "defaultdict", "OrderedDict", "Counter", "deque"}
)
_RUN_TIME_CODE = frozenset({"eval", "exec", "compile", "__import__"})
_BROAD = ("Exception", "BaseException")
_UNSAFE = frozenset({"ctypes", "cffi", "pickle", "marshal", "mmap", "shelve", "dill"})
# Of ruff and flake8, which read it in any case: on a line, and in front of it for the whole file.
_NOQA = r"(?i:(?P<whole>(ruff|flake8):\s*)?noqa)"
_SILENCED = re.compile(rf"#\s*({_NOQA}|type:\s*ignore)(?!\s*[:\[(])\s*($|[^:\[])")
_SUPPRESSION = re.compile(rf"#\s*({_NOQA}|type:\s*ignore|nosec)")


UNREADABLE = (
    *(SyntaxError, ValueError, OSError, tokenize.TokenError),
    *(MemoryError, RecursionError),  # How the parser says that it is nested too deeply.
)
"""What reading or parsing a file raises when it cannot be counted."""


def read_python(path: Path) -> str:
    """Returns a source file as the interpreter reads it: byte order mark, declared encoding.

    Raises:
        OSError: It cannot be read.
        SyntaxError: It declares an encoding there is not.
        ValueError: It is not in its encoding.
    """
    with tokenize.open(path) as stream:
        return stream.read()


def parsed(text: str, file: str) -> ast.Module:
    """Returns the syntax tree of a source, whatever the parser would warn of in it.

    Raises:
        SyntaxError: It is no Python this interpreter can parse.
    """
    # Warnings are ruff's to count; as errors (PYTHONWARNINGS) they would end the parser.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(text, filename=file)


def why_unreadable(error: BaseException) -> str:
    """Returns what one of `UNREADABLE` says, in words where it has none."""
    return str(error) or "it is nested too deeply"


def count_python(file: str, text: str) -> list[Count]:
    """Returns the counts of every rule that can be read from the source.

    Args:
        file: Name for the places.
        text: Its content.

    Raises:
        SyntaxError: It is no Python this interpreter can parse.
    """
    tree = parsed(text, file)
    functions = [node for node in ast.walk(tree) if isinstance(node, Function)]
    at = _Places(file)
    return [
        Count(1, "functions without recursion", len(functions), tuple(_recursion(tree, at))),
        Count(2, "loops with a bound", *_loops(tree, at)),
        Count(3, "queues and caches with a bound", *_containers(tree, at)),
        Count(4, "functions of 60 lines", len(functions), tuple(_long(functions, at))),
        Count(5, "checks", *_checks(functions, at)),
        Count(6, "module-level names that stay", *_scope(tree, at)),
        Count(7, "errors and results used", *_dropped(tree, at)),
        Count(8, "calls and imports that make no code", *_run_time_code(tree, at)),
        Count(9, "references", *_references(tree, at)),
        Count(10, "suppressions with a code", *_suppressions(text, at)),
    ]


class _Places:
    def __init__(self, file: str) -> None:
        self._file = file

    def __call__(self, line: int, what: str) -> Place:
        return Place(self._file, line, what)


def _calls(node: ast.AST) -> Iterator[ast.Call]:
    return (inner for inner in ast.walk(node) if isinstance(inner, ast.Call))


def _recursion(tree: ast.Module, at: _Places) -> Iterator[Place]:
    """Functions of the file that reach themselves through calls within the file."""
    calls = calls_within(tree)
    for node in calls:
        if node in _reachable(calls, node):
            yield at(node.lineno, f"{node.name} calls itself, directly or through others")


def _reachable(calls: Mapping[Function, set[Function]], start: Function) -> set[Function]:
    seen: set[Function] = set()
    waiting = list(calls[start])
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting.extend(calls[node])
    return seen


def _loops(tree: ast.Module, at: _Places) -> tuple[int, tuple[Place, ...]]:
    total, places = 0, []
    for node in ast.walk(tree):
        if isinstance(node, ast.While):
            total += 1
            if isinstance(node.test, ast.Constant) and node.test.value:
                places.append(at(node.lineno, "`while True` shows no bound"))
        elif isinstance(node, ast.For | ast.AsyncFor):
            total += 1
            called = dotted(node.iter.func) if isinstance(node.iter, ast.Call) else ""
            if called in _ENDLESS or (called == "iter" and len(node.iter.args) == 2):  # type: ignore[attr-defined]
                places.append(at(node.lineno, f"iterates over {called}, which has no end"))
    return total, tuple(places)


def _containers(tree: ast.Module, at: _Places) -> tuple[int, tuple[Place, ...]]:
    total, places = 0, []
    for call in _calls(tree):
        name = dotted(call.func).rpartition(".")[2]
        if name in _UNBOUNDED or name in _BOUNDED:
            total += 1
            if not _has_bound(call, name):
                places.append(at(call.lineno, f"{name} without a bound"))
    for function in (node for node in ast.walk(tree) if isinstance(node, Function)):
        for decorator in function.decorator_list:
            if (name := dotted(decorator)) not in _BARE_CACHES:
                continue
            total += 1
            # Without parameters there is one result.
            if name.endswith("lru_cache") or not _takes_something(function):
                continue
            places.append(at(decorator.lineno, f"{name} without a bound"))
    return total, tuple(places)


def _takes_something(function: Function) -> bool:
    takes = function.args
    named = (*takes.posonlyargs, *takes.args, *takes.kwonlyargs)
    return bool(named or takes.vararg or takes.kwarg)


def _has_bound(call: ast.Call, name: str) -> bool:
    if name in _UNBOUNDED:
        return False
    given = [k.value for k in call.keywords if k.arg == _BOUNDED[name]]
    given += call.args[1:2] if name == "deque" else call.args[:1]
    if name == "lru_cache" and not given:
        return True
    return any(not (isinstance(v, ast.Constant) and not v.value) for v in given)


def _lines(node: Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _long(functions: Sequence[Function], at: _Places) -> Iterator[Place]:
    for node in functions:
        if (lines := _lines(node)) > FUNCTION_LINES:
            yield at(node.lineno, f"{node.name} has {lines} lines")


def _checks(functions: Sequence[Function], at: _Places) -> tuple[int, tuple[Place, ...]]:
    """Checks wanted, and one place for each that is missing over the whole file."""
    wanted = found = 0
    missing: list[Place] = []
    for node in functions:
        if _lines(node) <= CHECKED_LINES:
            continue
        wanted += CHECKS_A_FUNCTION
        checks = sum(isinstance(inner, ast.Assert | ast.Raise) for inner in ast.walk(node))
        found += checks
        place = at(node.lineno, f"{node.name} checks {'one thing' if checks else 'nothing'}")
        missing += [place] * max(0, CHECKS_A_FUNCTION - checks)
    # On average: one function's third check stands for another's first.
    return wanted, tuple(missing[: max(0, wanted - found)])


def _scope(tree: ast.Module, at: _Places) -> tuple[int, tuple[Place, ...]]:
    total, places = 0, []
    for node in tree.body:
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets, value = [node.target], node.value
        else:
            continue
        for target in (t for t in targets if isinstance(t, ast.Name)):
            total += 1
            constant = target.id.strip("_").isupper() or target.id == "__all__"
            if _is_mutable(value) and not constant:
                places.append(at(node.lineno, f"{target.id} is mutable and global"))
    changes = [node for node in ast.walk(tree) if isinstance(node, ast.Global)]
    places += [at(node.lineno, f"global {', '.join(node.names)}") for node in changes]
    return total + len(changes), tuple(places)


def _is_mutable(value: ast.expr) -> bool:
    made = dotted(value.func) if isinstance(value, ast.Call) else ""
    return isinstance(value, _MUTABLE) or made.removeprefix("collections.") in _MAKES_MUTABLE


def _dropped(tree: ast.Module, at: _Places) -> tuple[int, tuple[Place, ...]]:
    total, places = 0, []
    runs = _names_of_run(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            total += 1
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            caught = [dotted(kind) for kind in kinds if kind is not None]
            broad = next((kind for kind in caught if kind in _BROAD), "")
            if node.type is None or (broad and all(map(_does_nothing, node.body))):
                places.append(at(node.lineno, f"except {broad or 'everything'} drops the error"))
        elif isinstance(node, ast.Call) and dotted(node.func) in runs:
            total += 1
            if not any(keyword.arg in ("check", None) for keyword in node.keywords):
                places.append(at(node.lineno, "subprocess.run without check="))
    return total, tuple(places)


def _does_nothing(node: ast.stmt) -> bool:
    # Text is a comment of a kind, and `...` a way to write `pass`.
    is_value = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_value or isinstance(node, ast.Pass | ast.Continue)


def _names_of_run(tree: ast.Module) -> set[str]:
    """Names by which the file calls `subprocess.run`."""
    names = {"subprocess.run"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases = (alias for alias in node.names if alias.name == "subprocess")
            names |= {f"{alias.asname or alias.name}.run" for alias in aliases}
        elif isinstance(node, ast.ImportFrom) and node.module == "subprocess":
            names |= {alias.asname or alias.name for alias in node.names if alias.name == "run"}
    return names


def _run_time_code(tree: ast.Module, at: _Places) -> tuple[int, tuple[Place, ...]]:
    total, places = 0, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            total += 1
            if node.func.id in _RUN_TIME_CODE:
                places.append(at(node.lineno, f"{node.func.id} makes code at run time"))
        elif isinstance(node, ast.ImportFrom):
            total += 1
            if any(alias.name == "*" for alias in node.names):
                places.append(at(node.lineno, f"imports all of {node.module}"))
    return total, tuple(places)


def _references(tree: ast.Module, at: _Places) -> tuple[int, tuple[Place, ...]]:
    total, places = 0, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            total += 1
            for alias in node.names:
                if alias.name.partition(".")[0] in _UNSAFE:
                    places.append(at(node.lineno, f"imports {alias.name}"))
        elif isinstance(node, ast.ImportFrom) and not node.level:
            total += 1
            if (module := node.module or "").partition(".")[0] in _UNSAFE:
                places.append(at(node.lineno, f"imports from {module}"))
    chains = list(_chains(tree))
    long = [node for node in chains if dotted(node).count(".") >= CHAIN_LENGTH]
    places += [at(node.lineno, f"{dotted(node)} goes through many objects") for node in long]
    return total + len(chains), tuple(places)


def _chains(tree: ast.Module) -> Iterator[ast.Attribute]:
    """The outermost attribute of each chain."""
    inner = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner and dotted(node):
            yield node


def _suppressions(text: str, at: _Places) -> tuple[int, tuple[Place, ...]]:
    total, places = 0, []
    for token in _comments(text):
        if _SUPPRESSION.search(token.string):
            total += 1
            if found := _SILENCED.search(token.string):
                where = "in its file" if found["whole"] else "on its line"
                places.append(at(token.start[0], f"silences everything {where}"))
    return total, tuple(places)


def _comments(text: str) -> Iterator[tokenize.TokenInfo]:
    readline: Callable[[], str] = StringIO(text).readline
    return (t for t in tokenize.generate_tokens(readline) if t.type == tokenize.COMMENT)

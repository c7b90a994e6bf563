"""Which functions of a Python file call which, as far as names tell."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(slots=True, eq=False)
class _Scope:
    """A module, class or function, and what is defined in it; None: a parameter."""

    node: ast.Module | ast.ClassDef | Function
    outer: _Scope | None = None
    names: dict[str, _Scope | None] = field(default_factory=dict)


def calls_within(tree: ast.Module) -> dict[Function, set[Function]]:
    """Returns each function with those of the file it calls.

    What a nested function calls is called by those around it too. `self.f` and `cls.f` are sought
    in the class around; what a base class or another object has is not known.

    Args:
        tree: Of the file.
    """
    calls: dict[Function, set[Function]] = {}
    found: list[tuple[ast.Call, _Scope]] = []
    waiting: list[tuple[ast.AST, _Scope]] = [(tree, _Scope(tree))]
    while waiting:
        node, scope = waiting.pop()
        if isinstance(node, Function | ast.ClassDef):
            inner = _Scope(node, scope)
            scope.names[node.name] = inner
            if not isinstance(node, ast.ClassDef):
                calls[node] = set()
                inner.names |= dict.fromkeys(_parameters(node))
            waiting += [(part, inner) for part in reversed(node.body)]
            waiting += [(part, scope) for part in _around(node)]
            continue
        if isinstance(node, ast.Call):
            found.append((node, scope))
        waiting += [(part, scope) for part in reversed([*ast.iter_child_nodes(node)])]
    # Only now is everything defined that may be called.
    for call, scope in found:
        called = _function_of(dotted(call.func), scope)
        for around in _outwards(scope):
            if called is not None and isinstance(around.node, Function):
                calls[around.node].add(called)
    return calls


def dotted(node: ast.expr) -> str:
    """Returns `a.b.c` of a chain of names; "" when it starts with something else."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def _around(node: ast.ClassDef | Function) -> Sequence[ast.AST]:
    """What is evaluated where the definition stands."""
    if isinstance(node, ast.ClassDef):
        return [*node.decorator_list, *node.bases, *node.keywords]
    return [*node.decorator_list, node.args]


def _parameters(node: Function) -> Iterator[str]:
    takes = node.args
    named = [*takes.posonlyargs, *takes.args, *takes.kwonlyargs, takes.vararg, takes.kwarg]
    return (each.arg for each in named if each is not None)


def _outwards(scope: _Scope | None) -> Iterator[_Scope]:
    while scope is not None:
        yield scope
        scope = scope.outer


def _function_of(name: str, scope: _Scope) -> Function | None:
    first, _, rest = name.partition(".")
    if rest and first in ("self", "cls"):
        around = (s for s in _outwards(scope) if isinstance(s.node, ast.ClassDef))
        found = next(around, None)
    else:
        found = _seen_from(first, scope)
    if rest:
        is_class = found is not None and isinstance(found.node, ast.ClassDef)
        found = found.names.get(rest) if found is not None and is_class else None
    return found.node if found is not None and isinstance(found.node, Function) else None


def _seen_from(name: str, scope: _Scope) -> _Scope | None:
    for around in _outwards(scope):
        # The names of a class are not seen from within its methods.
        is_seen = around is scope or not isinstance(around.node, ast.ClassDef)
        if is_seen and name in around.names:
            return around.names[name]
    return None

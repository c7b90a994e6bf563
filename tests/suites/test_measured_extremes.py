"""What a check measures goes through `largest` and `smallest`: Python's own pass over NaN."""

from __future__ import annotations

import ast
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_harness.evidence import largest, smallest
from forge_harness.paths import suites_dir

BUILTIN = ("max", "min")


def of_builtins(node):
    """Calls of Python's own max and min anywhere in a piece of code."""
    return [
        call
        for call in ast.walk(node)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id in BUILTIN
        and not any(keyword.arg == "key" for keyword in call.keywords)
    ]


def recorded(call):
    """The value of a call `evidence.at_most(name, value, ...)`, or None."""
    function = call.func
    is_evidence = (
        isinstance(function, ast.Attribute)
        and isinstance(function.value, ast.Name)
        and function.value.id == "evidence"
    )
    return call.args[1] if is_evidence and len(call.args) > 1 else None


def found_in(source):
    """Lines where what is recorded, or kept as the worst of a loop, is what a builtin chose."""
    lines = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and (value := recorded(node)) is not None:
            lines |= {call.lineno for call in of_builtins(value)}
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            lines |= {
                call.lineno
                for call in of_builtins(node.value)
                if any(isinstance(arg, ast.Name) and arg.id == name for arg in call.args)
            }
    return sorted(lines)


@pytest.mark.parametrize(
    "source",
    [
        "evidence.at_most('error', max(errors), limit=1)",
        "evidence.record('low', scale * min(a, b))",
        "for e in errors:\n    worst = max(worst, e)",
    ],
)
def test_the_builtins_are_seen(source):
    assert found_in(source)


@pytest.mark.parametrize(
    "source",
    [
        "evidence.at_most('error', largest(errors), limit=max(8, size))",
        "evidence.at_most('error', float(t.abs().max()), limit=1)",
        "model = max(models, key=size)",
    ],
)
def test_what_is_no_measured_value_is_not(source):
    assert not found_in(source)


def test_no_check_records_what_the_builtins_chose():
    """A model that answered NaN passed: max(0.0, nan) is 0.0."""
    files = sorted(suites_dir().rglob("*.py"))
    assert len(files) > 60
    found = {str(file): found_in(file.read_text(encoding="utf-8")) for file in files}
    assert {file: lines for file, lines in found.items() if lines} == {}


@given(st.lists(st.floats(allow_nan=True), max_size=6))
def test_the_extremes_are_nan_where_one_is_or_there_is_none(values):
    if not values or any(math.isnan(value) for value in values):
        assert math.isnan(largest(values))
        assert math.isnan(smallest(iter(values)))
    else:
        assert (largest(values), smallest(values)) == (np.max(values), np.min(values))

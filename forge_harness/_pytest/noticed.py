"""Python warnings given while a check runs: kept with the item, never its outcome.

Whose they are cannot be told: the model's, a library's it imports, the check's. A deprecated call
in a model's `forward` says nothing of its quantization, so it must not turn fifty checks to
errors; it is not lost either.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager

import pytest

from forge_harness._pytest.outcomes import first_line
from forge_harness._pytest.state import state_of

NOTICED = pytest.StashKey[Counter[str]]()
MOST = 20
"""Different warnings kept of one item; a loop that puts its step into the text gives thousands."""


class Noticing:
    """Plugin: takes the warnings of setup and call, and hands them on to pytest's own summary."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, None, None]:
        """Starts anew: of an item that is retried, the record is of the last attempt."""
        item.stash[NOTICED] = Counter()
        with _noticing(item):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, None, None]:
        """Takes those of the check itself."""
        with _noticing(item):
            return (yield)


def noticed(item: pytest.Item) -> list[str]:
    """Returns the warnings of an item so far, a line each: text, place and how often."""
    found = item.stash.get(NOTICED, Counter[str]())
    lines = [
        line if count == 1 else f"{line}, {count} times"
        for line, count in list(found.items())[:MOST]
    ]
    more = len(found) - MOST
    return [*lines, f"and {more} more"] if more > 0 else lines


@contextmanager
def _noticing(item: pytest.Item) -> Generator[None, None, None]:
    if item.nodeid not in state_of(item.config).marks:
        yield
        return
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            yield
    finally:
        found = item.stash[NOTICED]
        for each in caught:
            text = first_line(str(each.message))
            found[f"{each.category.__name__}: {text} ({each.filename}:{each.lineno})"] += 1
            # To the recorder of pytest around this one, past the filters it has passed already.
            warnings.showwarning(each.message, each.category, each.filename, each.lineno)

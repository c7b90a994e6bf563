"""The pytest plugin: marker `forge_check`, fixture `evidence`, options `--forge-*`.

It is loaded by every pytest session of the environment, so importing it costs next to nothing
(no torch, numpy, matplotlib or pydantic) and it does nothing where no test carries the marker.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest

from forge_harness._pytest.fixtures import (
    evidence,
    forge_config,
    forge_profile,
    forge_seed,
    policy,
    quality_study,
    served_load,
    shared_build,
    subject,
)
from forge_harness._pytest.marks import MARKER_LINE, TIMING_LINE, is_timed
from forge_harness._pytest.options import add_options
from forge_harness._pytest.state import STATE, ForgeState, state_of

__all__ = [
    "evidence",
    "forge_config",
    "forge_profile",
    "forge_seed",
    "policy",
    "quality_study",
    "served_load",
    "shared_build",
    "subject",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the `--forge-*` options."""
    add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marker, and in the process that sees all reports their collector."""
    config.addinivalue_line("markers", MARKER_LINE)
    config.addinivalue_line("markers", TIMING_LINE)
    state = ForgeState(config)
    config.stash[STATE] = state
    from forge_harness._pytest.forked import EndingForks
    from forge_harness._pytest.noticed import Noticing

    config.pluginmanager.register(Noticing(), "forge_noticing")
    config.pluginmanager.register(EndingForks(state), "forge_ending_forks")
    if not state.is_worker:
        from forge_harness._pytest.controller import Controller

        config.pluginmanager.register(Controller(state), "forge_controller")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:  # noqa: ANN401 - xdist has no public type for it
    """Tells an xdist worker which directory the processes of the session share."""
    node.workerinput["forge_shared"] = str(state_of(node.config).shared)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None, None, None]:
    """Reads the markers of all items, then selects among those other plugins left."""
    from forge_harness._pytest.collection import collision, marks_of, process_safely

    marks, problem = marks_of(items), collision(items)
    directories = {item.path.parent for item in items if item.nodeid in marks}
    yield
    state = state_of(config)
    if marks:
        process_safely(state, items, marks, directories, problem)
    state.compares_times = any(is_timed(item) for item in items)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Lets a test that compares times run while the other workers run nothing."""
    from forge_harness._pytest.outcomes import STARTED
    from forge_harness._pytest.shared import alone, alongside

    state = state_of(item.config)
    turn: AbstractContextManager[None] = nullcontext()
    if is_timed(item):
        turn = alone(state.shared)
    elif state.is_worker and state.compares_times:
        turn = alongside(state.shared)
    # Around the whole protocol: a check that waits its turn does not spend its time limit.
    with turn:
        item.stash[STARTED] = time.monotonic()
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Ends an item whose marker is unusable, or whose subject lacks what it needs."""
    from forge_harness._pytest.gate import admit

    admit(state_of(item.config), item)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Counts the attempts at an item, whichever plugin makes them."""
    from forge_harness._pytest.outcomes import CALLS

    item.stash[CALLS] = item.stash.get(CALLS, 0) + 1


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Puts the check id, and what ended the phase, onto the report."""
    from forge_harness._pytest.noticed import noticed
    from forge_harness._pytest.outcomes import (
        CALLS,
        describe,
        make_printable,
        refuse_swallowed_timeout,
    )

    report = yield
    state = state_of(item.config)
    if not state.marks:
        return report
    mark = state.marks.get(item.nodeid)
    raised = describe(item, call)
    if mark is not None:
        report.forge_check = mark.check  # type: ignore[attr-defined]
        report.forge_calls = item.stash.get(CALLS, 0)  # type: ignore[attr-defined]
        report.forge_warnings = noticed(item)  # type: ignore[attr-defined]
    if raised is not None:
        # A list, because what crosses to the controller must be plain JSON values.
        report.forge_raised = [raised.kind, raised.reason]  # type: ignore[attr-defined]
    refuse_swallowed_timeout(item, report)
    make_printable(report)
    return report

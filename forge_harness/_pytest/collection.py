"""Collection: reads the markers, applies the selection, sets the timeouts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from forge_harness._pytest.marks import MARKER, CheckMark, is_timed, read_mark
from forge_harness._pytest.state import ForgeState
from forge_harness.errors import ConfigError, ForgeError


def marks_of(items: Iterable[pytest.Item]) -> dict[str, CheckMark]:
    """Returns node id -> mark of the items that are checks."""
    marks = ((item.nodeid, read_mark(item)) for item in items)
    return {nodeid: mark for nodeid, mark in marks if mark is not None}


def collision(items: Iterable[pytest.Item]) -> str | None:
    """Returns the sentence for two checks of one node id, or None.

    Node ids are relative to the first suite path, so that tests/a.py of two paths may share one;
    of two checks with one node id only one would be in the record.
    """
    paths: dict[str, Path] = {}
    for item in items:
        other = paths.setdefault(item.nodeid, item.path)
        if other != item.path and item.get_closest_marker(MARKER) is not None:
            return (
                f"{other} and {item.path} both hold a test {item.nodeid!r}, so that one would "
                "stand for both; rename one of the files."
            )
    return None


def process_safely(
    state: ForgeState,
    items: list[pytest.Item],
    marks: dict[str, CheckMark],
    directories: Iterable[Path],
    problem: str | None = None,
) -> None:
    """Does what `process` does; a problem of the user's files ends the session as a usage error.

    `problem` is one that is known already.

    In an xdist worker an exception would be an INTERNALERROR. There each item fails with the
    sentence, and the controller, which meets the same problem, ends the session.
    """
    try:
        if problem is not None:
            raise ConfigError(problem)
        process(state, items, marks, directories)
    except ForgeError as error:
        if not state.is_worker:
            raise pytest.UsageError(str(error)) from error
        state.problem = str(error)
        state.marks = {nodeid: mark.with_problem(str(error)) for nodeid, mark in marks.items()}
        state.publish_collected()


def process(
    state: ForgeState,
    items: list[pytest.Item],
    marks: dict[str, CheckMark],
    directories: Iterable[Path],
) -> None:
    """Resolves the marks and deselects what the forge options leave out, in place.

    Args:
        state: State of this process.
        items: The items that are left after other plugins' deselection.
        marks: Marks of all items that were collected.
        directories: Directories of the checks, where a catalogue.toml may be.
    """
    from forge_harness.selection import catalogues_beside

    left = {item.nodeid for item in items}
    whole = {n: mark if n in left else mark.as_dropped() for n, mark in marks.items()}
    state.set_collected(whole, catalogues_beside(directories))
    problem = selection_problem(state)
    if problem is not None and not state.is_worker:
        raise pytest.UsageError(problem)
    if problem is not None:
        # An exception in a worker would be an INTERNALERROR; the controller refuses, by what
        # is published here.
        state.publish_collected()
    kept, gone = _split(state, items)
    if gone:
        state.config.hook.pytest_deselected(items=gone)
        items[:] = kept
    out = {item.nodeid for item in gone}
    state.marks = {
        nodeid: mark
        for nodeid, mark in state.marks.items()
        if nodeid not in out and (not mark.dropped or is_selected(state, mark))
    }
    # Last, when the other workers have little left to do that would disturb a measurement.
    items.sort(key=is_timed)
    _set_timeouts(state, kept)
    state.publish_collected()


def selection_problem(state: ForgeState) -> str | None:
    """Returns what is wrong with `--forge-suite`, `-check`, `-shard` and `-waivers`, or None."""
    from forge_harness.selection import select
    from forge_harness.types import Profile

    options = state.options
    try:
        select(state.policy, Profile(state.profile), options.suites, options.checks)
        if options.shard is not None and (options.suites or options.checks):
            return (
                f"--forge-shard {options.shard} cuts the whole profile; leave --forge-suite and "
                "--forge-check out, or --forge-shard."
            )
        if options.shard is not None:
            _ = state.shard_checks
        if options.events is None:
            # Unreadable waivers are known before the checks run for minutes.
            _ = state.waivers
    except ForgeError as error:
        return str(error)
    return None


def _split(
    state: ForgeState, items: list[pytest.Item]
) -> tuple[list[pytest.Item], list[pytest.Item]]:
    narrowed = bool(state.options.suites or state.options.checks or not _takes_the_rest(state))
    kept: list[pytest.Item] = []
    gone: list[pytest.Item] = []
    for item in items:
        mark = state.marks.get(item.nodeid)
        selected = not narrowed if mark is None else is_selected(state, mark)
        (kept if selected else gone).append(item)
    return kept, gone


def _takes_the_rest(state: ForgeState) -> bool:
    """Whether this session runs what belongs to no check: of the shards one does."""
    return state.shard is None or state.shard.is_first


def is_selected(state: ForgeState, mark: CheckMark) -> bool:
    """Returns whether the forge options keep an item of this mark.

    An item with an unusable marker stays in a whole run, so that it is seen to fail.
    """
    options = state.options
    entry = state.entry(mark.check)
    in_profile = entry is None or mark.problem is not None or state.profile in entry.profiles
    if state.shard is not None:
        if entry is None or mark.problem is not None:
            return _takes_the_rest(state)
        return mark.check in state.shard_checks
    if not options.suites and not options.checks:
        return in_profile
    suite = entry.suite if entry else mark.check.partition(".")[0]
    return in_profile and (mark.check in options.checks or suite in options.suites)


def _set_timeouts(state: ForgeState, items: Iterable[pytest.Item]) -> None:
    """Gives each check the catalogue's timeout, if pytest-timeout is there to keep it.

    A session inside another one (`run_check`) leaves the alarm clock to the outer session.
    """
    if state.handover is not None or not state.config.pluginmanager.hasplugin("timeout"):
        return
    for item in items:
        mark = state.marks.get(item.nodeid)
        entry = state.entry(mark.check) if mark is not None else None
        if entry is not None and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(state.check_timeout_s or entry.timeout_s))

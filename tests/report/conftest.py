"""Fixtures: each kind of run, and its page, built once."""

from __future__ import annotations

import functools

import pytest

from forge_harness.report import build_report, render_html

from . import support


@functools.cache
def _record(kind):
    return support.RECORDS[kind]()


@functools.cache
def _report(kind):
    policy = support.POLICIES.get(kind, support.POLICY)
    return build_report(_record(kind), policy, *support.AGAINST.get(kind, tuple)())


@functools.cache
def _page(kind):
    return render_html(_report(kind))


@pytest.fixture(scope="session")
def run_record():
    """Kind of run -> record."""
    return _record


@pytest.fixture(scope="session")
def report_of():
    """Kind of run -> Report."""
    return _report


@pytest.fixture(scope="session")
def page_of():
    """Kind of run -> HTML page."""
    return _page

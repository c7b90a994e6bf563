"""One generator for all tests of a process: starting Locust takes a second."""

from __future__ import annotations

import pytest

from forge_harness.load.session import Generator


@pytest.fixture(scope="session")
def generator(tmp_path_factory):
    with Generator(tmp_path_factory.mktemp("locust") / "locust.log") as running:
        yield running

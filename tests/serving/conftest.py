import signal

import pytest

from .support import run, running, write_byte_lm


@pytest.fixture(scope="session")
def byte_lm(tmp_path_factory):
    return write_byte_lm(tmp_path_factory.mktemp("packages") / "small-lm")


@pytest.fixture(scope="module")
def digits_server():
    with running("--no-auth") as server:
        yield server


@pytest.fixture(scope="module")
def lm_server(byte_lm):
    with running("--no-auth", package=byte_lm) as server:
        yield server


@pytest.fixture
def keys(tmp_path):
    run("keys", "new", tmp_path / "keys.json")
    return tmp_path / "keys.json"


@pytest.fixture
def hang_ups():
    """Servers are not told to ignore them, as they are when the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)

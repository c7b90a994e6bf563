import pytest

from .support import running, write_byte_lm


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

"""A check that gives away its credentials in every way a check can, for a run made to record it."""

SOURCE = """
import logging, os, subprocess, sys, warnings
import pytest

def leaks(name):
    return pytest.mark.forge_check("leaky." + name, title="Leaks", severity="low")


SECRETS = {name: os.environ[name] for name in %(names)r}


@leaks("raises")
def test_raises():
    raise ConnectionError(f"no connection with {SECRETS}")


@leaks("asserts")
def test_asserts(evidence):
    evidence.equal("settings", str(SECRETS), expected="none", reason=f"as set: {SECRETS}")


@leaks("records")
def test_records(evidence):
    for name, value in SECRETS.items():
        evidence.record(name.lower(), value, reason=f"{name}={value}")


@leaks("skips")
def test_skips():
    pytest.skip(f"nothing answers to {list(SECRETS.values())}")


@leaks("prints")
def test_prints():
    import base64
    for name, value in SECRETS.items():
        print(name, value, repr(value), base64.b64encode(value.encode()).decode())
        print(value, file=sys.stderr)
        logging.getLogger("leaky").error("%%s is %%s", name, value)
        subprocess.run([sys.executable, "-c", "import sys; print(sys.argv[1])", value], check=True)
    print("-----BEGIN " + "PRIVATE KEY-----")
    print(%(block)r)
    print("-----END " + "PRIVATE KEY-----")
    print("postgres://forge:" + %(password)r + "@db.internal/runs")
    assert False


@pytest.fixture
def broken():
    raise RuntimeError(f"set up with {SECRETS}")


@leaks("setup")
def test_setup(broken):
    pass
"""

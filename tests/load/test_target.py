"""A server that is started for a campaign, and its first answer."""

import sys

from forge_harness.load.target import started
from forge_harness.load.traffic import seeded_digits

from . import support


def test_the_first_answer_comes_from_the_server_itself(monkeypatch):
    """A proxy of the environment was asked, which knows nothing of it."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setattr("urllib.request._opener", None)  # One that was made before knows none.
    with started([sys.executable, str(support.SERVER), "--ready-line"]) as target:
        assert target.first_answer_s(seeded_digits(0)[0]) is not None

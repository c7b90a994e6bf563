"""Child processes: what of the user's environment reaches them."""

from __future__ import annotations

import json
import sys

from forge_harness.integration.child import Child, Log, scrubbed_environment

SHOW = "import json, os; print(json.dumps({n: v for n, v in os.environ.items() if 'PYTEST' in n}))"


def test_settings_for_the_users_own_pytest_runs_reach_no_child(monkeypatch):
    names = (
        "PYTEST_ADDOPTS",
        "PYTEST_PLUGINS",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD",
        "PYTEST_XDIST_WORKER",
        "PYTEST_XDIST_WORKER_COUNT",
        "PYTEST_XDIST_AUTO_NUM_WORKERS",
        "PYTEST_XDIST_TESTRUNUID",
        "PYTEST_THEME",
        "PYTEST_CURRENT_TEST",
        "PYTEST_DEBUG",
        "PYTEST_TIMEOUT",
    )
    for name in names:
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("MINE", "kept")
    log = Log(None)
    with Child([sys.executable, "-c", SHOW], log) as child:
        while child.pump(0.05) is None:
            pass
    assert json.loads(log.last_line()) == {}
    assert scrubbed_environment()["MINE"] == "kept"

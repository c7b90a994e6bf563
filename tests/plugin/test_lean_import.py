"""The plugin is loaded by every pytest session of the environment: it must cost nothing there."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "numpy", "matplotlib", "pydantic", "locust", "triton", "mlflow", "jinja2")


def test_importing_the_plugin_imports_nothing_heavy():
    script = f"import sys, forge_harness.plugin\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_session_without_checks_imports_nothing_heavy(pytester, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temp"))
    (tmp_path / "temp").mkdir()
    pytester.makepyfile(
        test_plain=f"""
        import sys
        def test_it():
            assert [m for m in {HEAVY!r} if m in sys.modules] == []
        """
    )
    plugins = ("--disable-plugin-autoload", "-p", "forge_harness", "-p", "no:cacheprovider")
    result = pytester.runpytest_subprocess(*plugins)
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*= forge-harness =*")
    assert not list((tmp_path / "temp").glob("forge-harness-*"))

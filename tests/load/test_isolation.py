"""Locust patches the process it is imported in: that is never ours, and never a test's."""

import subprocess
import sys
from pathlib import Path

import forge_harness
from forge_harness.paths import suites_dir

PACKAGE = Path(forge_harness.__file__).parent


def test_no_module_but_the_generators_imports_locust():
    modules = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in sorted(PACKAGE.glob("load/*.py"))
        if path.stem != "__init__"
    ]
    assert "forge_harness.load.driver" in modules
    script = (
        f"import sys\nfor name in {[*modules, 'forge_harness.cli.load']!r}: __import__(name)\n"
        "print([m for m in ('locust', 'gevent', 'geventhttpclient') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_sessions_of_tests_and_of_checks_keep_locusts_plugin_out(pytestconfig, tmp_path):
    assert pytestconfig.pluginmanager.is_blocked("locust")
    (tmp_path / "test_it.py").write_text(
        "import sys\n"
        "def test_it(pytestconfig):\n"
        "    assert pytestconfig.pluginmanager.is_blocked('locust')\n"
        "    assert 'locust' not in sys.modules\n"
    )
    ini = ["-c", str(suites_dir() / "pytest.ini"), "--rootdir", str(tmp_path)]
    command = [sys.executable, "-m", "pytest", "-q", *ini, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "1 passed" in done.stdout, done.stdout

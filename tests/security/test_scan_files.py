"""Trees of which a part cannot be looked at, seen by somebody whom permissions hold for."""

import subprocess
import sys
from pathlib import Path

import pytest

from forge_harness.security.scan_files import tree_files

from ..privileges import unprivileged

SCAN = """
import sys
from pathlib import Path
from forge_harness.security import scan_secrets, scan_static
for scanner in scan_secrets, scan_static:
    scan = scanner.scan(Path(sys.argv[1]))
    print(scan.state, scan.scanned, *scan.notes, scan.why_not, sep="|")
"""
HOLE = "eval(input())\npass" + 'word = "correct-horse-battery"\n'


def run(code, tree):
    command = [*unprivileged(), sys.executable, "-c", code, str(tree)]
    return subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60
    )


def scans(tree):
    done = run(SCAN, tree)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "open.py").write_text("x = 1\n")
    (tmp_path / "shut").mkdir()
    (tmp_path / "shut" / "a.py").write_text(HOLE)
    yield tmp_path
    (tmp_path / "shut").chmod(0o700)


@pytest.mark.parametrize(
    ("mode", "first"),
    [(0o000, "shut"), (0o100, "shut"), (0o400, "shut/a.py")],
    ids=["closed", "unlisted", "unopened"],
)
def test_a_tree_with_a_closed_directory_is_never_clean(tree, mode, first):
    (tree / "shut").chmod(mode)
    why = f"1 file or directory cannot be read, the first is {first}: Permission denied"
    assert scans(tree) == [f"not scanned|0|{why}"] * 2


def test_a_file_that_no_tool_can_open_is_never_clean(tree):
    (tree / "shut" / "a.py").chmod(0o000)
    why = "1 file or directory cannot be read, the first is shut/a.py: Permission denied"
    assert scans(tree) == [f"not scanned|0|{why}"] * 2
    (tree / "b.py").write_text(HOLE)
    assert scans(tree) == [f"found|2|{why}|"] * 2


def test_who_does_not_ask_for_what_cannot_be_listed_is_told(tree):
    (tree / "shut").chmod(0o100)
    code = (
        "import sys; from pathlib import Path\n"
        "from forge_harness.security.scan_files import tree_files\n"
        "list(tree_files(Path(sys.argv[1])))\n"
    )
    assert "PermissionError" in run(code, tree).stderr
    (tree / "shut").chmod(0o700)
    assert [path.name for path in tree_files(tree)] == ["open.py", "a.py"]

"""Static analysis: what counts, and tools that say nothing."""

import json
import os
import stat
import sys

import pytest

from forge_harness.errors import UsageError
from forge_harness.security import scan_static

HOLE = "def run(text):\n    return eval(text)\n"


@pytest.fixture
def tree(tmp_path):
    def write(name, text):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return tmp_path / "tree"

    return write


@pytest.fixture(params=["ruff", "bandit"])
def tool(request, monkeypatch):
    if request.param == "bandit":
        pytest.importorskip("bandit")
    monkeypatch.setattr(scan_static, "_TOOLS", (request.param,))
    return request.param


def test_sound_source_is_clean(tree, tool):
    scan = scan_static.scan(tree("a.py", "x = 1\n"))
    assert (scan.state, scan.scanned, scan.tool) == ("clean", 1, tool)
    assert scan.version[0].isdigit()


def test_a_hole_is_found_where_it_is(tree, tool):
    tree("inner/b.py", "x = 1\n")
    scan = scan_static.scan(tree("inner/a.py", HOLE))
    assert [(f.place, f.line, f.rule[1:]) for f in scan.findings] == [("inner/a.py", 2, "307")]
    assert scan.scanned == 2


def test_asserts_and_plain_calls_of_programs_are_no_finding(tree, tool):
    text = "import subprocess\n\n\ndef f(x):\n    assert x\n    subprocess.run([x], check=True)\n"
    assert scan_static.scan(tree("a.py", text)).state == "clean"


def test_a_sampled_data_set_is_no_finding(tree, tool):
    text = "import random\n\n\ndef f(x):\n    return random.Random(1).choices(x)\n"
    assert scan_static.scan(tree("a.py", text)).state == "clean"


@pytest.mark.parametrize("mark", ["# noqa: S307", "#noqa:S307", "# NOQA: E501,S307", "# nosec"])
def test_a_suppressed_finding_is_counted(tree, tool, mark):
    scan = scan_static.scan(tree("a.py", HOLE.replace("(text)\n", f"(text)  {mark}\n")))
    if tool == "bandit" and mark != "# nosec":
        pytest.skip("one mark for each tool is enough")
    assert scan.state == "clean"
    assert scan.notes == ("1 finding suppressed in the source (noqa, nosec)",)


@pytest.mark.parametrize(
    ("mark", "state"),
    [("# ruff: noqa: S307", "clean"), ("# ruff: noqa: S301", "found"), ("# ruff: noqa", "found")],
)
def test_a_rule_is_suppressed_for_a_whole_file_by_its_code(tree, mark, state):
    assert scan_static.scan(tree("a.py", f"{mark}\n{HOLE}")).state == state


def test_directories_of_python_that_are_left_out_are_named(tree):
    tree("a.py", "x = 1\n")
    tree("build/hole.py", HOLE)
    tree("build/more/hole.py", HOLE)
    tree(".github/scripts/hole.py", HOLE)
    tree(".vscode/settings.json", "{}")
    tree("node_modules/a/hole.py", HOLE)
    scan = scan_static.scan(tree("dist/a.whl", ""))
    assert (scan.state, scan.scanned) == ("clean", 1)
    assert scan.notes == (
        "2 directories with Python files not analysed (.github, build): hidden, or of a build by "
        "name",
    )


def test_a_configuration_of_the_tree_cannot_switch_rules_off(tree):
    tree("pyproject.toml", "[tool.ruff]\nexclude = ['*.py']\nlint.ignore = ['S']\n")
    assert scan_static.scan(tree("a.py", HOLE)).state == "found"


def test_a_file_that_cannot_be_parsed_is_never_clean(tree, tool):
    tree("good.py", "x = 1\n")
    scan = scan_static.scan(tree("bad.py", "def (:\n"))
    assert scan.state == "not scanned"
    assert "1 file cannot be parsed, the first at bad.py" in scan.why_not


def test_a_file_that_cannot_be_parsed_hides_no_hole_of_another(tree, tool):
    tree("hole.py", HOLE)
    scan = scan_static.scan(tree("bad.py", "def (:\n"))
    assert (scan.state, [f.place for f in scan.findings]) == ("found", ["hole.py"])
    assert "1 file cannot be parsed, the first at bad.py" in scan.notes[0]


def test_a_file_in_another_encoding_is_no_scan_or_found(tree, tool):
    """Ruff passed over it, and the scan was clean."""
    path = tree("old.py", "") / "old.py"
    path.write_bytes(b"# -*- coding: latin-1 -*-\nname = 'caf\xe9'\n" + HOLE.encode())
    scan = scan_static.scan(path.parent)
    if tool == "ruff":
        assert scan.state == "not scanned"
        assert "the first at old.py:1: stream did not contain valid UTF-8" in scan.why_not
    else:
        assert scan.state == "found"


def test_a_module_beside_it_is_not_run_in_place_of_a_librarys(tree, tool, monkeypatch):
    """Where the harness ran decided whether its tools could start."""
    root = tree("a.py", HOLE)
    monkeypatch.chdir(tree("types.py", "raise SystemExit(1)\n"))
    assert scan_static.scan(root).state == "found"


def test_nothing_to_look_at_is_no_scan(tree, tmp_path):
    assert scan_static.scan(tree("a.txt", "x")).state == "not scanned"
    with pytest.raises(UsageError, match="does not exist"):
        scan_static.scan(tmp_path / "gone")


def program(tmp_path, body):
    path = tmp_path / "tool"
    path.write_text(f"#!{sys.executable}\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return (str(path),)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("print('[]')", "did not find its canary (301, 307, 602)"),
        ("import sys; sys.exit('no such option')", "gave no report: no such option"),
        ("pass", "gave no report: exit code 0"),
        ("print('{\"a\": 1}')", "gave no report"),
    ],
)
def test_a_tool_that_looked_at_nothing_is_no_scan(tree, tmp_path, monkeypatch, body, said):
    found = program(tmp_path, body)
    monkeypatch.setattr(scan_static, "find_tool", lambda name: found if name == "ruff" else None)
    scan = scan_static.scan(tree("a.py", "x = 1\n"))
    assert scan.state == "not scanned"
    assert said in scan.why_not


def test_no_tool_is_no_scan(tree, monkeypatch):
    monkeypatch.setattr(scan_static, "find_tool", lambda name: None)
    assert scan_static.scan(tree("a.py", HOLE)).state == "not scanned"


def test_ruff_comes_before_bandit_and_bandit_stands_in(tree, monkeypatch):
    pytest.importorskip("bandit")
    root = tree("a.py", HOLE)
    assert scan_static.scan(root).tool == "ruff"
    real = scan_static.find_tool
    monkeypatch.setattr(scan_static, "find_tool", lambda n: None if n == "ruff" else real(n))
    assert scan_static.scan(root).tool == "bandit"


def test_the_scan_is_json(tree):
    scan = scan_static.scan(tree("a.py", HOLE))
    again = json.loads(json.dumps(scan.as_json()))
    assert again["findings"][0]["rule"] == "S307"
    assert again["digest"].startswith("sha256:")
    assert os.path.isabs(again["findings"][0]["place"]) is False


@pytest.mark.parametrize("name", ["--output-file=victim.py", "--exclude=hole.py", "@hole.py"])
def test_a_file_named_like_an_option_is_a_file(tree, tool, monkeypatch, name):
    """Whoever wrote the tree could otherwise have a file overwritten, or left out."""
    tree("victim.py", "x = 1\n")
    tree("hole.py", HOLE)
    root = tree(name, "x = 1\n")
    monkeypatch.chdir(root)
    scan = scan_static.scan(root.relative_to(root))
    assert [(f.place, f.line) for f in scan.findings] == [("hole.py", 2)]
    assert scan.scanned == 3
    assert (root / "victim.py").read_text() == "x = 1\n"


def test_more_files_than_a_command_line_takes_are_all_scanned(tree, monkeypatch):
    root = tree("first.py", HOLE)
    tree("middle.py", "x = 1\n")
    tree("last.py", HOLE)
    monkeypatch.setattr(scan_static, "_MOST_ARGUMENT_BYTES", 1)
    scan = scan_static.scan(root)
    assert [f.place for f in scan.findings] == ["first.py", "last.py"]
    assert scan.scanned == 3


def test_a_mark_counts_on_its_own_line_after_a_form_feed(tree):
    hole = "\f\f\ndef run(text):\n    return eval(text)\n    # nosec\n"
    scan = scan_static.scan(tree("a.py", hole))
    assert [(f.place, f.line) for f in scan.findings] == [("a.py", 3)]
    scan = scan_static.scan(tree("a.py", hole.replace("(text)\n    #", "(text)  #")))
    assert scan.state == "clean"

"""The scans together, and the command."""

import json
import os

import pytest
from click.testing import CliRunner

from forge_harness.cli import app
from forge_harness.security.scan_types import Finding, Scan, judged, not_scanned
from forge_harness.security.scanning import overall

CLEAN = Scan("a", "clean", "t", "1", 3, canary="c")
FOUND = Scan("b", "found", "t", "1", 3, (Finding("x", 1, "R", "w"),), canary="c")
BLIND = not_scanned("c", "t", "no data")


@pytest.mark.parametrize(
    ("scans", "state"),
    [
        ([], "not scanned"),
        ([CLEAN], "clean"),
        ([CLEAN, BLIND], "not scanned"),
        ([CLEAN, BLIND, FOUND], "found"),
        ([FOUND, CLEAN], "found"),
    ],
)
def test_overall(scans, state):
    assert overall(scans) == state


def test_without_its_canary_a_finding_is_no_scan():
    scan = judged("a", "t", "1", 3, FOUND.findings, canary="c", missed=["c1"])
    assert (scan.state, scan.findings) == ("not scanned", ())


def test_the_digest_follows_the_findings():
    other = judged("a", "t", "1", 3, [Finding("x", 2, "R", "w")], canary="c", missed=[])
    assert CLEAN.digest != FOUND.digest != other.digest


@pytest.fixture
def invoke(monkeypatch):
    def run(scans, *arguments):
        monkeypatch.setattr("forge_harness.security.scanning.scan_all", lambda *a: tuple(scans))
        return CliRunner().invoke(app, ["scan", *map(str, arguments)])

    return run


@pytest.mark.parametrize(
    ("scans", "code"), [([CLEAN], 0), ([CLEAN, FOUND, BLIND], 1), ([CLEAN, BLIND], 7)]
)
def test_exit_codes(invoke, scans, code):
    result = invoke(scans)
    assert result.exit_code == code
    assert ("NOT SCANNED" in result.output) == (BLIND in scans)


def test_the_command_on_a_real_tree(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("def f(x):\n    return eval(x)\n")
    bill = tmp_path / "out" / "bom.json"
    result = CliRunner().invoke(app, ["scan", str(tmp_path), "--sbom", str(bill), "--json"])
    report = json.loads(result.output)
    assert (result.exit_code, report["state"]) == (1, "found")
    states = {scan["name"]: scan["state"] for scan in report["scans"]}
    assert states["static analysis"] == "found"
    assert states["bill of materials"] == "clean"
    assert set(states) == {
        "advisories",
        "static analysis",
        "secrets",
        "licenses",
        "bill of materials",
    }
    assert json.loads(bill.read_text())["bomFormat"] == "CycloneDX"


def test_names_of_files_are_shown_and_not_obeyed(tmp_path, monkeypatch):
    monkeypatch.setenv("FORGE_HARNESS_ADVISORIES_FILE", str(tmp_path / "none"))
    text = 'eval(input())\nid = "AK' + 'IAQWERTYUIOPASDFGH"\n'
    for name in (b"clear\x1b[2J.py", b"\xff.py", b"::stop-commands::x.py"):
        (tmp_path / os.fsdecode(name)).write_text(text)
    shown = CliRunner().invoke(app, ["scan", str(tmp_path)])
    assert shown.exit_code == 1, shown.output
    assert "\x1b" not in shown.output
    assert "  : :stop-commands::x.py:2: credential" in shown.output
    assert "  ::" not in shown.output
    assert "clear\\x1b[2J.py:2: credential" in shown.output
    told = CliRunner().invoke(app, ["scan", str(tmp_path), "--json"])
    scans = {scan["name"]: scan for scan in json.loads(told.output)["scans"]}
    assert len(scans["static analysis"]["findings"]) == 3
    places = [finding["place"] for finding in scans["secrets"]["findings"]]
    assert places == ["::stop-commands::x.py", "\\udcff.py", "clear\x1b[2J.py"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["/no/such/tree"], "/no/such/tree does not exist"),
        ([".", "--advisories", "/no/such/data"], "The advisory database /no/such/data does not"),
    ],
)
def test_bad_input_is_one_sentence(arguments, said):
    result = CliRunner().invoke(app, ["scan", *arguments])
    assert result.exit_code == 4
    assert said in result.output

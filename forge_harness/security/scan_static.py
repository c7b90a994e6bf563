"""Static analysis of Python source by ruff's security rules, or by bandit.

A file of known holes is analysed in the same run: a tool that does not name them analysed nothing,
whatever it exits with.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from forge_harness.errors import several
from forge_harness.paths import resolved_path
from forge_harness.security.scan_files import relative, tree_files, unread_clause
from forge_harness.security.scan_tools import ToolRun, find_tool, run_tool, tool_version
from forge_harness.security.scan_types import Finding, Scan, judged, not_scanned

NAME = "static analysis"
CANARY_SOURCE = """\
import pickle
import subprocess


def canary(text, blob):
    subprocess.run(text, shell=True, check=True)
    eval(text)
    return pickle.loads(blob)
"""
CANARY_RULES = ("301", "307", "602")
"""Unpickling, eval and a shell, by the number ruff and bandit share."""
NOT_FINDINGS = ("101", "311", "404", "603", "607", "105", "106", "107")
"""assert, `random` (which samples and shuffles wherever a model is trained), import of subprocess,
and calls of it without a shell: they say where a reader should look, not that something is wrong.
Passwords in the text (105 to 107) are the secrets scan's."""
_TOOLS = ("ruff", "bandit")
_UNREADABLE = "E902"
"""What ruff says, when asked, of a file that it cannot read: one in another encoding than UTF-8."""
# As ruff and bandit read them: in any case, with or without spaces.
_NOQA = re.compile(r"#\s*(?P<of_file>(?:ruff|flake8)\s*:\s*)?noqa\s*:\s*(?P<codes>[^#]*)", re.I)
_NOSEC = re.compile(r"#\s*nosec\b", re.I)
_NAMED = 5
_MOST_ARGUMENT_BYTES = 100_000
"""Of names of files in one run of a tool; systems take 128 KiB and more."""


@dataclass(frozen=True, slots=True)
class _Raw:
    file: str
    line: int
    code: str
    message: str

    @property
    def number(self) -> str:
        return self.code[1:]


def scan(root: Path) -> Scan:
    """Analyses the Python files of a tree with ruff, else bandit.

    Args:
        root: Directory or file.

    Raises:
        UsageError: It is not there.
    """
    files, unread, left_out = _python_files(root)
    if not files:
        why = unread_clause(unread, root) if unread else f"there is no Python file in {root}"
        return not_scanned(NAME, "none", why)
    tool = next((name for name in _TOOLS if find_tool(name)), None)
    if tool is None:
        return not_scanned(NAME, "none", "neither ruff nor bandit is installed: pip install ruff")
    with tempfile.TemporaryDirectory(prefix="forge-scan-") as scratch:
        canary = Path(scratch) / "canary.py"
        canary.write_text(CANARY_SOURCE, encoding="utf-8")
        scan = _analysed(tool, root, files, canary)
    if left_out and scan.state != "not scanned":
        scan = replace(scan, notes=(*scan.notes, _left_out_clause(left_out, root)))
    return _but_for(scan, unread_clause(unread, root)) if unread else scan


def _python_files(root: Path) -> tuple[list[Path], list[OSError], list[Path]]:
    """Returns the files that can be opened, and why others, or directories, cannot be looked at.

    The tools pass over those: ruff warns, and exits with 0. Last come the directories that are
    left out and hold Python.
    """
    files: list[Path] = []
    unread: list[OSError] = []
    left_out: list[Path] = []
    found = tree_files(root, (".py",), on_error=unread.append, on_left_out=left_out.append)
    for path in found:
        try:
            path.open("rb").close()
        except FileNotFoundError:  # Removed since it was listed.
            continue
        except OSError as error:
            unread.append(error)
        else:
            files.append(path)
    return files, unread, [directory for directory in left_out if _holds_python(directory)]


def _holds_python(directory: Path) -> bool:
    return any(name.endswith(".py") for _, _, names in os.walk(directory) for name in names)


def _left_out_clause(directories: Sequence[Path], root: Path) -> str:
    names = ", ".join(relative(directory, root) for directory in directories[:_NAMED])
    more = ", ..." if len(directories) > _NAMED else ""
    count = several(len(directories), "directory", "directories")
    return f"{count} with Python files not analysed ({names}{more}): hidden, or of a build by name"


def _analysed(tool: str, root: Path, files: list[Path], canary: Path) -> Scan:
    program = find_tool(tool)
    assert program is not None
    version = tool_version(program)
    raw: list[_Raw] = []
    missed: set[str] = set()
    for names in _batches(files):
        run = run_tool([*program, *_ARGUMENTS[tool], *names, str(canary)])
        try:
            part = list(_READERS[tool](run))
        except (ValueError, KeyError, TypeError):
            why = f"{tool} gave no report: {run.last_words()}"
            return not_scanned(NAME, tool, why, version=version)
        named = {r.number for r in part if resolved_path(Path(r.file)) == resolved_path(canary)}
        missed |= set(CANARY_RULES) - named
        raw += part
    broken = [r for r in raw if _is_broken(r)]
    sound = [r for r in raw if not _is_broken(r)]
    own = [r for r in sound if resolved_path(Path(r.file)) != resolved_path(canary)]
    kept = [r for r in own if r.number not in NOT_FINDINGS and not _suppressed(r)]
    hidden = sum(r.number not in NOT_FINDINGS for r in own) - len(kept)
    suppressed = f"{several(hidden, 'finding')} suppressed in the source (noqa, nosec)"
    scan = judged(
        NAME,
        tool,
        version,
        len(files),
        (Finding(relative(Path(r.file), root), r.line, r.code, r.message) for r in kept),
        canary=f"rules {', '.join(CANARY_RULES)} in a file of known holes",
        missed=missed,
        notes=(suppressed,) if hidden else (),
    )
    return _but_for(scan, _broken_clause(broken, root)) if broken else scan


def _is_broken(raw: _Raw) -> bool:
    return raw.code == _UNREADABLE or not raw.number.isdigit()


def _broken_clause(broken: Sequence[_Raw], root: Path) -> str:
    place = f"{relative(Path(broken[0].file), root)}:{broken[0].line}"
    count = several(len({r.file for r in broken}), "file")
    return f"{count} cannot be parsed, the first at {place}: {broken[0].message}"


def _but_for(scan: Scan, why: str) -> Scan:
    """Returns a scan that could not look at something: what it found stays, clean it is not."""
    if scan.state == "found":
        return replace(scan, notes=(*scan.notes, why))
    if scan.state == "clean":
        return not_scanned(scan.name, scan.tool, why, version=scan.version)
    return scan


def _batches(files: Sequence[Path]) -> Iterator[list[str]]:
    """Yields the names of all files, as many at once as a command line takes.

    Absolute ones: a file may be named like an option of the tool, as `--output-file=x.py` is, or
    like a file of arguments, `@x.py`.
    """
    batch: list[str] = []
    size = 0
    for name in map(os.path.abspath, files):
        length = len(os.fsencode(name)) + 1
        if batch and size + length > _MOST_ARGUMENT_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += length
    if batch:
        yield batch


def _suppressed(raw: _Raw) -> bool:
    """Whether the source itself says so; the tools are told not to look, so that it is counted.

    A `noqa` without a code suppresses nothing here: it does not say what was looked at.
    """
    try:
        text = Path(raw.file).read_text(encoding="utf-8", errors="replace")
    except OSError:  # A name that is not UTF-8, which the tool tells otherwise.
        return False
    # Not splitlines: a form feed ends no line of Python.
    lines = text.split("\n")
    line = lines[raw.line - 1] if 0 < raw.line <= len(lines) else ""
    if _NOSEC.search(line):
        return True
    marks = [mark for mark in _NOQA.finditer(line) if not mark["of_file"]]
    marks += [mark for line in lines if (mark := _NOQA.match(line.lstrip())) and mark["of_file"]]
    return any(f"S{raw.number}" in mark["codes"].upper() for mark in marks)


def _ruff(run: ToolRun) -> Iterator[_Raw]:
    for entry in json.loads(run.stdout):
        code = entry["code"] or "invalid-syntax"
        yield _Raw(entry["filename"], entry["location"]["row"], code, entry["message"])


def _bandit(run: ToolRun) -> Iterator[_Raw]:
    report: dict[str, Any] = json.loads(run.stdout)
    for entry in report["errors"]:
        yield _Raw(entry["filename"], 0, "invalid-syntax", entry["reason"])
    for entry in report["results"]:
        text = entry["issue_text"].split("\n")[0]
        yield _Raw(entry["filename"], entry["line_number"], entry["test_id"], text)


_ARGUMENTS = {
    "ruff": (
        *("check", "--isolated", "--ignore-noqa", "--no-cache", "--no-respect-gitignore"),
        *("--select", f"S,{_UNREADABLE}", "--output-format", "json"),
    ),
    "bandit": ("--quiet", "--ignore-nosec", "--format", "json"),
}
_READERS = {"ruff": _ruff, "bandit": _bandit}

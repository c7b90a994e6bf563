"""Credentials in the files of a tree, by form and by randomness. None is repeated in a finding."""

from __future__ import annotations

import codecs
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from forge_harness.errors import several
from forge_harness.probes import secrets
from forge_harness.security.scan_files import relative, typed_files, unread_clause
from forge_harness.security.scan_types import Finding, Scan, judged, not_scanned

NAME = "secrets"
MAX_FILE_BYTES = 4 << 20
"""A larger text file holds data, not what somebody typed; they are counted in a note."""
IGNORE = "forge-scan: no secret"
"""A line with these words is taken as looked at; how many there are is a note."""

_SCRIPTS = (".sh", ".bash", ".zsh", ".sbatch", ".slurm", ".dockerfile")
_SETTINGS = (".env", ".ini", ".cfg", ".cnf", ".conf", ".properties")
_SETTINGS_NAMES = (".env", ".pypirc", "credentials")
_EXPECTED = {
    "a.password": "name of a credential",
    "b.note": "AWS access key",
    "c.note": "GitHub token",
    "d.note": "password in a URL",
    "e.note": "private key",
    "f.note": "long and random",
}
"""Planted value -> part of the reason it must be found for; another reason is another detector."""


def scan(root: Path) -> Scan:
    """Looks through every text file of a tree, those of hidden directories included.

    What was not read is counted in the notes.

    Args:
        root: Directory or file.

    Raises:
        UsageError: It is not there.
    """
    findings: list[Finding] = []
    scanned = large = binary = ignored = 0
    files, left_out, unread = typed_files(root)
    for path in files:
        try:
            is_large = path.stat().st_size > MAX_FILE_BYTES
            text = None if is_large else read_text(path)
        except FileNotFoundError:  # Removed since it was listed.
            continue
        except OSError as error:
            # What a read raises names no file.
            unread.append(OSError(error.errno, error.strerror or str(error), str(path)))
            continue
        large += is_large
        if text is None:
            binary += not is_large
            continue
        scanned += 1
        for line, why, marked in _found(text, bare_in(path)):
            ignored += marked
            if not marked:
                findings.append(Finding(relative(path, root), line, "credential", why))
    if unread and not findings:
        return not_scanned(NAME, "forge-harness", unread_clause(unread, root))
    notes = [
        f"{several(count, one, many)} {what}"
        for count, one, many, what in (
            (large, "file", "files", f"over {MAX_FILE_BYTES} bytes not read"),
            (binary, "binary file", "binary files", "not read"),
            (
                len(left_out),
                "directory",
                "directories",
                "of version control, caches and others' code not read",
            ),
            (ignored, "line", "lines", f"marked {IGNORE!r}"),
        )
        if count
    ]
    if unread:
        notes.append(unread_clause(unread, root))
    return judged(
        NAME,
        "forge-harness",
        f"{len(secrets.FORM_NAMES)} forms and entropy",
        scanned,
        findings,
        canary=f"{len(secrets.PLANTED)} planted values",
        missed=_missed(),
        notes=tuple(notes),
    )


def read_text(path: Path) -> str | None:
    """Returns the text of a file, None when it is binary: UTF-8, or UTF-16 or 32 that says so."""
    raw = path.read_bytes()
    # Its mark begins with that of UTF-16.
    if raw.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return raw.decode("utf-32", errors="replace")
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return raw.decode("utf-16", errors="replace")
    if b"\x00" in raw[:8192]:
        return None
    return raw.decode("utf-8", errors="replace")


def bare_in(path: Path) -> secrets.Bare:
    """Returns where a file has values without quotes, by its name.

    `.env`, `a.env`, scripts of shells, what containers are made from, INI files; YAML.
    """
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        return secrets.Bare.YAML
    is_named = path.name in _SETTINGS_NAMES or path.name.startswith(".env.")
    if is_named or suffix in _SETTINGS:
        return secrets.Bare.SETTINGS
    if path.name.startswith(("Dockerfile", "Containerfile")) or suffix in _SCRIPTS:
        return secrets.Bare.SCRIPT
    return secrets.Bare.NOWHERE


def _found(text: str, bare: secrets.Bare = secrets.Bare.NOWHERE) -> Iterator[tuple[int, str, bool]]:
    # Not splitlines, which ends lines where no editor does: at form feeds and separators.
    for number, line in enumerate(re.split("\r\n|\r|\n", text), 1):
        if (why := secrets.in_line(line, bare=bare)) is not None:
            yield number, why, IGNORE in line


def _missed() -> list[str]:
    """Writes each planted value into a file and looks for it as for any other."""
    with tempfile.TemporaryDirectory(prefix="forge-scan-") as scratch:
        missed = []
        for key, value in secrets.PLANTED.items():
            file = Path(scratch) / "canary.txt"
            file.write_text(f'{key.rpartition(".")[2]} = "{value}"\n', encoding="utf-8")
            text = read_text(file)
            reasons = [why for _, why, _ in _found(text)] if text is not None else []
            if not any(_EXPECTED[key] in why for why in reasons):
                missed.append(key)
        return missed

"""Installed distributions: requirements, constraints, hashes, licenses, advisories."""

import pytest

from forge_harness import paths
from forge_harness.probes import advisories, distributions, licenses


@pytest.mark.forge_check("dependencies.requirements_satisfied")
def test_requirements_satisfied(evidence):
    """Every requirement the distribution declares is installed at an allowed version.

    Oracle: the declaration in the installed metadata, markers evaluated for this interpreter.
    """
    wanted = distributions.requirements()
    evidence.at_least(
        "declared", len(wanted), limit=1, unit="requirements", reason="an empty list proves nothing"
    )
    missing = distributions.unsatisfied(wanted)
    evidence.equal(
        "unsatisfied",
        len(missing),
        expected=0,
        unit="requirements",
        reason="; ".join(map(str, missing)) or "all are met; `pip check` says the same",
    )


@pytest.mark.forge_check("dependencies.lock_matches")
def test_lock_matches(evidence):
    """Installed versions equal the constraints the project commits."""
    directory = paths.suites_dir().parent / "constraints"
    pins = distributions.committed_pins(directory) if directory.is_dir() else []
    if not pins:
        pytest.skip("no committed constraints beside the suites: an installed wheel has none")
    different = [p for p in distributions.unsatisfied(pins) if p.installed is not None]
    evidence.record("pins", len(pins), reason=", ".join(str(pin) for pin in pins))
    evidence.equal(
        "pins_not_matched",
        len(different),
        expected=0,
        reason="; ".join(map(str, different)) or "every pinned distribution is at its pin",
    )


@pytest.mark.forge_check("dependencies.installed_files_intact")
def test_installed_files_intact(evidence):
    """Installed files have the SHA-256 their distribution recorded when it was installed.

    Of distributions over 100 MB only .py files are read; how many files and bytes were is
    evidence. Distributions that recorded no hash (those of an operating system) leave the check
    not measured: nothing can be said of their files.
    """
    names = [requirement.name for requirement in distributions.requirements()]
    reading = distributions.check_integrity([distributions.DISTRIBUTION, *names])
    evidence.record("bytes_hashed", reading.size_bytes, unit="B", reason="read and hashed now")
    evidence.at_least(
        "files_hashed", reading.files, limit=1, unit="files", reason="no file read proves nothing"
    )
    for name, found in (("altered", reading.altered), ("missing", reading.missing)):
        evidence.equal(
            name,
            len(found),
            expected=0,
            unit="files",
            reason=f"{', '.join(found[:5])}: reinstall what they belong to"
            if found
            else "against RECORD",
        )
    if reading.unrecorded:
        pytest.skip(f"no hashes were recorded for {', '.join(reading.unrecorded)}; use pip's")


@pytest.mark.forge_check("dependencies.known_vulnerabilities")
def test_known_vulnerabilities(evidence):
    """A scan with live advisory data finds nothing, and finds its canary.

    Three answers: clean, found, not scanned. The last is not measured, never a pass: scanners
    that reached no database report "no vulnerabilities" and exit 0.
    """
    names = distributions.dependency_closure()
    installed = {
        name: distributions.installed_version(name) or distributions.NO_VERSION for name in names
    }
    result = advisories.scan(installed)
    if result.state == "not scanned":
        pytest.skip(f"not scanned ({result.source}): {result.why_not}")
    evidence.at_least(
        "scanned",
        result.scanned,
        limit=1,
        unit="distributions",
        reason=f"with {result.source}, which found its canary",
    )
    if result.age_days is not None:
        evidence.record(
            "advisory_age", result.age_days, unit="days", reason="of the newest advisory"
        )
    evidence.equal(
        "vulnerabilities",
        len(result.findings),
        expected=0,
        reason="; ".join(result.findings[:10]) or "the canary was found, nothing else",
    )


@pytest.mark.forge_check("dependencies.licenses")
def test_licenses(evidence):
    """No dependency, direct or not, is under a license that reaches the program that uses it.

    Oracle: the license each distribution states in its metadata; of "A OR B" one acceptable
    alternative is enough, of "A AND B" both count. Unstated ones are listed and warned about.
    """
    texts = {name: distributions.license_of(name) for name in distributions.dependency_closure()}
    judged = {name: licenses.judge(text) for name, text in texts.items()}
    refused, unclear = (
        [f"{name}: {texts[name]}" for name in sorted(texts) if judged[name] == word]
        for word in ("refused", "unclear")
    )
    evidence.at_least("distributions", len(texts), limit=1, reason="the dependency closure")
    evidence.equal(
        "refused", len(refused), expected=0, reason="; ".join(refused) or "none is copyleft"
    )
    evidence.at_most(
        "unclear",
        len(unclear),
        limit=0,
        unit="distributions",
        reason="; ".join(unclear)[:500] or "every license is a known one",
        level="warn",
    )

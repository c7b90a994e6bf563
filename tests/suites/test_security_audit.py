"""Security, audit log and signatures: each check goes red for a subject with one seeded defect."""

from __future__ import annotations

import hashlib
import sqlite3
from contextlib import closing

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from forge_harness.canonical import file_sha256
from forge_harness.drill.defects import all_benign, all_defects
from forge_harness.subject.reference import ReferenceSubject
from forge_harness.types import Outcome

CHECKS = (
    "security.audit_tamper",
    "security.audit_fail_closed",
    "security.package_signature",
)
DEFECTS = [d for d in all_defects().values() if d.check in CHECKS]
SOUND = [
    (kind, check) for kind in all_benign().values() for check in CHECKS if check in kind.checks
]


@pytest.mark.parametrize("check", CHECKS)
def test_the_reference_passes(run_check, check):
    run = run_check(check, ReferenceSubject())
    assert (run.outcome, run.reason) == (Outcome.PASS, "")


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.id)
def test_a_seeded_defect_is_found(run_check, defect):
    run = run_check(defect.check, defect.subject())
    assert run.outcome is Outcome.FAIL
    assert defect.shows in run.reason


@pytest.mark.parametrize(("kind", "check"), SOUND, ids=lambda each: getattr(each, "id", each))
def test_a_log_of_another_make_passes(run_check, kind, check):
    run = run_check(check, kind.subject())
    assert (run.outcome, run.reason) == (Outcome.PASS, "")


def test_every_check_has_a_defect():
    assert {d.check for d in DEFECTS} == set(CHECKS)


class SignsBytes(ReferenceSubject):
    """Signatures are 64 bytes, and what is wrong with one is an error of its library."""

    def __init__(self, key=None):
        super().__init__()
        self.key = key or Ed25519PrivateKey.generate()

    def sign_package(self, directory):
        target = directory.with_name("package.sig")
        target.write_bytes(self.key.sign(_listing(directory)))
        return target

    def check_package(self, directory, signature):
        self.key.public_key().verify(signature.read_bytes(), _listing(directory))


def _listing(directory):
    paths = [path for path in sorted(directory.rglob("*")) if not path.is_dir()]
    if any(path.is_symlink() for path in paths):
        raise InvalidSignature("a link")
    names = (path.relative_to(directory).as_posix() for path in paths)
    return "\n".join(f"{n} {file_sha256(directory / n)}" for n in names).encode()


class SignsAnything(SignsBytes):
    def check_package(self, directory, signature):
        if len(signature.read_bytes()) != 64:
            raise InvalidSignature("no signature")


class NeedsAKey(SignsBytes):
    def __init__(self, key):
        super().__init__(key)


def test_a_signature_may_have_any_format(run_check):
    run = run_check("security.package_signature", SignsBytes())
    assert (run.outcome, run.reason) == (Outcome.PASS, "")
    run = run_check("security.package_signature", SignsAnything())
    assert run.outcome is Outcome.FAIL


def test_where_there_is_no_second_instance_no_stranger_signs(run_check):
    run = run_check("security.package_signature", NeedsAKey(Ed25519PrivateKey.generate()))
    assert (run.outcome, run.evidence("by_a_stranger")) == (Outcome.PASS, "not held")


class KeepsJournal(ReferenceSubject):
    """A log of unusual names that begins at 0, with times in numbers and links that are unique."""

    bound = slice(None)

    def audit_log(self, path):
        return Journal(path, self.bound)

    def audit_problems(self, path):
        with closing(sqlite3.connect(path)) as connection:
            rows = connection.execute('SELECT * FROM "group" ORDER BY n').fetchall()
        link, sound = "", True
        for position, (*row, found) in enumerate(rows):
            link = _link(row[self.bound], link)
            sound &= found == link and row[-1] == position
        return [] if sound and path.with_name("end").read_text() == link else ["differs"]


class ForgetsTheTime(KeepsJournal):
    bound = slice(1, None)


class Journal:
    def __init__(self, path, bound):
        self.path, self.bound = path, bound
        self.connection = sqlite3.connect(path, isolation_level=None)
        self.connection.execute(
            'CREATE TABLE IF NOT EXISTS "group" (at INTEGER, who VARCHAR(40), "order" TEXT,'
            " what JSON, n INTEGER PRIMARY KEY, link CHAR(64) UNIQUE)"
        )

    def add(self, actor, action, resource):
        last = self.connection.execute('SELECT n, link FROM "group" ORDER BY n DESC').fetchone()
        n, link = last or (-1, "")
        row = [1_700_000_000, actor, action, resource, n + 1]
        link = _link(row[self.bound], link)
        self.connection.execute('INSERT INTO "group" VALUES (?, ?, ?, ?, ?, ?)', (*row, link))
        self.path.with_name("end").write_text(link)

    def close(self):
        self.connection.close()


def _link(row, link):
    return hashlib.sha256(repr((list(row), link)).encode()).hexdigest()


def test_a_log_that_begins_at_zero_passes(run_check):
    run = run_check("security.audit_tamper", KeepsJournal())
    assert (run.outcome, run.reason) == (Outcome.PASS, "")


def test_a_number_that_is_not_chained_is_found(run_check):
    run = run_check("security.audit_tamper", ForgetsTheTime())
    assert run.outcome is Outcome.FAIL
    assert "at changed" in run.reason

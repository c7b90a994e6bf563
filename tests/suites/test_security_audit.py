"""Security, audit log and signatures: each check goes red for a subject with one seeded defect."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3

import pytest

from forge_harness.canonical import file_sha256
from forge_harness.drill import store_mutants
from forge_harness.errors import SignatureError
from forge_harness.protocols import StoreSpec
from forge_harness.subject.reference import ReferenceSubject
from forge_harness.types import Outcome

CHECKS = ("audit_tamper", "audit_fail_closed", "package_signature", "encryption_at_rest")


@pytest.mark.parametrize("check", CHECKS)
def test_the_reference_passes(run_check, check):
    run = run_check(f"security.{check}", ReferenceSubject())
    assert (run.outcome, run.reason) == (Outcome.PASS, "")


class Ledger:
    """A log of its own: rows, chained by a plain hash when asked to."""

    def __init__(self, path, *, chained, anchored):
        self.path, self.chained, self.anchored = path, chained, anchored
        self.connection = sqlite3.connect(path, isolation_level=None)
        self.connection.execute(
            "CREATE TABLE IF NOT EXISTS record (n INTEGER PRIMARY KEY, actor TEXT, action TEXT,"
            " resource TEXT, link TEXT)"
        )

    def add(self, actor, action, resource):
        last = self.connection.execute("SELECT n, link FROM record ORDER BY n DESC").fetchone()
        n, link = last or (0, "")
        link = chain(n + 1, actor, action, resource, link) if self.chained else ""
        self.connection.execute(
            "INSERT INTO record VALUES (?, ?, ?, ?, ?)", (n + 1, actor, action, resource, link)
        )
        if self.anchored:
            self.path.with_name("anchor").write_text(link)

    def close(self):
        self.connection.close()


def chain(n, actor, action, resource, link):
    return hashlib.sha256(f"{n}|{actor}|{action}|{resource}|{link}".encode()).hexdigest()


class LedgerSubject(ReferenceSubject):
    chained, anchored = True, True

    def audit_log(self, path):
        return Ledger(path, chained=self.chained, anchored=self.anchored)

    def audit_problems(self, path):
        connection = sqlite3.connect(path)
        rows = connection.execute("SELECT * FROM record ORDER BY n").fetchall()
        connection.close()
        if not self.chained:
            numbers = [row[0] for row in rows]
            return [] if numbers == list(range(1, len(rows) + 1)) else ["gap"]
        link, problems = "", []
        for position, (n, actor, action, resource, found) in enumerate(rows, 1):
            link = chain(n, actor, action, resource, link)
            if n != position or link != found:
                problems.append(f"record {n}")
        if self.anchored and path.with_name("anchor").read_text() != link:
            problems.append("the end is not the anchored one")
        return problems


class Unchained(LedgerSubject):
    chained, anchored = False, False


class Unanchored(LedgerSubject):
    anchored = False


@pytest.mark.parametrize(
    ("subject", "attack"),
    [(Unchained, "actor changed"), (Unanchored, "the last removed")],
)
def test_a_log_that_does_not_show_tampering_is_found(run_check, subject, attack):
    run = run_check("security.audit_tamper", subject())
    assert run.outcome is Outcome.FAIL
    assert attack in run.reason


def test_a_log_of_another_make_passes(run_check):
    run = run_check("security.audit_tamper", LedgerSubject())
    assert (run.outcome, run.reason) == (Outcome.PASS, "")


class ActsFirst(ReferenceSubject):
    def audited(self, path, action):
        action()
        super().audited(path, lambda: None)


class CarriesOn(ReferenceSubject):
    """Logs the failure to log, as most applications do."""

    def audited(self, path, action):
        with contextlib.suppress(Exception):
            super().audited(path, lambda: None)
        action()


@pytest.mark.parametrize("subject", [ActsFirst, CarriesOn])
def test_acting_without_a_record_is_found(run_check, subject):
    run = run_check("security.audit_fail_closed", subject())
    assert run.outcome is Outcome.FAIL
    assert "done_without_room is True" in run.reason


class Listing(ReferenceSubject):
    """A list of digests beside the package, which anybody can make."""

    def sign_package(self, directory):
        listed = {
            p.relative_to(directory).as_posix(): file_sha256(p)
            for p in sorted(directory.rglob("*"))
            if p.is_file()
        }
        target = directory.with_name("sums.json")
        target.write_text(json.dumps({"payload": listed, "signatures": []}))
        return target

    def check_package(self, directory, signature):
        listed = json.loads(signature.read_bytes())["payload"]
        found = {
            p.relative_to(directory).as_posix(): file_sha256(p)
            for p in sorted(directory.rglob("*"))
            if p.is_file()
        }
        if found != listed:
            raise SignatureError("differs")


class OverlooksAdded(ReferenceSubject):
    """Checks the files that are listed, and no others."""

    def check_package(self, directory, signature):
        try:
            super().check_package(directory, signature)
        except SignatureError as error:
            if "was not signed" not in str(error):
                raise


class TrustsTheSignature(ReferenceSubject):
    """Compares the files, and does not ask who signed."""

    def check_package(self, directory, signature):
        try:
            super().check_package(directory, signature)
        except SignatureError as error:
            if "pinned keys" not in str(error):
                raise


@pytest.mark.parametrize(
    ("subject", "attack"),
    [
        (Listing, "somebody else's signature"),
        (OverlooksAdded, "a file added"),
        (TrustsTheSignature, "another payload"),
    ],
)
def test_a_signature_that_does_not_hold_is_found(run_check, subject, attack):
    run = run_check("security.package_signature", subject())
    assert run.outcome is Outcome.FAIL
    assert "accepted is" in run.reason
    assert attack.split()[0] in run.reason


def plain_store(root, **options):
    """Takes a key and does not use it."""
    options.pop("sealer", None)
    return store_mutants.Store.open(root, **options)


class Plain(ReferenceSubject):
    def state_store(self):
        return StoreSpec(opener=f"{__name__}:plain_store")


def test_plaintext_on_disk_is_found(run_check):
    run = run_check("security.encryption_at_rest", Plain())
    assert run.outcome is Outcome.FAIL
    assert "files_with_plaintext is" in run.reason

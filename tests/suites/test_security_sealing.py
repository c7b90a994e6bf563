"""Security, sealing: each check goes red for a subject whose encryption has one seeded defect."""

from __future__ import annotations

import pytest

from forge_harness.drill.defects import all_benign, all_defects
from forge_harness.drill.defects.state import KeepsIn
from forge_harness.state import Store
from forge_harness.subject.reference import ReferenceSubject
from forge_harness.types import Outcome

CHECKS = ("security.chunk_binding", "security.key_rotation", "security.encryption_at_rest")
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
def test_a_scheme_of_another_layout_passes(run_check, kind, check):
    run = run_check(check, kind.subject())
    assert (run.outcome, run.reason) == (Outcome.PASS, "")


def test_a_plain_file_that_is_not_declared_is_named(run_check):
    subject = KeepsIn("forge_harness.drill.defects.sealing:versioned_store")
    run = run_check("security.encryption_at_rest", subject)
    assert run.outcome is Outcome.FAIL
    assert "unlisted_plain_files is 1 files" in run.reason
    assert "VERSION" in run.reason


def keyed_store(root, *, sealer=None, **options):
    if sealer is None:
        raise PermissionError(f"{root} is sealed: give the key")
    return Store.open(root, sealer=sealer, **options)


def test_a_store_may_refuse_to_open_without_its_key(run_check):
    run = run_check("security.encryption_at_rest", KeepsIn(f"{__name__}:keyed_store"))
    assert (run.outcome, run.reason) == (Outcome.PASS, "")


def test_every_check_has_a_defect():
    assert {d.check for d in DEFECTS} == set(CHECKS)

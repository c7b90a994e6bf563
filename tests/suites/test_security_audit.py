"""Security, audit log and signatures: each check goes red for a subject with one seeded defect."""

from __future__ import annotations

import pytest

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

"""Security of the server, from outside: each check goes red for a server with one defect."""

from __future__ import annotations

import pytest

from forge_harness.drill.defects import all_defects
from forge_harness.protocols import ServerSpec
from forge_harness.subject.reference import ReferenceSubject
from forge_harness.types import Outcome

CHECKS = ("security.tls_1_3_only", "security.rbac_matrix", "security.audit_coverage")
DEFECTS = [d for d in all_defects().values() if d.check in CHECKS]


@pytest.mark.usefixtures("trained_once")
@pytest.mark.parametrize("check", CHECKS)
def test_the_reference_server_passes(run_check, check):
    run = run_check(check, ReferenceSubject())
    assert (run.outcome, run.reason) == (Outcome.PASS, "")


@pytest.mark.usefixtures("trained_once")
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.id)
def test_a_careless_server_is_found(run_check, defect):
    run = run_check(defect.check, defect.subject())
    assert run.outcome is Outcome.FAIL, run.reason
    assert defect.shows in run.reason


def test_every_check_has_a_defect():
    assert {d.check for d in DEFECTS} == set(CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_a_subject_without_a_server_is_not_applicable(run_check, check):
    class Silent:
        name = "silent"

    assert run_check(check, Silent()).outcome is Outcome.NOT_APPLICABLE


def test_a_server_without_an_audit_log_is_not_measured(run_check, tmp_path):
    class Unaudited(ReferenceSubject):
        def server(self, directory, *, secured=False):
            return ServerSpec(command=("false",), requests=tmp_path)

    run = run_check("security.audit_coverage", Unaudited())
    assert run.outcome is Outcome.NOT_MEASURED
    assert "shows no audit log" in run.reason

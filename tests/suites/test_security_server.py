"""Security of the server, from outside: each check goes red for a server with one defect."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from forge_harness.subject.reference import ReferenceSubject
from forge_harness.types import Outcome

CARELESS = Path(__file__).with_name("careless_server.py")


class Careless(ReferenceSubject):
    """The reference subject, whose server has a defect."""

    def __init__(self, defect):
        self._defect = defect

    def server(self, directory, *, secured=False):
        spec = super().server(directory, secured=secured)
        after = spec.command.index("serve") + 1
        command = (sys.executable, str(CARELESS), self._defect, *spec.command[after:])
        return replace(spec, command=command)


@pytest.mark.usefixtures("trained_once")
@pytest.mark.parametrize("check", ["tls_1_3_only", "rbac_matrix", "audit_coverage"])
def test_the_reference_server_passes(run_check, check):
    run = run_check(f"security.{check}", ReferenceSubject())
    assert (run.outcome, run.reason) == (Outcome.PASS, "")


@pytest.mark.usefixtures("trained_once")
@pytest.mark.parametrize(
    ("check", "defect", "reason"),
    [
        ("tls_1_3_only", "speaks_tls_1_2", "older_accepted is 1"),
        ("rbac_matrix", "lets_every_role_do_everything", "wrong_cells is"),
        ("rbac_matrix", "takes_expired_tokens", "expired: "),
        ("rbac_matrix", "reads_its_tokens_once", "still_open is 1 routes, expected 0"),
        ("audit_coverage", "forgets_every_fifth_record", "missing is"),
        ("audit_coverage", "records_nobody", "other_actor is 36 requests, expected 0"),
        ("audit_coverage", "records_no_control_action", "end_recorded is False"),
    ],
)
def test_a_careless_server_is_found(run_check, check, defect, reason):
    run = run_check(f"security.{check}", Careless(defect))
    assert run.outcome is Outcome.FAIL, run.reason
    assert reason in run.reason


@pytest.mark.parametrize("check", ["tls_1_3_only", "rbac_matrix", "audit_coverage"])
def test_a_subject_without_a_server_is_not_applicable(run_check, check):
    class Silent:
        name = "silent"

    assert run_check(f"security.{check}", Silent()).outcome is Outcome.NOT_APPLICABLE

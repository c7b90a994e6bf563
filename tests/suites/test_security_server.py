"""Security of the server, from outside: each check goes red for a server with one defect."""

from __future__ import annotations

import sys
from dataclasses import replace

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


WITH_ADMIN = """
import runpy
from forge_harness.security.access import Permission
from forge_harness.serving.route import Route
from forge_harness.serving.routes import Api

shipped = Api.routes
describe = Permission("model", "describe")
Api.routes = lambda self: (
    *shipped(self), Route("/admin", "GET", describe, self.models, "serve.admin")
)
runpy.run_module("forge_harness", run_name="__main__", alter_sys=True)
"""


@pytest.mark.usefixtures("trained_once")
@pytest.mark.parametrize("is_declared", [True, False])
def test_a_route_that_others_do_not_have_may_be_declared(run_check, tmp_path, is_declared):
    class WithAdmin(ReferenceSubject):
        def server(self, directory, *, secured=False):
            spec = super().server(directory, secured=secured)
            script = tmp_path / "with_admin.py"
            script.write_text(WITH_ADMIN)
            options = spec.command[spec.command.index("serve") :]
            spec = replace(spec, command=(sys.executable, str(script), *options))
            return with_admin(spec) if is_declared else spec

    run = run_check("security.rbac_matrix", WithAdmin())
    assert run.outcome is (Outcome.PASS if is_declared else Outcome.FAIL), run.reason
    assert ("GET /admin is 200" in run.reason) is not is_declared


def with_admin(spec):
    access = {
        name: routes | ({"GET /admin"} if "GET /v1/models" in routes else set())
        for name, routes in spec.access.items()
    }
    # The shipped description knows the shipped routes alone.
    routes = tuple(route for route in spec.routes if route != "GET /openapi.json")
    return replace(spec, access=access, routes=("GET /admin", *routes))


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

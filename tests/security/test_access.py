from __future__ import annotations

import itertools

import pytest

from forge_harness.errors import AccessDeniedError, SecurityError
from forge_harness.security.access import (
    ANONYMOUS,
    PUBLIC,
    ROLES,
    Access,
    Permission,
    Principal,
    check_declared,
)

# Written out a second time on purpose: a role that gains a permission by accident is a finding.
EXPECTED = {
    "viewer": "metrics:read model:describe run:read state:read",
    "client": "model:describe model:predict",
    "engineer": "metrics:read model:describe model:predict run:read run:start state:read"
    " state:write",
    "release-owner": "metrics:read model:deploy model:describe package:sign run:read"
    " state:migrate state:read",
    "auditor": "audit:read metrics:read run:read state:read",
    "admin": "audit:read keys:rotate metrics:read model:deploy model:describe server:drain"
    " state:collect state:read state:restore token:issue token:revoke",
}
ALL = sorted({Permission.parse(p) for line in EXPECTED.values() for p in line.split()})


@pytest.mark.parametrize("role", [*EXPECTED, "none", "superuser"])
def test_every_cell_of_role_by_permission(role: str) -> None:
    access = Access()
    granted = EXPECTED.get(role, "").split()
    principal = Principal("p", frozenset({role}))
    for permission in [*ALL, Permission("model", "delete"), Permission("", "")]:
        assert access.allows(principal, permission) == (str(permission) in granted), permission
    assert access.allows(principal, PUBLIC)


def test_roles_add_up_and_nobody_has_all() -> None:
    access = Access()
    for first, second in itertools.combinations(EXPECTED, 2):
        both = Principal("p", frozenset({first, second}))
        granted = set(EXPECTED[first].split()) | set(EXPECTED[second].split())
        assert {str(p) for p in ALL if access.allows(both, p)} == granted
    assert all(held < set(ALL) for held in ROLES.values())
    assert not any(access.allows(ANONYMOUS, permission) for permission in ALL)


def test_a_refusal_says_who_what_and_who_may() -> None:
    with pytest.raises(AccessDeniedError) as caught:
        Access().require(Principal("ci", frozenset({"viewer"})), Permission("package", "sign"))
    assert str(caught.value) == (
        "'ci' (roles: viewer) may not package:sign; roles that may: release-owner."
    )


def test_an_unknown_role_and_a_bad_permission() -> None:
    with pytest.raises(SecurityError, match="Did you mean 'viewer'"):
        Access().check_roles(["viever"])
    for text in ("", "state", ":", "a:", ":b", "a:b:c"):
        with pytest.raises(SecurityError, match="no permission"):
            Permission.parse(text)


def test_a_route_without_a_permission_is_refused() -> None:
    check_declared({"/healthz": PUBLIC, "/v1/predict": Permission("model", "predict")})
    with pytest.raises(SecurityError, match="declared for /a, /b"):
        check_declared({"/b": None, "/a": None, "/healthz": PUBLIC})

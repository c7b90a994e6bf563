"""Who may do what: roles as sets of permissions, everything else denied.

A table of our own: a check costs microseconds where a policy engine takes hundreds (casbin 1.43:
316 us for 54 rules, measured), and users do not write policies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from forge_harness.errors import AccessDeniedError, SecurityError, unknown_choice


@dataclass(frozen=True, slots=True, order=True)
class Permission:
    """One action on one type of resource, as in `state:read`."""

    resource: str
    action: str

    @classmethod
    def parse(cls, text: str) -> Permission:
        """Reads `resource:action`.

        Raises:
            SecurityError: It has another form.
        """
        resource, colon, action = text.partition(":")
        if not (resource and colon and action) or ":" in action:
            raise SecurityError(f"{text!r} is no permission; expected resource:action.")
        return cls(resource, action)

    def __str__(self) -> str:
        return f"{self.resource}:{self.action}"


def _permissions(*texts: str) -> frozenset[Permission]:
    return frozenset(map(Permission.parse, texts))


ROLES: Mapping[str, frozenset[Permission]] = {
    "viewer": _permissions("model:describe", "metrics:read", "state:read", "run:read"),
    "client": _permissions("model:describe", "model:predict"),
    "engineer": _permissions(
        "model:describe",
        "model:predict",
        "metrics:read",
        "state:read",
        "state:write",
        "run:read",
        "run:start",
    ),
    "release-owner": _permissions(
        "model:describe",
        "model:deploy",
        "metrics:read",
        "state:read",
        "state:migrate",
        "run:read",
        "package:sign",
    ),
    "auditor": _permissions("audit:read", "metrics:read", "run:read", "state:read"),
    "admin": _permissions(
        "audit:read",
        "keys:rotate",
        "metrics:read",
        "model:describe",
        "model:deploy",
        "server:drain",
        "state:collect",
        "state:read",
        "state:restore",
        "token:issue",
        "token:revoke",
    ),
}
"""The shipped roles. None has all: who rotates keys does not sign packages."""

PUBLIC = Permission("health", "read")
"""What needs no token."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks.

    Attributes:
        name: For the audit log.
        roles: What it is.
    """

    name: str
    roles: frozenset[str]


ANONYMOUS = Principal("anonymous", frozenset())


class Access:
    """Decides by roles.

    Args:
        roles: Name -> permissions; None: `ROLES`.
    """

    def __init__(self, roles: Mapping[str, frozenset[Permission]] | None = None) -> None:
        self.roles = dict(ROLES if roles is None else roles)

    def allows(self, principal: Principal, permission: Permission) -> bool:
        """Whether one of the principal's roles has the permission; an unknown role has none."""
        return permission == PUBLIC or any(
            permission in self.roles.get(role, ()) for role in principal.roles
        )

    def require(self, principal: Principal, permission: Permission) -> None:
        """Refuses what is not allowed.

        Raises:
            AccessDeniedError: It is not; names what is missing.
        """
        if not self.allows(principal, permission):
            having = sorted(name for name, held in self.roles.items() if permission in held)
            raise AccessDeniedError(
                f"{principal.name!r} (roles: {', '.join(sorted(principal.roles)) or 'none'}) may "
                f"not {permission}; roles that may: {', '.join(having) or 'none'}."
            )

    def check_roles(self, names: Iterable[str]) -> frozenset[str]:
        """Returns role names that exist.

        Raises:
            SecurityError: One does not; names the nearest.
        """
        chosen = frozenset(names)
        for name in sorted(chosen - self.roles.keys()):
            raise SecurityError(unknown_choice("role", name, self.roles))
        return chosen


def check_declared(routes: Mapping[str, Permission | None]) -> None:
    """Refuses routes of which one declares no permission, so that none is open by oversight.

    Args:
        routes: Route -> what it needs.

    Raises:
        SecurityError: Names the routes that declare nothing.
    """
    undeclared = sorted(route for route, permission in routes.items() if permission is None)
    if undeclared:
        raise SecurityError(
            f"No permission is declared for {', '.join(undeclared)}; declare one (PUBLIC for what "
            "needs no token)."
        )

"""Who asks, whether they may, and that it was recorded."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from forge_harness.errors import AccessDeniedError, AuditError, TokenError
from forge_harness.security.access import ANONYMOUS, PUBLIC, Access, Permission, Principal
from forge_harness.security.audit import AuditEvent, AuditLog, Decision
from forge_harness.security.tokens import TokenStore

from .problems import FORBIDDEN, NOT_AUDITED, UNAUTHENTICATED, Problem

AUDIENCE = "serve"
"""What tokens of this server are issued for."""


class Guard:
    """Authenticates, authorizes and records.

    Args:
        tokens: Whose holders are let in; None: everybody may do everything (loopback only).
        audit: Where requests and control actions are recorded; None: nowhere.
        access: Roles; None: the shipped ones.
    """

    def __init__(
        self,
        *,
        tokens: TokenStore | None,
        audit: AuditLog | None,
        access: Access | None = None,
    ) -> None:
        self._tokens, self._audit = tokens, audit
        self._access = access or Access()

    def principal(self, authorization: str | None, permission: Permission) -> Principal:
        """Returns who asks.

        Args:
            authorization: The header of that name.
            permission: What the route needs; without need of one nobody has to say who they are.

        Raises:
            Problem: UNAUTHENTICATED.
        """
        if self._tokens is None or permission == PUBLIC:
            return ANONYMOUS
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not secret:
            raise Problem(
                UNAUTHENTICATED, "No token was sent; expected a header 'Authorization: Bearer ...'."
            )
        try:
            return self._tokens.authenticate(secret.strip(), audience=AUDIENCE)
        except TokenError as error:
            raise Problem(UNAUTHENTICATED, str(error)) from error

    def require(self, principal: Principal, permission: Permission) -> None:
        """Refuses what the principal may not do.

        Raises:
            Problem: FORBIDDEN.
        """
        if self._tokens is None:
            return
        try:
            self._access.require(principal, permission)
        except AccessDeniedError as error:
            raise Problem(FORBIDDEN, str(error)) from error

    @property
    def records(self) -> bool:
        """Whether requests are recorded."""
        return self._audit is not None

    async def record(self, event: AuditEvent) -> None:
        """Records the event of a request; returns once its group is on disk.

        Raises:
            Problem: NOT_AUDITED; the request must not be answered otherwise.
        """
        if self._audit is None:
            return
        try:
            await asyncio.wrap_future(self._audit.submit(event))
        except AuditError as error:
            raise Problem(
                NOT_AUDITED,
                "The audit log takes no record, so nothing is answered; ask the operator.",
                retry_after_s=5.0,
            ) from error

    def control(self, action: str, resource: str, detail: Mapping[str, Any], actor: str) -> None:
        """Records a control action; returns once it is on disk.

        Raises:
            AuditError: It is not; the action must not be done.
        """
        if self._audit is not None:
            self._audit.record(
                AuditEvent(
                    actor=actor,
                    action=action,
                    resource=resource,
                    decision=Decision.ALLOW,
                    detail=detail,
                )
            )

    def close(self) -> None:
        """Commits and closes the audit log."""
        if self._audit is not None:
            self._audit.close()

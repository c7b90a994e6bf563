"""Who asks, whether they may, and that it was recorded."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from forge_harness.errors import (
    AccessDeniedError,
    AuditError,
    SecurityError,
    TokenError,
    UsageError,
)
from forge_harness.security.access import ANONYMOUS, PUBLIC, Access, Permission, Principal
from forge_harness.security.audit import AuditEvent, AuditLog, Decision
from forge_harness.security.key_sources import load_keyring
from forge_harness.security.keys import Purpose
from forge_harness.security.tokens import TokenStore

from .problems import FORBIDDEN, FOREIGN_PAGE, NO_TOKENS, NOT_AUDITED, UNAUTHENTICATED, Problem

AUDIENCE = "serve"
"""What tokens of this server are issued for."""

_log = logging.getLogger(__name__)


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
        self._trouble = ""

    def principal(self, authorization: str | None, permission: Permission) -> Principal:
        """Returns who asks.

        Args:
            authorization: The header of that name.
            permission: What the route needs; without need of one nobody has to say who they are.

        Raises:
            Problem: UNAUTHENTICATED; or NO_TOKENS: the file of tokens cannot be read.
        """
        if self._tokens is None or permission == PUBLIC:
            return ANONYMOUS
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not secret:
            raise Problem(
                UNAUTHENTICATED, "No token was sent; expected a header 'Authorization: Bearer ...'."
            )
        try:
            found = self._tokens.authenticate(secret.strip(), audience=AUDIENCE)
        except TokenError as error:
            raise Problem(UNAUTHENTICATED, str(error)) from error
        except (SecurityError, OSError) as error:
            self._say(f"Nobody can be let in: {error}")
            raise Problem(
                NO_TOKENS,
                "The server cannot read its tokens, so nobody is let in; ask the operator.",
                retry_after_s=5.0,
            ) from error
        self._trouble = ""
        return found

    def check_page(self, origin: str | None, host: str | None) -> None:
        """Refuses what a page of another site asks in a browser on this machine.

        The browser sends its `POST` wherever the page wants it, and without tokens everybody on
        this machine may do everything. A page has no token to send, so that with tokens it is
        nobody anyway.

        Args:
            origin: The header of that name, which browsers send of themselves.
            host: The header of that name.

        Raises:
            Problem: FOREIGN_PAGE.
        """
        if self._tokens is None and origin is not None and not _is_of(origin, host):
            raise Problem(
                FOREIGN_PAGE,
                f"The Origin is {origin[:100]!r} and the Host {(host or '')[:100]!r}; expected a "
                "request that is no page's of another site.",
            )

    def _say(self, trouble: str) -> None:
        """Logs what is wrong: once, since every request of a flood meets it."""
        if trouble != self._trouble:
            self._trouble = trouble
            _log.error("%s", trouble)

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

    def control(
        self,
        action: str,
        resource: str,
        detail: Mapping[str, Any],
        actor: str,
        *,
        is_last: bool = False,
    ) -> None:
        """Records a control action; returns once it is on disk.

        Args:
            action: Its name.
            resource: What it is done to.
            detail: More about it.
            actor: Who does it.
            is_last: Whether it comes after the requests whose records still wait.

        Raises:
            AuditError: It is not; the action must not be done.
        """
        if self._audit is None:
            return
        event = AuditEvent(
            actor=actor, action=action, resource=resource, decision=Decision.ALLOW, detail=detail
        )
        if is_last:
            self._audit.submit(event).result()
        else:
            self._audit.record(event)

    def close(self) -> None:
        """Commits and closes the audit log."""
        if self._audit is not None:
            self._audit.close()


def _is_of(origin: str, host: str | None) -> bool:
    try:
        return urlsplit(origin).netloc.lower() == (host or "").lower() != ""
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class GuardSpec:
    """Where tokens, audit log and their keys are; every process of a server opens its own guard.

    Attributes:
        tokens: Token file; None: everybody may do everything.
        audit: Audit log; None: nothing is recorded.
        keys: Source of the keyring that both were made with.
    """

    tokens: Path | None
    audit: Path | None
    keys: str | None

    def open(self) -> Guard:
        """Opens tokens and audit log.

        Raises:
            UsageError: There is no token file, or no keyring is given.
        """
        if self.tokens is None and self.audit is None:
            return Guard(tokens=None, audit=None)
        if self.keys is None:
            raise UsageError("--tokens and --audit need --keys, the keyring they are made with.")
        if self.tokens is not None and not self.tokens.exists():
            raise UsageError(
                f"There is no token file {self.tokens}; make one with `forge-harness tokens issue`."
            )
        keyring = load_keyring(self.keys)
        store = None
        if self.tokens is not None:
            store = TokenStore.of_keyring(self.tokens, keyring)
        log = None
        if self.audit is not None:
            key, signing = keyring.active(Purpose.AUDIT), keyring.active(Purpose.SIGN)
            log = AuditLog(self.audit, key=key, signing_key=signing, group_s=0.0)
        return Guard(tokens=store, audit=log)

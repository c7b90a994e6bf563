"""A route: where a request goes, and who may send it there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from forge_harness.security.access import Permission

from .exchange import Exchange, Handler

Gate = Callable[[Exchange], None]


@dataclass(frozen=True, slots=True)
class Route:
    """A route.

    Attributes:
        path: Exact.
        method: Of HTTP.
        permission: What it needs; None is refused when the server starts.
        handler: Answers.
        action: Its name in the audit log; "": health checks, which must not depend on a disk.
        gate: Raises what can be said before the body is there; asked before the handler.
    """

    path: str
    method: str
    permission: Permission | None
    handler: Handler
    action: str
    gate: Gate | None = None

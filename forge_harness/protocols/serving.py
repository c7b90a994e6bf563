"""The server of a trained model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditedRequest:
    """What an audit log says of one request."""

    request_id: str
    actor: str
    """Name of the token's holder, as `ServerSpec.access` has it; of a request that was not let in
    anything else."""
    status: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSpec:
    """How a server is started on a model, and what it should answer."""

    command: tuple[str, ...]
    """Starts it in the foreground; it listens on a free port and prints one line of JSON with
    `url` on its standard output when it is ready. SIGTERM ends it."""
    requests: Path
    """Requests with the trained model's answers: JSON lines, see `forge_harness.load.traffic`."""
    ca: Path | None = None
    """Certificate authority of its certificate, PEM, where it speaks TLS."""
    tokens: Mapping[str, str] = field(default_factory=dict)
    """Name of a holder -> bearer token; of holders that must be refused too."""
    access: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Name of a holder -> the `METHOD /path` it may ask for; empty: its token must be refused."""
    routes: tuple[str, ...] = ()
    """Every `METHOD /path` that needs a token, those that end the server last."""
    audited: Callable[[], Sequence[AuditedRequest]] | None = None
    """Reads the requests in the audit log, oldest first."""
    actions: Callable[[], Sequence[tuple[str, str]]] | None = None
    """Reads the actions in the audit log that are no requests (a start, the begin of a drain),
    oldest first: (who, what)."""
    revoke: Callable[[str], None] | None = None
    """Revokes the token of a holder, from outside, while the server runs."""
    others: tuple[ServerSpec, ...] = ()
    """Further servers whose answers are compared and that get no load: other kinds of request,
    other models."""


@runtime_checkable
class Serves(Protocol):
    """Serves its trained model over HTTP."""

    def server(self, directory: Path, *, secured: bool = False) -> ServerSpec:
        """Prepares a model and a server for it.

        Args:
            directory: Empty; what the server needs goes there.
            secured: Whether it speaks TLS, asks for tokens and keeps an audit log.
        """
        ...

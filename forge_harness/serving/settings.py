"""What a server is set to."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, replace
from pathlib import Path

from forge_harness.errors import UsageError

from .package import Classifier, Served


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Limits and places. Seconds everywhere; the defaults are for one small model on one machine.

    Attributes:
        host: Address to listen on.
        port: 0: any free one.
        tls_cert: PEM chain; without it the server speaks plain HTTP.
        tls_key: PEM key of it.
        max_batch: Rows of one classifier step, or sequences that decode together.
        window_s: How long a batch waits for more, and only when the last one was of some size.
        max_queue: Requests that may wait.
        deadline_s: Longest a request may take; a client can only ask for less.
        threads: Of one inference.
        client_rate: Requests a second one client may send; 0: no limit.
        client_in_flight: Requests of one client at a time; 0: no limit.
        max_body: Bytes of a request body.
        body_s: Until a request body must be there.
        header_s: Until the headers of a request must be there.
        send_s: How long a client may read nothing of its answer.
        keep_alive_s: How long an idle connection stays open.
        max_connections: Open connections.
        drain_s: Longest wait for accepted requests after SIGTERM.
        canary_s: Between two canary inferences.
        stall_s: Silence of the inference thread after which the server is not ready.
        hang_s: Silence after which the thread is replaced.
        max_restarts: Replacements within `restart_window_s`; one more and the server has failed.
        restart_window_s: See `max_restarts`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    tls_cert: Path | None = None
    tls_key: Path | None = None
    max_batch: int = 64
    window_s: float = 0.001
    max_queue: int = 256
    deadline_s: float = 1.0
    threads: int = 1
    client_rate: float = 0.0
    client_in_flight: int = 0
    max_body: int = 1 << 18
    body_s: float = 5.0
    header_s: float = 5.0
    send_s: float = 10.0
    keep_alive_s: float = 75.0
    max_connections: int = 1024
    drain_s: float = 30.0
    canary_s: float = 5.0
    stall_s: float = 1.5
    hang_s: float = 5.0
    max_restarts: int = 3
    restart_window_s: float = 300.0

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def check_exposure(
    settings: Settings, *, has_tokens: bool, has_audit: bool, insecure_http: bool
) -> None:
    """Refuses to listen to other machines without encryption, tokens and audit.

    Raises:
        UsageError: Names what is missing.
    """
    if (settings.tls_cert is None) != (settings.tls_key is None):
        raise UsageError("--tls-cert and --tls-key go together; give both or neither.")
    if settings.is_loopback:
        return
    missing = [
        name
        for name, given in (
            ("--tls-cert and --tls-key", settings.tls_cert is not None or insecure_http),
            ("--tokens", has_tokens),
            ("--audit", has_audit),
        )
        if not given
    ]
    if missing:
        raise UsageError(
            f"{settings.host} can be reached from other machines; give {', '.join(missing)}, or "
            "listen on 127.0.0.1."
        )


def sized(
    settings: Settings, served: Served, max_batch: int | None, deadline_ms: int | None
) -> Settings:
    """Returns the settings with what depends on the kind of model, where it was not given."""
    batch, milliseconds = (64, 1000) if isinstance(served, Classifier) else (8, 30_000)
    return replace(
        settings,
        max_batch=max_batch or batch,
        deadline_s=(deadline_ms or milliseconds) / 1000,
    )

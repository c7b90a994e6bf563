"""What an audit log records, as the bytes its chain is computed over."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from forge_harness.canonical import canonical_json
from forge_harness.probes.secrets import suspicious

MAC_BYTES = 32
_REDACTED = "[redacted]"


class Decision(StrEnum):
    """How what was asked for ended."""

    ALLOW = "allow"
    DENY = "deny"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEvent:
    """One action, whoever asked for it and however it ended.

    Attributes:
        actor: Who: a token's name, a user, a component.
        action: What, as resource type and verb: "state.migrate", "serve.predict".
        resource: On what.
        decision: How it ended.
        request_id: Ties it to a request; "" for none.
        detail: JSON values; what looks like a credential is redacted before it is recorded.
        time: UTC, ISO 8601 with microseconds; of the recording when empty.
    """

    actor: str
    action: str
    resource: str
    decision: Decision
    request_id: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)
    time: str = ""


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """An event in its place in the chain.

    Attributes:
        number: From 1, without gaps.
        event: What was recorded.
        previous: MAC of the record before; of the first, one over the log's id.
        mac: HMAC-SHA-256 over number, previous and event.
    """

    number: int
    event: AuditEvent
    previous: bytes
    mac: bytes


def completed(event: AuditEvent) -> AuditEvent:
    """Returns the event with its time, and without credentials in its detail."""
    flagged = suspicious({key: value for key, value in event.detail.items()})
    detail = {key: _REDACTED if key in flagged else v for key, v in event.detail.items()}
    time = event.time or datetime.now(UTC).isoformat(timespec="microseconds")
    return replace(event, detail=detail, time=time)


def genesis(key: bytes, log_id: str) -> bytes:
    """Returns what the first record follows: it binds the chain to this log and no other."""
    return hmac.digest(key, f"forge-audit/1:{log_id}".encode(), "sha256")


def mac_of(key: bytes, number: int, previous: bytes, event: AuditEvent) -> bytes:
    """Returns the MAC of a record."""
    content = {
        "number": number,
        "previous": previous.hex(),
        "time": event.time,
        "actor": event.actor,
        "action": event.action,
        "resource": event.resource,
        "decision": str(event.decision),
        "request_id": event.request_id,
        "detail": dict(event.detail),
    }
    return hmac.digest(key, canonical_json(content), "sha256")

"""The reference pipeline's servers: models of a few steps, with answers of the trained model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from forge_harness import training
from forge_harness.imports import python_program
from forge_harness.model import ByteLM
from forge_harness.protocols import AuditedRequest, ServerSpec, TrainOptions
from forge_harness.security.audit_events import AuditEvent
from forge_harness.security.audit_file import AuditFile
from forge_harness.security.certificates import LocalAuthority
from forge_harness.security.key_sources import write_keyring
from forge_harness.security.keys import Keyring
from forge_harness.security.tokens import TokenStore
from forge_harness.subject.answers import greedy, labelled, special, write_requests

STEPS = {"bytes": 150, "digits": 40}
"""Few; digits are told apart after them, and places of bytes: with rotary positions that stand
still 5 of the 6 answers to long prompts are others then, and none of 40 were after 30 steps (on
Zen 5; training rounds differently on another processor)."""
DEADLINE_MS = 400
"""Of a request: under the load checks' objective of 0.5 s, so that what is accepted keeps it."""
PATIENCE_MS = 20_000
"""Of requests that are answered for what they say, however slow the machine is."""
AUDIENCE = "serve"

_PREDICT = frozenset({"POST /v1/completions", "POST /v1/predict"})
_DESCRIBE = frozenset({"GET /v1/models", "GET /openapi.json"})
_METRICS = frozenset({"GET /metrics"})
_DRAIN = frozenset({"POST /v1/drain"})
ACCESS: Mapping[str, frozenset[str]] = {
    "client": _PREDICT | _DESCRIBE,
    "viewer": _DESCRIBE | _METRICS,
    "engineer": _PREDICT | _DESCRIBE | _METRICS,
    "release-owner": _DESCRIBE | _METRICS,
    "auditor": _METRICS,
    "admin": _DESCRIBE | _METRICS | _DRAIN,
}
"""Role -> what it may ask for. Written down here and not read off the roles it is to hold."""


def byte_model_server(directory: Path, *, secured: bool) -> ServerSpec:
    """Trains the byte model for a few steps, packages it, and says how it is served.

    Args:
        directory: Empty.
        secured: With TLS, tokens of every role and of holders to be refused, and an audit log.
            Without, the classifier's server comes along.
    """
    session = _trained("bytes")
    model = cast(ByteLM, session.model.eval())
    requests = write_requests(directory / "requests.jsonl", greedy(model))
    package = directory / "package"
    training.export_package(session, package)
    command = _command(package, DEADLINE_MS)
    if secured:
        return _secured(directory, command, requests)
    lines = special(model, model.config.context)
    further = ServerSpec(
        command=(*_command(package, PATIENCE_MS), "--no-auth"),
        requests=write_requests(directory / "special.jsonl", lines),
    )
    spec = ServerSpec(command=(*command, "--no-auth"), requests=requests)
    return replace(spec, others=(further, _classifier_server(directory)))


def _classifier_server(directory: Path) -> ServerSpec:
    session = _trained("digits")
    package = directory / "digits"
    training.export_package(session, package)
    size = session.data.data_info("digits").validation_size
    inputs = session.data.batch("digits", "validation", range(size)).inputs
    lines = labelled(session.model.eval(), inputs)
    return ServerSpec(
        command=(*_command(package, PATIENCE_MS), "--no-auth"),
        requests=write_requests(directory / "digits.jsonl", lines),
    )


def _trained(task: str) -> training.QATSession:
    session = training.QATSession(
        task, TrainOptions(steps=STEPS[task], seed=5, extra={"compute": "int8"})
    )
    for _ in range(STEPS[task]):
        session.step()
    return session


def _command(package: Path, deadline_ms: int) -> tuple[str, ...]:
    serve = (*python_program("forge_harness"), "serve", "--package", str(package))
    return (*serve, "--port", "0", "--deadline-ms", str(deadline_ms))


def _secured(directory: Path, command: Sequence[str], requests: Path) -> ServerSpec:
    keyring, keys = Keyring.new(), directory / "keys.json"
    write_keyring(keys, keyring)
    authority = LocalAuthority()
    cert, key = authority.issue(directory)
    store = TokenStore.of_keyring(directory / "tokens.json", keyring)
    issued = {role: store.issue(role, [role], audience=AUDIENCE) for role in ACCESS}
    held = {role: secret for role, (secret, _) in issued.items()}

    def revoke(name: str) -> None:
        store.revoke(issued[name][1].id)

    refused = {
        "expired": store.issue("expired", ["admin"], audience=AUDIENCE, days=1e-9)[0],
        "for another service": store.issue("other", ["admin"], audience="other")[0],
        "malformed": held["admin"][:-1],
        "unknown": held["admin"][:-4] + "AAAA",
        "empty": "",
    }
    revoked, token = store.issue("revoked", ["admin"], audience=AUDIENCE)
    store.revoke(token.id)
    audit = _AuditLog(directory / "audit.db")
    options = ["--tls-cert", cert, "--tls-key", key, "--keys", keys, "--audit", audit.path]
    options += ["--tokens", store.path]
    return ServerSpec(
        command=(*command, *map(str, options)),
        requests=requests,
        ca=authority.write(directory / "ca.pem"),
        tokens={**held, **refused, "revoked": revoked},
        access={**ACCESS, **dict.fromkeys([*refused, "revoked"], frozenset())},
        routes=(*sorted(_PREDICT | _DESCRIBE | _METRICS), *_DRAIN),
        audited=audit.requests,
        actions=audit.actions,
        revoke=revoke,
    )


@dataclass(frozen=True, slots=True)
class _AuditLog:
    """What a server's audit log says."""

    path: Path

    def requests(self) -> list[AuditedRequest]:
        return [
            AuditedRequest(
                request_id=event.request_id, actor=event.actor, status=int(event.detail["status"])
            )
            for event in self._events()
            if event.request_id and "status" in event.detail
        ]

    def actions(self) -> list[tuple[str, str]]:
        return [(event.actor, event.action) for event in self._events() if not event.request_id]

    def _events(self) -> list[AuditEvent]:
        file = AuditFile(self.path, read_only=True)
        try:
            return [record.event for record in file.records()]
        finally:
            file.close()

"""The reference pipeline's server: the byte language model, with answers of the trained model."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random

import torch
from torch import nn

from forge_harness import training
from forge_harness.durable import write_durably
from forge_harness.protocols import AuditedRequest, ServerSpec, TrainOptions
from forge_harness.security.audit_file import AuditFile
from forge_harness.security.certificates import LocalAuthority
from forge_harness.security.key_sources import write_keyring
from forge_harness.security.keys import Keyring, Purpose
from forge_harness.security.tokens import TokenStore

STEPS = 3
REQUESTS, NEW_TOKENS = 24, 12
DEADLINE_MS = 400
"""Of a request: under the load checks' objective of 0.5 s, so that what is accepted keeps it."""
CLEAR = 1e-3
"""Least lead of the likeliest token: a cache changes the order of additions, not the answer."""
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
    """
    session = training.QATSession("bytes", TrainOptions(steps=STEPS, seed=5))
    for _ in range(STEPS):
        session.step()
    package = directory / "package"
    training.export_package(session, package)
    requests = directory / "requests.jsonl"
    lines = _answered(training.package_model(package))
    write_durably(requests, "".join(f"{json.dumps(line)}\n" for line in lines).encode())
    command = [sys.executable, "-m", "forge_harness", "serve", "--package", str(package)]
    command += ["--port", "0", "--deadline-ms", str(DEADLINE_MS)]
    if not secured:
        return ServerSpec(command=(*command, "--no-auth"), requests=requests)
    return _secured(directory, command, requests)


def _answered(model: nn.Module) -> list[dict[str, object]]:
    """Requests with the trained model's answers: whole forwards, no cache, no packing."""
    random = Random(11)
    lines: list[dict[str, object]] = []
    while len(lines) < REQUESTS:
        prompt = [random.randrange(256) for _ in range(random.randrange(8, 25))]
        tokens = _greedy(model, prompt)
        if tokens is not None:
            body = {"prompt": prompt, "max_tokens": NEW_TOKENS}
            expect = {"tokens": tokens}
            lines.append({"path": "/v1/completions", "body": body, "expect": expect})
    return lines


def _greedy(model: nn.Module, prompt: Sequence[int]) -> list[int] | None:
    tokens = list(prompt)
    for _ in range(NEW_TOKENS):
        with torch.inference_mode():
            logits = model(torch.tensor([tokens]))[0, -1]
        first, second = logits.topk(2).values
        if first - second < CLEAR:
            return None
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


def _secured(directory: Path, command: Sequence[str], requests: Path) -> ServerSpec:
    keyring, keys = Keyring.new(), directory / "keys.json"
    write_keyring(keys, keyring)
    authority = LocalAuthority()
    cert, key = authority.issue(directory)
    store = TokenStore(directory / "tokens.json", key=keyring.active(Purpose.TOKENS))
    held = {role: store.issue(role, [role], audience=AUDIENCE)[0] for role in ACCESS}
    refused = {
        "expired": store.issue("expired", ["admin"], audience=AUDIENCE, days=1e-9)[0],
        "for another service": store.issue("other", ["admin"], audience="other")[0],
        "malformed": held["admin"][:-1],
        "unknown": held["admin"][:-4] + "AAAA",
        "empty": "",
    }
    revoked, token = store.issue("revoked", ["admin"], audience=AUDIENCE)
    store.revoke(token.id)
    audit = directory / "audit.db"
    options = ["--tls-cert", cert, "--tls-key", key, "--keys", keys, "--audit", audit]
    options += ["--tokens", store.path]
    return ServerSpec(
        command=(*command, *map(str, options)),
        requests=requests,
        ca=authority.write(directory / "ca.pem"),
        tokens={**held, **refused, "revoked": revoked},
        access={**ACCESS, **dict.fromkeys([*refused, "revoked"], frozenset())},
        routes=(*sorted(_PREDICT | _DESCRIBE | _METRICS), *_DRAIN),
        audited=lambda: _requests_in(audit),
    )


def _requests_in(audit: Path) -> list[AuditedRequest]:
    file = AuditFile(audit, read_only=True)
    try:
        events = [record.event for record in file.records()]
    finally:
        file.close()
    return [
        AuditedRequest(
            request_id=event.request_id, actor=event.actor, status=int(event.detail["status"])
        )
        for event in events
        if event.request_id and "status" in event.detail
    ]

"""Servers with one behaviour changed: what they let in, what they record, what they answer."""

from __future__ import annotations

import http.client
import json
import ssl
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from forge_harness.drill.careless_server import careless_command
from forge_harness.drill.defect import Defect, Stage
from forge_harness.load.metrics import direct
from forge_harness.load.target import started
from forge_harness.load.traffic import Request, read_requests
from forge_harness.protocols import ServerSpec
from forge_harness.subject.reference import ReferenceSubject

_TOKENS_REST_S = 2.1
"""Token files that were just written are read again for each request (`TokenStore`)."""


class Careless(ReferenceSubject):
    """The reference subject, whose servers have a defect; the answers expected stay the model's."""

    def __init__(self, defect: str) -> None:
        self.defect = defect

    def server(self, directory: Path, *, secured: bool = False) -> ServerSpec:
        """See `Serves.server`."""
        spec = super().server(directory, secured=secured)
        spec, *others = (self._with_defect(each) for each in (spec, *spec.others))
        return replace(spec, others=tuple(others))

    def _with_defect(self, spec: ServerSpec) -> ServerSpec:
        return replace(spec, command=careless_command(spec.command, self.defect))


def guarded(subject: Any) -> object:
    """Who gets in where, over which protocol, before and after a token ends; what is on record."""
    with tempfile.TemporaryDirectory() as folder:
        spec = subject.server(Path(folder), secured=True)
        written = time.monotonic()
        with started(spec.command) as target:
            time.sleep(max(0.0, _TOKENS_REST_S - (time.monotonic() - written)))
            held = {**spec.tokens, "nobody": ""}
            statuses = {
                f"{name} {path}": _status(target.url, spec, path, token, name)
                for path in ("/v1/models", "/metrics")
                for name, token in held.items()
            }
            protocol = _protocol_of_old_client(target.url, spec)
            spec.revoke("viewer")
            after = _status(target.url, spec, "/v1/models", spec.tokens["viewer"], "after")
            drained = _status(target.url, spec, "/v1/drain", spec.tokens["admin"], "last")
            target.stop()
        recorded = sorted((e.request_id, e.actor, e.status) for e in spec.audited())
        return statuses, protocol, after, drained, recorded, list(spec.actions())


def _status(url: str, spec: ServerSpec, path: str, token: str, name: str) -> int:
    context = ssl.create_default_context(cafile=spec.ca)
    host = urlsplit(url)
    connection = http.client.HTTPSConnection(str(host.hostname), host.port, context=context)
    request_id = f"{name}{path}".replace(" ", "-").replace("/", ".")
    headers = {"Authorization": f"Bearer {token}", "X-Request-Id": request_id}
    try:
        connection.request("POST" if path.endswith("drain") else "GET", path, headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()


def _protocol_of_old_client(url: str, spec: ServerSpec) -> str | None:
    context = ssl.create_default_context(cafile=spec.ca)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    host = urlsplit(url)
    connection = http.client.HTTPSConnection(str(host.hostname), host.port, context=context)
    try:
        connection.connect()
        return cast(ssl.SSLSocket, connection.sock).version()
    except OSError:
        return None
    finally:
        connection.close()


def answers(subject: Any, server: int = 1) -> object:
    """What one of its servers answers to requests sent at once: tokens and text, or labels.

    Args:
        subject: The subject.
        server: Which: 0 for the first, later ones are its `others`.
    """
    with tempfile.TemporaryDirectory() as folder:
        first = subject.server(Path(folder))
        spec = (first, *first.others)[server]
        requests = read_requests(spec.requests)[:24]
        with started(spec.command) as target, ThreadPoolExecutor(8) as pool:
            return list(pool.map(partial(_said, target.url), requests))


def _said(url: str, request: Request) -> object:
    headers = {"Content-Type": "application/json"}
    asked = urllib.request.Request(
        url + request.path, data=request.body, headers=headers, method=request.method
    )
    with direct().open(asked, timeout=60) as answer:
        said = json.loads(answer.read())
    return [said.get(name) for name in ("choices", "labels")]


_SEEDED = partial(Defect, stage=Stage.SECURITY, alive=guarded)


_TLS, _ROLES, _RECORD, _SERVED = (
    "security.tls_1_3_only",
    "security.rbac_matrix",
    "security.audit_coverage",
    "integration.served_equals_trained",
)
_BYTES, _CLASSES = partial(answers, server=1), partial(answers, server=2)

DEFECTS: tuple[Defect, ...] = (
    _SEEDED(
        id="X09_speaks_tls_1_2",
        title="The server accepts clients of TLS 1.2",
        check=_TLS,
        shows="older_accepted is 1",
        source="Venafi/vcert-python#190",
        subtlety=3,
        subject=partial(Careless, "speaks_tls_1_2"),
    ),
    _SEEDED(
        id="X06_every_role_may_do_everything",
        title="Whoever has a token may do what any token may do",
        check=_ROLES,
        shows="wrong_cells is",
        source="mlflow/mlflow#10250",
        subtlety=3,
        subject=partial(Careless, "lets_every_role_do_everything"),
    ),
    _SEEDED(
        id="X06_metrics_left_out_of_the_table",
        title="A route that nobody gave a permission is open to everybody",
        check=_ROLES,
        shows="/metrics is 200",
        source="mlflow/mlflow#21923",
        subtlety=3,
        subject=partial(Careless, "leaves_metrics_out_of_the_table"),
    ),
    _SEEDED(
        id="X06_takes_expired_tokens",
        title="A token opens after its end",
        check=_ROLES,
        shows="expired: ",
        subtlety=3,
        subject=partial(Careless, "takes_expired_tokens"),
    ),
    _SEEDED(
        id="X06_takes_tokens_of_other_services",
        title="A token of another service opens this one: its audience is not looked at",
        check=_ROLES,
        shows="for another service: ",
        subtlety=4,
        subject=partial(Careless, "takes_tokens_of_other_services"),
    ),
    _SEEDED(
        id="X06_reads_its_tokens_once",
        title="A token that was revoked opens until the server is started again",
        check=_ROLES,
        shows="still_open is 1 routes, expected 0",
        subtlety=4,
        subject=partial(Careless, "reads_its_tokens_once"),
    ),
    _SEEDED(
        id="X08_forgets_every_fifth_record",
        title="Every fifth request is not in the audit log",
        check=_RECORD,
        shows="missing is",
        subtlety=3,
        subject=partial(Careless, "forgets_every_fifth_record"),
    ),
    _SEEDED(
        id="X08_records_what_it_allowed",
        title="Requests that were refused are not in the audit log",
        check=_RECORD,
        shows="missing is",
        source="gravitational/teleport#48430",
        subtlety=3,
        subject=partial(Careless, "records_what_it_allowed"),
    ),
    _SEEDED(
        id="X08_records_nobody",
        title="The audit log does not say who asked",
        check=_RECORD,
        shows="other_actor is 36 requests, expected 0",
        subtlety=3,
        subject=partial(Careless, "records_nobody"),
    ),
    _SEEDED(
        id="X08_records_no_control_action",
        title="That the server was ended, and by whom, is not in the audit log",
        check=_RECORD,
        shows="end_recorded is False",
        subtlety=4,
        subject=partial(Careless, "records_no_control_action"),
    ),
    _SEEDED(
        id="V01_ignores_the_temperature",
        title="Completions are greedy whatever temperature the request asks for",
        check=_SERVED,
        shows="wrong answer (tokens)",
        alive=_BYTES,
        source="microsoft/BitNet#602",
        subtlety=2,
        subject=partial(Careless, "ignores_the_temperature"),
        stage=Stage.SERVING,
    ),
    _SEEDED(
        id="V05_ignores_the_seed",
        title="Completions are drawn with one seed whatever seed the request names",
        check=_SERVED,
        shows="wrong answer (tokens)",
        alive=_BYTES,
        source="pytorch/torchtitan#1983",
        subtlety=3,
        subject=partial(Careless, "ignores_the_seed"),
        stage=Stage.SERVING,
    ),
    _SEEDED(
        id="L13_stands_still_after_position_40",
        title="Rotary positions stop growing at the end of a table that is too short",
        check=_SERVED,
        shows="wrong answer (tokens)",
        alive=_BYTES,
        subtlety=4,
        subject=partial(Careless, "stands_still_after_position_40"),
        stage=Stage.SERVING,
    ),
    _SEEDED(
        id="served_text_backwards",
        title="The text of a completion is not that of its tokens",
        check=_SERVED,
        shows="wrong answer (text_sha256)",
        alive=_BYTES,
        subtlety=1,
        subject=partial(Careless, "tells_the_text_backwards"),
        stage=Stage.SERVING,
    ),
    _SEEDED(
        id="S13_gives_rows_to_the_wrong_job",
        title="Requests that share a batch get each other's answers",
        check=_SERVED,
        shows="wrong answer (labels)",
        alive=_CLASSES,
        source="microsoft/onnxruntime#8625",
        subtlety=4,
        subject=partial(Careless, "gives_rows_to_the_wrong_job"),
        stage=Stage.SERVING,
    ),
)
"""Servers."""

"""`forge-harness serve`: answers requests with a packed model."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from forge_harness.cli.options import examples, keys_option
from forge_harness.errors import UsageError

if TYPE_CHECKING:
    from forge_harness.serving.guard import Guard
    from forge_harness.serving.package import Served
    from forge_harness.serving.settings import Settings

_path = click.Path(path_type=Path)


@click.command(
    "serve",
    epilog=examples(
        "forge-harness serve --package runs/digits/package",
        "forge-harness serve --package runs/digits/package --host 0.0.0.0 --port 8443 \\",
        "  --tls-cert cert.pem --tls-key key.pem --keys keys.json --tokens tokens.json \\",
        "  --audit audit.db",
    ),
)
@click.option("--package", required=True, type=_path, metavar="DIR", help="Package to serve.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port; 0: any free one.",
)
@click.option("--tls-cert", type=_path, metavar="FILE", help="Certificate chain, PEM; TLS 1.3.")
@click.option("--tls-key", type=_path, metavar="FILE", help="Key of the certificate, PEM.")
@click.option("--insecure-http", is_flag=True, help="Allow other machines without TLS.")
@click.option("--tokens", type=_path, metavar="FILE", help="Access tokens; needs --keys.")
@click.option("--no-auth", is_flag=True, help="Let everybody on this machine do everything.")
@click.option("--audit", type=_path, metavar="FILE", help="Audit log; needs --keys.")
@keys_option(required=False)
@click.option(
    "--max-batch", type=click.IntRange(1, 1024), help="Rows (64) or sequences (8) of one step."
)
@click.option(
    "--max-queue",
    type=click.IntRange(1, 100_000),
    default=256,
    show_default=True,
    help="Requests that may wait.",
)
@click.option(
    "--deadline-ms",
    type=click.IntRange(1),
    help="Longest time of a request (1000; completions 30000).",
)
@click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="Threads of one inference.",
)
@click.option(
    "--client-rate",
    type=click.FloatRange(0),
    default=0.0,
    help="Requests a second of one client (no limit).",
)
@click.option(
    "--client-in-flight",
    type=click.IntRange(0),
    default=0,
    help="Requests of one client at a time (no limit).",
)
@click.option(
    "--drain-s",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="Longest wait for accepted requests at the end.",
)
def serve_command(
    package: Path,
    host: str,
    port: int,
    tls_cert: Path | None,
    tls_key: Path | None,
    insecure_http: bool,
    tokens: Path | None,
    no_auth: bool,
    audit: Path | None,
    keys: str | None,
    max_batch: int | None,
    deadline_ms: int | None,
    **limits: float,
) -> int:
    """Serve a packed model over HTTP: POST /v1/predict or /v1/completions.

    When it is ready, one line of JSON with its URL goes to standard output. SIGTERM drains: nothing
    new, accepted requests finish, exit code 0. Other machines are served with TLS, tokens and audit
    only.
    """
    if no_auth and tokens is not None:
        raise UsageError("--no-auth and --tokens exclude each other; drop one.")
    from forge_harness.serving.package import load_served
    from forge_harness.serving.server import ready_line, serve
    from forge_harness.serving.settings import Settings, check_exposure

    settings = Settings(host=host, port=port, tls_cert=tls_cert, tls_key=tls_key, **limits)  # type: ignore[arg-type]  # checked by click
    check_exposure(
        settings,
        has_tokens=tokens is not None,
        has_audit=audit is not None,
        insecure_http=insecure_http,
    )
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    if tokens is None and not no_auth:
        click.echo(
            "Without --tokens everybody on this machine may ask; say --no-auth if that is meant.",
            err=True,
        )
    served = load_served(package, threads=settings.threads)
    chosen = _sized(settings, served, max_batch, deadline_ms)
    guard = _guard(tokens, audit, keys)

    def say(server: object) -> None:
        import json

        click.echo(json.dumps(ready_line(server)))  # type: ignore[arg-type]  # a Server

    return serve(served, chosen, guard, on_ready=say)


def _sized(
    settings: Settings, served: Served, max_batch: int | None, deadline_ms: int | None
) -> Settings:
    """Returns the settings with what depends on the kind of model."""
    from dataclasses import replace

    from forge_harness.serving.package import Classifier

    batch, milliseconds = (64, 1000) if isinstance(served, Classifier) else (8, 30_000)
    return replace(
        settings,
        max_batch=max_batch or batch,
        deadline_s=(deadline_ms or milliseconds) / 1000,
    )


def _guard(tokens: Path | None, audit: Path | None, keys: str | None) -> Guard:
    """Opens tokens and audit log."""
    from forge_harness.security.audit import AuditLog
    from forge_harness.security.key_sources import load_keyring
    from forge_harness.security.keys import Purpose
    from forge_harness.security.tokens import TokenStore
    from forge_harness.serving.guard import Guard

    if tokens is None and audit is None:
        return Guard(tokens=None, audit=None)
    if keys is None:
        raise UsageError("--tokens and --audit need --keys, the keyring they are made with.")
    if tokens is not None and not tokens.exists():
        raise UsageError(
            f"There is no token file {tokens}; make one with `forge-harness tokens issue`."
        )
    keyring = load_keyring(keys)
    store = None if tokens is None else TokenStore(tokens, key=keyring.active(Purpose.TOKENS))
    log = None
    if audit is not None:
        key, signing = keyring.active(Purpose.AUDIT), keyring.active(Purpose.SIGN)
        log = AuditLog(audit, key=key, signing_key=signing, group_s=0.0)
    return Guard(tokens=store, audit=log)

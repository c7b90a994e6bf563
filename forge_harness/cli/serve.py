"""`forge-harness serve`: answers requests with a packed model."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import click

from forge_harness.cli.options import FiniteRange, NamedPath, WholeNumber, examples, keys_option
from forge_harness.cli.places import audit_places, check_apart, given, keys_place
from forge_harness.errors import UsageError

_path = NamedPath()


@click.command(
    "serve",
    epilog=examples(
        "forge-harness serve --package runs/digits/package",
        "forge-harness serve --package runs/digits/package --host 0.0.0.0 --port 8443 \\",
        "  --tls-cert cert.pem --tls-key key.pem --keys keys.json --tokens tokens.json \\",
        "  --audit audit.db",
        "forge-harness serve --package runs/digits/package --engine ray --replicas 2",
    ),
)
@click.option("--package", required=True, type=_path, metavar="DIR", help="Package to serve.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=WholeNumber(0, 65535),
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
    "--max-batch", type=WholeNumber(1, 1024), help="Rows (64) or sequences (8) of one step."
)
@click.option(
    "--max-queue",
    type=WholeNumber(1, 100_000),
    default=256,
    show_default=True,
    help="Requests that may wait.",
)
@click.option(
    "--deadline-ms",
    type=WholeNumber(1),
    help="Longest time of a request (1000; completions 30000).",
)
@click.option(
    "--threads",
    type=WholeNumber(1, 1024),
    default=1,
    show_default=True,
    help="Threads of one inference.",
)
@click.option(
    "--client-rate",
    type=FiniteRange(0),
    default=0.0,
    help="Requests a second of one client (no limit).",
)
@click.option(
    "--client-in-flight",
    type=WholeNumber(0),
    default=0,
    help="Requests of one client at a time (no limit).",
)
@click.option(
    "--drain-s",
    type=FiniteRange(0),
    default=30.0,
    show_default=True,
    help="Longest wait for accepted requests at the end.",
)
@click.option(
    "--engine",
    type=click.Choice(["uvicorn", "ray"]),
    default="uvicorn",
    show_default=True,
    help="ray: replicas behind Ray Serve's proxy, on this machine.",
)
@click.option("--replicas", type=WholeNumber(1, 256), help="Processes of --engine ray (2).")
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
    engine: str,
    replicas: int | None,
    **limits: float,
) -> int:
    """Serve a packed model over HTTP: POST /v1/predict or /v1/completions.

    When it is ready, one line of JSON with its URL goes to standard output. SIGTERM, SIGINT
    and SIGHUP drain: nothing new, accepted requests finish, exit code 0. Other machines are served
    with TLS, tokens and audit only.
    """
    if no_auth and tokens is not None:
        raise UsageError("--no-auth and --tokens exclude each other; drop one.")
    if replicas is not None and engine != "ray":
        raise UsageError("--replicas is for --engine ray; drop it, or choose that engine.")
    others = given(package=package, tokens=tokens, tls_cert=tls_cert, tls_key=tls_key)
    check_apart(audit_places(audit), [*others, *keys_place(keys)])
    from forge_harness.serving.guard import GuardSpec
    from forge_harness.serving.package import load_served
    from forge_harness.serving.server import ready_line, serve
    from forge_harness.serving.settings import Settings, check_exposure, sized

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
    if tokens is not None:
        _check_tokens(tokens)
    guard = GuardSpec(tokens, audit, keys)

    def say(line: dict[str, object]) -> None:
        click.echo(json.dumps(line))

    if engine == "ray":
        from forge_harness.serving.ray_engine import serve_with_ray

        return serve_with_ray(
            package,
            settings,
            guard,
            replicas=replicas or 2,
            max_batch=max_batch,
            deadline_ms=deadline_ms,
            on_ready=say,
        )
    served = load_served(package, threads=settings.threads)
    chosen = sized(settings, served, max_batch, deadline_ms)
    return serve(served, chosen, guard.open(), on_ready=lambda server: say(ready_line(server)))


def _check_tokens(path: Path) -> None:
    """Refuses, before the server is ready, a file no token could ever be read from."""
    from forge_harness.security.tokens import TokenStore

    TokenStore(path, key=b"").tokens()  # Reading needs no key; only hashing does.

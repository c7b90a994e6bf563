"""`forge-harness tokens`: who may ask a server, and for what."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from forge_harness.cli.options import FiniteRange, NamedPath, examples, json_option, keys_option
from forge_harness.cli.places import Place, audit_places, check_apart, keys_place
from forge_harness.cli.terminal import echo_json, say, table
from forge_harness.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from forge_harness.security.keys import Keyring
    from forge_harness.security.tokens import Token, TokenStore

_file = click.argument("path", metavar="FILE", type=NamedPath())
_audit = click.option(
    "--audit",
    type=NamedPath(),
    metavar="FILE",
    help="Audit log that records it first.",
)
_TIMES = ("created_at", "expires_at", "revoked_at")


@click.group(
    "tokens",
    epilog=examples(
        "forge-harness tokens issue tokens.json --keys keys.json --name ci --role client",
        "forge-harness tokens list tokens.json --keys keys.json",
        "forge-harness tokens revoke tokens.json 0123456789abcdef --keys keys.json",
    ),
)
def tokens_group() -> None:
    """Issue, list and revoke the access tokens of a server."""


@tokens_group.command(
    "issue",
    epilog=examples(
        "forge-harness tokens issue tokens.json --keys keys.json --name ci --role client",
    ),
)
@_file
@keys_option(required=True)
@click.option("--name", required=True, help="Of who will hold it.")
@click.option("--role", "roles", multiple=True, required=True, help="What it may do (repeatable).")
@click.option(
    "--days",
    type=FiniteRange(min=0, min_open=True),
    default=30.0,
    show_default=True,
    help="Until it expires.",
)
@_audit
def issue_command(
    path: Path, keys: str, name: str, roles: tuple[str, ...], days: float, audit: Path | None
) -> int:
    """Issue a token; it is printed once and kept nowhere."""
    from forge_harness.serving.guard import AUDIENCE

    if not name.strip() or not name.isprintable():
        raise UsageError(
            f"--name is {name!r}; expected the name of who will hold the token, in one line."
        )
    _check_apart(path, keys, audit)
    store, keyring = _opened(path, keys)

    def record(token: Token) -> None:
        detail = {"id": token.id, "name": name, "roles": token.roles, "days": days}
        _record(audit, keyring, "token.issue", detail)

    secret, token = store.issue(name, roles, audience=AUDIENCE, days=days, record=record)
    click.echo(secret)
    say(f"Token {token.id} of {name!r}, until {token.expires_at}.")
    return ExitCode.PASS


@tokens_group.command(
    "revoke",
    epilog=examples("forge-harness tokens revoke tokens.json 0123456789abcdef --keys keys.json"),
)
@_file
@click.argument("token_id", metavar="ID")
@keys_option(required=True)
@_audit
def revoke_command(path: Path, token_id: str, keys: str, audit: Path | None) -> int:
    """End the token ID now; a running server refuses it from its next request on."""
    _existing(path)
    _check_apart(path, keys, audit)
    store, keyring = _opened(path, keys)

    def record(token: Token) -> None:
        _record(audit, keyring, "token.revoke", {"id": token.id})

    token = store.revoke(token_id, record=record)
    click.echo(f"Token {token.id} of {token.name!r} was revoked on {token.revoked_at}.")
    return ExitCode.PASS


@tokens_group.command(
    "list", epilog=examples("forge-harness tokens list tokens.json --keys keys.json")
)
@_file
@keys_option(required=True)
@json_option
def list_command(path: Path, keys: str, as_json: bool) -> int:
    """List the tokens of FILE; never the tokens themselves, nor their hashes."""
    _existing(path)
    store, _ = _opened(path, keys)
    rows = [
        {key: value for key, value in asdict(token).items() if key != "hash"}
        for token in store.tokens()
    ]
    if as_json:
        echo_json(rows)
        return ExitCode.PASS
    cells = [
        (row["id"], row["name"], ",".join(row["roles"]), *(row[time] or "" for time in _TIMES))
        for row in rows
    ]
    click.echo(table(("id", "name", "roles", "created", "expires", "revoked"), cells))
    return ExitCode.PASS


def _existing(path: Path) -> None:
    """A wrong name must not look like a file without tokens; only `issue` makes one."""
    if not path.exists():
        raise UsageError(f"There is no token file {path}; `forge-harness tokens issue` makes one.")


def _check_apart(path: Path, keys: str, audit: Path | None) -> None:
    check_apart([Place("FILE", path), *audit_places(audit)], keys_place(keys))


def _opened(path: Path, keys: str) -> tuple[TokenStore, Keyring]:
    from forge_harness.security.key_sources import load_keyring
    from forge_harness.security.tokens import TokenStore

    keyring = load_keyring(keys)
    return TokenStore.of_keyring(path, keyring), keyring


def _record(audit: Path | None, keyring: Keyring, action: str, detail: Mapping[str, Any]) -> None:
    """Records before the deed: what cannot be recorded is not done."""
    if audit is None:
        return
    from forge_harness.security.audit import AuditEvent, AuditLog, Decision
    from forge_harness.security.keys import Purpose

    key, signing = keyring.active(Purpose.AUDIT), keyring.active(Purpose.SIGN)
    with AuditLog(audit, key=key, signing_key=signing) as log:
        log.record(
            AuditEvent(
                actor=f"uid:{os.getuid()}",
                action=action,
                resource="tokens",
                decision=Decision.ALLOW,
                detail=detail,
            )
        )

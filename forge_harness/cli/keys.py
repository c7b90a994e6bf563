"""`forge-harness keys`: the keyring that seals, signs and chains."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from forge_harness.cli.options import NamedPath, check_target, examples, json_option
from forge_harness.cli.terminal import echo_json, say, several, table
from forge_harness.errors import ExitCode, ForgeError, SecurityError, UsageError

if TYPE_CHECKING:
    from forge_harness.security.sealing import KeyringSealer

# Stated here, not imported: `--help` must not import cryptography. A test holds them equal.
PURPOSES = ("seal", "audit", "tokens", "sign")


@click.group(
    "keys",
    epilog=examples(
        "forge-harness keys new keys.json",
        "forge-harness keys rotate keys.json --sealed states",
        "forge-harness keys list keys.json",
    ),
)
def keys_group() -> None:
    """Make, rotate and list the keys that seal, sign and chain.

    Other commands take a keyring as --keys FILE, env:NAME (base64, removed from the environment) or
    command:PROGRAM ARGUMENTS (its standard output).
    """


@keys_group.command("new", epilog=examples("forge-harness keys new keys.json"))
@click.argument("path", metavar="FILE", type=NamedPath())
def new_command(path: Path) -> int:
    """Write a new keyring to FILE, which must not exist; only its owner can read it."""
    from forge_harness.security.key_sources import create_keyring
    from forge_harness.security.keys import Keyring

    if not path.exists():
        check_target(path)
    keyring = Keyring.new()
    try:
        create_keyring(path, keyring)
    except FileExistsError as error:
        raise UsageError(
            f"{path} exists, and what is sealed under its keys could never be read again; give "
            "another name, or `keys rotate` it."
        ) from error
    count = several(len(keyring.keys), "key")
    click.echo(f"{path}: {count}. Keep a copy where {path} cannot be lost with it.")
    return ExitCode.PASS


@keys_group.command(
    "rotate",
    epilog=examples(
        "forge-harness keys rotate keys.json",
        "forge-harness keys rotate keys.json --sealed states",
        "forge-harness keys rotate keys.json --purpose sign",
    ),
)
@click.argument("path", metavar="FILE", type=NamedPath())
@click.option(
    "--purpose",
    type=click.Choice(PURPOSES),
    default="seal",
    show_default=True,
    help="Which key to replace.",
)
@click.option(
    "--sealed",
    "places",
    multiple=True,
    type=NamedPath(exists=True),
    metavar="PATH",
    help="File, directory or state store to put under the new key (repeatable).",
)
def rotate_command(path: Path, purpose: str, places: tuple[Path, ...]) -> int:
    """Make a new active key in FILE; the former one stays for reading.

    With --sealed only the heads of the files change, whatever their size; readers go on meanwhile.
    Killed half-way, a repetition of the command completes it.
    """
    from forge_harness.security.key_sources import changing_keyring, write_keyring
    from forge_harness.security.keys import Purpose
    from forge_harness.security.sealing import KeyringSealer

    if places and purpose != "seal":
        raise UsageError(f"--sealed goes with --purpose seal, not {purpose!r}.")
    # Until the contents are under it too: another rotation meanwhile would move them on, to a key
    # that this one does not know.
    with changing_keyring(path) as former:
        keyring = former.rotated(Purpose(purpose))
        write_keyring(path, keyring)
        click.echo(f"{path}: key {keyring.active_id(Purpose(purpose))} is active to {purpose}.")
        if purpose == "tokens":
            say("A server that runs takes tokens issued from now on when it is started again.")
        _rewrap_all(places, KeyringSealer(keyring))
    return ExitCode.PASS


def _rewrap_all(places: Sequence[Path], sealer: KeyringSealer) -> None:
    """Puts every place under the new key; one that cannot be keeps no other from it."""
    errors: list[ForgeError] = []
    for place in places:
        try:
            changed, total = _rewrap(place, sealer)
        except ForgeError as error:
            errors.append(error)
        else:
            click.echo(f"{place}: {changed} of {total} sealed contents put under it.")
    for other in errors[1:]:
        say(f"Error: {other}")
    if errors:
        raise errors[0]


def _rewrap(place: Path, sealer: KeyringSealer) -> tuple[int, int]:
    """Puts a file, the files of a directory or a store under the active key: (changed, sealed)."""
    from forge_harness.state import Store
    from forge_harness.state.opening import INDEX

    if (place / INDEX).exists():
        with Store.open(place, create=False, sealer=sealer) as store:
            return store.rewrap()
    sealed, refused = _sealed_below(place, sealer)
    if not sealed and not refused:
        raise UsageError(
            f"{place} holds nothing that is sealed; the new key is active all the same."
        )
    changed = 0
    for path in sealed:
        try:
            changed += sealer.rewrap_file(path)
        except (OSError, SecurityError) as error:
            refused.append(f"{path}: {str(error).rstrip('.')}")
    if refused:
        count = several(len(refused), "file or directory", "files or directories")
        raise SecurityError(
            f"{count} of {place} could not be put under the new key, the first is {refused[0]}. "
            "All others are; mend these, and repeat before the old key is destroyed."
        )
    return changed, len(sealed)


def _sealed_below(place: Path, sealer: KeyringSealer) -> tuple[list[Path], list[str]]:
    """Returns the sealed files of a place, and why others, or directories, cannot be looked at."""
    unread: list[OSError] = []
    files = [place]
    if place.is_dir():
        walk = os.walk(place, onerror=unread.append)
        files = sorted(Path(directory) / name for directory, _, names in walk for name in names)
    sealed = []
    for path in files:
        try:
            if stat.S_ISREG(path.lstat().st_mode) and sealer.is_sealed(path):
                sealed.append(path)
        except OSError as error:
            unread.append(error)
    return sealed, [f"{error.filename}: {error.strerror}" for error in unread]


@keys_group.command(
    "destroy", epilog=examples("forge-harness keys destroy keys.json 8c1f0e3ab2d47755")
)
@click.argument("path", metavar="FILE", type=NamedPath())
@click.argument("key_id", metavar="ID")
def destroy_command(path: Path, key_id: str) -> int:
    """Forget the bytes of a decrypt-only key; what is still sealed under it is lost."""
    from forge_harness.security.key_sources import changing_keyring, write_keyring

    with changing_keyring(path) as keyring:
        write_keyring(path, keyring.destroyed(key_id))
    click.echo(f"{path}: key {key_id} is destroyed.")
    return ExitCode.PASS


@keys_group.command("list", epilog=examples("forge-harness keys list keys.json"))
@click.argument("source", metavar="SOURCE")
@json_option
def list_command(source: str, as_json: bool) -> int:
    """List the keys of SOURCE (FILE, env:NAME or command:...); never their bytes."""
    from forge_harness.security.key_sources import load_keyring

    keyring = load_keyring(source)
    rows = [(k.id, str(k.purpose), str(k.state), k.created_at, k.changed_at) for k in keyring.keys]
    headers = ("id", "purpose", "state", "created_at", "changed_at")
    if as_json:
        echo_json([dict(zip(headers, row, strict=True)) for row in rows])
    else:
        click.echo(table(("id", "for", "state", "created", "changed"), rows))
    return ExitCode.PASS

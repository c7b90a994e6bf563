"""`forge-harness sign`: a signature beside a package."""

from __future__ import annotations

from pathlib import Path

import click

from forge_harness.cli.options import NamedPath, examples
from forge_harness.cli.places import Place, check_apart, given, keys_place
from forge_harness.cli.terminal import say, several
from forge_harness.errors import ExitCode


@click.command(
    "sign",
    epilog=examples(
        "forge-harness sign packages/digits --keys keys.json --public digits.pem",
        "forge-harness verify packages/digits --key digits.pem",
        "forge-harness sign packages/digits --keys keys.json --openssf d.sig --openssf-key ec.pem",
    ),
)
@click.argument("package", metavar="DIR", type=NamedPath())
@click.option(
    "--keys", required=True, metavar="SOURCE", help="Keyring: FILE, env:NAME, command:..."
)
@click.option("--signature", type=NamedPath(), metavar="FILE", help="Default: DIR.dsse.json.")
@click.option(
    "--public",
    type=NamedPath(),
    metavar="FILE",
    help="Also write the public key (PEM), to hand to those who verify.",
)
@click.option(
    "--openssf",
    type=NamedPath(),
    metavar="FILE",
    help="Also sign in the format of OpenSSF model signing.",
)
@click.option(
    "--openssf-key",
    type=NamedPath(exists=True, dir_okay=False),
    metavar="FILE",
    help="P-256 private key (PEM); that format takes no other.",
)
def sign_command(
    package: Path,
    keys: str,
    signature: Path | None,
    public: Path | None,
    openssf: Path | None,
    openssf_key: Path | None,
) -> int:
    """Sign every file of DIR: an in-toto statement in a DSSE envelope (Ed25519), beside it."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from forge_harness.durable import write_durably
    from forge_harness.errors import UsageError
    from forge_harness.security.dsse import key_id, public_key_to_pem
    from forge_harness.security.key_sources import load_keyring
    from forge_harness.security.keys import Purpose
    from forge_harness.security.openssf import export_signature, holds_git_files, p256_key
    from forge_harness.security.signing import sign_package, signature_beside

    if (openssf is None) != (openssf_key is None):
        raise UsageError("--openssf and --openssf-key go together; give both or neither.")
    target = signature or signature_beside(package)
    check_apart(
        given(signature=target, public=public, openssf=openssf),
        [Place("DIR", package), *keys_place(keys), *given(openssf_key=openssf_key)],
    )
    seed = load_keyring(keys).active(Purpose.SIGN)
    # Before anything is written: signatures come out together or not at all.
    other_key = None if openssf_key is None else p256_key(openssf_key.read_bytes())
    key = Ed25519PrivateKey.from_private_bytes(seed).public_key()
    signed = sign_package(package, [seed], signature=target)
    if openssf is not None and other_key is not None:
        export_signature(package, other_key, openssf)
    if public is not None:
        write_durably(public, public_key_to_pem(key))
    click.echo(f"{target}: {several(signed.files, 'file')} signed by key {key_id(key)[:16]}.")
    if openssf is not None and holds_git_files(package):
        say(
            f"Note: {package} holds files of git, which are signed too: verify {openssf} with "
            "`model_signing verify key --no-ignore-git-paths`."
        )
    return ExitCode.PASS

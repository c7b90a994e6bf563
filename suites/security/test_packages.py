"""A package is exactly what a pinned key signed."""

import json
import random
import shutil

import pytest

from forge_harness.errors import ForgeError

SIZE = 20_000


@pytest.mark.forge_check("security.package_signature")
def test_package_signature(subject, evidence, tmp_path, forge_seed):
    """A signed package verifies; one that differs in any file, and one signed by others, does not.

    Attacks: bytes flipped, files added, removed, renamed, swapped, linked; the signature of another
    package, a signature changed, emptied, without signatures, made by somebody else's key. Oracle:
    the package verified before and after.
    """
    generator = random.Random(forge_seed)
    package = _package(tmp_path / "package", generator)
    signature = subject.sign_package(package)
    evidence.equal(
        "signature_outside",
        signature.resolve().is_relative_to(package.resolve()),
        expected=False,
        reason="a signature within what it signs changes it",
    )
    evidence.equal(
        "verifies", _accepted(subject, package, signature), expected=True, reason="as signed"
    )
    accepted, tried = [], 0
    for name, change in _changes(generator).items():
        copy = shutil.copytree(package, tmp_path / "attacked" / package.name)
        change(copy)
        tried += 1
        if _accepted(subject, copy, signature):
            accepted.append(name)
        shutil.rmtree(tmp_path / "attacked")
    for name, forged in _forgeries(subject, signature, tmp_path, generator).items():
        file = tmp_path / "forged.json"
        file.write_bytes(forged)
        tried += 1
        if _accepted(subject, package, file):
            accepted.append(name)
    tried += 1
    if _accepted(subject, package, tmp_path / "no such file"):
        accepted.append("no signature")
    evidence.record("attacks", tried, unit="attacks", reason="on package or signature")
    evidence.equal(
        "accepted",
        len(accepted),
        expected=0,
        unit="attacks",
        reason=", ".join(accepted[:4]) or "every one was refused",
    )
    evidence.equal(
        "still_verifies",
        _accepted(subject, package, signature),
        expected=True,
        reason="the package itself was not touched",
    )


def _package(folder, generator):
    (folder / "extra").mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(generator.randbytes(SIZE))
    (folder / "config.json").write_text(json.dumps({"width": 64}))
    (folder / "extra" / "labels.json").write_text("[]")
    return folder


def _changes(generator):
    def flip(folder):
        path = folder / "weights.safetensors"
        content = bytearray(path.read_bytes())
        content[generator.randrange(SIZE)] ^= 1 << generator.randrange(8)
        path.write_bytes(content)

    def swap(folder):
        first, second = folder / "config.json", folder / "extra" / "labels.json"
        contents = first.read_bytes(), second.read_bytes()
        first.write_bytes(contents[1])
        second.write_bytes(contents[0])

    def link(folder):
        (folder / "config.json").rename(folder.parent / "elsewhere.json")
        (folder / "config.json").symlink_to(folder.parent / "elsewhere.json")

    return {
        "a bit flipped": flip,
        "a byte appended": lambda f: (f / "config.json").write_text('{"width": 64} '),
        "a file emptied": lambda f: (f / "config.json").write_bytes(b""),
        "a file removed": lambda f: (f / "extra" / "labels.json").unlink(),
        "a file added": lambda f: (f / "loader.py").write_text("raise SystemExit"),
        "a hidden file added": lambda f: (f / ".startup").write_text(""),
        "a file added below": lambda f: (f / "extra" / "more.json").write_text("{}"),
        "a file renamed": lambda f: (f / "config.json").rename(f / "Config.json"),
        "two files swapped": swap,
        "a file linked": link,
    }


def _forgeries(subject, signature, scratch, generator):
    """Signatures that are none of this package's."""
    envelope = signature.read_bytes()
    other = subject.sign_package(_package(scratch / "other" / "package", generator)).read_bytes()
    # Another instance has keys of its own.
    stranger = type(subject)()
    copy = shutil.copytree(scratch / "package", scratch / "stranger" / "package")
    by_stranger = stranger.sign_package(copy).read_bytes()
    document = json.loads(envelope)
    flipped = bytearray(envelope)
    flipped[len(flipped) // 2] ^= 1
    return {
        "another package's signature": other,
        "somebody else's signature": by_stranger,
        "an empty signature": b"",
        "a signature that is no JSON": b"\0\1\2",
        "no signatures in it": json.dumps({**document, "signatures": []}).encode(),
        "a byte of it changed": bytes(flipped),
        "another payload": json.dumps(
            {**document, "payload": json.loads(other)["payload"]}
        ).encode(),
    }


def _accepted(subject, package, signature):
    try:
        subject.check_package(package, signature)
    except (ForgeError, OSError, ValueError):
        return False
    return True

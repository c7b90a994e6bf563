"""A package is exactly what a pinned key signed."""

import json
import random
import shutil

import pytest

SIZE = 20_000


@pytest.mark.forge_check("security.package_signature")
def test_package_signature(subject, evidence, tmp_path, forge_seed):
    """A signed package verifies; one that differs in any file, and one signed by others, does not.

    Attacks: bytes flipped, files added, removed, renamed, swapped, linked; the signature of another
    package, a signature changed, cut off, emptied, without signatures, made by somebody else's key.
    Oracle: the package verified before and after. A signature may have any format; what is forged
    within an envelope (DSSE) is forged where there is one.
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
    forgeries = _forgeries(subject, signature, tmp_path, generator)
    forgeries |= _by_stranger(subject, tmp_path, evidence)
    for name, forged in forgeries.items():
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
    flipped = bytearray(envelope)
    flipped[len(flipped) // 2] ^= 1
    forged = {
        "another package's signature": other,
        "an empty signature": b"",
        "three bytes for a signature": b"\0\1\2",
        "half of it": envelope[: len(envelope) // 2],
        "a byte of it changed": bytes(flipped),
    }
    document = _envelope(envelope)
    if document is not None:
        theirs = json.loads(other)["payload"]
        forged["no signatures in it"] = json.dumps({**document, "signatures": []}).encode()
        forged["another payload"] = json.dumps({**document, "payload": theirs}).encode()
    return forged


def _envelope(signature):
    """Returns the JSON of an envelope with its payload; None of a signature of another format."""
    try:
        document = json.loads(signature)
    except ValueError:
        return None
    return document if isinstance(document, dict) and "payload" in document else None


def _by_stranger(subject, scratch, evidence):
    """The package as another instance signs it, which has keys of its own."""
    try:
        stranger = type(subject)()
    except TypeError as error:
        evidence.record(
            "by_a_stranger", "not held", reason=f"no second instance of the subject: {error}"
        )
        return {}
    copy = shutil.copytree(scratch / "package", scratch / "stranger" / "package")
    return {"somebody else's signature": stranger.sign_package(copy).read_bytes()}


def _accepted(subject, package, signature):
    try:
        subject.check_package(package, signature)
    except Exception:
        # How a subject refuses is its own; that it takes what is whole is held as well.
        return False
    return True

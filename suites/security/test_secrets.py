"""No credential reaches what a run leaves behind."""

import base64
import json
import os
import secrets
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

from forge_harness.probes.secrets import NAMES

from . import leaky

LIMIT_S = 120
MARK = b"weights that are nobody else's"


@pytest.mark.forge_check("security.secrets_not_logged")
def test_secrets_not_logged(evidence, tmp_path):
    """Credentials given to the harness, and to checks that give them away, are in no file it wrote.

    A run records checks that raise, assert, record, skip with, print and log what the environment
    names as credentials; a sealed store is made with keys from the environment and opened with the
    wrong ones. Oracle: each value is looked for as it is, in base64, percent-encoded and as raw
    bytes, in every file and everything printed. A value that is no credential must be found, or
    nothing was recorded.
    """
    planted = {
        "FORGE_TEST_API_KEY": secrets.token_urlsafe(32),
        "DATABASE_PASSWORD": f'p@ss/{secrets.token_hex(6)} "word"',
        "REGISTRY_TOKEN": secrets.token_hex(20),
    }
    assert all(NAMES.search(name) for name in planted)
    known = f"no-credential-{secrets.token_hex(8)}"
    block, password = secrets.token_urlsafe(48), secrets.token_hex(8)
    written, ring = _store(tmp_path, planted)
    written += _run(tmp_path, {**planted, "FORGE_TEST_NAME": known}, block, password)
    forms = {name: _forms(value.encode()) for name, value in planted.items()}
    forms |= {"a private key": _forms(block.encode()), "a URL": _forms(password.encode())}
    forms |= {f"key {number}": _forms(key) for number, key in enumerate(ring)}
    forms["sealed content"] = (MARK,)
    found = [
        f"{name} in {where}"
        for name, values in forms.items()
        for where, content in written
        if any(value in content for value in values)
    ]
    evidence.record("searched", len(written), unit="files", reason="and what commands printed")
    evidence.equal(
        "recorded",
        any(known.encode() in content for _, content in written),
        expected=True,
        reason="a value that is no credential is where the others would be",
    )
    evidence.equal(
        "places", len(found), expected=0, unit="places", reason="; ".join(found[:4]) or "none"
    )


def _forms(value):
    """The spellings of a secret: as it is, base64, percent-encoded, hexadecimal, in JSON."""
    spelled = {value, base64.b64encode(value).rstrip(b"="), value.hex().encode()}
    spelled.add(base64.urlsafe_b64encode(value).rstrip(b"="))
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return tuple(spelled)
    return (*spelled, quote(text, safe="").encode(), json.dumps(text)[1:-1].encode())


def _run(folder, environment, block, password):
    suite = folder / "leaky"
    suite.mkdir()
    names = [*environment]
    source = leaky.SOURCE % {"names": names, "block": block, "password": password}
    (suite / "test_leaky.py").write_text(source)
    directory = folder / "run"
    command = ["run", "--suite-path", suite, "--suite", "leaky", "--run-dir", directory]
    command += ["--format", "html", "--format", "json", "--format", "md", "--format", "junit"]
    command += ["--quiet", "--workers", "1"]
    printed = _forge(command, environment)
    # The test file itself is ours; it names no value but the last two.
    return [("the output of run", printed), *_files(directory)]


def _store(folder, planted):
    """A sealed store whose keys come from the environment, and one opening with wrong keys."""
    rings = [folder / "ring.json", folder / "other.json"]
    model = folder / "model.bin"
    model.write_bytes(MARK * 100)
    store = folder / "store"
    printed = [_forge(["keys", "new", ring], planted) for ring in rings]
    keys = [base64.b64encode(ring.read_bytes()).decode() for ring in rings]
    common = ["--root", store, "--keys", "env:FORGE_KEYRING"]
    save = ["state", "save", model, "--phase", "5", "--kind", "checkpoint", "--name", "m"]
    get = ["state", "get", "5", "m", "--out", folder / "out"]
    commands = ((save, keys[0]), (["state", "verify"], keys[0]), (get, keys[1]))
    for command, ring in commands:
        printed.append(_forge([*command, *common], {**planted, "FORGE_KEYRING": ring}))
    material = [
        base64.b64decode(key["material"])
        for ring in rings
        for key in json.loads(ring.read_bytes())["keys"]
    ]
    outputs = [(f"the output of command {n}", text) for n, text in enumerate(printed)]
    return [*outputs, *_files(store)], material


def _forge(command, environment):
    done = subprocess.run(
        [sys.executable, "-m", "forge_harness", *map(str, command)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        timeout=LIMIT_S,
        check=False,
    )
    return done.stdout


def _files(directory):
    return [
        (str(path.relative_to(directory)), path.read_bytes())
        for path in sorted(Path(directory).rglob("*"))
        if path.is_file()
    ]

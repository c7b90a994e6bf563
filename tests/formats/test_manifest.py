"""Manifests: json, hashlib and os.walk say what is right; every lie is named."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forge_harness.errors import CheckpointError, DamagedCheckpointError
from forge_harness.formats.manifest import Manifest, verify_manifest, write_manifest

CONTENT = {"a.txt": b"alpha", "deep/er/b.bin": b"\x00" * 70_000, "deep/empty": b"", "z": b"last"}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    for name, data in CONTENT.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    write_manifest(tmp_path)
    return tmp_path


def listed(package: Path) -> dict:
    return json.loads((package / "manifest.json").read_bytes())


def rewrite(package: Path, change) -> None:
    content = listed(package)
    change(content)
    (package / "manifest.json").write_text(json.dumps(content))


def test_manifest_lists_what_is_there(package: Path) -> None:
    assert listed(package) == {
        "schema": "forge-manifest/1",
        "files": [
            {"path": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in sorted(CONTENT.items())
        ],
    }
    compact = json.dumps(listed(package), sort_keys=True, separators=(",", ":")).encode()
    assert (package / "manifest.json").read_bytes() == compact


def test_digest_and_total_are_those_of_the_list(package: Path) -> None:
    manifest = verify_manifest(package)
    files = json.dumps(listed(package)["files"], sort_keys=True, separators=(",", ":")).encode()
    assert manifest.digest == f"sha256:{hashlib.sha256(files).hexdigest()}"
    assert manifest.total_bytes == sum(map(len, CONTENT.values()))
    assert [entry.path for entry in manifest.files] == sorted(CONTENT)
    assert Manifest(()).total_bytes == 0


def test_second_manifest_does_not_list_the_first(package: Path) -> None:
    before = (package / "manifest.json").read_bytes()
    assert write_manifest(package) == verify_manifest(package)
    assert (package / "manifest.json").read_bytes() == before
    assert sorted(os.listdir(package)) == ["a.txt", "deep", "manifest.json", "z"]


def test_known_digests_are_taken_and_not_computed(package: Path) -> None:
    write_manifest(package, {"z": "0" * 64})
    with pytest.raises(DamagedCheckpointError, match="'z' has sha256"):
        verify_manifest(package)
    write_manifest(package, {"z": hashlib.sha256(b"last").hexdigest()})
    verify_manifest(package)


@pytest.mark.parametrize("name", CONTENT)
def test_missing_file_is_named(package: Path, name: str) -> None:
    (package / name).unlink()
    with pytest.raises(
        DamagedCheckpointError, match=f"lists '{name}', and it is missing"
    ) as caught:
        verify_manifest(package)
    assert caught.value.path == str(package / name)
    assert caught.value.exit_code == 8


@pytest.mark.parametrize("name", ["added", "deep/er/added", "deep/manifest.json", ".hidden"])
def test_added_file_is_named(package: Path, name: str) -> None:
    (package / name).write_bytes(b"")
    with pytest.raises(DamagedCheckpointError, match=f"'{name}' is there, and"):
        verify_manifest(package)


@pytest.mark.parametrize("name", CONTENT)
def test_file_of_another_size_is_named(package: Path, name: str) -> None:
    with (package / name).open("ab") as stream:
        stream.write(b"+")
    size = len(CONTENT[name])
    with pytest.raises(DamagedCheckpointError, match=f"'{name}' has {size + 1} bytes.*says {size}"):
        verify_manifest(package)


@pytest.mark.parametrize("name", ["a.txt", "deep/er/b.bin", "z"])
def test_file_of_another_content_is_named(package: Path, name: str) -> None:
    data = bytearray(CONTENT[name])
    data[-1] ^= 1
    (package / name).write_bytes(data)
    with pytest.raises(DamagedCheckpointError, match=f"'{name}' has sha256"):
        verify_manifest(package)


def test_unlisted_entry_is_not_verified(package: Path) -> None:
    rewrite(package, lambda m: m["files"].pop(0))
    with pytest.raises(DamagedCheckpointError, match=r"'a\.txt' is there, and"):
        verify_manifest(package)
    rewrite(package, lambda m: m["files"].clear())
    with pytest.raises(DamagedCheckpointError, match=r"'a\.txt' is there, and"):
        verify_manifest(package)


@pytest.mark.parametrize("kind", ["file", "directory", "dangling", "pipe"])
def test_what_is_no_plain_file_is_refused(package: Path, kind: str) -> None:
    odd = package / "deep/odd"
    if kind == "pipe":
        os.mkfifo(odd)
    else:
        odd.symlink_to({"file": "../a.txt", "directory": "er", "dangling": "none"}[kind])
    what = "pipe" if kind == "pipe" else "symbolic link"
    with pytest.raises(DamagedCheckpointError, match=f"deep/odd' is a .*{what}"):
        verify_manifest(package)
    with pytest.raises(CheckpointError, match=f"deep/odd' is a .*{what}"):
        write_manifest(package)


def test_listed_file_that_became_a_link_is_refused(package: Path) -> None:
    (package / "z").unlink()
    (package / "z").symlink_to("a.txt")
    with pytest.raises(DamagedCheckpointError, match="symbolic link"):
        verify_manifest(package)


def test_manifest_that_is_a_link_is_refused(package: Path, tmp_path_factory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "manifest.json"
    (package / "manifest.json").rename(elsewhere)
    (package / "manifest.json").symlink_to(elsewhere)
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json is a symbolic link"):
        verify_manifest(package)


@pytest.mark.parametrize(
    "path",
    ["../z", "deep/../z", "/etc/passwd", "./z", "deep//er", "", "z/", "a\\b", "c:z", "z\n", "z\0"],
)
def test_path_that_leads_elsewhere_is_refused(package: Path, path: str) -> None:
    rewrite(package, lambda m: m["files"].append({"path": path, "bytes": 4, "sha256": "0" * 64}))
    with pytest.raises(
        DamagedCheckpointError, match=r"lists .*: a path (is relative|has printable)"
    ):
        verify_manifest(package)


@pytest.mark.parametrize("name", ["a\\b", "a:b", "line\nbreak", b"not\xffutf8"])
def test_name_that_others_cannot_have_is_not_listed(package: Path, name: str | bytes) -> None:
    (package / os.fsdecode(name)).write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be listed"):
        write_manifest(package)


def entry(**changes: object) -> dict:
    return {"path": "z", "bytes": 4, "sha256": hashlib.sha256(b"last").hexdigest(), **changes}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda m: m.update(schema="forge-manifest/2"), "schema 'forge-manifest/2'"),
        (lambda m: m.pop("schema"), "schema None"),
        (lambda m: m.pop("files"), "expected files"),
        (lambda m: m.update(more=1), "'more'"),
        (lambda m: m.update(files={}), "no list"),
        (lambda m: m["files"].append("z"), "an entry of"),
        (lambda m: m["files"].append(entry(mode=1)), "an entry of"),
        (lambda m: m["files"][3].pop("bytes"), "an entry of"),
        (lambda m: m["files"].__setitem__(3, entry(path=1)), "path 1"),
        (lambda m: m["files"].__setitem__(3, entry(bytes="4")), "'z' has '4' bytes"),
        (lambda m: m["files"].__setitem__(3, entry(bytes=-4)), "'z' has -4 bytes"),
        (lambda m: m["files"].__setitem__(3, entry(bytes=True)), "'z' has True bytes"),
        (lambda m: m["files"].__setitem__(3, entry(bytes=4.0)), r"'z' has 4\.0 bytes"),
        (lambda m: m["files"].__setitem__(3, entry(sha256="")), "sha256 '' for 'z'"),
        (lambda m: m["files"].__setitem__(3, entry(sha256=None)), "sha256 None for 'z'"),
        (lambda m: m["files"][3].update(sha256=m["files"][3]["sha256"].upper()), "for 'z'"),
        (lambda m: m["files"].append(entry()), "lists 'z' twice"),
        (lambda m: m["files"].reverse(), "not sorted"),
        (lambda m: m["files"].insert(3, entry(path="manifest.json")), "does not list itself"),
    ],
)
def test_malformed_manifest_is_refused(package: Path, change, what: str) -> None:
    rewrite(package, change)
    with pytest.raises(DamagedCheckpointError, match=what):
        verify_manifest(package)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "not JSON at byte 0"),
        (b'{"schema": "forge-manifest/1", "files": [}', "not JSON at byte 41"),
        (b"[]", "holds list"),
        (b'{"files": [], "files": []}', "key 'files' is there twice"),
        (b'{"files": [{"path": "a", "path": "b"}]}', "key 'path' is there twice"),
        (b'{"files": "\xff"}', "not UTF-8 at byte 11"),
        (b'{"files": NaN}', "holds NaN"),
        (b'{"files": 1e999}', "number 1e999"),
        (b"[" * 100_000, "nests deeper"),
        (b'{"files": ' + b"9" * 5000 + b"}", "damaged"),
    ],
)
def test_manifest_that_is_no_json_object_is_refused(
    package: Path, content: bytes, what: str
) -> None:
    (package / "manifest.json").write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=what):
        verify_manifest(package)


def test_missing_manifest_is_refused(package: Path) -> None:
    (package / "manifest.json").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json.*cannot be read"):
        verify_manifest(package)
    (package / "manifest.json").mkdir()
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json.*cannot be read"):
        verify_manifest(package)


@settings(
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_flipped_bit_of_the_manifest_is_noticed(package: Path, data: st.DataObject) -> None:
    whole = (package / "manifest.json").read_bytes()
    damaged = bytearray(whole)
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    damaged[bit // 8] ^= 1 << bit % 8
    (package / "manifest.json").write_bytes(damaged)
    try:
        with pytest.raises(DamagedCheckpointError):
            verify_manifest(package)
    finally:
        (package / "manifest.json").write_bytes(whole)


def test_manifest_truncated_anywhere_is_refused(package: Path) -> None:
    whole = (package / "manifest.json").read_bytes()
    for length in range(len(whole)):
        (package / "manifest.json").write_bytes(whole[:length])
        with pytest.raises(DamagedCheckpointError, match=r"manifest\.json"):
            verify_manifest(package)

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from forge_harness.canonical import sha256_hex
from forge_harness.errors import AuditError
from forge_harness.security import audit_heads
from forge_harness.security.audit_heads import HeadFile, is_signed_by, parse_head

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
MAC = bytes(32)


@pytest.fixture
def heads(tmp_path: Path) -> HeadFile:
    return HeadFile(tmp_path / "audit.db.heads")


@pytest.mark.parametrize("tail_bytes", [1, 64, 400, 1 << 20])
def test_each_head_names_the_line_before(heads, monkeypatch, tail_bytes):
    monkeypatch.setattr(audit_heads, "_TAIL_BYTES", tail_bytes)
    for number in range(1, 6):
        heads.add("log", number, MAC, KEY)
    lines = heads.lines()
    found = [parse_head(line) for line in lines]
    assert [head.number for head in found] == [1, 2, 3, 4, 5]
    before = ["0" * 64, *(sha256_hex(line) for line in lines[:-1])]
    assert [head.previous for head in found] == before
    assert all(is_signed_by(head, [KEY.public_key()]) for head in found)


def test_a_writer_that_comes_late_finds_its_record_vouched_for(heads):
    newer = heads.add("log", 7, MAC, KEY)
    assert heads.add("log", 6, MAC, KEY) == newer
    assert len(heads.lines()) == 1


def test_the_head_of_another_log_is_followed_and_not_taken_for_one(heads):
    heads.add("other", 7, MAC, KEY)
    assert heads.add("log", 6, MAC, KEY).number == 6
    assert len(heads.lines()) == 2


def test_a_torn_line_goes(heads):
    heads.add("log", 1, MAC, KEY)
    whole = heads.path.read_bytes()
    heads.path.write_bytes(whole + whole[:-30])
    heads.add("log", 2, MAC, KEY)
    assert [parse_head(line).number for line in heads.lines()] == [1, 2]
    assert heads.path.read_bytes().startswith(whole)


def test_a_torn_first_line_goes(heads):
    heads.path.write_bytes(b'{"log_id"')
    heads.add("log", 1, MAC, KEY)
    assert [parse_head(line).number for line in heads.lines()] == [1]


@pytest.mark.parametrize("line", [b"", b"[]", b"{}", b'{"number": 1', b"[" * 100_000])
def test_a_line_that_is_no_head_is_refused(line):
    with pytest.raises(AuditError, match="no signed head"):
        parse_head(line)

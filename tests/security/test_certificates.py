"""The test authority's files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from forge_harness import durable
from forge_harness.security.certificates import LocalAuthority


def test_a_private_key_is_its_owners_from_its_first_byte_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its writing and the change of its mode everybody could read it."""
    seen: dict[str, int] = {}
    sync = durable.sync_file

    def look(path: Path) -> None:
        seen[path.name] = path.stat().st_mode & 0o777
        sync(path)

    monkeypatch.setattr(durable, "sync_file", look)
    before = os.umask(0o022)
    try:
        _, private = LocalAuthority().issue(tmp_path, "127.0.0.1")
    finally:
        os.umask(before)
    assert private.stat().st_mode & 0o777 == 0o600
    assert [mode for name, mode in seen.items() if name.startswith(".key.pem")] == [0o600]

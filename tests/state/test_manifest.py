"""Manifests of generations: what hashes to its digest can still be malformed."""

import pytest

from forge_harness.canonical import sha256_hex
from forge_harness.state.manifest import parse


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"{}", b'{"format": 99}', b'{"format": 1}', b"\xff", b"[" * 100_000]
)
def test_a_malformed_manifest_is_a_value_error(text):
    with pytest.raises(ValueError, match="manifest"):
        parse(text, sha256_hex(text))


def test_another_text_than_the_digest_says_is_not_looked_at():
    with pytest.raises(ValueError, match="does not hash to its digest"):
        parse(b"{}", sha256_hex(b"[]"))

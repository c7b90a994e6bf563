"""Credentials in configuration values: what looks like one, by key name or by form."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping

_NAMES = re.compile(r"(secret|passw(or)?d|api_?key|access_?key|private_?key|(^|[._])token$)", re.I)
_FORMS = {
    "AWS access key": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "GitHub token": re.compile(r"\bgh[pousr]_[A-Za-z0-9]{36,}\b"),
    "Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}\b"),
    "API key": re.compile(r"\bsk-[A-Za-z0-9_-]{20,}\b"),
    "private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "JSON web token": re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\b"),
    "password in a URL": re.compile(r"\b[a-z][a-z0-9+]*://[^/\s:@]+:[^/\s:@]+@"),
}
_OPAQUE = re.compile(r"^[A-Za-z0-9+/=_-]{32,}$")
_ENTROPY_BITS = 4.0
"""A character: random base64 of 32 has about 4.5, hexadecimal 3.7, words and names below 4."""

PLANTED: Mapping[str, str] = {
    "a.password": "hunter2",
    "b.note": "AKIA" + "ABCDEFGHIJKLMNOP",
    "c.note": "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8",
    "d.note": "postgres://forge:s3cr3t@db.internal/runs",
    "e.note": "-----BEGIN " + "PRIVATE KEY-----",
    "f.note": "q7Zk2LxW9vTb4RnYc8HsJd3GmPfUa6Ee",
}
"""Values a scan must find, or it finds nothing. None opens anything."""


def suspicious(values: Mapping[str, object]) -> dict[str, str]:
    """Returns dotted key -> why its value looks like a credential. Values are not repeated."""
    found = {}
    for key, value in values.items():
        texts = [v for v in (value if isinstance(value, list | tuple) else [value])]
        for text in texts:
            if isinstance(text, str) and text and (why := _why(key, text)):
                found[key] = why
    return found


def _why(key: str, text: str) -> str | None:
    if _NAMES.search(key):
        return "the key names a credential"
    for name, form in _FORMS.items():
        if form.search(text):
            return f"has the form of a {name}"
    if _OPAQUE.match(text) and _entropy(text) > _ENTROPY_BITS:
        return "is long and random"
    return None


def _entropy(text: str) -> float:
    shares = [count / len(text) for count in Counter(text).values()]
    return -sum(share * math.log2(share) for share in shares)

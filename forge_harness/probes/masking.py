"""Keeps credentials out of records and logs: what the environment names as one, and known forms.

A check may raise an error that quotes what it connected with, and a subject may print its settings.
What a run keeps goes through a `Masker` first: run directories are uploaded and read by others.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterator, Mapping
from urllib.parse import quote

from forge_harness.paths import home_path
from forge_harness.probes.secrets import FORMS, NAMES

_VARIABLES = re.compile(r"(^|_)(AUTH|CREDENTIALS?|KEYS?|KEYRING|PASSPHRASE|PWD|TOKENS?)$")
_KEY_BLOCK = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----.*?"
    r"(-----END [A-Z ]*PRIVATE KEY(?: BLOCK)?-----|\Z)",
    re.DOTALL,
)
_KEY_BEGINS = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----")
_KEY_ENDS = re.compile(rb"-----END [A-Z ]*PRIVATE KEY(?: BLOCK)?-----")
_OWN_TOKEN = re.compile(r"\bfht_[A-Za-z0-9_-]{16,}")
"""Of `tokens issue`, or most of one; what is shorter stands in an example."""
_NOT_SECRET = frozenset({"PWD", "OLDPWD"})
_SHORTEST = 6
"""Masking every occurrence of a shorter value would mask words and numbers that are none."""


class Masker:
    """Replaces credentials in text by `***` and the name they have."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        """Learns the values to mask.

        Args:
            environ: Whose variables with the name of a credential are masked wherever they occur,
                also in base64, percent-encoded and JSON; None: those of the process.
        """
        known: dict[str, str] = {}
        for name, value in (os.environ if environ is None else environ).items():
            if _is_secret(name, value):
                known |= dict.fromkeys(_written(value), f"***{name}***")
        self._names = known
        # The longest first: one value may begin with another.
        choices = sorted(known, key=len, reverse=True)
        self._values = re.compile("|".join(map(re.escape, choices))) if choices else None

    def text(self, text: str) -> str:
        """Returns a text without them."""
        if self._values is not None:
            text = self._values.sub(lambda match: self._names[match.group()], text)
        text = _KEY_BLOCK.sub("***private key***", text)
        for name, form in FORMS.items():
            text = form.sub(f"***{name}***", text)
        return _OWN_TOKEN.sub("***Forge token***", text)

    def data(self, data: bytes) -> bytes:
        """Returns output without them; what is no UTF-8 stays as it is."""
        return self.text(data.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")


def settled(data: bytes) -> int:
    """Returns how many bytes of output can be masked before more comes.

    Whole lines, and no private key that has begun and not ended.
    """
    end = data.rfind(b"\n") + 1
    begins = [match.start() for match in _KEY_BEGINS.finditer(data, 0, end)]
    if not begins or _KEY_ENDS.search(data, begins[-1], end):
        return end
    return data.rfind(b"\n", 0, begins[-1]) + 1


def _is_secret(name: str, value: str) -> bool:
    named = NAMES.search(name) is not None or _VARIABLES.search(name.upper()) is not None
    if not named or name in _NOT_SECRET or len(value) < _SHORTEST:
        return False
    # A file that holds a secret is named in messages; its name is none. A secret may look like the
    # start of a path too, and be too long for one: `Path.exists` raises then.
    return not (value.startswith((os.sep, ".", "~")) and os.path.exists(home_path(value)))


def _written(value: str) -> Iterator[str]:
    yield value
    yield quote(value, safe="")
    yield json.dumps(value)[1:-1]
    yield repr(value)[1:-1]
    raw = value.encode("utf-8", "surrogateescape")
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        yield encode(raw).decode().rstrip("=")

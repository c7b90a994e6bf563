"""Credentials in configuration values and text: what looks like one, by key name or by form."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping

NAMES = re.compile(r"(secret|passw(or)?d|api_?key|access_?key|private_?key|(^|[._])token$)", re.I)
"""Names of settings that hold a credential."""
FORMS = {
    "AWS access key": re.compile(r"\bA[KS]IA[0-9A-Z]{16}\b"),
    "GitHub token": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{40,})\b"),
    "GitLab token": re.compile(r"\bglpat-[\w-]{20,}"),
    "Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}\b"),
    # All in small letters it is a class of a style sheet (sk-toggleable__label-arrow).
    "API key": re.compile(r"\bsk-(?=[a-z_-]{0,200}[A-Z0-9])[A-Za-z0-9_-]{20,}\b"),
    "Google API key": re.compile(r"\bAIza[\w-]{35}(?![\w-])"),
    "Slack token": re.compile(r"\bxox[abeoprs]-[A-Za-z0-9-]{20,}"),
    "Stripe key": re.compile(r"\b[rs]k_live_[A-Za-z0-9]{20,}\b"),
    "npm token": re.compile(r"\bnpm_[A-Za-z0-9]{36}\b"),
    "PyPI token": re.compile(r"\bpypi-AgE[\w-]{50,}"),
    "Weights & Biases key": re.compile(
        r"""\bwandb\.login\([^)]{0,200}\bkey\s?=\s?\\?["'][0-9a-f]{40}\b"""
    ),
    "Kaggle key": re.compile(r"""\\?"username\\?":[^{}]{1,100}"key\\?":\s?\\?"[0-9a-f]{32}\b"""),
    "private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----"),
    "JSON web token": re.compile(
        r"\beyJ[A-Za-z0-9_-]{8,2048}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\b"
    ),
    "password in a URL": re.compile(r"\b[a-z][a-z0-9+]{0,31}://[^/\s:@]*:[^/\s:@]+@"),
}
FORM_NAMES = tuple(FORMS)
_OPAQUE = re.compile(r"^[A-Za-z0-9+/=_-]{32,}$")
_PIECES = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+")
"""Of a name: its words and numbers."""
_WORDS_LENGTH = 2.8
_WORDS_SHARE = 0.4
"""A text whose pieces are as long as this on average, with that share of common pairs of letters,
is a name, as those of models are (`meta-llama/Llama-3.2-1B`). So are 93 in 100 of the texts in the
sources of ten packages that look random otherwise, and one random key of 32 characters in
15,000."""
_PAIRS = """
th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le ve co me
de hi ri ro ic ne ea ra ce li ch ll be ma si om ur ca el ta la ns di fo ho pe ec pr no ct us ac ot
il tr ly nc et ut ss so rs un lo wa ge ie wh ee wi em ad ol rt po we na ul ni ts mo ow pa im mi ai
sh
"""
_COMMON_PAIRS = frozenset(_PAIRS.split())
"""The hundred most frequent ones of English."""
_ENTROPY_BITS = 4.0
"""A character: random base64 of 32 has about 4.5, hexadecimal 3.7, words and names below 4."""
_DIGITLESS_ENTROPY_BITS = 4.4
"""In source, where long names have cases too: of 429 strings of installed packages that had cases,
no digit and more than 4.0 bits, 8 have more than this. One random key of 32 bytes in 1,500 has no
digit; none of 400,000 had none and so few bits."""

PLANTED: Mapping[str, str] = {
    "a.password": "hunter2",  # forge-scan: no secret
    "b.note": "AKIA" + "ABCDEFGHIJKLMNOP",
    "c.note": "ghp_" + "a1B2c3D4e5F6g7H8" + "i9J0k1L2m3N4o5P6q7R8",
    "d.note": "postgres://forge:s3cr3t@db.internal/runs",  # forge-scan: no secret
    "e.note": "-----BEGIN " + "PRIVATE KEY-----",
    "f.note": "q7Zk2LxW9vTb4RnYc8HsJd3GmPfUa6Ee",  # forge-scan: no secret
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


# A name from its first letter on, and no longer than names are: tried from every letter of a word,
# a line of 45,000 took a minute. Quotes may be escaped: a notebook holds its code in JSON.
_ASSIGNED = re.compile(
    r"""(?<![A-Za-z0-9_.-])([A-Za-z0-9_.-]{1,200})(?:\\?["'])?\s{0,99}[:=]\s*"""
    r"""\\?["']([^"'\s{}<>$]{6,}?)\\?["']""",
)
# A digest with its algorithm before it, as a content security policy has them, is public.
# So is an image, as notebooks keep what they drew: PNG, JPEG, GIF, WebP, SVG.
_QUOTED = re.compile(
    r"""["'](?!sha\d{3}-|iVBORw0KGgo|/9j/|R0lGOD|UklGR|PHN2Zy|PD94bWwg)"""
    r"""([A-Za-z0-9+/=_-]{32,})\\?["']"""
)
_UNQUOTED = re.compile(
    r"""\s{0,99}(?:(?:export|ENV|ARG)\s{1,99})?([A-Za-z_][A-Za-z0-9_.-]{0,199})\s{0,99}=\s{0,99}"""
    r"""([^\s"'`{}<>$#;&|()]{6,})(?:[\s#;&|\\].*)?$""",
)
"""A line of a file of environment variables, where values need no quotes."""
_VARIABLE = re.compile(r"[{}<>$]")
_STAND_IN = re.compile(r".*(?:\.\.\.|\u2026).*|your[_-].+|[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+")
"""What stands for a credential in a text about it ("sk-...", "your-key"), and the name of a
variable that holds one ("HF_TOKEN")."""
_SHORTEST_TOKEN = 16
"""A shorter `..._token` is a word of a tokenizer, not what opens a service."""


def in_line(line: str, *, unquoted: bool = False) -> str | None:
    """Returns why a line of a text file looks as if it held a credential, None when it does not.

    Stricter than for configuration values, since source is full of long words: what stands for a
    value elsewhere (`{user}`, `$TOKEN`, `<key>`, `sk-...`) is none, and a random text has cases,
    digits or more entropy than names have, and is not made of words.

    Args:
        line: The line.
        unquoted: Whether values stand without quotes, as in a file of environment variables or a
            script of a shell.
    """
    for name, form in FORMS.items():
        if (match := form.search(line)) and not _VARIABLE.search(match.group()):
            return f"has the form of a {name}"
    bare = _UNQUOTED.match(line) if unquoted else None
    for key, value in [*_ASSIGNED.findall(line), *([bare.groups()] if bare else [])]:
        named = NAMES.search(key)
        short = named and named.group().lower().endswith("token") and len(value) < _SHORTEST_TOKEN
        if named and not short and not _STAND_IN.fullmatch(value):
            return "is assigned to a name of a credential"
    for text in [*_QUOTED.findall(line), *([bare[2]] if bare and _OPAQUE.match(bare[2]) else [])]:
        cased = re.search("[a-z]", text) and re.search("[A-Z]", text)
        least = _ENTROPY_BITS if re.search("[0-9]", text) else _DIGITLESS_ENTROPY_BITS
        if cased and _entropy(text) > least and not _is_of_words(text):
            return "is long and random"
    return None


def _is_of_words(text: str) -> bool:
    pieces = _PIECES.findall(text)
    if sum(map(len, pieces)) < _WORDS_LENGTH * len(pieces):
        return False
    words = [piece.lower() for piece in pieces if not piece.isdigit()]
    pairs = [word[i : i + 2] for word in words for i in range(len(word) - 1)]
    return sum(pair in _COMMON_PAIRS for pair in pairs) >= _WORDS_SHARE * len(pairs)


def _why(key: str, text: str) -> str | None:
    if NAMES.search(key):
        return "the key names a credential"
    for name, form in FORMS.items():
        if form.search(text):
            return f"has the form of a {name}"
    if _OPAQUE.match(text) and _entropy(text) > _ENTROPY_BITS:
        return "is long and random"
    return None


def _entropy(text: str) -> float:
    shares = [count / len(text) for count in Counter(text).values()]
    return -sum(share * math.log2(share) for share in shares)

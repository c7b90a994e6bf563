"""Credentials in configuration values and text: what looks like one, by key name or by form."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from enum import Enum, auto

NAMES = re.compile(
    r"(secret|passw(or)?d|api[_-]?key|access[_-]?key|private[_-]?key|(^|[._-])token$)", re.I
)
"""Names of settings that hold a credential."""
FORMS = {
    "AWS access key": re.compile(r"\bA[KS]IA[0-9A-Z]{16}\b"),
    "GitHub token": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{40,})\b"),
    "GitLab token": re.compile(r"\bglpat-[\w-]{20,}"),
    "Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}\b"),
    # All in small letters it is a class of a style sheet (sk-toggleable__label-arrow).
    "API key": re.compile(r"\bsk-(?=[a-z_-]{0,200}[A-Z0-9])[A-Za-z0-9_-]{20,}\b"),
    "Google API key": re.compile(r"\bAIza[\w-]{35}(?![\w-])"),
    "Slack token": re.compile(
        r"\b(?:xox[abeoprs]-[A-Za-z0-9-]{20,}|xapp-[0-9]-[A-Za-z0-9-]{20,}"
        r"|hooks\.slack\.com/(?:services|workflows|triggers)/[A-Z0-9]{8,}/[A-Za-z0-9/]{20,})"
    ),
    "Stripe key": re.compile(r"\b[rs]k_live_[A-Za-z0-9]{20,}\b"),
    "npm token": re.compile(r"\bnpm_[A-Za-z0-9]{36}\b"),
    "PyPI token": re.compile(r"\bpypi-AgE[\w-]{50,}"),
    "Weights & Biases key": re.compile(
        r"""\bwandb(?:\.login\([^)]{0,200}\bkey\s?=\s?\\?["']"""
        r"""|\slogin\s(?:--[a-z-]{1,20}\s){0,3})[0-9a-f]{40}\b"""
    ),
    "Kaggle key": re.compile(r"""\\?"username\\?":[^{}]{1,100}"key\\?":\s?\\?"[0-9a-f]{32}\b"""),
    "private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----"),
    "JSON web token": re.compile(
        r"\beyJ[A-Za-z0-9_-]{8,2048}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\b"
    ),
    "Forge token": re.compile(r"\bfht_[A-Za-z0-9_-]{43}(?![\w-])"),
    "bearer token": re.compile(
        r"\bBearer\s(?=[A-Za-z._~+/-]{0,200}[0-9])[A-Za-z0-9._~+/-]{24,}", re.I
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
# Python writes an index after it (`os.environ["KEY"] = `) or a type, and letters before the quote.
_ASSIGNED = re.compile(
    r"""(?<![A-Za-z0-9_.-])([A-Za-z0-9_.-]{1,200})(?:\\?["'])?\]?"""
    r"""(?:\s?:\s?[A-Za-z][A-Za-z0-9_.|\[\] ]{0,60}(?==))?\s{0,99}[:=]\s*"""
    r"""[bBrRuUfF]{0,2}\\?["']([^"'\s{}<>$]{6,}?)\\?["']""",
)
_SET = re.compile(
    r"""\b(?:environ\.setdefault|putenv)\(\s{0,9}\\?["']([A-Za-z0-9_]{1,200})\\?["']\s{0,9},"""
    r"""\s{0,9}\\?["']([^"'\s{}<>$]{6,}?)\\?["']"""
)
_MAGIC = re.compile(
    r"""%(?:set_)?env\s{1,9}([A-Za-z0-9_]{1,200})(?:\s{0,9}=\s{0,9}|\s{1,9})"""
    r"""([^\s"'`{}<>$\\]{6,})"""
)
"""Of a notebook: it sets a variable of the environment, without quotes."""
# A digest with its algorithm before it, as a content security policy has them, is public.
# So is an image, as notebooks keep what they drew: PNG, JPEG, GIF, WebP, SVG.
_QUOTED = re.compile(
    r"""["'](?!sha\d{3}-|iVBORw0KGgo|/9j/|R0lGOD|UklGR|PHN2Zy|PD94bWwg)"""
    r"""([A-Za-z0-9+/=_-]{32,})\\?["']"""
)
_BARE = r"""([^\s"'`{}<>$#;&|()]{6,})(?=[\s#;&|\\]|$)"""
_NAME = r"([A-Za-z_][A-Za-z0-9_.-]{0,199})"
_UNQUOTED = re.compile(
    rf"""^\s{{0,99}}(?:(?:export|ENV|ARG|-)\s{{1,99}})?{_NAME}\s{{0,99}}=(?!=)\s{{0,99}}{_BARE}"""
    rf"""|(?<=[\s;&|])(?:--)?{_NAME}={_BARE}"""
    rf"""|^\s{{0,99}}ENV\s{{1,99}}{_NAME}\s{{1,99}}{_BARE}""",
)
"""A line of a file of variables, or a word of a command, where values need no quotes."""
_SETTING = re.compile(
    rf"""^\s{{0,99}}(?:export\s{{1,99}})?{_NAME}\s{{0,99}}=\s{{0,99}}"""
    r"""((?!.*\$[A-Za-z_{(])[^\s"'`{}<>]{6,})\s{0,99}(?:#.*)?$""",
)
"""A line of a file of settings, where a value has any sign; not what stands for another (`$A`)."""
_YAML = re.compile(
    rf"""^\s{{0,99}}(?:-\s{{1,9}})?["']?{_NAME}["']?\s{{0,9}}:\s{{1,99}}"""
    r"""(?![!%*@\[,|-])([^\s"'`{}<>$#;&|()]{6,})\s{0,99}(?:#.*)?$""",
)
_PASSWORD = re.compile("passw(or)?d", re.I)
_PLAIN = re.compile(r"[a-z0-9]+(?:[-.][a-z0-9]+)+|[^0-9]+")
"""In YAML: the name of an object that holds a secret, or words about one."""
_WORDS = """
boolean changeme default disabled enabled inherit integer optional password password123 prompt
required string unused
"""
_STAND_IN_WORDS = frozenset(_WORDS.split())
"""In YAML: what stands where a password would, and is none."""
_ABOUT = re.compile(r"(?:file|path|dir|name|names|ref|type|length|policy|version|arn)$", re.I)
"""A name that ends so is of something else than the credential before it in the name."""
_VARIABLE = re.compile(r"[{}<>$]")
_STAND_IN = re.compile(
    r".*(?:\.\.\.|\u2026).*|your[_-].+|[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+"
    r"|[a-z~.]*(?:/[a-z0-9._-]+)+|[\w~./-]+\.(?:crt|env|json|key|pem|pub|txt|ya?ml)"
)
"""What stands for a credential in a text about it ("sk-...", "your-key"), the name of a variable
that holds one ("HF_TOKEN"), and a file that does."""
_SHORTEST_TOKEN = 16
"""A shorter `..._token` is a word of a tokenizer, not what opens a service."""


class Bare(Enum):
    """Where a kind of file has values without quotes."""

    NOWHERE = auto()
    SCRIPT = auto()
    """After `=`, in words of a shell."""
    SETTINGS = auto()
    """After `=`, to the end of the line: files of environment variables, INI files."""
    YAML = auto()
    """After `:` too."""


def in_line(line: str, *, bare: Bare = Bare.NOWHERE) -> str | None:
    """Returns why a line of a text file looks as if it held a credential, None when it does not.

    Stricter than for configuration values, since source is full of long words: what stands for a
    value elsewhere (`{user}`, `$TOKEN`, `<key>`, `sk-...`) is none, and a random text has cases,
    digits or more entropy than names have, and is not made of words.

    Args:
        line: The line.
        bare: Where values stand without quotes.
    """
    for name, form in FORMS.items():
        if (match := form.search(line)) and not _VARIABLE.search(match.group()):
            return f"has the form of a {name}"
    unquoted = [*_unquoted(line, bare)]
    for key, value in [*_ASSIGNED.findall(line), *_SET.findall(line), *unquoted]:
        named = NAMES.search(key)
        short = named and named.group().lower().endswith("token") and len(value) < _SHORTEST_TOKEN
        if named and not short and not _STAND_IN.fullmatch(value) and not _ABOUT.search(key):
            return "is assigned to a name of a credential"
    opaque = [value for _, value in unquoted if _OPAQUE.match(value)]
    for text in [*_QUOTED.findall(line), *opaque]:
        cased = re.search("[a-z]", text) and re.search("[A-Z]", text)
        least = _ENTROPY_BITS if re.search("[0-9]", text) else _DIGITLESS_ENTROPY_BITS
        if cased and _entropy(text) > least and not _is_of_words(text):
            return "is long and random"
    return None


def _unquoted(line: str, bare: Bare) -> Iterator[tuple[str, str]]:
    """Yields names and values that stand without quotes."""
    yield from _MAGIC.findall(line)
    if bare is not Bare.NOWHERE:
        for match in _UNQUOTED.finditer(line):
            key, value = (group for group in match.groups() if group is not None)
            yield key, value
    if bare is Bare.SETTINGS and (setting := _SETTING.match(line)) is not None:
        key, value = setting.groups()
        yield key, value
    if bare is Bare.YAML and (of_yaml := _YAML.match(line)) is not None:
        key, value = of_yaml.groups()
        is_said = value.lower() in _STAND_IN_WORDS
        if not is_said and (_PASSWORD.search(key) or not _PLAIN.fullmatch(value)):
            yield key, value


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

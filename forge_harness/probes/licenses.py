"""What the license texts of distributions allow, read as alternatives."""

from __future__ import annotations

import re
from typing import Literal

ALLOWED_WORDS = frozenset(
    {"apache", "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "mit", "mit-0", "isc", "0bsd"}
    | {"psf", "psf-2.0", "python-2.0", "python", "mpl", "mpl-2.0", "mozilla", "unlicense", "zlib"}
    | {"mit-cmu", "hpnd", "cc0-1.0", "bsl-1.0", "unicode-3.0", "zpl-2.1"}
)
REFUSED_WORDS = frozenset(
    {"gpl", "gplv2", "gplv3", "gpl-1.0", "gpl-1.0-only", "gpl-2.0", "gpl-2.0-only", "gpl-3.0"}
    | {"gpl-3.0-only", "agpl", "agplv3", "agpl-1.0", "agpl-1.0-only", "agpl-3.0", "agpl-3.0-only"}
    | {"affero", "sspl-1.0", "busl-1.1"}
)
"""Licenses whose terms reach the program that uses the library, or forbid its use.

A proprietary one may do either or, as those of the CUDA libraries that come with torch, neither:
what it is, its text says.
"""

_OR_LATER = re.compile(
    r"\bor(?:[ -]|,? \(at your option\),? )(?:any )?(?:later|newer)(?: versions?)?\b|-or-later\b"
)
_SPELLED_OUT = re.compile(r"(?<!lesser )(?<!library )general public licen[cs]e")
# The exception lifts the license's terms from what is merely linked with the compiler's runtime.
_RUNTIME_EXCEPTION = re.compile(r"\S+ with gcc-exception\S*")


def alternatives(text: str) -> list[set[str]]:
    """Returns the license words of each alternative a text offers, lower case.

    "A OR B" and several classifiers (joined by ";") are alternatives: one of them is enough.
    "A AND B" is one alternative in which both bind. "Or later" and a trailing "+" are dropped.
    """
    plain = _RUNTIME_EXCEPTION.sub("gcc-exception", text.lower())
    plain = _SPELLED_OUT.sub("gpl", _OR_LATER.sub("", plain))
    words = (re.findall(r"[a-z0-9.+-]+", part) for part in re.split(r"\bor\b|;", plain))
    return [found for part in words if (found := {word.rstrip("+") for word in part})]


def judge(text: str) -> Literal["allowed", "refused", "unclear"]:
    """Returns what a license text means for a program that uses the library.

    Allowed when one alternative is known and does not bind the program, refused when every one
    binds it, unclear otherwise.
    """
    offers = alternatives(text)
    if any(offer & ALLOWED_WORDS and not offer & REFUSED_WORDS for offer in offers):
        return "allowed"
    return "refused" if offers and all(offer & REFUSED_WORDS for offer in offers) else "unclear"

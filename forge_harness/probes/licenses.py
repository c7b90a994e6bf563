"""What the license texts of distributions allow, read as alternatives."""

from __future__ import annotations

import re

_OR_LATER = re.compile(r"\bor[ -](?:later|newer)\b|-or-later\b")
# The exception lifts the license's terms from what is merely linked with the compiler's runtime.
_RUNTIME_EXCEPTION = re.compile(r"\S+ with gcc-exception\S*")


def alternatives(text: str) -> list[set[str]]:
    """Returns the license words of each alternative a text offers, lower case.

    "A OR B" and several classifiers (joined by ";") are alternatives: one of them is enough.
    "A AND B" is one alternative in which both bind. "Or later" and a trailing "+" are dropped.
    """
    plain = _RUNTIME_EXCEPTION.sub("gcc-exception", text.lower())
    plain = _OR_LATER.sub("", plain)
    words = (re.findall(r"[a-z0-9.+-]+", part) for part in re.split(r"\bor\b|;", plain))
    return [found for part in words if (found := {word.rstrip("+") for word in part})]

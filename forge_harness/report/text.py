"""Numbers, limits and foreign text as a reader should see them."""

from __future__ import annotations

import re
import unicodedata

from forge_harness.types import Direction

_ANSI = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # colours and cursor movement
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?"  # titles and hyperlinks
    r"|\x1b[PX^_][^\x1b]*(?:\x1b\\)?"  # device control strings
    r"|\x1b[ -/]*[0-~]"
)
_KEPT = "\n\t"
_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
"""Control, format (bidirectional overrides, zero-width), surrogate, private use, separators."""

UNITS_OF_ONE = ("1", "")


def clean(text: str, *, lines: bool = False) -> str:
    r"""Returns text without terminal sequences and with invisible characters made visible.

    A bidirectional override could show a failing value as a passing one, so format characters
    become `\u202e` in words. Line ends and tabs are kept only when `lines` is set.
    """
    shown = _ANSI.sub("", text).replace("\r\n", "\n")
    if not lines:
        shown = shown.replace("\n", " ").replace("\t", " ")
    return "".join(map(_visible, shown))


def _visible(character: str) -> str:
    if character in _KEPT or unicodedata.category(character) not in _INVISIBLE:
        # U+FFFE and U+FFFF are no characters in XML 1.0.
        return character if ord(character) & 0xFFFE != 0xFFFE else "\ufffd"
    return f"\\u{ord(character):04x}"


def number(value: object, *, exact: bool = False) -> str:
    """Returns a value in the digits a reader can use: six for floats, all for integers.

    Args:
        value: A scalar, or the two ends of a range.
        exact: All digits of a float, and text in quotes, so that nothing else reads the same.
    """
    if exact and isinstance(value, float | str):
        return clean(repr(value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f") if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return number(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.6g}"
    if isinstance(value, list | tuple):
        return " to ".join(number(part, exact=exact) for part in value)
    return clean(str(value))


def with_unit(text: str, unit: str) -> str:
    """Appends a unit; "1" (a plain number or share) is not written."""
    return text if unit in UNITS_OF_ONE else f"{text} {clean(unit)}"


def expectation(limit: object, direction: str, unit: str, *, exact: bool = False) -> str:
    """Returns the limit in words, for example "at most 0.1 s"; empty when there is none."""
    words = {
        Direction.AT_MOST: "at most ",
        Direction.AT_LEAST: "at least ",
        Direction.EQUAL: "exactly ",
        Direction.WITHIN: "",
    }
    if direction == Direction.RECORD or limit is None:
        return ""
    return words[Direction(direction)] + with_unit(number(limit, exact=exact), unit)


def duration(seconds: float) -> str:
    """Returns a duration in the unit a reader would choose."""
    if seconds < 0.0995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def percent(share: float) -> int:
    """Returns a share in whole percent, floored: 89.9 % is not 90 %."""
    # Coverage has four digits; the addend undoes their binary error (0.29 * 100 is 28.99...).
    return int(share * 100 + 1e-9)


def shorten(text: str, length: int) -> str:
    """Returns at most `length` characters, the cut marked."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "\u2026"


def tail(text: str, *, lines: int, characters: int) -> str:
    """Returns the end of a log, with a first line that says what is missing."""
    text = text.rstrip()
    kept = "\n".join(text.split("\n")[-lines:])[-characters:]
    missing = len(text) - len(kept)
    if missing <= 0:
        return text
    return f"[{missing} earlier characters are in run.json]\n{kept}"

"""Text output: aligned tables and colour, plain wherever the reader is not a terminal."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

import click

from forge_harness.errors import several as several

COLOURS = {
    "PASS": "green",
    "pass": "green",
    "PASS_WITH_WARNINGS": "yellow",
    "warn": "yellow",
    "flaky": "yellow",
    "INCOMPLETE": "yellow",
    "PARTIAL": "yellow",
    "FAIL": "red",
    "fail": "red",
    "error": "red",
    "xpass": "red",
}
_NARROWEST_LAST = 20
_NOT_SHOWN = ("strict", "surrogateescape")
"""What a stream does with a name that is not UTF-8: raise, or write bytes that are none."""


def is_plain(stream: TextIO | None) -> bool:
    """Returns whether a stream gets neither colour nor cursor movement.

    NO_COLOR counts when it is not empty (no-color.org).
    """
    return (
        stream is None  # Closed when the process started: `2>&-`.
        or not stream.isatty()
        or os.environ.get("NO_COLOR", "") != ""
        or os.environ.get("TERM") == "dumb"
    )


def coloured(word: str, text: str | None = None) -> str:
    """Returns `text` (or the word) in the colour of a verdict or outcome, on a terminal."""
    shown = word if text is None else text
    colour = COLOURS.get(word)
    if colour is None or is_plain(sys.stdout):
        return shown
    return click.style(shown, fg=colour, bold=True)


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns an aligned table; numbers to the right, the last column wrapped on a terminal.

    Piped output is never wrapped: one row, one line, for grep. What a cell has of line breaks and
    control characters is escaped: it may come from a stranger, who must not write rows of his own.
    """
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    widths = [
        max([len(header), *(len(row[i]) for row in cells)]) for i, header in enumerate(headers)
    ]
    right = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(headers))]
    room = _room(widths)
    lines = [_line(list(headers), widths, right, room)]
    lines += [_line(row, widths, right, room) for row in cells]
    return "\n".join(lines)


def printable(text: str) -> str:
    """Returns a text in which nothing ends the line or moves the cursor; such is escaped."""
    if text.isprintable():
        return text
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(escaped)


def _line(row: list[str], widths: Sequence[int], right: Sequence[bool], room: int) -> str:
    *first, last = row
    head = "".join(
        f"{cell.rjust(width) if flush else cell.ljust(width)}  "
        for cell, width, flush in zip(first, widths, right, strict=False)
    )
    if right[-1]:
        return head + last.rjust(widths[-1])
    parts = textwrap.wrap(last, room) if room else [last]
    indent = "\n" + " " * len(head)
    return (head + indent.join(parts or [""])).rstrip()


def _room(widths: Sequence[int]) -> int:
    """Returns the characters left for the last column on a terminal, 0 for no limit."""
    if not sys.stdout.isatty():
        return 0
    left = shutil.get_terminal_size().columns - sum(widths[:-1]) - 2 * (len(widths) - 1)
    return max(left, _NARROWEST_LAST)


def _is_number(cell: object) -> bool:
    text = str(cell).replace(",", "").removesuffix(" %").removesuffix(" s")
    try:
        float(text)
    except ValueError:
        return text in ("", "-")
    return True


def say(text: str) -> None:
    """Prints on standard error; a reader that went away costs the line and nothing else."""
    try:
        click.echo(text, err=True)
    except OSError:
        unread(sys.stderr)


class Spare:
    """A stream for a writer that must not end with whoever reads it.

    Args:
        stream: Standard output or error, of text or of bytes.
        lost: What says that nobody reads any more: any error of the system, or only that of a pipe.
    """

    def __init__(self, stream: Any, lost: type[OSError] = OSError) -> None:  # noqa: ANN401 - any
        self._stream, self._lost = stream, lost

    def write(self, content: Any) -> int:  # noqa: ANN401 - as the stream
        """Writes, or leaves it where nobody reads."""
        try:
            return int(self._stream.write(content))
        except self._lost:
            unread(self._stream)
            return len(content)

    def flush(self) -> None:
        """Flushes, or leaves it where nobody reads."""
        try:
            self._stream.flush()
        except self._lost:
            unread(self._stream)

    @property
    def buffer(self) -> Spare:
        """The bytes below the text, as spare."""
        return Spare(self._stream.buffer, self._lost)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - what a text stream has
        return getattr(self._stream, name)


def hold_standard_streams() -> None:
    """Opens standard input, output and error on nothing where they are closed (`run <&-`).

    Their numbers would go to the next files that are opened: to the run's own, into which a child
    would print, or to the pipe by which a child sees that this process ended.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            # To the end of the process, as the stream it stands for.
            setattr(sys, name, Path(os.devnull).open("r+" if number == 0 else "w"))  # noqa: SIM115


@contextlib.contextmanager
def results_stand() -> Iterator[None]:
    """Lets a command end as it would, whether or not anybody reads what it prints.

    `gate first | head -1` reads a line and goes away; the exit code is that of the gate all the
    same. Only a closed pipe is meant: a full disk, or a terminal that hangs up, is an error.
    """
    streams = sys.stdout, sys.stderr
    _escape_what_is_no_text(sys.stdout)
    spared = [stream and Spare(stream, BrokenPipeError) for stream in streams]
    sys.stdout, sys.stderr = (cast("TextIO", stream) for stream in spared)
    try:
        yield
    finally:
        for stream in spared:
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = streams


def _escape_what_is_no_text(stream: TextIO | None) -> None:
    """Writes what the encoding does not have as escapes: a file name need not be UTF-8.

    In JSON such an escape is one of JSON's. Standard error does so anyway.
    """
    if isinstance(stream, io.TextIOWrapper) and stream.errors in _NOT_SHOWN:
        stream.reconfigure(errors="backslashreplace")


def unread(stream: TextIO) -> None:
    """Lets a stream lead nowhere: its pipe or terminal was closed, and every write would raise.

    What it still holds must go somewhere too, or Python ends with a status of its own.
    """
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def shown(path: Path) -> str:
    """Returns a path as the user would type it: relative where it is below the current one."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def echo_json(value: Any) -> None:  # noqa: ANN401 - any JSON value
    """Prints a value as JSON a person can read."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))

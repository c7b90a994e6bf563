"""Counts over C, C++ and CUDA files: functions by lizard, the rest by pattern."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .measures import Count, Place
from .rules import FUNCTION_LINES

SUFFIXES = (
    *(".c", ".cc", ".cpp", ".cxx", ".c++", ".cu"),
    *(".h", ".hh", ".hpp", ".hxx", ".cuh", ".inl", ".ipp", ".tpp"),
)
RULES = (1, 2, 4, 8, 9)
"""Those that are counted here."""
_JUMPS = re.compile(r"\b(goto\s+\w+|setjmp\s*\(|longjmp\s*\()")
_ENDLESS = re.compile(r"\b(for\s*\(\s*;\s*;|while\s*\(\s*(true|1)\s*\))")
_LOOPS = re.compile(r"\b(for|while)\s*\(")
_DIRECTIVE = re.compile(r"^\s*#\s*(\w+)")
_MACRO = re.compile(r"^\s*#\s*define\s+\w+\(")
_POINTERS = re.compile(r"\w\s*\*\s*\*+\s*\w")
_POINTER = re.compile(r"\w\s*\*+\s*\w")
_COMMENT = re.compile(
    r"//[^\n]*|/\*.*?\*/"
    r'|R"(?P<raw>[^()\\\s]{0,16})\(.*?\)(?P=raw)"'
    r'|"(?:\\.|[^"\\\n])*"'
    # A quote in quotes begins no string; between digits it separates thousands.
    r"|(?<![0-9A-Fa-f])'(?:\\.|[^'\\\n])+'",
    re.DOTALL,
)


def count_c(file: str, text: str) -> list[Count]:
    """Returns the counts of the rules that can be read without a compiler.

    Args:
        file: Name for the places.
        text: Its content.

    Raises:
        ImportError: lizard, which finds the functions, is not installed.
    """
    import lizard

    found = lizard.analyze_file.analyze_source_code(file, text)
    functions = found.function_list
    plain = _without_comments(text)
    jumps = tuple(_places(file, plain, _JUMPS, "jumps"))
    endless = tuple(_places(file, plain, _ENDLESS, "shows no bound"))
    long = tuple(
        Place(file, f.start_line, f"{f.name} has {f.length} lines")
        for f in functions
        if f.length > FUNCTION_LINES
    )
    return [
        Count(1, "functions without jumps", len(functions), jumps),
        Count(2, "loops with a bound", len(_LOOPS.findall(plain)), endless),
        Count(4, "functions of 60 lines", len(functions), long),
        Count(8, "directives that are no macro with arguments", *_directives(file, plain)),
        Count(9, "pointers of one level", *_pointers(file, plain)),
    ]


def _without_comments(text: str) -> str:
    """The text with comments, strings and characters blanked, lines kept."""
    return _COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), text)


def _places(file: str, text: str, pattern: re.Pattern[str], what: str) -> Iterator[Place]:
    for match in pattern.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield Place(file, line, f"`{' '.join(match.group().split())}` {what}")


def _directives(file: str, text: str) -> tuple[int, tuple[Place, ...]]:
    total, places = 0, []
    # Not splitlines, which takes a form feed for the end of a line.
    for number, line in enumerate(text.split("\n"), 1):
        if _DIRECTIVE.match(line):
            total += 1
            if _MACRO.match(line):
                places.append(Place(file, number, "a macro with arguments"))
    return total, tuple(places)


def _pointers(file: str, text: str) -> tuple[int, tuple[Place, ...]]:
    return len(_POINTER.findall(text)), tuple(_places(file, text, _POINTERS, "goes two levels"))

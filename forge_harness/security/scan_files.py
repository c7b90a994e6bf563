"""The files of a source tree, as scanners and measures take them."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from forge_harness.errors import UsageError, several
from forge_harness.paths import resolved_path

SKIPPED = frozenset(
    {"__pycache__", "node_modules", "build", "dist", "site-packages", "venv", "htmlcov"}
)
"""Directories that hold what others wrote or tools made; hidden ones are left out as well."""
NOT_TYPED = frozenset({".git", ".hg", ".svn", "__pycache__", "node_modules", "site-packages"})
"""Directories in which nobody types anything; caches and virtual environments are such too."""


def _raised(error: OSError) -> NoReturn:
    raise error


def _passed_over(directory: Path) -> None:
    """Says nothing of a directory that is left out."""


def tree_files(
    root: Path,
    suffixes: Collection[str] = (),
    *,
    on_error: Callable[[OSError], object] = _raised,
    on_left_out: Callable[[Path], object] = _passed_over,
) -> Iterator[Path]:
    """Yields the regular files of a tree in order; links are not followed.

    Args:
        root: Directory, or one file.
        suffixes: Only these, for example ".py"; all when empty.
        on_error: Told of each directory that cannot be listed.
        on_left_out: Told of each directory that is left out and in which somebody may have typed.

    Raises:
        UsageError: Nothing is there.
        OSError: A directory cannot be listed, unless `on_error` takes it.
    """
    if root.is_file():
        yield root
        return
    if not root.is_dir():
        raise UsageError(f"{root} does not exist; expected a directory of source, or one file.")
    for directory, names, files in os.walk(root, onerror=on_error):
        here = Path(directory)
        left_out = {name for name in names if _skipped(here / name)}
        for name in sorted(left_out):
            if not _not_typed(here / name):
                on_left_out(here / name)
        names[:] = sorted(set(names) - left_out)
        for name in sorted(files):
            path = here / name
            if (not suffixes or path.suffix in suffixes) and _regular(path):
                yield path


def typed_files(root: Path) -> tuple[list[Path], list[Path], list[OSError]]:
    """Returns the regular files of a tree that somebody may have typed into, hidden ones too.

    Links are not followed.

    Args:
        root: Directory, or one file.

    Returns:
        The files in order, the directories that were left out, and why others could not be listed.

    Raises:
        UsageError: Nothing is there.
    """
    if not root.is_dir():
        return list(tree_files(root)), [], []
    files: list[Path] = []
    left_out: list[Path] = []
    unlisted: list[OSError] = []
    for directory, names, found in os.walk(root, onerror=unlisted.append):
        here = Path(directory)
        left_out += [here / name for name in sorted(names) if _not_typed(here / name)]
        names[:] = sorted(name for name in names if not _not_typed(here / name))
        files += [here / name for name in sorted(found) if _regular(here / name)]
    return files, left_out, unlisted


def unread_clause(errors: Sequence[OSError], root: Path) -> str:
    """Returns in a clause how much below `root` could not be looked at, and the first reason."""
    first = errors[0]
    where = relative(Path(first.filename or root), root)
    count = several(len(errors), "file or directory", "files or directories")
    return f"{count} cannot be read, the first is {where}: {first.strerror}"


def relative(path: Path, root: Path) -> str:
    """Returns a path under `root` as text in UTF-8, with forward slashes."""
    resolved, base = resolved_path(path), resolved_path(root)
    if base.is_file():
        base = base.parent
    text = resolved.relative_to(base).as_posix() if resolved.is_relative_to(base) else str(path)
    # Bytes of a name that are no UTF-8 have no place in JSON.
    return text.encode(errors="backslashreplace").decode()


def _skipped(directory: Path) -> bool:
    return (
        directory.name.startswith(".")
        or directory.name in SKIPPED
        or directory.name.endswith(".egg-info")
        or os.path.exists(directory / "pyvenv.cfg")
    )


def _not_typed(directory: Path) -> bool:
    # CACHEDIR.TAG: the mark of caches, https://bford.info/cachedir/
    marks = ("pyvenv.cfg", "CACHEDIR.TAG")
    return directory.name in NOT_TYPED or any(os.path.exists(directory / mark) for mark in marks)


def _regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:  # Removed since it was listed.
        return False
    except OSError:  # Who opens it will meet the reason, and must not pass over it.
        return True

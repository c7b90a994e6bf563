"""The files of a source tree, as scanners and measures take them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from forge_harness.errors import UsageError
from forge_harness.paths import resolved_path

SKIPPED = frozenset(
    {"__pycache__", "node_modules", "build", "dist", "site-packages", "venv", "htmlcov"}
)
"""Directories that hold what others wrote or tools made; hidden ones are left out as well."""
NOT_TYPED = frozenset({".git", ".hg", ".svn", "__pycache__", "node_modules", "site-packages"})
"""Directories in which nobody types anything; caches and virtual environments are such too."""


def tree_files(root: Path, suffixes: Collection[str] = ()) -> Iterator[Path]:
    """Yields the regular files of a tree in order; links are not followed.

    Args:
        root: Directory, or one file.
        suffixes: Only these, for example ".py"; all when empty.

    Raises:
        UsageError: Nothing is there.
    """
    if root.is_file():
        yield root
        return
    if not root.is_dir():
        raise UsageError(f"{root} does not exist; expected a directory of source, or one file.")
    for directory, names, files in os.walk(root):
        here = Path(directory)
        names[:] = sorted(n for n in names if not _skipped(here / n))
        for name in sorted(files):
            path = here / name
            if (not suffixes or path.suffix in suffixes) and _regular(path):
                yield path


def typed_files(root: Path) -> tuple[list[Path], list[Path]]:
    """Returns the regular files of a tree that somebody may have typed into, hidden ones too.

    Links are not followed.

    Args:
        root: Directory, or one file.

    Returns:
        The files in order, and the directories that were left out.

    Raises:
        UsageError: Nothing is there.
    """
    if not root.is_dir():
        return list(tree_files(root)), []
    files, left_out = [], []
    for directory, names, found in os.walk(root):
        here = Path(directory)
        left_out += [here / name for name in sorted(names) if _not_typed(here / name)]
        names[:] = sorted(name for name in names if not _not_typed(here / name))
        files += [here / name for name in sorted(found) if _regular(here / name)]
    return files, left_out


def relative(path: Path, root: Path) -> str:
    """Returns a path under `root` as text, with forward slashes."""
    resolved, base = resolved_path(path), resolved_path(root)
    if base.is_file():
        base = base.parent
    return resolved.relative_to(base).as_posix() if resolved.is_relative_to(base) else str(path)


def _skipped(directory: Path) -> bool:
    return (
        directory.name.startswith(".")
        or directory.name in SKIPPED
        or directory.name.endswith(".egg-info")
        or (directory / "pyvenv.cfg").exists()
    )


def _not_typed(directory: Path) -> bool:
    # CACHEDIR.TAG: the mark of caches, https://bford.info/cachedir/
    marks = ("pyvenv.cfg", "CACHEDIR.TAG")
    return directory.name in NOT_TYPED or any((directory / mark).exists() for mark in marks)


def _regular(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()

"""The files of a source tree, as scanners and measures take them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from forge_harness.errors import UsageError

SKIPPED = frozenset(
    {"__pycache__", "node_modules", "build", "dist", "site-packages", "venv", "htmlcov"}
)
"""Directories that hold what others wrote or tools made; hidden ones are left out as well."""


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


def relative(path: Path, root: Path) -> str:
    """Returns a path under `root` as text, with forward slashes."""
    resolved, base = path.resolve(), root.resolve()
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


def _regular(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()

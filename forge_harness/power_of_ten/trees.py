"""Which files are counted, of trees that are taken as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from forge_harness.paths import resolved_path
from forge_harness.security.scan_files import tree_files


def files_of(roots: Sequence[Path], suffixes: Sequence[str]) -> Iterator[tuple[Path, list[Path]]]:
    """Yields each tree with its files; one that several trees hold is with the first of them.

    Args:
        roots: Directories or files.
        suffixes: Of the files.

    Raises:
        UsageError: There is no such tree.
    """
    seen: set[Path] = set()
    for root in roots:
        named = {resolved_path(path): path for path in tree_files(root, suffixes)}
        yield root, [path for resolved, path in named.items() if resolved not in seen]
        seen |= named.keys()

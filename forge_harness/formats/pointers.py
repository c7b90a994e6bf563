"""What Git LFS keeps in place of a large file until it is fetched."""

from __future__ import annotations

from pathlib import Path

from forge_harness.errors import CheckpointError

_START = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: Path) -> None:
    """Refuses a file that was never fetched: no reader could say more than that it is none.

    Raises:
        CheckpointError: It is a pointer of Git LFS.
    """
    with path.open("rb") as stream:
        if stream.read(len(_START)) == _START:
            raise CheckpointError(
                f"{path} is the pointer that Git LFS keeps in place of the file; expected the file "
                "itself: run `git lfs pull` where it lies, or download it."
            )

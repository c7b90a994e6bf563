"""Byte corpus made at run time from the sources of the Python standard library.

It follows the interpreter's version and packaging, so its digest goes into the evidence and
gates use ratios of two models on one corpus, never absolute bits a byte.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from forge_harness.errors import ForgeError

# Test suites (60 % of the bytes), generated tables and vendored trees: repetitive text that
# would make the corpus easier than source code is.
_DROPPED_DIRECTORIES = frozenset(
    {
        "test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "pydoc_data", "ensurepip",
        "msilib", "turtledemo", "site-packages", "dist-packages", "__pycache__",
    }
)  # fmt: skip
_DROPPED_PREFIXES = ("config-", "_sysconfigdata")
# Written by distributions and administrators, not part of the library.
_DROPPED_FILES = frozenset({"sitecustomize.py", "usercustomize.py"})
_MIN_FILE_BYTES = 200
_HELD_OUT_OF = 16
_SHARED_LINE_MIN_BYTES = 40
_MIN_TRAIN_BYTES = 1 << 20


class CorpusError(ForgeError):
    """The standard library's sources are not there, or too few to train on."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Files of the corpus by split, ordered by relative path."""

    train: tuple[bytes, ...]
    validation: tuple[bytes, ...]

    def digest(self) -> str:
        """Returns `sha256:<hex>` over all files, lengths and split included."""
        hasher = hashlib.sha256()
        for name, files in (("train", self.train), ("validation", self.validation)):
            hasher.update(f"{name}:{len(files)};".encode())
            for content in files:
                hasher.update(f"{len(content)};".encode())
                hasher.update(content)
        return f"sha256:{hasher.hexdigest()}"


@cache
def standard_library_corpus() -> Corpus:
    """Returns the corpus of this interpreter, built on the first call (about 0.5 s).

    Raises:
        CorpusError: The interpreter ships without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    corpus = build_corpus(_read(root))
    size = sum(map(len, corpus.train))
    if size < _MIN_TRAIN_BYTES or not corpus.validation:
        raise CorpusError(
            f"The standard library of this interpreter has {size} bytes of .py sources to train "
            f"on, at least {_MIN_TRAIN_BYTES} are needed; use a Python that ships its sources."
        )
    return corpus


def build_corpus(files: Iterable[tuple[str, bytes]]) -> Corpus:
    """Splits files by the hash of their path and removes what the splits share.

    Exact duplicates are kept once, before the split; lines of 40 and more bytes that occur in
    the training split are dropped from held-out files, because learning them by heart would
    read as generalisation.

    Args:
        files: (relative POSIX path, content).

    Returns:
        Both splits, ordered by path, whatever order the files came in.
    """
    seen: set[bytes] = set()
    train: list[bytes] = []
    held_out: list[bytes] = []
    for path, raw in sorted(files):
        content = raw.replace(b"\r\n", b"\n")
        fingerprint = hashlib.sha256(content).digest()
        if len(content) < _MIN_FILE_BYTES or fingerprint in seen:
            continue
        seen.add(fingerprint)
        (held_out if _is_held_out(path) else train).append(content)
    known = {line for content in train for line in _long_lines(content)}
    stripped = (_without_lines(content, known) for content in held_out)
    return Corpus(tuple(train), tuple(content for content in stripped if content))


def _is_held_out(path: str) -> bool:
    return hashlib.sha256(path.encode()).digest()[0] % _HELD_OUT_OF == 0


def _long_lines(content: bytes) -> Iterator[bytes]:
    for line in content.split(b"\n"):
        stripped = line.strip()
        if len(stripped) >= _SHARED_LINE_MIN_BYTES:
            yield stripped


def _without_lines(content: bytes, known: set[bytes]) -> bytes:
    return b"\n".join(line for line in content.split(b"\n") if line.strip() not in known)


def _read(root: Path) -> Iterator[tuple[str, bytes]]:
    for path in root.rglob("*.py"):
        relative = PurePosixPath(path.relative_to(root).as_posix())
        if not _is_dropped(relative) and path.is_file():
            yield str(relative), path.read_bytes()


def _is_dropped(path: PurePosixPath) -> bool:
    return path.name in _DROPPED_FILES or any(
        part in _DROPPED_DIRECTORIES or part.startswith(_DROPPED_PREFIXES) for part in path.parts
    )

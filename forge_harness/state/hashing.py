"""SHA-256 of a stream, with the running digest at the end of each chunk.

The running digests cost nothing beyond the whole one, and the first that differs tells in which
chunk the first wrong byte is.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from typing import Self

CHUNK_BYTES = 4 << 20
_DIGEST_BYTES = 32


class StreamDigest:
    """Hashes what it is given, in the caller's thread."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._prefixes: list[bytes] = []
        self.size = 0

    def update(self, data: memoryview | bytes) -> None:
        """Takes in the next bytes."""
        view = memoryview(data)
        while view:
            part = view[: CHUNK_BYTES - self.size % CHUNK_BYTES]
            self._hash.update(part)
            self.size += len(part)
            if self.size % CHUNK_BYTES == 0:
                self._prefixes.append(self._hash.digest())
            view = view[len(part) :]

    @property
    def hexdigest(self) -> str:
        """Lower-case hexadecimal SHA-256 of all that was given."""
        return self._hash.hexdigest()

    @property
    def prefixes(self) -> bytes:
        """Running digests, one a chunk, the last included; empty for a single chunk."""
        if self.size <= CHUNK_BYTES:
            return b""
        last = [] if self.size % CHUNK_BYTES == 0 else [self._hash.digest()]
        return b"".join([*self._prefixes, *last])


class ThreadedDigest:
    """Hashes in a thread of its own while the caller reads and writes.

    What is given must not change before the block ends. Leaving the block waits for the thread.
    """

    def __init__(self) -> None:
        self.digest = StreamDigest()
        self._queue: queue.Queue[memoryview | bytes | None] = queue.Queue(maxsize=4)
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.finish()

    def update(self, data: memoryview | bytes) -> None:
        """Takes in the next bytes; a first and last short one is hashed at once."""
        if self._thread is None and len(data) < CHUNK_BYTES:
            self.digest.update(data)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        self._queue.put(data)

    def finish(self) -> StreamDigest:
        """Waits for all that was given and returns its digest."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        return self.digest

    def _run(self) -> None:
        while (data := self._queue.get()) is not None:
            self.digest.update(data)


def first_difference(stored: bytes, found: bytes, size: int) -> tuple[int, int] | None:
    """Returns (start, stop) in bytes of the first chunk whose running digests differ.

    Args:
        stored: Running digests as they were when the content was committed.
        found: Running digests of what was read.
        size: Length of the content in bytes.
    """
    for index in range(len(stored) // _DIGEST_BYTES):
        at = slice(index * _DIGEST_BYTES, (index + 1) * _DIGEST_BYTES)
        if stored[at] != found[at]:
            return index * CHUNK_BYTES, min((index + 1) * CHUNK_BYTES, size)
    return None

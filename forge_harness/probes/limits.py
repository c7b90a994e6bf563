"""Resource limits of this process, lowered for the length of a block."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def file_size_limited(limit: int) -> Iterator[None]:
    """Keeps this process from writing any file beyond `limit` bytes, as a full disk would.

    Writing fails with EFBIG (RLIMIT_FSIZE); the signal for it is ignored meanwhile. Main thread.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)

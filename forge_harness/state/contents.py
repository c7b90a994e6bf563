"""Contents by their digest: small ones inside the index, others in files; verified when read."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from forge_harness.canonical import sha256_hex
from forge_harness.errors import (
    DamagedSealError,
    DamagedStateError,
    ForgeError,
    SealedStateError,
    StateError,
    UnknownStateError,
    WrongKeyError,
)

from .blobs import CONTEXT, Blobs, Staged
from .hashing import CHUNK_BYTES, StreamDigest, first_difference
from .index import Index, StoredObject
from .lock import Turns
from .records import BlobRef
from .sealer import Sealer

INLINE_BYTES = 32 << 10
"""Contents up to this length live in the index: no file, no rename, no fsync of their own."""


class NotHeldError(UnknownStateError):
    """The index has never heard of a content."""


class Sink(Protocol):
    """Where verified-while-written plaintext goes."""

    def write(self, data: bytes) -> int:
        """Takes all of it."""


Sight = tuple[str, float, int, float]
"""Name, time of the commit, size and time of the last change of a file."""


@dataclass
class Prepared:
    """Contents of one commit before they are in the store."""

    inline: dict[str, bytes] = field(default_factory=dict)
    """Digest -> plaintext."""
    staged: dict[str, Staged] = field(default_factory=dict)
    """Digest -> temporary file."""
    held: dict[str, BlobRef] = field(default_factory=dict)
    """Digest -> content that must be in the store already."""
    seen: dict[str, Sight] = field(default_factory=dict)
    """Digest -> how the file of a content lay there when it verified."""


@dataclass
class Rewrapped:
    """What a change of key came to."""

    changed: int = 0
    total: int = 0
    refused: list[tuple[str, Exception]] = field(default_factory=list)
    """Digest, and why it is not under the new key."""

    def check(self) -> None:
        """Raises StateError when a content is not under the new key; DamagedStateError if lost."""
        if not self.refused:
            return
        digest, error = self.refused[0]
        sentence = (
            f"{len(self.refused)} of {self.total} sealed contents are not under the new key, the "
            f"first of them {digest}: {str(error).rstrip('.')}. All others are; verify the store, "
            "mend these, and repeat before the old key is destroyed."
        )
        if isinstance(error, FileNotFoundError | DamagedSealError):
            raise DamagedStateError(sentence, digest=digest)
        raise StateError(sentence)


class Contents:
    """Puts contents in and gets them out, sealed when there is a sealer.

    Attributes:
        let_go: Called between the chunks of a content that is read: may let go of the lock, and
            returns whether it has.
    """

    inline_bytes = INLINE_BYTES

    def __init__(self, index: Index, blobs: Blobs) -> None:
        self.index = index
        self.blobs = blobs
        self.let_go: Callable[[], bool] = bool
        self._seen: Mapping[str, Sight] = {}

    # Writing

    def prepare(self, source: bytes | Path | BlobRef, into: Prepared) -> BlobRef:
        """Hashes a content, and writes it to a temporary file unless it is small.

        Raises:
            OSError: The source cannot be read or the file system refused.
        """
        if isinstance(source, BlobRef):
            into.held[source.digest] = source
            return source
        if isinstance(source, Path) and source.stat().st_size <= self.inline_bytes:
            source = source.read_bytes()
        if isinstance(source, bytes) and len(source) <= self.inline_bytes:
            digest = sha256_hex(source)
            into.inline[digest] = source
            return BlobRef(digest, len(source))
        staged = self.blobs.stage(source)
        if staged.digest in into.staged:
            self.blobs.discard(staged.temp)
        else:
            into.staged[staged.digest] = staged
        return BlobRef(staged.digest, staged.size)

    def look(self, prepared: Prepared, reading: Callable[[], AbstractContextManager[None]]) -> None:
        """Verifies what the store holds already, before the caller keeps everybody else out.

        `plan` reads again only what is not as it was: a GB takes seconds, for which nobody could
        commit. What does not verify it finds again, and tells.

        Args:
            prepared: Contents of the commit.
            reading: Takes the readers' lock.
        """
        staged = (BlobRef(item.digest, item.size) for item in prepared.staged.values())
        for ref in (*prepared.held.values(), *staged):
            if self._sight(ref) is None:
                continue
            with Turns(reading) as turns:
                self.let_go, sight = turns.let_go, self._sight(ref)
                with contextlib.suppress(ForgeError, OSError):
                    self.verify(ref, quarantine=False)
                    if sight is not None:
                        prepared.seen[ref.digest] = sight
        self.let_go = bool

    def _sight(self, ref: BlobRef) -> Sight | None:
        """Returns how a content lies in a file of its own; None where it does not."""
        stored = self.index.object(ref.digest)
        if stored is None or stored.content is not None or stored.collected_at is not None:
            return None
        path, fs = self.blobs.path(stored.stored), self.blobs.fs
        try:
            return stored.stored, stored.created_at, fs.size(path), fs.modified_at(path)
        except OSError:
            return None

    def _is_as_seen(self, ref: BlobRef) -> bool:
        return ref.digest in self._seen and self._sight(ref) == self._seen[ref.digest]

    def discard(self, prepared: Prepared) -> None:
        """Removes what was staged and not published."""
        for staged in prepared.staged.values():
            self.blobs.discard(staged.temp)

    def plan(self, prepared: Prepared) -> tuple[list[Staged], list[StoredObject]]:
        """Finds out which contents are new; the caller holds the exclusive lock.

        Returns:
            Files to publish, and rows the index must take in the transaction that refers to them.

        Raises:
            UnknownStateError: A content that should be held is not.
            DamagedStateError: A content that should be held is damaged.
        """
        self._seen = prepared.seen
        for ref in prepared.held.values():
            is_given = ref.digest in prepared.inline or ref.digest in prepared.staged
            if not (is_given or self._is_as_seen(ref)):
                self.verify(ref)
        now = time.time()
        rows = [
            self._inline(digest, content, now)
            for digest, content in prepared.inline.items()
            if not self._is_good(BlobRef(digest, len(content)))
        ]
        fresh = [
            s for s in prepared.staged.values() if not self._is_good(BlobRef(s.digest, s.size))
        ]
        if self.blobs.sealer is not None:
            for item in fresh:
                # The keys may have been rotated while a large one was being sealed.
                self.blobs.sealer.rewrap_file(item.temp)
        return fresh, rows + [
            StoredObject(
                digest=item.digest,
                size=item.size,
                prefixes=item.prefixes,
                content=None,
                stored=item.name,
                stored_size=item.stored_size,
                sealed=self._sealed(),
                created_at=now,
                collected_at=None,
            )
            for item in fresh
        ]

    def _inline(self, digest: str, content: bytes, now: float) -> StoredObject:
        sealer = self.blobs.sealer
        stored = content if sealer is None else sealer.seal_bytes(content, context=CONTEXT)
        return StoredObject(
            digest=digest,
            size=len(content),
            prefixes=b"",
            content=stored,
            stored=sha256_hex(stored[self._head() :]),
            stored_size=len(stored),
            sealed=self._sealed(),
            created_at=now,
            collected_at=None,
        )

    def _head(self) -> int:
        return 0 if self.blobs.sealer is None else self.blobs.sealer.head_bytes

    def _sealed(self) -> int:
        return 0 if self.blobs.sealer is None else 1 + self._head()

    def rewrap(self) -> Rewrapped:
        """Puts every sealed content under the sealer's newest key; the caller holds the lock.

        One that is lost keeps no other under the old key. What a destroyed key sealed is left out.

        Raises:
            WrongKeyError: One is sealed under a key the sealer never had.
        """
        sealer, done = self.blobs.sealer, Rewrapped()
        assert sealer is not None
        for stored in self.index.objects():
            if not stored.sealed or stored.collected_at is not None:
                continue
            done.total += 1
            try:
                done.changed += self._rewrap(stored, sealer)
            except WrongKeyError:
                self._check_keys(stored, sealer)
                done.total -= 1
            except (OSError, DamagedSealError) as error:
                done.refused.append((stored.digest, error))
        return done

    def _rewrap(self, stored: StoredObject, sealer: Sealer) -> bool:
        if stored.content is None:
            return sealer.rewrap_file(self.blobs.path(stored.stored))
        whole = self.index.object(stored.digest)
        assert whole is not None
        assert whole.content is not None
        again = sealer.rewrap_bytes(whole.content)
        if again is not None:
            self.index.put_objects([replace(whole, content=again)])
        return again is not None

    def refuse_other_keys(self) -> None:
        """Refuses a sealer that never had a key of what was sealed last.

        No one keyring would open all of the store any more.

        Raises:
            WrongKeyError: It had none; keys that were destroyed count.
        """
        if self.blobs.sealer is not None and (stored := self.index.newest_sealed()) is not None:
            self._check_keys(stored, self.blobs.sealer)

    def _check_keys(self, stored: StoredObject, sealer: Sealer) -> None:
        try:
            if stored.content is not None:
                head = stored.content[: _head_of(stored)]
            else:
                with self.blobs.reading(stored.stored) as stream:
                    head = stream.read(_head_of(stored))
        except OSError:  # What is missing or cannot be read is found when it is.
            return
        sealer.check_head(head)

    def _is_good(self, ref: BlobRef) -> bool:
        """Whether the store holds a content whole; a damaged one goes to quarantine."""
        if (stored := self.index.object(ref.digest)) is None:
            return False
        if self._is_as_seen(ref):
            return True
        try:
            self.verify(ref)
        except (UnknownStateError, DamagedStateError):
            return False
        except WrongKeyError:
            assert self.blobs.sealer is not None
            # Raises unless the key was destroyed on purpose, and with it this copy.
            self._check_keys(stored, self.blobs.sealer)
            return False
        return True

    # Reading

    def verify(self, ref: BlobRef, *, quarantine: bool = True) -> None:
        """Reads a content and compares it with its digest; a damaged one goes to quarantine.

        Raises:
            UnknownStateError: The store never had it, or it was collected.
            DamagedStateError: It is missing or not what was committed.
        """
        self.copy(ref, _Nowhere(), quarantine=quarantine)

    def read(self, ref: BlobRef, *, quarantine: bool = True) -> bytes:
        """Returns a content. Raises as `verify` does."""
        buffer = io.BytesIO()
        self.copy(ref, buffer, quarantine=quarantine)
        return buffer.getvalue()

    def copy(self, ref: BlobRef, target: Sink, *, quarantine: bool = True) -> None:
        """Writes a content to `target`, which may be used only when this returned.

        What is found damaged when the lock was let go of stays where it is: another may lie there.

        Raises:
            UnknownStateError: The store never had it, or it was collected.
            DamagedStateError: It is missing or not what was committed.
            StateError: It is sealed and there is no key, or its file cannot be read.
        """
        stored = self.locate(ref)
        digest = StreamDigest()
        tee = _Tee(target, digest, self.let_go)
        try:
            self._plaintext(stored, tee)
        except FileNotFoundError as error:
            raise self._lost(ref, stored, "its file is missing") from error
        except _TargetError as error:
            raise error.cause from error
        except (OSError, ForgeError) as error:
            aside = quarantine and not tee.is_alone
            raise self._unreadable(ref, stored, error, quarantine=aside) from error
        if not self.agrees(ref, digest):
            aside = quarantine and not tee.is_alone
            raise self._damaged(ref, stored, _where(ref, stored, digest), quarantine=aside)

    def agrees(self, ref: BlobRef, found: StreamDigest) -> bool:
        """Returns whether what was read is what was committed."""
        return (found.hexdigest, found.size) == (ref.digest, ref.size)

    def locate(self, ref: BlobRef) -> StoredObject:
        """Returns where a content is.

        Raises:
            UnknownStateError: The store never had it, or it was collected.
        """
        stored = self.index.object(ref.digest)
        if stored is None:
            size = self.blobs.stored_size(ref.digest)
            if size is None:
                raise NotHeldError(
                    f"The store does not hold content {ref.digest}. Commit it as bytes or a file."
                )
            # The row is damaged, and unsealed contents are found by their digest alone.
            return StoredObject(
                digest=ref.digest,
                size=size,
                sealed=0,
                stored=ref.digest,
                stored_size=size,
                created_at=0.0,
                collected_at=None,
                prefixes=b"",
                content=None,
            )
        if stored.collected_at is not None:
            raise UnknownStateError(
                f"Content {ref.digest} was collected on {stored.collected_at}: no generation that "
                "was to be kept had it. Restore it from a copy of the store."
            )
        return stored

    def _plaintext(self, stored: StoredObject, target: _Tee) -> None:
        sealer = self.blobs.sealer
        if stored.sealed and sealer is None:
            raise SealedStateError(
                f"Content {stored.digest} is sealed and the store was opened without a key. Give "
                "the key it was sealed with."
            )
        if stored.content is not None:
            plain = stored.content
            if stored.sealed and sealer is not None:
                plain = sealer.unseal_bytes(stored.content, context=CONTEXT)
            target.write(plain)
            return
        with self.blobs.reading(stored.stored) as stream:
            if stored.sealed and sealer is not None:
                sealer.unseal(stream, cast(BinaryIO, target), context=CONTEXT)
                return
            while chunk := stream.read(CHUNK_BYTES):
                target.write(chunk)

    def stored_is_good(self, stored: StoredObject) -> bool:
        """Whether the bytes on disk are those that were written; needs no key.

        Raises:
            OSError: The file cannot be read.
        """
        if stored.content is not None:
            return sha256_hex(stored.content[_head_of(stored) :]) == stored.stored
        if self.blobs.stored_size(stored.stored) != stored.stored_size:
            return False
        found = self.blobs.stored_digest(stored.stored, _head_of(stored), self.let_go)
        return found == stored.stored

    # Damage

    def _unreadable(
        self, ref: BlobRef, stored: StoredObject, error: Exception, *, quarantine: bool
    ) -> ForgeError:
        if not stored.sealed:
            return StateError(
                f"Content {ref.digest} could not be read: {error}. Check the disk, then try again."
            )
        # A wrong key may look like damage from inside; the stored bytes tell one from the other.
        try:
            intact = self.stored_is_good(stored)
        except OSError:
            intact = True
        if not intact:
            return self._damaged(ref, stored, f"it does not open ({error})", quarantine=quarantine)
        if isinstance(error, ForgeError):
            return error
        return StateError(
            f"Content {ref.digest} could not be read: {error}. Check the disk, then try again."
        )

    def _damaged(
        self, ref: BlobRef, stored: StoredObject, what: str, *, quarantine: bool
    ) -> DamagedStateError:
        kept = None
        if quarantine and stored.content is not None:
            kept = self.blobs.quarantine_bytes(ref.digest, stored.content)
        elif quarantine:
            kept = self.blobs.quarantine(stored.stored)
        return self._lost(ref, stored, what, kept)

    def _lost(
        self, ref: BlobRef, stored: StoredObject, what: str, kept: Path | None = None
    ) -> DamagedStateError:
        inline = stored.content is not None
        path = self.index.path if inline else self.blobs.path(stored.stored)
        aside = f" What is left of it was moved to {kept}." if kept else ""
        return DamagedStateError(
            f"Content {ref.digest} in {path} is damaged: {what}.{aside} Restore it from a copy of "
            "the store, or commit it again.",
            path=str(path),
            digest=ref.digest,
        )


def _where(ref: BlobRef, stored: StoredObject, found: StreamDigest) -> str:
    if found.size != ref.size:
        return f"it has {found.size} bytes; expected {ref.size}"
    chunk = first_difference(stored.prefixes, found.prefixes, ref.size)
    place = f", and the first wrong byte is in {chunk[0]}..{chunk[1] - 1}" if chunk else ""
    return f"its SHA-256 is {found.hexdigest}{place}"


class _Tee:
    """Hashes what passes through."""

    def __init__(self, target: Sink, digest: StreamDigest, let_go: Callable[[], bool]) -> None:
        self._target, self._digest, self._let_go = target, digest, let_go
        self.is_alone = False
        """Whether the lock was let go of."""

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        try:
            self._target.write(data)
        except OSError as error:
            raise _TargetError(error) from error
        self.is_alone = self._let_go()
        return len(data)

    def flush(self) -> None:
        pass


class _TargetError(Exception):
    """The target refused, not the store."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class _Nowhere:
    def write(self, data: bytes) -> int:
        return len(data)


def _head_of(stored: StoredObject) -> int:
    return max(0, stored.sealed - 1)

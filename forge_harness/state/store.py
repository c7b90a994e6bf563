"""The state store: what was committed is there, whole, after a kill or a power cut, or it says so.

    root/
      index.db        generations, where contents are, small contents; SQLite, WAL, synchronous=FULL
      objects/aa/..   contents, each under the SHA-256 of the file's bytes
      tmp/            contents being written
      quarantine/     damaged contents, kept aside
      backups/        the index as it was before each migration
      lock            flock: shared by readers, alone for a commit or a collection

A commit writes contents first, then appends one generation in one transaction, then returns. The
current generation is the newest whose manifest, and all it builds on, verifies. Every content is
compared with its digest when it is read.
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from forge_harness.canonical import sha256_hex
from forge_harness.durable import staged_file
from forge_harness.errors import (
    ConflictError,
    DamagedStateError,
    SealedStateError,
    StateError,
    UnknownStateError,
    nearest,
)
from forge_harness.forks import tell_of_forks

from . import collecting, manifest, verifying
from .blobs import Blobs, Staged
from .contents import Contents, NotHeldError, Prepared, Sink
from .fs import Fs, RealFs
from .head import LOSSES, Head, add_loss, read_head, read_losses, write_head
from .history import History, states_of, unknown_state
from .index import Index
from .lock import StoreLock, Turns
from .manifest import Key
from .migrations import migrate
from .opening import INDEX, check_version, examine, make_directories, reported
from .records import BlobRef, CollectReport, Generation, NewState, State, VerifyReport
from .schema import VERSION, version_of
from .sealer import Sealer


class Store:
    """An open state store. Any number of threads and processes may have one open at once.

    A child of fork opens its own: what its parent had open refuses to be used there.

    Attributes:
        root: Its directory.
        read_only: Whether it refuses to change anything.
    """

    def __init__(
        self, root: Path, *, read_only: bool, fs: Fs, sealer: Sealer | None, lock_timeout_s: float
    ) -> None:
        self.root = root
        self.read_only = read_only
        self._mutex = threading.RLock()
        self._lock = StoreLock(root / "lock", lock_timeout_s)
        self._timeout_s = lock_timeout_s
        self._blobs = self.make_blobs(fs, sealer)
        self._history = History()
        self._lost: Head | None = None
        self._losses: list[str] = []
        self._index: Index | None = None
        tell_of_forks(self)

    @classmethod
    def open(
        cls,
        root: Path,
        *,
        create: bool = True,
        read_only: bool = False,
        fs: Fs | None = None,
        sealer: Sealer | None = None,
        lock_timeout_s: float = 10.0,
    ) -> Self:
        """Opens a store, makes one, or brings an old one up to date.

        Args:
            root: Directory of the store.
            create: Whether one may be made where there is none.
            read_only: Never change anything: no migration, no quarantine, no new store.
            fs: Where contents are kept; the operating system's file system when None.
            sealer: Encrypts new contents and opens sealed ones.
            lock_timeout_s: How long each operation waits for other processes, in seconds.

        Raises:
            UnknownStateError: There is no store and none may be made.
            NotAStoreError: The directory holds something else or is on a network file system.
            NewerSchemaError: A newer release wrote the store; it is untouched.
            StoreLockedError: Another process holds it.
            DamagedStateError: The index is damaged beyond reading.
            StateError: No permission, disk full, or an old schema and `read_only`.
        """
        version = examine(root, create=create and not read_only)
        if read_only and version < VERSION:
            raise StateError(
                f"The state store at {root} has schema {version}; this release reads {VERSION}. "
                "Open it once for writing to migrate it."
            )
        store = cls(
            root,
            read_only=read_only,
            fs=fs or RealFs(),
            sealer=sealer,
            lock_timeout_s=lock_timeout_s,
        )
        try:
            store._start(version)
        except BaseException:
            store.close()
            raise
        return store

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the store; closing twice is allowed."""
        with self._mutex:
            if self._index is not None:
                self._index.close()
                self._index = None

    # What a test may replace to see a fault found

    def make_blobs(self, fs: Fs, sealer: Sealer | None) -> Blobs:
        """Returns what keeps contents in files."""
        return Blobs(self.root, fs, sealer)

    def make_contents(self, index: Index) -> Contents:
        """Returns what finds contents."""
        return Contents(index, self._blobs)

    def writing(self) -> contextlib.AbstractContextManager[None]:
        """Returns the lock a commit or a collection holds."""
        return self._lock.exclusive()

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """Returns the lock a reader holds."""
        return self._lock.shared()

    def make_index(self, *, read_only: bool) -> Index:
        """Returns the open index."""
        return Index(self.root / INDEX, read_only=read_only, timeout_s=self._timeout_s)

    def publish(self, files: Sequence[Staged], record: Callable[[], None]) -> None:
        """Makes contents durable, then records them and the generation that has them.

        Args:
            files: New contents, under temporary names.
            record: Writes the rows; its transaction is on disk when it returns.
        """
        self._blobs.publish(files)
        record()

    # Reading

    def current(self) -> Generation | None:
        """Returns the newest generation that verifies, None in an empty store."""
        with self._reading_history() as history:
            return history.current

    def problems(self) -> list[str]:
        """Returns what did not verify when the history was read; empty when all did."""
        with self._reading_history() as history:
            return [f"{problem.where}: {problem.what}" for problem in history.problems]

    def lost(self) -> list[str]:
        """Returns what is newer than the current generation and gone, until the next commit."""
        with self._reading_history() as history:
            return [f"{problem.where}: {problem.what}" for problem in history.lost()]

    def generations(self) -> list[Generation]:
        """Returns the generations that verify, oldest first."""
        with self._reading_history() as history:
            return history.generations()

    def list(
        self, *, phase: str | None = None, kind: str | None = None, generation: int | None = None
    ) -> list[State]:
        """Returns the states at a generation, by default the current one, by phase and name.

        Raises:
            UnknownStateError: There is no such generation.
        """
        with self._reading_history() as history:
            states = states_of(history.view(generation), history.states)
        return [
            state for state in states if phase in (None, state.phase) and kind in (None, state.kind)
        ]

    def get(self, phase: str, name: str, *, generation: int | None = None) -> State:
        """Returns a state.

        Raises:
            UnknownStateError: There is none of that name, with the nearest name; or no such
                generation.
        """
        with self._reading_history() as history:
            view = history.view(generation)
            try:
                return history.states[view[phase, name]]
            except KeyError:
                raise unknown_state(self.root, view, phase, name) from None

    def state(self, state_id: str) -> State:
        """Returns a state of any generation by its id.

        Raises:
            UnknownStateError: There is none.
        """
        with self._reading_history() as history:
            try:
                return history.states[state_id]
            except KeyError:
                raise UnknownStateError(
                    f"There is no state with id {state_id!r} in {self.root}. List them first."
                ) from None

    def read(self, state: State, file: str = "data") -> bytes:
        """Returns the content of a file of a state, compared with its digest.

        Raises:
            UnknownStateError: The state has no such file, or its content was collected.
            DamagedStateError: The content is missing or not what was committed; what is left of it
                went to quarantine/.
        """
        ref = self._file(state, file)
        with reported(f"{self.root} could not be read"), Turns(self.reading) as turns:
            buffer = io.BytesIO()
            self._copy(ref, buffer, turns)
            return buffer.getvalue()

    def copy_to(self, state: State, file: str, target: Path) -> None:
        """Copies a file of a state; `target` appears, durable, when all of it was verified.

        Raises:
            UnknownStateError: The state has no such file, or its content was collected.
            DamagedStateError: The content is missing or not what was committed; `target` is as it
                was before.
            StateError: The target cannot be written.
        """
        ref = self._file(state, file)
        with (
            reported(f"{target} could not be written"),
            staged_file(target) as partial,
            partial.open("wb") as stream,
            Turns(self.reading) as turns,
        ):
            self._copy(ref, stream, turns)

    # Writing

    def commit(
        self, states: Sequence[NewState], *, note: str = "", parent: int | None = None
    ) -> Generation:
        """Appends one generation that puts all the states; it is durable when this returns.

        Args:
            states: At least one; each (phase, name) once.
            note: Why, for the history.
            parent: Number of the generation the commit was based on, 0 for an empty store; None
                for whatever is current.

        Raises:
            ConflictError: `parent` is not the current generation.
            WrongKeyError: The store is sealed under keys the sealer never had.
            UnknownStateError: A `BlobRef` names content the store does not hold.
            StoreLockedError: Another process holds the store.
            StateError: A state is malformed, or the disk is full or refuses; nothing was committed.
        """
        self._check_states(states)
        with reported(f"Nothing was committed to {self.root}"):
            contents, prepared = self._contents(), Prepared()
            try:
                files = [
                    {name: contents.prepare(source, prepared) for name, source in s.files.items()}
                    for s in states
                ]
                contents.look(prepared, self.reading)
                with self._mutex, self.writing():
                    parent_digest = self._expect(parent)
                    number = self._history.last_number + 1
                    seed = f"{number} {parent_digest}"
                    changes = [
                        manifest.put(state, refs, seed)
                        for state, refs in zip(states, files, strict=True)
                    ]
                    return self._append(changes, note, prepared)
            finally:
                contents.discard(prepared)

    def remove(self, phase: str, name: str) -> Generation:
        """Appends a generation without a state; earlier generations keep it.

        Raises:
            UnknownStateError: There is none of that name.
        """
        with self._mutex, reported(f"Nothing was removed from {self.root}"), self.writing():
            self._expect(None)
            view = self._history.view()
            if (phase, name) not in view:
                raise unknown_state(self.root, view, phase, name)
            return self._append([manifest.remove((phase, name))], f"remove {phase}/{name}")

    def restore(self, generation: int, *, keep_phases: Collection[str] = ()) -> Generation:
        """Appends a generation that has the states of an earlier one.

        Args:
            generation: Its number.
            keep_phases: Phases whose states stay as they are now.

        Raises:
            UnknownStateError: There is no such generation, or a content of it was collected.
            DamagedStateError: A content of it is damaged.
        """
        with self._mutex, reported(f"Nothing was restored in {self.root}"), self.writing():
            self._expect(None)
            now = self._history.view()
            wanted = self._history.view(generation)
            wanted = {key: at for key, at in wanted.items() if key[0] not in keep_phases}
            wanted |= {key: at for key, at in now.items() if key[0] in keep_phases}
            prepared = Prepared()
            for key in wanted:
                if now.get(key) != wanted[key]:
                    for ref in self._history.states[wanted[key]].files.values():
                        prepared.held[ref.digest] = ref
            changes = manifest.difference(now, wanted)
            return self._append(changes, f"restore generation {generation}", prepared)

    def verify(self, *, deep: bool = True, quarantine: bool = False) -> VerifyReport:
        """Looks at everything: index, chain of generations, every content.

        Args:
            deep: Whether contents are read and hashed, not only looked for. Sealed ones are hashed
                as they lie when the store was opened without a key, and counted as unopened.
            quarantine: Whether damaged contents are moved aside. Nothing else is ever changed.

        Raises:
            DamagedStateError: The index cannot be opened at all.
        """
        turns = Turns(self.reading)
        with reported(f"{self.root} could not be verified"), turns:
            # A new connection: the open one would answer from pages it read before they rotted.
            index = self.make_index(read_only=True)
            with contextlib.closing(index):
                contents, aside = self.make_contents(index), quarantine and not self.read_only
                return verifying.verify(contents, self.root, turns, deep=deep, quarantine=aside)

    def collect(
        self,
        *,
        retain: int | None = None,
        keep: Collection[int] | Callable[[], Collection[int]] = (),
        grace_s: float = 3600.0,
    ) -> CollectReport:
        """Removes contents no retained generation has, and what kills left behind.

        Args:
            retain: How many of the newest generations keep every content; all when None. The
                current one always does.
            keep: Numbers of further generations to retain, or what says them once nobody else can
                commit any more.
            grace_s: What is younger stays in any case, in seconds: it may belong to a commit that
                is being made. 0: nothing does, whatever the clock said when it was written.

        Raises:
            UnknownStateError: `keep` names a generation that is not there.
            DamagedStateError: A generation does not verify, so what it has is not known; or the
                index has lost where a sealed content is.
        """
        with self._mutex, reported(f"{self.root} was not collected"), self.writing():
            self._check_writable()
            self._refresh()
            self._check_complete()
            kept = keep() if callable(keep) else keep
            return collecting.collect(
                self._contents(), self._history, retain=retain, keep=kept, grace_s=grace_s
            )

    def rewrap(self) -> tuple[int, int]:
        """Puts every sealed content under the sealer's newest key, in place; readers may read on.

        Killed at any moment, everything still opens, and a repetition completes it.

        Returns:
            How many contents changed, and how many are sealed.

        Raises:
            StateError: The store was opened without a sealer; or a content could not be put under
                the key, and all others are.
            WrongKeyError: A content is sealed under a key the sealer never had.
        """
        with self._mutex, reported(f"{self.root} is not all under the new key"), self.writing():
            self._check_writable()
            if self._blobs.sealer is None:
                raise StateError(f"{self.root} was opened without a key. Give the keyring.")
            self._refresh()
            with self._opened().transaction():
                done = self._contents().rewrap()
            done.check()
            return done.changed, done.total

    # Inside

    def _start(self, version: int) -> None:
        with reported(f"The state store at {self.root} could not be opened"):
            fs = self._blobs.fs
            if version < VERSION:
                make_directories(self.root, fs)
                with self.writing():
                    self._create_or_migrate(fs)
            else:
                self._index = self.make_index(read_only=self.read_only)
            if not self.read_only:
                # A copy may have come without the empty ones (git keeps none).
                self._blobs.create()
                # Whoever made the index and the directories may have been killed before this.
                fs.fsync_dir(self.root)
            # Read before the index: a commit of another process must not look like a lost one.
            head = read_head(self.root)
            self._refresh()
            self._compare(head)

    def _create_or_migrate(self, fs: Fs) -> None:
        self._blobs.create()
        self._index = self.make_index(read_only=False)
        with self._index.translated():
            version = version_of(self._index.connection)
        check_version(self.root, version)
        if version == 0:
            self._index.create_layout()
        elif version < VERSION:
            with self._index.translated():
                migrate(self._index.connection, self.root, fs)

    def _compare(self, head: Head) -> None:
        """Reports what was acknowledged and is not in the index."""
        self._lost = self._history.lacks(head)
        self._losses = read_losses(self.root)
        self._history.report(head, self._losses)

    def _note(self, number: int, digest: str) -> None:
        """Notes a generation as acknowledged; what the last note named and is gone is kept."""
        if self._lost is not None:
            add_loss(self.root, self._lost)
            self._losses, self._lost = read_losses(self.root), None
        write_head(self.root, number, digest)

    def _opened(self) -> Index:
        if self._index is None:
            raise StateError(f"The state store at {self.root} was closed. Open it again.")
        return self._index

    def _contents(self) -> Contents:
        return self.make_contents(self._opened())

    def _refresh(self) -> None:
        index = self._opened()
        with index.translated():
            self._history.extend(index.rows_after(self._history.last_number))

    @contextlib.contextmanager
    def _reading_history(self) -> Iterator[History]:
        """Yields what is in the index now; no commit of another thread shows up half of itself."""
        with self._mutex:
            self._refresh()
            yield self._history

    def disown(self) -> None:
        """Leaves the index to the parent process; called in a child of fork."""
        self._mutex = threading.RLock()  # Another thread may have held it when the process forked.
        if self._index is not None:
            self._index.disown()

    def _check_writable(self) -> None:
        if self.read_only:
            raise StateError(
                f"The state store at {self.root} was opened read-only. Open it for writing."
            )

    def _check_complete(self) -> None:
        if self._history.damaged or self._lost or self._losses:
            raise DamagedStateError(
                f"Generations of {self.root} are damaged or lost, so what they need is not known; "
                f"nothing was collected. Verify the store, restore what is missing from a copy, "
                f"then remove {self.root / LOSSES} where it is."
            )

    def _check_states(self, states: Sequence[NewState]) -> None:
        self._check_writable()
        if not states:
            raise StateError("A commit needs at least one state; got none.")
        seen: set[Key] = set()
        for state in states:
            key = (state.phase, state.name)
            if key in seen:
                raise StateError(
                    f"State {state.name!r} of phase {state.phase!r} is in one commit twice; "
                    "expected each once. Commit them one after the other."
                )
            seen.add(key)

    def _expect(self, parent: int | None) -> str | None:
        """Checks what a commit is based on; returns the digest of the current generation."""
        self._check_writable()
        self._refresh()
        if self._blobs.sealer is None and self._opened().has_sealed():
            raise SealedStateError(
                f"The state store at {self.root} holds sealed contents and was opened without a "
                "key; expected the key, so that nothing is written in the clear."
            )
        # Each time: the keys may have been rotated since the last one.
        self._contents().refuse_other_keys()
        current = self._history.current
        if parent is not None and parent != (0 if current is None else current.number):
            at = "empty" if current is None else f"at generation {current.number}"
            raise ConflictError(
                f"The commit was based on generation {parent} and the store is {at}. Load the "
                "states again and repeat the change."
            )
        return None if current is None else current.manifest_digest

    def _append(
        self, changes: Sequence[Mapping[str, Any]], note: str, prepared: Prepared | None = None
    ) -> Generation:
        """Writes contents and a generation; the exclusive lock is held."""
        index, history = self._opened(), self._history
        current = history.current
        number = history.last_number + 1
        parent_digest = None if current is None else current.manifest_digest
        text = manifest.build(number, parent_digest, note, manifest.now(), changes)
        digest = sha256_hex(text)

        contents = self._contents()
        files, rows = contents.plan(prepared or Prepared())

        def record() -> None:
            with index.transaction():
                index.put_objects(rows)
                index.insert_generation(
                    number, None if current is None else current.number, digest, text
                )

        self.publish(files, record)
        self._refresh()
        self._note(number, digest)
        generation = self._history.current
        assert generation is not None
        assert generation.manifest_digest == digest
        return generation

    def _copy(self, ref: BlobRef, target: Sink, turns: Turns) -> None:
        contents = self._contents()
        contents.let_go = turns.let_go
        try:
            contents.copy(ref, target, quarantine=not self.read_only)
        except NotHeldError as error:
            raise DamagedStateError(
                f"The index {self.root / INDEX} has lost where content {ref.digest} is. Verify the "
                "store, and restore the index from a copy.",
                path=str(self.root / INDEX),
                digest=ref.digest,
            ) from error
        except DamagedStateError:
            if not turns.is_held and not self.read_only:
                # It may have been replaced meanwhile: set aside is what is damaged under the lock.
                with self.reading():
                    self._contents().verify(ref)
            raise

    def _file(self, state: State, file: str) -> BlobRef:
        try:
            return state.files[file]
        except KeyError:
            close = nearest(file, state.files)
            hint = f" Did you mean {close!r}?" if close else ""
            raise UnknownStateError(
                f"State {state.name!r} of phase {state.phase!r} has no file {file!r}.{hint} It has "
                f"{', '.join(sorted(state.files)) or 'none'}."
            ) from None

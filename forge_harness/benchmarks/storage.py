"""The state store against the least a durable store can do, on the same disk, in turns.

A commit is held against a bare SQLite transaction (WAL, FULL), a large content against writing the
same bytes, syncing them and hashing them, sealing against AES-256-GCM over bytes in memory.
"""

from __future__ import annotations

import hashlib
import io
import os
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from forge_harness.errors import StateError
from forge_harness.security.audit import AuditLog
from forge_harness.security.audit_events import AuditEvent, Decision
from forge_harness.security.keys import Keyring
from forge_harness.security.sealing import KeyringSealer
from forge_harness.state import NewState, Store

from .timing import Timed, disturbed_of, interleave, samples_of, speedup, void_of

SMALL_BYTES = 1024
GROUP = 64
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class StorageRow:
    """One comparison.

    Attributes:
        name: What was done.
        unit: Of the rates.
        rate: Ours, median.
        baseline: What it is held against.
        baseline_rate: Median, measured in turns.
        times: (estimate, low, high) of how many times longer ours takes for the same amount; None
            for too few rounds.
        amounts: "ours" and "baseline" -> what a call does, in units of the rates.
        samples: The same -> seconds a call, one entry a round.
        disturbed: The same -> whether another process took the core, one entry a round.
        void: Candidates and ratios of which too few rounds were undisturbed; see `timing.void_of`.
    """

    name: str
    unit: str
    rate: float
    baseline: str
    baseline_rate: float
    times: tuple[float, float, float] | None
    amounts: dict[str, float] = field(repr=False, default_factory=dict)
    samples: dict[str, list[float]] = field(repr=False, default_factory=dict)
    disturbed: dict[str, list[bool]] = field(repr=False, default_factory=dict)
    void: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class StorageMeasured:
    """What `measure` found.

    Attributes:
        rows: Comparisons.
        states: States of the store that was opened.
        open_seconds: Each opening of it, after its writer went away without closing it; none where
            that was not measured.
        file_system: Directory the files were in.
    """

    rows: list[StorageRow]
    states: int
    open_seconds: list[float]
    file_system: str


def measure(
    place: Path,
    *,
    blob_bytes: int = 1 << 30,
    states: int = 10_000,
    rounds: int = 7,
    told: Callable[[str], None] = lambda what: None,
    so_far: Callable[[StorageMeasured], object] = lambda found: None,
) -> StorageMeasured:
    """Times the store in a scratch directory below `place`, which is removed again.

    Args:
        place: Directory on the disk to measure; needs about three times `blob_bytes`.
        blob_bytes: Of the large content.
        states: In the store that is opened.
        rounds: Turns of each candidate, 6 at least for bounds.
        told: Told what is measured next.
        so_far: Told what was found after each comparison.

    Raises:
        OSError: The disk is full, or cannot be written.
        StateError: The same, as SQLite or the store found it.
    """
    measured = StorageMeasured([], states, [], str(place))

    def keep(row: StorageRow) -> None:
        measured.rows.append(row)
        so_far(measured)

    with _refusals(place), tempfile.TemporaryDirectory(prefix="forge-bench-", dir=place) as scratch:
        folder = Path(scratch)
        for what, compare in (
            ("commits", _commits),
            ("groups", _groups),
            ("audit records", _audit),
        ):
            told(what)
            (folder / what).mkdir()
            keep(compare(folder / what, rounds))
        told("large content")
        keep(_blob(folder, blob_bytes, rounds))
        told("sealing")
        keep(_sealing(min(blob_bytes, 256 << 20), rounds))
        told(f"opening a store of {states:,} states")
        measured.open_seconds.extend(_opening(folder / "many", states, rounds))
        so_far(measured)
    return measured


@contextmanager
def _refusals(place: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        raise StateError(
            f"The disk of {place} took no more ({error}). Free space there, or name a directory on "
            "another."
        ) from error


def _row(
    name: str, unit: str, amount: float, ours: Timed, baseline: str, theirs: Timed, other: float
) -> StorageRow:
    slower = speedup(theirs, ours)
    # Times longer for the same amount of work on both sides.
    scale = other / amount
    times = None
    if slower is not None:
        times = (slower.estimate * scale, slower.low * scale, slower.high * scale)
    timed = {"ours": ours, "baseline": theirs}
    return StorageRow(
        name,
        unit,
        amount / ours.median,
        baseline,
        other / theirs.median,
        times,
        {"ours": amount, "baseline": other},
        samples_of(timed),
        disturbed_of(timed),
        void_of(timed, [("ours", "baseline")]),
    )


def _small(number: int) -> NewState:
    content = number.to_bytes(8, "big") * (SMALL_BYTES // 8)
    return NewState(phase="phase5", kind="metrics", name=f"s{number}", files={"data": content})


def _bare(folder: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(folder / "bare.db", isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("CREATE TABLE state (name TEXT PRIMARY KEY, content BLOB)")
    return connection


def _insert(connection: sqlite3.Connection, number: int) -> None:
    content = number.to_bytes(8, "big") * (SMALL_BYTES // 8)
    connection.execute("INSERT INTO state VALUES (?, ?)", (f"s{number}", content))


class _Counter:
    def __init__(self) -> None:
        self.value = 0

    def next(self) -> int:
        self.value += 1
        return self.value


def _commits(folder: Path, rounds: int) -> StorageRow:
    count, other = _Counter(), _Counter()
    with closing(_bare(folder)) as connection, Store.open(folder / "store") as store:
        timed = interleave(
            {
                "store": lambda: store.commit([_small(count.next())]),
                "sqlite": lambda: _insert(connection, other.next()),
            },
            rounds=rounds,
            batch=0.2,
        )
    return _row(
        "commit of one state of 1 KiB",
        "commits/s",
        1,
        timed["store"],
        "SQLite, WAL, FULL",
        timed["sqlite"],
        1,
    )


def _groups(folder: Path, rounds: int) -> StorageRow:
    count = _Counter()
    with Store.open(folder / "store") as store:
        timed = interleave(
            {
                "group": lambda: store.commit([_small(count.next()) for _ in range(GROUP)]),
                "single": lambda: store.commit([_small(count.next())]),
            },
            rounds=rounds,
            batch=0.2,
        )
    return _row(
        f"commit of {GROUP} states at once",
        "states/s",
        GROUP,
        timed["group"],
        "one by one",
        timed["single"],
        1,
    )


def _audit(folder: Path, rounds: int) -> StorageRow:
    other = _Counter()
    event = AuditEvent(actor="bench", action="a.b", resource="c", decision=Decision.ALLOW)
    with (
        closing(_bare(folder)) as connection,
        AuditLog.of_keyring(folder / "audit.db", Keyring.new()) as log,
    ):
        timed = interleave(
            {
                "audit": lambda: log.record(event),
                "sqlite": lambda: _insert(connection, other.next()),
            },
            rounds=rounds,
            batch=0.2,
        )
    return _row(
        "audit record with a signed head",
        "records/s",
        1,
        timed["audit"],
        "SQLite, WAL, FULL",
        timed["sqlite"],
        1,
    )


def _blob(folder: Path, size: int, rounds: int) -> StorageRow:
    source = folder / "blob"
    _random_file(source, size)
    count = _Counter()

    def commit() -> None:
        # Each round another content: the store would not write the same one twice.
        with source.open("r+b") as stream:
            stream.write(count.next().to_bytes(8, "big"))
        state = NewState(phase="phase5", kind="model", name="m", files={"data": source})
        store.commit([state])
        store.collect(retain=1, grace_s=0.0)

    def plain() -> None:
        target = folder / "plain"
        digest = hashlib.sha256()
        with source.open("rb") as reader, target.open("wb") as writer:
            while chunk := reader.read(_CHUNK):
                digest.update(chunk)
                writer.write(chunk)
            writer.flush()
            os.fsync(writer.fileno())
        target.unlink()

    with Store.open(folder / "blobs") as store:
        timed = interleave({"store": commit, "plain": plain}, rounds=rounds, batch=0.0)
    return _row(
        f"content of {size / 1e6:,.0f} MB",
        "MB/s",
        size / 1e6,
        timed["store"],
        "write, fsync, sha256",
        timed["plain"],
        size / 1e6,
    )


def _random_file(path: Path, size: int) -> None:
    block = os.urandom(_CHUNK)
    with path.open("wb") as stream:
        for start in range(0, size, _CHUNK):
            stream.write(block[: min(_CHUNK, size - start)])


def _sealing(size: int, rounds: int) -> StorageRow:
    data = os.urandom(_CHUNK) * max(1, size // _CHUNK)
    sealer, raw, nonce = KeyringSealer(Keyring.new()), AESGCM(os.urandom(32)), os.urandom(12)
    target = io.BytesIO(bytes(len(data) + (1 << 20)))

    def seal() -> None:
        target.seek(0)
        sealer.seal(io.BytesIO(data), target)

    def encrypt() -> None:
        view = memoryview(data)
        for start in range(0, len(data), _CHUNK):
            raw.encrypt(nonce, view[start : start + _CHUNK], None)

    timed = interleave({"seal": seal, "raw": encrypt}, rounds=rounds, batch=0.0)
    amount = len(data) / 1e6
    return _row(
        "sealing, in memory", "MB/s", amount, timed["seal"], "AES-256-GCM", timed["raw"], amount
    )


def _opening(root: Path, states: int, rounds: int) -> list[float]:
    _write_and_vanish(root, states)
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        with Store.open(root) as store:
            found = len(store.list())
            seconds.append(time.perf_counter() - began)
        if found != states:
            raise StateError(
                f"{found} of {states} states are in {root} after its writer went away; expected "
                "all of them. Check the disk."
            )
    return seconds


def _write_and_vanish(root: Path, states: int) -> None:
    """Fills a store in a process that leaves by os._exit, as a kill would have it: open."""
    receive, send = os.pipe()
    if (child := os.fork()) == 0:
        # Whatever happens, the child must not go on with what its parent was about to do.
        try:
            store = Store.open(root)
            for start in range(0, states, 1000):
                store.commit([_small(n) for n in range(start, min(start + 1000, states))])
        except BaseException as error:
            os.write(send, (str(error) or type(error).__name__).encode())
            os._exit(1)
        os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as stream:
        reason = stream.read().decode(errors="replace")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        raise StateError(
            f"The process that was to write {states:,} states ended with {code}: "
            f"{reason or 'it was killed.'}"
        )

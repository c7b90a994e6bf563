"""What is sealed cannot be changed unnoticed, and keys rotate without losing or rewriting it."""

import base64
import random
import threading
from itertools import pairwise

import pytest

from forge_harness.drill.target import open_store
from forge_harness.state import NewState

ROUND = 1 << 20
CONTEXT = b"security suite"
FLIPS, CUTS = 400, 200
PIECES = 64
"""Places of 32 bytes, over all segments, that are looked at for a nonce used twice."""
FILES, READS = 4, 400
HEAD_CUTS = 104
"""Places a head is cut at: all of one of this length."""


@pytest.mark.forge_check("security.chunk_binding")
def test_chunk_binding(subject, evidence, forge_seed):
    """A sealed content opens as what was sealed, or not at all.

    Oracle: the plaintext. Attacks, at the segment boundaries the subject declares: every pair of
    segments swapped, every one dropped, repeated, or taken from another content of the same length
    under the same key; ends cut off or extended; bits flipped; another context. After AE security
    of the segment scheme (Hoang, Reyhanitabar, Rogaway, Vizar: nOAE2, CRYPTO 2015). A content that
    is one segment has none to move: its overhead is then the same for every length, as each further
    segment would bring a tag. No two contents share a keystream, sealed by one sealer or by two
    that start anew: under a nonce used twice the difference of the ciphertexts is that of the
    plaintexts (NIST SP 800-38D, 8).
    """
    sealer = subject.content_sealer()
    generator = random.Random(forge_seed)
    plain = generator.randbytes(3 * ROUND + 12_345)
    sealed = sealer.seal_bytes(plain, context=CONTEXT)
    other_plain = generator.randbytes(len(plain))
    other = sealer.seal_bytes(other_plain, context=CONTEXT)
    starts = sealer.segment_starts(len(sealed))
    evidence.at_least(
        "segments", len(starts), limit=1, unit="1", reason=f"declared of {len(plain)} bytes"
    )
    if len(starts) == 1:
        _expect_one_segment(sealer, plain, len(sealed) - len(plain), evidence)
    evidence.equal(
        "opens",
        sealer.unseal_bytes(sealed, context=CONTEXT) == plain,
        expected=True,
        reason="what was not attacked",
    )
    attacks = {
        **({"moved": _moved(sealed, other, starts)} if len(starts) > 1 else {}),
        "cut": _cut(sealed, starts, generator),
        "flipped": _flipped(sealed, generator),
    }
    for name, forged in attacks.items():
        tried, wrong = 0, []
        for what, content in forged:
            tried += 1
            if _opens_otherwise(sealer, content, CONTEXT, plain):
                wrong.append(what)
        evidence.record(f"{name}_tried", tried, unit="attacks", reason="forged sealed contents")
        reason = f"opened as something else: {', '.join(wrong[:3])}" if wrong else "none opened"
        evidence.equal(f"{name}_opened", len(wrong), expected=0, unit="attacks", reason=reason)
    _expect_no_keystream_twice(subject, evidence, (plain, sealed), (other_plain, other))
    evidence.equal(
        "other_context_refused",
        _refused(sealer, sealed, CONTEXT + b"!"),
        expected=True,
        reason="a content cannot stand in for another one's place",
    )


def _expect_one_segment(sealer, plain, overhead, evidence):
    """Holds a content that is declared to be one segment to having no parts."""
    shorter = plain[2 * ROUND :]
    evidence.equal(
        "overhead_by_length",
        overhead - (len(sealer.seal_bytes(shorter, context=CONTEXT)) - len(shorter)),
        expected=0,
        unit="B",
        reason=f"of {len(plain)} bytes against {len(shorter)}: one segment, one tag, and no part "
        "that could be moved",
    )


def _expect_no_keystream_twice(subject, evidence, first, second):
    """Holds two contents, as (plain, sealed), and the second sealed anew, to their own nonces."""
    (plain, sealed), (other_plain, other) = first, second
    restarted = subject.content_sealer().seal_bytes(other_plain, context=CONTEXT)
    shared = {
        "by one sealer": _shared_keystream(plain, other_plain, sealed, other),
        "by a second sealer": _shared_keystream(plain, other_plain, sealed, restarted),
    }
    evidence.equal(
        "keystreams_used_twice",
        sum(shared.values()),
        expected=0,
        unit="pieces",
        reason=f"of {2 * PIECES}: {', '.join(f'{n} {how}' for how, n in shared.items())}",
    )


def _shared_keystream(plain, other_plain, sealed, other):
    """Counts pieces whose two ciphertexts differ by exactly what the plaintexts differ by."""
    length = min(len(sealed), len(other))
    ciphers = _xor(sealed[:length], other[:length])
    plains = _xor(plain, other_plain)
    step = len(plains) // PIECES
    return sum(plains[i * step : i * step + 32] in ciphers for i in range(PIECES))


def _xor(one, two):
    return (int.from_bytes(one) ^ int.from_bytes(two)).to_bytes(len(one))


def _moved(sealed, other, starts):
    bounds = [*starts, len(sealed)]
    parts = [sealed[a:b] for a, b in pairwise(bounds)]
    theirs = [other[a:b] for a, b in pairwise(bounds)]
    head = sealed[: starts[0]]
    for i in range(len(parts)):
        yield f"segment {i} dropped", head + b"".join(parts[:i] + parts[i + 1 :])
        yield f"segment {i} repeated", head + b"".join([*parts[: i + 1], *parts[i:]])
        yield f"segment {i} spliced", head + b"".join([*parts[:i], theirs[i], *parts[i + 1 :]])
        for j in range(i):
            order = list(parts)
            order[i], order[j] = order[j], order[i]
            yield f"segments {j} and {i} swapped", head + b"".join(order)
    yield "another head", other[: starts[0]] + b"".join(parts)


def _cut(sealed, starts, generator):
    lengths = {0, 1, len(sealed) - 1, *starts, *(start - 1 for start in starts)}
    lengths |= {generator.randrange(len(sealed)) for _ in range(CUTS)}
    for length in sorted(lengths):
        yield f"cut to {length} bytes", sealed[:length]
    for more in (b"\0", sealed[starts[-1] :], bytes(100)):
        yield f"extended by {len(more)} bytes", sealed + more


def _flipped(sealed, generator):
    positions = [*range(0, 200), *(generator.randrange(len(sealed)) for _ in range(FLIPS))]
    for position in positions:
        forged = bytearray(sealed)
        forged[position] ^= 1 << generator.randrange(8)
        yield f"bit in byte {position} flipped", bytes(forged)


def _opens_otherwise(sealer, content, context, plain):
    try:
        return sealer.unseal_bytes(content, context=context) != plain
    except Exception:
        return False


def _refused(sealer, content, context):
    try:
        sealer.unseal_bytes(content, context=context)
    except Exception:
        return True
    return False


@pytest.mark.forge_check("security.key_rotation")
def test_key_rotation(subject, evidence, tmp_path, forge_seed):
    """Readers read on while every file changes its key; the files' contents are not rewritten.

    Oracles: the plaintexts; the bytes of the files before and after. Once the old keys are
    destroyed, rewrapped files open and one that was left out does not, whatever key its head is
    made to name: the old key was real.
    """
    sealer = subject.content_sealer()
    contents = {
        tmp_path / f"model-{index}": random.Random(forge_seed + index).randbytes(ROUND)
        for index in range(FILES)
    }
    for path, content in contents.items():
        path.write_bytes(sealer.seal_bytes(content))
    left_out = sealer.seal_bytes(b"left out of the rotation")
    before = {path: path.read_bytes() for path in contents}
    with _Readers(sealer, contents) as readers:
        rotations = 0
        while readers.fewest() < READS and not readers.failures:
            subject.rotate_seal_key()
            rotations += sum(sealer.rewrap_file(path) for path in contents)
    failed = readers.failures[0] if readers.failures else "none"
    evidence.record("rotations", rotations, unit="files", reason="put under a newer key meanwhile")
    evidence.record("reads", sum(readers.reads), unit="reads", reason="by two threads meanwhile")
    evidence.equal(
        "failed_reads", len(readers.failures), expected=0, unit="reads", reason=f"first: {failed}"
    )
    changed = max(_differing(before[path], path.read_bytes()) for path in contents)
    evidence.at_most(
        "bytes_changed",
        changed,
        limit=sealer.head_bytes,
        unit="B",
        reason=f"of a file of {ROUND} bytes: its head",
    )
    subject.destroy_old_seal_keys()
    evidence.equal(
        "open_under_the_new_key",
        sum(sealer.unseal_bytes(p.read_bytes()) == content for p, content in contents.items()),
        expected=FILES,
        unit="files",
        reason="after the old keys were destroyed",
    )
    evidence.equal(
        "old_key_gone",
        _refused(sealer, left_out, b""),
        expected=True,
        reason="what was left under a destroyed key stays closed",
    )
    opened, tried = _opened_by_another_key(sealer, left_out, b"left out of the rotation")
    evidence.record("heads_tried", tried, unit="heads", reason="of the old content, parts replaced")
    evidence.equal(
        "opened_by_another_key",
        opened,
        expected=0,
        unit="heads",
        reason="the old content under a head that names the new key: the key opens, not its name",
    )


def _opened_by_another_key(sealer, old, content):
    """Puts every stretch of a head under the new key into the head of what the old one sealed.

    Where a key's name and what it wraps lie is the format's; one of the stretches is the name.
    """
    size = sealer.head_bytes
    new = sealer.seal_bytes(content)
    step = max(1, size // HEAD_CUTS)
    stretches = [(i, j) for j in range(0, size + 1, step) for i in range(0, j, step)]
    forged = (old[:i] + new[i:j] + old[j:] for i, j in stretches)
    opened = sum(_opens_as(sealer, each, content) for each in forged if each[:size] != new[:size])
    return opened, len(stretches)


def _opens_as(sealer, sealed, content):
    try:
        return sealer.unseal_bytes(sealed) == content
    except Exception:
        # How a subject's sealer refuses is its own; that it opens what is whole is held above.
        return False


class _Readers:
    """Two threads that read the files over and over and compare."""

    def __init__(self, sealer, contents):
        self.failures, self.reads = [], [0, 0]
        self._done = threading.Event()
        arguments = [(sealer, contents, index) for index in range(2)]
        self._threads = [threading.Thread(target=self._read, args=each) for each in arguments]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        for thread in self._threads:
            thread.join()

    def fewest(self):
        return min(self.reads)

    def _read(self, sealer, contents, index):
        while not self._done.is_set():
            for path, content in contents.items():
                try:
                    if sealer.unseal_bytes(path.read_bytes()) != content:
                        self.failures.append(f"{path.name} read as something else")
                except Exception as error:
                    self.failures.append(f"{path.name}: {error}")
                self.reads[index] += 1
            if self.failures:
                return


def _differing(before, after):
    return abs(len(before) - len(after)) + sum(a != b for a, b in zip(before, after, strict=False))


@pytest.mark.forge_check("security.encryption_at_rest")
def test_encryption_at_rest(subject, evidence, tmp_path, forge_seed):
    """Nothing of a content can be read from a sealed store; every file is sealed or known plain.

    Oracle: bytes that occur in the contents and nowhere else, looked for in every file, as they are
    and in hexadecimal and base64. Contents of both kinds, within the index and in files; one
    committed twice, one removed, one collected. Without the key nothing is returned. Plain are the
    files of our own store that hold no content, and what `StoreSpec.plaintext` adds to them.
    """
    spec = subject.state_store()
    generator = random.Random(forge_seed)
    needles = [generator.randbytes(24) for _ in range(4)]
    small, large, gone, again = (needle * 40 for needle in needles)
    large *= 500
    root = tmp_path / "store"
    sealer = subject.content_sealer()
    with open_store(spec.opener, root, sealer=sealer) as store:
        for name, content in (("small", small), ("large", large), ("gone", gone * 500)):
            store.commit([_new_state(name, content)])
        store.commit([_new_state("again", again), _new_state("small", small)])
        store.remove("phase5", "gone")
        store.collect(retain=1, grace_s=0.0)
        read = [store.read(store.get("phase5", name)) for name in ("small", "large", "again")]
    evidence.equal("read_back", read == [small, large, again], expected=True, reason="with the key")
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    leaks = [path.name for path in files if _holds_any(path.read_bytes(), needles)]
    evidence.equal(
        "files_with_plaintext",
        len(leaks),
        expected=0,
        unit="files",
        reason=f"of {len(files)}: {', '.join(leaks) or 'none'}",
    )
    plain = [p.relative_to(root).as_posix() for p in files if not sealer.is_sealed(p)]
    unknown = [name for name in plain if name not in PLAINTEXT | spec.plaintext]
    evidence.record("sealed_files", len(files) - len(plain), unit="files", reason="recognized")
    evidence.equal(
        "unlisted_plain_files",
        len(unknown),
        expected=0,
        unit="files",
        reason=f"names, kinds and digests only: {', '.join(unknown) or ', '.join(plain)}",
    )
    closed = _closed(spec.opener, root, ("small", "large", "again"))
    evidence.equal(
        "closed_without_key", closed, expected=3, unit="contents", reason="refused, not returned"
    )


PLAINTEXT = {"index.db", "index.db-wal", "index.db-shm", "lock", "head", "losses"}
"""Files of our store that are not sealed: names, kinds, metadata and digests are in the index."""


def _new_state(name, content):
    return NewState(phase="phase5", kind="model", name=name, files={"data": content})


def _holds_any(content, needles):
    forms = [form for n in needles for form in (n, n.hex().encode(), base64.b64encode(n)[:30])]
    return any(form in content for form in forms)


def _closed(opener, root, names):
    """How many contents a store gives to nobody without the key; it may refuse to open at all."""
    try:
        opened = open_store(opener, root)
    except Exception:
        return len(names)
    with opened as store:
        return sum(_unreadable(store, name) for name in names)


def _unreadable(store, name):
    try:
        store.read(store.get("phase5", name))
    except Exception:
        return True
    return False

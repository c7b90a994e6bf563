"""What is sealed cannot be changed unnoticed, and keys rotate without losing or rewriting it."""

import random
import threading
from itertools import pairwise

import pytest

ROUND = 1 << 20
CONTEXT = b"security suite"
FLIPS, CUTS = 400, 200
FILES, READS = 4, 400


@pytest.mark.forge_check("security.chunk_binding")
def test_chunk_binding(subject, evidence, forge_seed):
    """A sealed content opens as what was sealed, or not at all.

    Oracle: the plaintext. Attacks, at the segment boundaries the subject declares: every pair of
    segments swapped, every one dropped, repeated, or taken from another content of the same length
    under the same key; ends cut off or extended; bits flipped; another context. After AE security
    of the segment scheme (Hoang, Reyhanitabar, Rogaway, Vizar: nOAE2, CRYPTO 2015).
    """
    sealer = subject.content_sealer()
    generator = random.Random(forge_seed)
    plain = generator.randbytes(3 * ROUND + 12_345)
    sealed = sealer.seal_bytes(plain, context=CONTEXT)
    other = sealer.seal_bytes(generator.randbytes(len(plain)), context=CONTEXT)
    starts = sealer.segment_starts(len(sealed))
    evidence.at_least(
        "segments", len(starts), limit=3, unit="1", reason="fewer cannot be told from a whole file"
    )
    evidence.equal(
        "opens",
        sealer.unseal_bytes(sealed, context=CONTEXT) == plain,
        expected=True,
        reason="what was not attacked",
    )
    attacks = {
        "moved": _moved(sealed, other, starts),
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
    evidence.equal(
        "other_context_refused",
        _refused(sealer, sealed, CONTEXT + b"!"),
        expected=True,
        reason="a content cannot stand in for another one's place",
    )


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
    destroyed, rewrapped files open and one that was left out does not: the old key was real.
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

"""Files from outside: read as data, or refused."""

import resource
import signal
import time
from contextlib import contextmanager

import pytest

from forge_harness.errors import ForgeError
from forge_harness.evidence import largest
from forge_harness.paths import fixtures_dir

from . import hostile

SOUND = ("native", "hf-packed-autobitlinear-tied", "gguf-tq2_0", "legacy-pt", "legacy-safetensors")
MEMORY_BYTES, SECONDS = 1 << 30, 20.0


@pytest.mark.forge_check("security.hostile_model_refused")
def test_hostile_model_refused(subject, evidence, tmp_path):
    """No file makes a reader run code, run out of memory or time, or leave its directory.

    Each hostile file is opened and read whole, with 1 GiB of memory over what is in use and 20
    seconds; a payload that runs leaves a mark. Oracle: the mark, the limits, no file that appears
    or is gone outside the place of the file, and that the same call reads a sound file: of five
    formats those that the subject knows, and the others are refused.
    """
    sound = {name: _outcome(subject, fixtures_dir() / "checkpoints" / name) for name in SOUND}
    read = [name for name, outcome in sound.items() if outcome == "read"]
    unread = [name for name in SOUND if name not in read]
    evidence.at_least(
        "sound_files_read",
        len(read),
        limit=1,
        unit="files",
        reason=f"not read: {', '.join(unread)}" if unread else "one of each format",
    )
    canary, outside = tmp_path / "ran", tmp_path / "outside.safetensors"
    outside.write_bytes(
        (fixtures_dir() / "checkpoints/legacy-safetensors-bare/weights.safetensors").read_bytes()
    )
    (tmp_path / "files").mkdir()
    outcomes, slowest, ran, left = {}, 0.0, [], []
    for name, path in hostile.files(tmp_path / "files", canary, outside):
        before = _outside(tmp_path, path)
        started = time.monotonic()
        outcomes[name] = _outcome(subject, path)
        slowest = largest((slowest, time.monotonic() - started))
        if canary.exists():
            ran.append(name)
            canary.unlink()
        elif _outside(tmp_path, path) != before:
            left.append(name)
    evidence.record("files", len(outcomes), unit="files", reason="made to harm")
    evidence.record("slowest", slowest, unit="s", reason="of one refusal")
    evidence.equal(
        "executed",
        len(ran),
        expected=0,
        unit="files",
        reason=", ".join(ran[:3]) or "no payload ran",
    )
    evidence.equal(
        "written_outside",
        len(left),
        expected=0,
        unit="files",
        reason=", ".join(left[:3]) or "nothing outside the places of the files was touched",
    )
    outcomes |= {f"sound {name}": outcome for name, outcome in sound.items() if name in unread}
    for what in ("read", "overran", "crashed"):
        names = [name for name, outcome in outcomes.items() if outcome == what]
        evidence.equal(
            what, len(names), expected=0, unit="files", reason=", ".join(names[:3]) or "none"
        )


def _outside(top, path):
    """Sizes of all files below a directory that are not in the place of one hostile file."""
    place = path if path.is_dir() else path.parent
    found = (each for each in top.rglob("*") if place not in (each, *each.parents))
    return {each: each.lstat().st_size for each in found if not each.is_dir()}


def _outcome(subject, path):
    """How reading a file ends: read, refused, overran (memory, time, stack) or crashed."""
    try:
        with _limited():
            subject.read_checkpoint(path)
    except (MemoryError, TimeoutError, RecursionError):
        return "overran"
    except ForgeError:
        return "refused"
    except Exception:
        return "crashed"
    return "read"


@contextmanager
def _limited():
    """Bounds memory and time of the block; for the main thread."""

    def stop(*_):
        raise TimeoutError(f"over {SECONDS:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    left = signal.setitimer(signal.ITIMER_REAL, SECONDS)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as stream:
        used = int(stream.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, *left)
        signal.signal(signal.SIGALRM, before)

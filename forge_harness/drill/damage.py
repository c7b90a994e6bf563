"""Campaigns `bit_flips` and `swaps`: files that are not what was written.

A quiet store, and one whose writer was killed so that its write-ahead log is full, each with
several generations, are copied, damaged in one place, opened and read. What comes back is judged
against the bytes that were committed:

- *harmless*: everything reads back right and nothing complains: the byte was of no use;
- *detected*: the store says so, on opening, on reading, or when it is verified;
- *silent*: something reads back wrong, or is missing, and nothing complains;
- *lost*: an earlier generation, whole, and nothing complains: SQLite takes a damaged tail of its
  log for a commit that was never finished, so a store has to remember elsewhere what it
  acknowledged. Or damaged content, reported, of which nothing is left to mend it from.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from forge_harness.drill import children, scenes, workload
from forge_harness.drill.children import session_of
from forge_harness.drill.tally import Finding, NotMeasured, Result, Tally
from forge_harness.drill.target import open_store
from forge_harness.drill.workload import View

_ROUNDS = 3
_SHAPE = "mixed"
_ROLLED_BACK = "an acknowledged commit is gone, and nothing complains"

Step = Callable[[int, int, str], None]
Harm = Callable[[Path], str]
"""Damages a store in place and returns what it did."""


@dataclass(frozen=True, slots=True)
class Patient:
    """A store to damage copies of."""

    name: str
    template: Path
    shown: View
    earlier: tuple[View, ...]
    """What it showed at earlier generations, and before the first."""
    old: Path
    """The same store two commits earlier."""


def flip_bits(tally: Tally, opener: str, *, trials: int, tell: Step) -> None:
    """Flips one bit a trial, in contents, index and log in turn, and counts what is found.

    Args:
        tally: Takes the findings.
        opener: What opens the store.
        trials: Flips.
        tell: Progress.
    """
    generator = random.Random(tally.seed)
    with scenes.workspace() as workspace:
        patients = _patients(workspace, opener, tally.seed)
        for index in range(trials):
            patient = patients[index % len(patients)]
            kinds = _kinds(patient.template)
            files = kinds[sorted(kinds)[index // len(patients) % len(kinds)]]
            file = files[generator.randrange(len(files))]
            _try(tally, opener, patient, workspace, _Flip(file, generator))
            tell(index + 1, trials, f"{patient.name} store, {file.name}")


def swap_files(tally: Tally, opener: str, *, limit: int, tell: Step) -> None:
    """Truncates, zeroes, lengthens, ages, removes and swaps files, and counts what is found.

    Each damaged store is collected as well, and mended: that must not have taken anything away.

    Args:
        tally: Takes the findings.
        opener: What opens the store.
        limit: Most trials; all of them when 0.
        tell: Progress.
    """
    generator = random.Random(tally.seed)
    with scenes.workspace() as workspace:
        harms = [
            (patient, harm)
            for patient in _patients(workspace, opener, tally.seed)
            for harm in _harms(patient)
        ]
        tally.points = len(harms)
        if limit and limit < len(harms):
            harms = [harms[i] for i in sorted(generator.sample(range(len(harms)), limit))]
        tally.points_tried = len(harms)
        for index, (patient, harm) in enumerate(harms):
            what = _try(tally, opener, patient, workspace, harm, collect=True)
            tell(index + 1, len(harms), what)


def _try(
    tally: Tally,
    opener: str,
    patient: Patient,
    workspace: Path,
    harm: Harm,
    *,
    collect: bool = False,
) -> str:
    root = scenes.fresh(patient.template, workspace / "store")
    what = f"{patient.name} store, {harm(root)}"
    harmed = _harmed(patient.template, root) if collect else []
    struck = _digests(root / "objects")
    finding = _look(opener, root, patient)
    if finding.result is Result.DETECTED and struck - _digests(root):
        finding = Finding(result=Result.LOST, message="what was left of a content was deleted")
    if collect and finding.result in (Result.DETECTED, Result.HARMLESS):
        finding = _collected(opener, root, patient, harmed) or finding
    if finding.message == _ROLLED_BACK:
        tally.details["rolled back"] += 1
    tally.add(finding, where=what)
    return what


def _harmed(template: Path, root: Path) -> list[Path]:
    """Files that are not what they were, or are gone; relative to the root."""
    files = [path.relative_to(template) for path in template.rglob("*") if path.is_file()]
    return [
        file
        for file in files
        if not (root / file).exists()
        or (root / file).read_bytes() != (template / file).read_bytes()
    ]


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _collected(opener: str, root: Path, patient: Patient, harmed: Sequence[Path]) -> Finding | None:
    """Collects in the damaged store, mends it from a copy, and looks for what that took away.

    A store that does not know what it needs must not collect. What is mended is what was harmed:
    a content alone, and of index, log and whatever else lies at the top all of it.
    """
    with contextlib.suppress(Exception), open_store(opener, root) as store:
        store.collect(grace_s=0.0)
    if any(len(file.parts) == 1 for file in harmed):
        for path in root.iterdir():
            if path.is_file():
                path.unlink()
        harmed = [path.relative_to(patient.template) for path in patient.template.iterdir()]
    for file in harmed:
        if (patient.template / file).is_file():
            (root / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(patient.template / file, root / file)
    message = "what it mended shows something else"
    try:
        with open_store(opener, root) as store:
            for number, view in enumerate((*patient.earlier, patient.shown)):
                if number and workload.seen(store, generation=number) != view:
                    break
            else:
                return None
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    return Finding(
        result=Result.LOST,
        message=f"collected while it was damaged, and mended from a copy afterwards: {message}",
    )


def _digests(root: Path) -> set[str]:
    """Digests of all files below a directory, wherever they are."""
    return {workload.digest(path.read_bytes()) for path in root.rglob("*") if path.is_file()}


def _look(opener: str, root: Path, patient: Patient) -> Finding:
    try:
        with open_store(opener, root) as store:
            shown, unread = {}, 0
            for state in store.list():
                for file in state.files:
                    try:
                        content = store.read(state, file)
                    except Exception:
                        unread += 1
                    else:
                        shown[f"{state.phase}/{state.name}/{file}"] = workload.digest(content)
            said = bool(store.verify(deep=True).problems)
    except Exception as error:
        return Finding(result=Result.DETECTED, message=f"{type(error).__name__}: {error}")
    wrong = [key for key, digest in shown.items() if digest not in _once(patient, key)]
    if wrong:
        return Finding(result=Result.SILENT, message=f"{wrong[0]} reads back wrong")
    if unread or said:
        return Finding(result=Result.DETECTED)
    if shown == patient.shown:
        return Finding(result=Result.HARMLESS)
    if shown in patient.earlier:
        return Finding(result=Result.LOST, message=_ROLLED_BACK)
    gone = sorted(patient.shown.keys() - shown.keys())
    return Finding(result=Result.SILENT, message=f"{(gone or ['something'])[0]} is not what it was")


def _once(patient: Patient, key: str) -> set[str]:
    """Digests that a file ever had in this store."""
    return {view[key] for view in (patient.shown, *patient.earlier) if key in view}


def _patients(workspace: Path, opener: str, seed: int) -> list[Patient]:
    quiet, old = workspace / "quiet", workspace / "old"
    with open_store(opener, quiet) as store:
        for round_ in range(_ROUNDS):
            if round_ == 1:
                scenes.fresh(quiet, old)
            store.commit(workload.states(seed, round_, _SHAPE), note=f"round {round_}")
    views = [workload.view(seed, round_, _SHAPE) for round_ in range(-1, 2 * _ROUNDS)]
    busy, newest = _killed_writer(workspace, quiet, opener, seed)
    return [
        Patient("quiet", quiet, views[_ROUNDS], tuple(views[:_ROUNDS]), old),
        Patient("killed", busy, views[newest + 1], tuple(views[: newest + 1]), quiet),
    ]


def _killed_writer(workspace: Path, quiet: Path, opener: str, seed: int) -> tuple[Path, int]:
    """A store whose last commits are in its write-ahead log only, as a kill leaves it."""
    busy = scenes.fresh(quiet, workspace / "killed")
    command = children.writer(
        busy, opener, seed=seed, first=_ROUNDS, rounds=_ROUNDS, shape=_SHAPE, linger=True
    )
    with children.killed_at_end(command) as child:
        assert child.stdout is not None
        output = b""
        while b"done\n" not in output:
            if not (line := child.stdout.readline()):
                break
            output += line
        child.send_signal(signal.SIGKILL)
        child.stdout.read()
    session = session_of(output, base=_ROUNDS - 1)
    if len(session.acked) != _ROUNDS:
        raise NotMeasured(f"the store to damage cannot be made: {session.errors}")
    return busy, session.last_acked


def _kinds(root: Path) -> dict[str, list[Path]]:
    """Files worth damaging, by what they are, relative to the root."""
    kinds: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*")):
        # SQLite makes its shared memory anew from the log; nothing is read from an old one.
        if path.is_file() and path.stat().st_size and not path.name.endswith("-shm"):
            inside = path.relative_to(root)
            kind = inside.parts[0] if len(inside.parts) > 1 else inside.name
            kinds.setdefault(kind, []).append(inside)
    return kinds


@dataclass(frozen=True, slots=True)
class _Flip:
    file: Path
    generator: random.Random

    def __call__(self, root: Path) -> str:
        path = root / self.file
        content = bytearray(path.read_bytes())
        at = self._place(content)
        bit = self.generator.randrange(8)
        content[at] ^= 1 << bit
        path.write_bytes(content)
        return f"bit {bit} of byte {at} of {self.file} flipped"

    def _place(self, content: bytearray) -> int:
        """Any byte, or as often one that is in use: most of an index is empty pages."""
        for _ in range(100 if self.generator.random() < 0.5 else 1):
            at = self.generator.randrange(len(content))
            if content[at]:
                break
        return at


@dataclass(frozen=True, slots=True)
class _Rewrite:
    """Writes other content into a file."""

    file: Path
    what: str
    change: Callable[[bytes], bytes]

    def __call__(self, root: Path) -> str:
        path = root / self.file
        path.write_bytes(self.change(path.read_bytes()))
        return f"{self.file} {self.what}"


@dataclass(frozen=True, slots=True)
class _Swap:
    one: Path
    two: Path

    def __call__(self, root: Path) -> str:
        one, two = root / self.one, root / self.two
        first, second = one.read_bytes(), two.read_bytes()
        one.write_bytes(second)
        two.write_bytes(first)
        return f"{self.one} and {self.two} swapped"


@dataclass(frozen=True, slots=True)
class _Replace:
    """Puts back what a file was earlier, or takes it away where it did not exist then."""

    file: Path
    source: Path | None

    def __call__(self, root: Path) -> str:
        target = root / self.file
        if self.source is None or not (self.source / self.file).exists():
            target.unlink()
            return f"{self.file} removed"
        shutil.copyfile(self.source / self.file, target)
        return f"{self.file} as it was earlier"


def _harms(patient: Patient) -> Iterator[Harm]:
    kinds = _kinds(patient.template)
    files = [file for kind in kinds.values() for file in kind]
    for file in files:
        size = (patient.template / file).stat().st_size
        for length in _lengths(size):
            yield _Rewrite(file, f"cut to {length} of {size} B", _cut_to(length))
        for start, end in _spans(size):
            yield _Rewrite(file, f"bytes {start} to {end} zeroed", _zero(start, end))
        yield _Rewrite(file, "with 512 zero bytes at its end", lambda data: data + bytes(512))
        yield _Replace(file, None)
        before = patient.old / file
        if before.exists() and before.read_bytes() != (patient.template / file).read_bytes():
            yield _Replace(file, patient.old)
    contents = [file for kind, paths in kinds.items() if kind == "objects" for file in paths]
    yield from (_Swap(one, two) for one, two in _pairs(contents))
    yield from (_Swap(one, two) for one, two in _pairs([f for f in files if f not in contents]))


def _lengths(size: int) -> list[int]:
    """One of each class: nothing, a byte, a sector and a page less or more, half, all but one."""
    classes = {0, 1, 511, 512, 513, 4095, 4096, size // 2, size - 512, size - 1}
    return sorted(length for length in classes if 0 <= length < size)


def _spans(size: int) -> list[tuple[int, int]]:
    spans = {(0, size), (0, min(512, size)), (size // 2, min(size // 2 + 512, size))}
    return sorted(spans | {(max(0, size - 512), size)})


def _cut_to(length: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:length]


def _zero(start: int, end: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:start] + bytes(end - start) + data[end:]


def _pairs(files: Sequence[Path]) -> list[tuple[Path, Path]]:
    return list(itertools.pairwise(files))

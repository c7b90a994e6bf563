"""The run directory: what a run leaves behind, durable at every moment and sealed at the end.

    run.json        the record; state `running` until the run ends
    policy.json     what the score depends on besides the evidence
    items.jsonl     one line a finished pytest item, appended while the run goes on
    evidence/       files named by their sha256
    logs/           output of the processes that ran the checks
    study.json      the quality study's runs, where one was made
    reports.json    what rendered the reports, so that they can be rendered again
    manifest.json   path, size and sha256 of every other file; written last

Without a manifest, or with a file the manifest does not know, a directory never verifies.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from forge_harness.canonical import (
    canonical_json,
    digest_of,
    file_sha256,
    json_fault,
    read_canonical,
)
from forge_harness.durable import read_plain, sync_directory, write_durably
from forge_harness.errors import RunDirectoryError
from forge_harness.paths import resolved_path
from forge_harness.policy import Policy
from forge_harness.record import ItemRecord, RunRecord

RUN, POLICY, ITEMS, MANIFEST = "run.json", "policy.json", "items.jsonl", "manifest.json"
STUDY, LOGS = "study.json", "logs"
RESERVE = ".reserve"
RESERVE_BYTES = 4 << 20
"""Freed to write the final record when the disk is full. A record of 150 checks takes about
0.3 MB, its temporary copy as much again, reports up to 1 MB each."""
MANIFEST_SCHEMA_VERSION = "1.0"
NOT_PLAIN = "is not a plain file"
"""What is wrong with a link or device in a run directory."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_Model = TypeVar("_Model", bound=BaseModel)


class DiskFullError(RunDirectoryError):
    """The run directory takes no more bytes; what was measured so far is in it."""


@dataclass(frozen=True, slots=True)
class ManifestProblem:
    """One file of a run directory that is not what the manifest says."""

    path: str
    """Relative to the run directory."""
    what: str
    expected: str
    found: str

    def sentence(self) -> str:
        """Returns the problem as one line."""
        return f"{self.path}: {self.what}: expected {self.expected}, found {self.found}"


class RunDirectory:
    """An open run directory. Use `create` for a new run and `open_existing` to finish one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._items_end = 0

    @classmethod
    def create(cls, path: Path, *, record: RunRecord, policy: Policy) -> RunDirectory:
        """Makes the directory and writes the stub of the run durably.

        Args:
            path: Must not exist, or be an empty directory.
            record: State `running`, every check in scope not measured: what is true if
                nothing else is ever written.
            policy: What the run is scored with.

        Raises:
            RunDirectoryError: The path holds something already, or cannot be written to.
        """
        check_is_free(path)
        directory = cls(path)
        with _explained(path):
            path.mkdir(parents=True, exist_ok=True)
            _claim(path)
        try:
            with _explained(path):
                _reserve(path / RESERVE)
                directory.write_record(record, policy)
                (path / ITEMS).touch()
                sync_directory(path)
        except RunDirectoryError:
            directory._undo()
            raise
        return directory

    def _undo(self) -> None:
        """Removes a stub that could not be written, so that a second try does not meet it."""
        for name in (RESERVE, POLICY, RUN, ITEMS):
            with contextlib.suppress(OSError):
                (self.path / name).unlink()
        with contextlib.suppress(OSError):
            self.path.rmdir()

    @classmethod
    def open_existing(cls, path: Path) -> RunDirectory:
        """Returns the directory of a run that was created before.

        Raises:
            RunDirectoryError: There is no run.json in it.
        """
        if not (path / RUN).is_file():
            raise RunDirectoryError(f"{path} holds no {RUN}; expected the directory of a run.")
        directory = cls(path)
        with contextlib.suppress(FileNotFoundError):
            directory._items_end = (path / ITEMS).stat().st_size
        return directory

    @property
    def evidence(self) -> Path:
        """Where artifacts go."""
        return self.path / "evidence"

    def append_item(self, item: ItemRecord) -> None:
        """Appends one finished item; a kill of this process loses none that was appended.

        Raises:
            DiskFullError: Nothing of the item was kept.
        """
        line = canonical_json(item.model_dump(mode="json")) + b"\n"
        target = self.path / ITEMS
        try:
            with target.open("ab", buffering=0) as stream:
                written = stream.write(line)
                if written != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            # Half a line would make the whole file unreadable for line-wise tools.
            with contextlib.suppress(OSError):
                os.truncate(target, self._items_end)
            _refuse(self.path, error)
        self._items_end += len(line)

    def read_items(self) -> list[ItemRecord]:
        """Returns the items appended so far; a torn last line of a killed run is left out."""
        return read_items(self.path)

    def write_record(self, record: RunRecord, policy: Policy) -> None:
        """Replaces run.json and policy.json, each atomically and durably.

        Raises:
            RunDirectoryError: They cannot be written.
        """
        with _explained(self.path):
            write_durably(self.path / POLICY, canonical_json(policy.to_json()))
            write_durably(self.path / RUN, canonical_json(record.model_dump(mode="json")))

    def write_final(self, record: RunRecord, policy: Policy) -> None:
        """Frees the reserve and writes the final record. `seal` must follow.

        Raises:
            RunDirectoryError: They cannot be written.
        """
        self.release_reserve()
        self.write_record(record, policy)

    def release_reserve(self) -> None:
        """Gives the reserved bytes back to the file system."""
        with contextlib.suppress(FileNotFoundError):
            (self.path / RESERVE).unlink()

    def seal(self) -> None:
        """Writes the manifest over every file of the directory, last of all.

        Raises:
            RunDirectoryError: It cannot be written, or something is not a plain file.
        """
        self.release_reserve()
        with _explained(self.path):
            _remove_leftovers(self.path)
            # An earlier manifest stays until this one takes its place.
            names = (name for name in all_files(self.path) if name != MANIFEST)
            files = [_entry(self.path, name) for name in names]
            body: dict[str, Any] = {"schema_version": MANIFEST_SCHEMA_VERSION, "files": files}
            write_durably(self.path / MANIFEST, canonical_json({**body, "digest": digest_of(body)}))


def check_is_free(path: Path) -> None:
    """Refuses a path that holds anything, or lies within a run, which it would damage.

    Raises:
        RunDirectoryError: With what is there, or around it.
    """
    _refuse_content(path)
    if around := run_around(path):
        raise RunDirectoryError(
            f"Run directory {path} lies within a run ({around}), which would no longer verify; "
            "choose a place outside of it."
        )


def _refuse_content(path: Path) -> None:
    try:
        names = sorted(entry.name for entry in path.iterdir())
    except FileNotFoundError:
        return
    except NotADirectoryError:
        what = "a file" if path.is_file() else "below a file"
        raise RunDirectoryError(
            f"Run directory {path} is {what}; choose a directory that is new or empty."
        ) from None
    except OSError as error:
        raise RunDirectoryError(f"Run directory {path}: {error.strerror}.") from error
    if RUN in names:
        raise RunDirectoryError(
            f"Run directory {path} already holds a run; choose a new one, or delete it first."
        )
    if names:
        raise RunDirectoryError(
            f"Run directory {path} is not empty (it holds {names[0]!r}); choose one that is new "
            "or empty."
        )


def run_around(path: Path) -> Path | None:
    """Returns the run a path lies in, if any: a file its manifest does not name damages it."""
    place = resolved_path(path)
    runs = (p for p in (place, *place.parents) if (p / RUN).is_file() and (p / POLICY).is_file())
    return next(runs, None)


def read_record(path: Path) -> RunRecord:
    """Returns the record of a run directory.

    Raises:
        RunDirectoryError: There is none, or it does not fit the schema.
    """
    return _read_model(path / RUN, RunRecord)


def read_policy(path: Path) -> Policy:
    """Returns the policy a run was scored with.

    Raises:
        RunDirectoryError: There is none, or it does not fit the schema.
    """
    return _read_model(path / POLICY, Policy)


def read_items(path: Path) -> list[ItemRecord]:
    """Returns the items of a run directory; a torn last line is left out."""
    try:
        text = read_plain(path / ITEMS)
    except FileNotFoundError:
        return []
    whole = text[: text.rfind(b"\n") + 1]
    return [ItemRecord.model_validate(read_canonical(line)) for line in whole.splitlines()]


def left_files(path: Path) -> dict[str, str]:
    """Returns path -> "sha256:..." of study.json and of all files in logs/, where there are any."""
    return {
        name: f"sha256:{file_sha256(path / name)}"
        for name in all_files(path)
        if name == STUDY or name.startswith(f"{LOGS}/")
    }


def _read_model(file: Path, model: type[_Model]) -> _Model:
    try:
        return model.model_validate(read_canonical(read_plain(file)))
    except OSError as error:
        raise RunDirectoryError(
            f"Cannot read {file}: {error.strerror}; expected the directory of a run."
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise RunDirectoryError(
            f"{file} does not fit its schema: {where}: {first['msg']}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise RunDirectoryError(f"{file} is not JSON: {json_fault(error)}.") from error


def check_manifest(path: Path) -> list[ManifestProblem]:
    """Returns every file that is missing, extra or changed, and any damage of the manifest."""
    try:
        raw = read_plain(path / MANIFEST)
    except OSError as error:
        return [ManifestProblem(MANIFEST, "cannot be read", "a manifest", str(error.strerror))]
    problem = _manifest_damage(raw)
    if problem is not None:
        return [problem]
    stated = {entry["path"]: entry for entry in json.loads(raw)["files"]}
    return [*_odd_entries(path), *_differences(path, stated)]


def _manifest_damage(raw: bytes) -> ManifestProblem | None:
    """Returns what is wrong with the bytes of the manifest itself."""
    try:
        manifest = json.loads(raw)
        canonical = canonical_json(manifest)
    except (ValueError, RecursionError) as error:
        return ManifestProblem(MANIFEST, "is damaged", "canonical JSON", type(error).__name__)
    if canonical != raw or not isinstance(manifest, dict):
        return ManifestProblem(MANIFEST, "is damaged", "canonical JSON", "other bytes")
    stated = manifest.pop("digest", None)
    if stated != digest_of(manifest):
        return ManifestProblem(MANIFEST, "is damaged", digest_of(manifest), str(stated))
    if manifest.get("schema_version") != MANIFEST_SCHEMA_VERSION:
        version = str(manifest.get("schema_version"))
        return ManifestProblem(MANIFEST, "schema version", MANIFEST_SCHEMA_VERSION, version)
    if not _are_entries(manifest.get("files")):
        expected = "a list of files, each once, with path, bytes and sha256"
        return ManifestProblem(MANIFEST, "is damaged", expected, "other entries")
    return None


def _are_entries(files: object) -> bool:
    """Whether the files of a manifest can be read: a digest says who wrote it, not what."""
    if not isinstance(files, list):
        return False
    kinds = {"path": str, "bytes": int, "sha256": str}
    if not all(
        isinstance(entry, dict)
        and all(isinstance(entry.get(key), kind) for key, kind in kinds.items())
        for entry in files
    ):
        return False
    return len({entry["path"] for entry in files}) == len(files)


def _differences(path: Path, stated: dict[str, Any]) -> Iterator[ManifestProblem]:
    present = set(all_files(path)) - {MANIFEST}
    for name in sorted(present | stated.keys()):
        if name not in present:
            yield ManifestProblem(name, "is missing", f"sha256:{stated[name]['sha256']}", "no file")
        elif name not in stated:
            yield ManifestProblem(name, "is not in the manifest", "no file", "a file")
        else:
            found = _entry(path, name)
            if found["sha256"] != stated[name]["sha256"] or found["bytes"] != stated[name]["bytes"]:
                yield ManifestProblem(
                    name,
                    "was changed",
                    f"sha256:{stated[name]['sha256']}",
                    f"sha256:{found['sha256']}",
                )


def _walk(path: Path) -> Iterator[tuple[str, int]]:
    """Yields (relative path, mode) of everything but directories; links are not followed."""
    for root, directories, files in os.walk(path):
        for name in [*files, *(d for d in directories if (Path(root) / d).is_symlink())]:
            full = Path(root) / name
            yield full.relative_to(path).as_posix(), full.lstat().st_mode


def all_files(path: Path) -> list[str]:
    """Returns the path of every plain file of a run directory, relative to it, sorted."""
    return sorted(name for name, mode in _walk(path) if stat.S_ISREG(mode))


def _odd_entries(path: Path) -> list[ManifestProblem]:
    """Returns what is neither a file nor a directory: its content could change unseen."""
    return [
        ManifestProblem(name, NOT_PLAIN, "a plain file", "a link or device")
        for name, mode in _walk(path)
        if not stat.S_ISREG(mode)
    ]


def _entry(path: Path, name: str) -> dict[str, Any]:
    file = path / name
    return {"path": name, "bytes": file.stat().st_size, "sha256": file_sha256(file)}


def leftovers(path: Path) -> set[str]:
    """Returns the files of a run directory, relative to it, that killed writers left."""
    bases = {name: name.rpartition("/")[2] for name, _ in _walk(path)}
    return {n for n, base in bases.items() if base.startswith(".") and base.endswith(".partial")}


def _remove_leftovers(path: Path) -> None:
    """Removes what a killed writer left: our temporary names, which no reader looks at."""
    for name in leftovers(path):
        (path / name).unlink()
    odd = _odd_entries(path)
    if odd:
        raise RunDirectoryError(f"{path / odd[0].path} is a link or device; remove it.")


def _claim(path: Path) -> None:
    """Takes a directory for this run: of two that both found it free, one is refused.

    Raises:
        RunDirectoryError: Another run was faster.
    """
    try:
        (path / RESERVE).open("xb").close()
    except FileExistsError:
        raise RunDirectoryError(
            f"Run directory {path} was taken by another run at the same time; choose a new one."
        ) from None


def _reserve(path: Path) -> None:
    # Written, not only allocated: a sparse or compressed file reserves nothing.
    with path.open("wb") as stream:
        stream.write(os.urandom(RESERVE_BYTES))
        stream.flush()
        os.fsync(stream.fileno())


def is_full(error: OSError) -> bool:
    """Returns whether an error means that no more bytes are taken: disk, quota or file limit."""
    return error.errno in _FULL


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _refuse(path, error)


def _refuse(path: Path, error: OSError) -> NoReturn:
    if is_full(error):
        raise DiskFullError(
            f"No space left for run directory {path} ({error.strerror}); free some and run again."
        ) from error
    raise RunDirectoryError(
        f"Run directory {path}: cannot write {error.filename or path}: {error.strerror}."
    ) from error

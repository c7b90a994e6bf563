"""Puts the run directories of several CI jobs together as one."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from forge_harness.canonical import file_sha256
from forge_harness.durable import staged_directory
from forge_harness.errors import RunDirectoryError
from forge_harness.finish import DEFAULT_FORMATS, finish_run
from forge_harness.policy import Policy
from forge_harness.record import RunRecord
from forge_harness.rundir import LOGS, RUN, STUDY, RunDirectory, check_is_free, read_items
from forge_harness.scoring.merge import MergeSource, in_order, merge_records, shard_file

_KEPT = (LOGS, STUDY)
"""Of a source, beside its run.json: what its checks wrote elsewhere than into evidence/."""


def merge_runs(
    sources: Sequence[tuple[Path, RunRecord]],
    policy: Policy,
    out: Path,
    formats: Sequence[str] = DEFAULT_FORMATS,
) -> tuple[RunRecord, list[Path]]:
    """Writes one sealed run directory from several, which stay as they are.

    The merged run keeps the run.json of each source, and with it what `verify` needs to merge
    again; evidence is named by its digest and lies together.

    Args:
        sources: Sealed run directories that verify, and their records.
        policy: What all of them were scored with.
        out: New or empty directory.
        formats: Report formats.

    Returns:
        The merged record, and the report files.

    Raises:
        UsageError: The runs do not belong together (see `merge_records`).
        RunDirectoryError: `out` holds something, or takes no more bytes; nothing of it is left.
    """
    ordered = in_order(
        [
            MergeSource(str(path), record, f"sha256:{file_sha256(path / RUN)}")
            for path, record in sources
        ]
    )
    merged = merge_records(policy, ordered)
    check_is_free(out)
    with staged_directory(out) as stage:
        try:
            directory = RunDirectory.create(stage, record=merged, policy=policy)
            for place, source in enumerate(ordered):
                _take(directory, Path(source.name), place)
            written = finish_run(stage, merged, policy, formats)
        except RunDirectoryError as error:
            raise type(error)(str(error).replace(str(stage), str(out))) from error
    return merged, [out / path.relative_to(stage) for path in written]


def _take(directory: RunDirectory, source: Path, place: int) -> None:
    """Copies items, evidence, record and logs of one source."""
    for item in read_items(source):
        directory.append_item(item)
    for artifact in sorted(source.glob("evidence/sha256/*")):
        target = directory.evidence / "sha256" / artifact.name
        if not target.exists():
            _copy(artifact, target)
    record = directory.path / shard_file(place)
    _copy(source / RUN, record)
    for name in _KEPT:
        for file in (source / name, *sorted((source / name).rglob("*"))):
            if file.is_file():
                _copy(file, record.parent / file.relative_to(source))


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)

"""Directories a run writes to: space, durability, writability, text."""

import tempfile
from pathlib import Path

import pytest

from forge_harness.probes import filesystem
from forge_harness.protocols import BuildsModel

CHECKPOINTS_KEPT = 10
"""More than any session of the suites keeps."""
BYTES_A_PARAMETER = 12
"""fp32 latent weight and AdamW's two fp32 moments."""
RUN_DIRECTORY_BYTES = 64 << 20
"""A run directory is a few MB; evidence files of a full run stay below this."""


def run_directory(evidence, tmp_path):
    """Returns where this run keeps its files, or a temporary directory when it keeps none."""
    return evidence.artifact_dir.parent if evidence.artifact_dir is not None else tmp_path


@pytest.mark.forge_check("environment.disk_headroom")
def test_disk_headroom(subject, evidence, tmp_path):
    """Free space exceeds ten checkpoints of the largest model plus a run directory."""
    parameters = 0
    if isinstance(subject, BuildsModel):
        parameters = max(subject.model_spec(task).parameters for task in subject.tasks())
    needed = RUN_DIRECTORY_BYTES + CHECKPOINTS_KEPT * BYTES_A_PARAMETER * parameters
    for name, directory in (
        ("run_directory_free", run_directory(evidence, tmp_path)),
        ("temporary_free", Path(tempfile.gettempdir())),
    ):
        evidence.at_least(
            name,
            filesystem.free_bytes(directory),
            limit=needed,
            unit="B",
            reason=f"{CHECKPOINTS_KEPT} checkpoints of {parameters} parameters and a run directory",
        )


@pytest.mark.forge_check("environment.durable_filesystem")
def test_durable_filesystem(evidence, tmp_path):
    """fsync, atomic rename, directory fsync and exclusive locks hold where the run is kept.

    A checkpoint is acknowledged only after all four; on a network file system none of them means
    what it says between machines.
    """
    directory = run_directory(evidence, tmp_path)
    kind = filesystem.file_system_type(directory)
    evidence.record("file_system", kind, reason="type of the mount the run directory is on")
    evidence.equal(
        "network_file_system",
        filesystem.is_network(kind),
        expected=False,
        reason=f"{kind}: on a network one, rename and locks are not atomic between machines",
    )
    reading = filesystem.probe_durability(directory)
    for operation in ("fsync_file", "rename_replaces", "fsync_directory", "lock_excludes"):
        evidence.equal(
            operation,
            getattr(reading, operation),
            expected=True,
            reason=reading.error or "tried in the run directory",
        )


@pytest.mark.forge_check("environment.writable_paths")
def test_writable_paths(forge_config, evidence, tmp_path):
    """A file can be created in every directory the run writes to.

    Tried, not asked: `os.access` answers for permission bits, not for a read-only mount.
    """
    directories = [run_directory(evidence, tmp_path), Path(tempfile.gettempdir())]
    if forge_config.run.run_dir:
        directories.append(Path(forge_config.run.run_dir))
    refused = filesystem.unwritable(directories)
    evidence.record("directories", len(directories), reason="run directory and temporary files")
    evidence.equal(
        "unwritable",
        len(refused),
        expected=0,
        unit="directories",
        reason="; ".join(f"{path}: {why}" for path, why in refused) or "a file was made in each",
    )


@pytest.mark.forge_check("environment.text_encoding")
def test_text_encoding(evidence, tmp_path):
    """Text written with the interpreter's defaults is UTF-8, in content and in file names."""
    text = "β·W ≈ ±1 Größe 重み"
    try:
        found = filesystem.text_round_trip(tmp_path, text)
    except UnicodeError as error:
        found = type(error).__name__
    evidence.equal(
        "round_trip",
        found,
        expected=text,
        reason="default encoding of files and of the file system; set PYTHONUTF8=1",
    )

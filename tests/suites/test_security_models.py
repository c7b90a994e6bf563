"""Security, hostile_model_refused: red for readers that run, believe or follow what they read."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import pytest

from forge_harness.subject.reference import ReferenceSubject
from forge_harness.types import Outcome


def test_the_reference_passes(run_check):
    run = run_check("security.hostile_model_refused", ReferenceSubject())
    assert (run.outcome, run.reason) == (Outcome.PASS, "")


class Unpickles(ReferenceSubject):
    """Loads a checkpoint as `torch.load(weights_only=False)` did for years."""

    def read_checkpoint(self, path: Path) -> None:
        if path.suffix == ".pt" and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.endswith("data.pkl") and archive.getinfo(name).file_size < 1 << 20:
                        pickle.loads(archive.read(name))
        super().read_checkpoint(path)


class AllocatesWhatIsAnnounced(ReferenceSubject):
    """Makes room for what a header announces before it looks whether it is there."""

    def read_checkpoint(self, path: Path) -> None:
        if path.suffix == ".safetensors":
            announced = int.from_bytes(path.read_bytes()[:8], "little")
            bytearray(min(announced, 1 << 40))
        super().read_checkpoint(path)


class Crashes(ReferenceSubject):
    """An error of a library comes out as it is."""

    def read_checkpoint(self, path: Path) -> None:
        try:
            super().read_checkpoint(path)
        except Exception as error:
            raise KeyError("weight_map") from error


class FollowsLinks(ReferenceSubject):
    """Reads whatever an index or a link points to."""

    def read_checkpoint(self, path: Path) -> None:
        if path.is_dir() and (path / "model.safetensors").is_symlink():
            (path / "model.safetensors").read_bytes()
            return
        super().read_checkpoint(path)


class RefusesEverything(ReferenceSubject):
    """Safe, and of no use."""

    def read_checkpoint(self, path: Path) -> None:
        from forge_harness.errors import UsageError

        raise UsageError(f"{path} is refused.")


@pytest.mark.parametrize(
    ("subject", "reason"),
    [
        (Unpickles, "executed is"),
        (AllocatesWhatIsAnnounced, "overran is"),
        (Crashes, "crashed is"),
        (FollowsLinks, "read is 1"),
        (RefusesEverything, "sound_files_read is 0"),
    ],
)
def test_an_unsafe_reader_is_found(run_check, subject, reason):
    run = run_check("security.hostile_model_refused", subject())
    assert run.outcome is Outcome.FAIL
    assert reason in run.reason

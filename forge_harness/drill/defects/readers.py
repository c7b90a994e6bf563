"""Signatures that do not hold, and readers that run, believe or follow what they read."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import struct
import tempfile
import tracemalloc
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from forge_harness.canonical import file_sha256
from forge_harness.drill.defect import Defect, Stage
from forge_harness.errors import ForgeError, SignatureError, UsageError
from forge_harness.paths import fixtures_dir
from forge_harness.subject.reference import ReferenceSubject

_ANNOUNCED = 1 << 26
"""Bytes that a header of the observable announces."""


class Listing(ReferenceSubject):
    """A list of digests beside the package, which anybody can make."""

    def sign_package(self, directory: Path) -> Path:
        """See `SignsPackages.sign_package`."""
        target = directory.with_name("sums.json")
        target.write_text(json.dumps({"payload": _digests(directory), "signatures": []}))
        return target

    def check_package(self, directory: Path, signature: Path) -> None:
        """See `SignsPackages.check_package`."""
        if _digests(directory) != json.loads(signature.read_bytes())["payload"]:
            raise SignatureError("differs")


def _digests(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): file_sha256(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


class _Forgives(ReferenceSubject):
    """Passes over one kind of what is wrong with a package."""

    forgiven = ""

    def check_package(self, directory: Path, signature: Path) -> None:
        """See `SignsPackages.check_package`."""
        try:
            super().check_package(directory, signature)
        except SignatureError as error:
            if self.forgiven not in str(error):
                raise


class OverlooksAdded(_Forgives):
    """Checks the files that are listed, and no others."""

    forgiven = "was not signed"


class TrustsTheSignature(_Forgives):
    """Compares the files, and does not ask who signed."""

    forgiven = "pinned keys"


class ComparesNoFiles(_Forgives):
    """Verifies the signature over the digests, and does not compare the digests with the files."""

    forgiven = "is not what was signed"


class NeedsNoSignature(_Forgives):
    """A package without a signature passes, as a warning nobody reads."""

    forgiven = "There is no signature"


class Unpickles(ReferenceSubject):
    """Loads a checkpoint as `torch.load(weights_only=False)` did for years."""

    def read_checkpoint(self, path: Path) -> None:
        """See `ReadsCheckpoints.read_checkpoint`."""
        if path.suffix == ".pt" and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.endswith("data.pkl") and archive.getinfo(name).file_size < 1 << 20:
                        pickle.loads(archive.read(name))
        super().read_checkpoint(path)


class UnpicklesRaw(ReferenceSubject):
    """Loads archives safely, and falls back to a plain pickle for what is none."""

    def read_checkpoint(self, path: Path) -> None:
        """See `ReadsCheckpoints.read_checkpoint`."""
        try:
            super().read_checkpoint(path)
        except ForgeError:
            if path.suffix == ".bin":
                with contextlib.suppress(pickle.UnpicklingError):
                    pickle.loads(path.read_bytes())
            raise


class ExtractsArchives(ReferenceSubject):
    """Unpacks an archive beside itself before it looks into it, under the names in the archive."""

    def read_checkpoint(self, path: Path) -> None:
        """See `ReadsCheckpoints.read_checkpoint`."""
        if path.suffix == ".pt" and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    if info.file_size < 1 << 20:
                        target = path.parent / "unpacked" / info.filename
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(archive.read(info))
        super().read_checkpoint(path)


class AllocatesWhatIsAnnounced(ReferenceSubject):
    """Makes room for what a header announces before it looks whether it is there."""

    def read_checkpoint(self, path: Path) -> None:
        """See `ReadsCheckpoints.read_checkpoint`."""
        if path.suffix == ".safetensors":
            announced = int.from_bytes(path.read_bytes()[:8], "little")
            bytearray(min(announced, 1 << 40))
        super().read_checkpoint(path)


class Crashes(ReferenceSubject):
    """An error of a library comes out as it is."""

    def read_checkpoint(self, path: Path) -> None:
        """See `ReadsCheckpoints.read_checkpoint`."""
        try:
            super().read_checkpoint(path)
        except Exception as error:  # the defect: each refusal comes out as another error
            raise KeyError("weight_map") from error


class FollowsLinks(ReferenceSubject):
    """Reads whatever an index or a link points to."""

    def read_checkpoint(self, path: Path) -> None:
        """See `ReadsCheckpoints.read_checkpoint`."""
        if path.is_dir() and (path / "model.safetensors").is_symlink():
            (path / "model.safetensors").read_bytes()
            return
        super().read_checkpoint(path)


class RefusesEverything(ReferenceSubject):
    """Safe, and of no use."""

    def read_checkpoint(self, path: Path) -> None:
        """See `ReadsCheckpoints.read_checkpoint`."""
        raise UsageError(f"{path} is refused.")


class _Makes:
    """Pickles as the making of a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.mkdir, (self.path,)


def accepted(subject: Any) -> object:
    """Which of five packages is taken for signed: sound, added to, changed, unsigned, a stranger's.

    The stranger is another instance, with keys of its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "package"
        package.mkdir()
        (package / "weights").write_bytes(b"weights")
        signature = subject.sign_package(package)
        seen = [_is_taken(subject, package, signature)]
        (package / "more").write_text("more")
        seen.append(_is_taken(subject, package, signature))
        (package / "more").unlink()
        (package / "weights").write_bytes(b"others")
        seen.append(_is_taken(subject, package, signature))
        seen.append(_is_taken(subject, package, Path(folder) / "none"))
        elsewhere = shutil.copytree(package, Path(folder) / "elsewhere" / "package")
        return [*seen, _is_taken(subject, package, type(subject)().sign_package(elsewhere))]


def _is_taken(subject: Any, package: Path, signature: Path) -> bool:
    try:
        subject.check_package(package, signature)
    except Exception:  # whatever it refuses with: that it does is what is observed
        return False
    return True


def read(subject: Any) -> object:
    """How reading ends of a sound file, pickles, a lie about a length, and a link; what it left."""
    sound = fixtures_dir() / "checkpoints" / "native"
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "in" / "files"
        place.mkdir(parents=True)
        ran = Path(folder) / "ran"
        (place / "raw.bin").write_bytes(pickle.dumps(_Makes(ran / "raw"), protocol=2))
        with zipfile.ZipFile(place / "model.pt", "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(_Makes(ran / "zip"), protocol=2))
            archive.writestr("../../above", b"above")
        (place / "model.safetensors").write_bytes(struct.pack("<Q", _ANNOUNCED) + b"{}")
        linked = place / "linked"
        linked.mkdir()
        (linked / "config.json").write_text('{"model_type": "bitnet"}')
        (linked / "model.safetensors").symlink_to(place / "model.safetensors")
        ran.mkdir()
        files = (sound, place / "raw.bin", place / "model.pt", place / "model.safetensors", linked)
        ended = [_ending(subject, file) for file in files]
        left = sorted(p.name for p in (*ran.iterdir(), *ran.parent.iterdir(), *place.iterdir()))
        above = sorted(p.name for p in place.parent.iterdir())
    return ended, left, above


def _ending(subject: Any, path: Path) -> tuple[str, bool]:
    """How reading a file ends, and whether it took the memory that a header announces."""
    tracemalloc.start()
    try:
        subject.read_checkpoint(path)
    except ForgeError:
        ended = "refused"
    except Exception as error:  # how it ends is what is observed
        ended = type(error).__name__
    else:
        ended = "read"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return ended, peak > _ANNOUNCED // 2


_SEEDED = partial(Defect, stage=Stage.SECURITY, check="security.hostile_model_refused", alive=read)


_SIGNED = partial(_SEEDED, check="security.package_signature", alive=accepted)


DEFECTS: tuple[Defect, ...] = (
    _SIGNED(
        id="X10_list_of_digests",
        title="A package is signed by a list of digests that anybody can make",
        shows="somebody else's signature",
        subject=Listing,
        subtlety=2,
    ),
    _SIGNED(
        id="E04_added_files_pass",
        title="Files of a package that are not listed are not looked at",
        shows="a file added",
        subject=OverlooksAdded,
        subtlety=3,
        source="maziyarpanahi/openmed#1539",
    ),
    _SIGNED(
        id="X10_any_signer",
        title="The files are compared with the signature, and nobody asks who signed",
        shows="another payload",
        subject=TrustsTheSignature,
        subtlety=4,
        source="sigstore/sigstore-java#377",
    ),
    _SIGNED(
        id="X10_files_not_compared",
        title="The signature over the digests is verified, and no file is compared with its digest",
        shows="a bit flipped",
        subject=ComparesNoFiles,
        subtlety=4,
        source="sigstore/sigstore-python#1652",
    ),
    _SIGNED(
        id="E04_missing_signature_passes",
        title="A package whose signature is missing counts as verified",
        shows="no signature",
        subject=NeedsNoSignature,
        subtlety=3,
        source="AutoPTZ/autoptz#146",
    ),
    _SEEDED(
        id="X01_unpickles_archives",
        title="A checkpoint is unpickled with everything that a pickle may call",
        shows="executed is",
        subject=Unpickles,
        subtlety=3,
        source="microsoft/BitNet#421",
    ),
    _SEEDED(
        id="X01_unpickles_what_is_no_archive",
        title="What is no archive is unpickled as an old checkpoint",
        shows="executed is",
        subject=UnpicklesRaw,
        subtlety=4,
        source="microsoft/BitNet#421",
    ),
    _SEEDED(
        id="X02_extracts_above",
        title="An archive is unpacked under the names it gives, which may lie above its directory",
        shows="written_outside is",
        subject=ExtractsArchives,
        subtlety=3,
        source="mlflow/mlflow#21824",
    ),
    _SEEDED(
        id="X02_follows_links",
        title="A link out of the directory of a checkpoint is followed",
        shows="read is 1",
        subject=FollowsLinks,
        subtlety=3,
        source="PaddlePaddle/Paddle#76899",
    ),
    _SEEDED(
        id="reader_allocates_what_is_announced",
        title="Room is made for what a header announces, whether or not it is there",
        shows="overran is",
        subject=AllocatesWhatIsAnnounced,
        subtlety=3,
    ),
    _SEEDED(
        id="X13_reader_crashes",
        title="An error of a library comes out of a reader as it is",
        shows="crashed is",
        subject=Crashes,
        subtlety=2,
    ),
    _SEEDED(
        id="reader_refuses_everything",
        title="A reader refuses sound checkpoints too",
        shows="sound_files_read is 0",
        subject=RefusesEverything,
        subtlety=1,
    ),
)
"""Signatures and readers."""

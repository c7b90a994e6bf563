"""The baking manifest: every file of every package of a fleet, and totals anyone can recompute."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast, get_args

from forge_harness.canonical import canonical_json, file_sha256, read_canonical
from forge_harness.durable import write_durably
from forge_harness.errors import CheckpointError, DamagedCheckpointError
from forge_harness.formats.manifest import verify_manifest
from forge_harness.paths import resolved_path

from .readiness import DESCRIPTION, Status, is_name, present_fields

SCHEMA = "forge-baking/1"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BakedFile:
    """A file of a package, manifest included: path below it, bytes, sha256."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BakedPackage:
    """A package of the fleet.

    Attributes:
        name: As in its description; also its directory below the manifest.
        status: READY or NOT_READY, as assessed when it was exported.
        quality_score: Held-out accuracy; None when it was not measured.
        files: Every file.
    """

    name: str
    status: Status
    quality_score: float | None
    files: tuple[BakedFile, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class BakingManifest:
    """A fleet of packages."""

    packages: tuple[BakedPackage, ...]

    @property
    def ready(self) -> int:
        """How many are READY."""
        return sum(package.status == "READY" for package in self.packages)

    @property
    def total_bytes(self) -> int:
        """Bytes of all files of all packages."""
        return sum(package.bytes for package in self.packages)

    @property
    def quality_range(self) -> tuple[float, float] | None:
        """Lowest and highest quality score; None while one is not measured."""
        scores = [package.quality_score for package in self.packages]
        known = [score for score in scores if score is not None]
        return (min(known), max(known)) if known and len(known) == len(scores) else None

    def to_json(self) -> dict[str, Any]:
        """Returns packages and totals as JSON values."""
        quality = self.quality_range
        return {
            "schema": SCHEMA,
            "packages": [{**asdict(p), "bytes": p.bytes} for p in self.packages],
            "totals": {
                "packages": len(self.packages),
                "ready": self.ready,
                "bytes": self.total_bytes,
                "average_bytes": self.total_bytes // max(1, len(self.packages)),
                "quality_range": None if quality is None else list(quality),
            },
        }


def bake(packages: Sequence[Path], destination: Path) -> BakingManifest:
    """Reads every package and writes the manifest durably.

    Raises:
        CheckpointError: There is no package, two have one name, one is no export, or is not in a
            directory of its name beside the manifest.
        DamagedCheckpointError: A package is not what its own manifest says.
    """
    if not packages:
        raise CheckpointError("No package was named; a baking manifest is over one or more.")
    baked = tuple(_baked(package) for package in packages)
    names = [package.name for package in baked]
    for name in names:
        if names.count(name) > 1:
            raise CheckpointError(
                f"Two packages are named {name!r}; export one under another name."
            )
    for path, name in zip(packages, names, strict=True):
        expected = destination.parent / name
        if resolved_path(path) != resolved_path(expected):
            raise CheckpointError(
                f"Package {name!r} is at {str(path)!r}, and whoever reads the manifest looks for "
                f"it at {str(expected)!r}; move it there, or export it under another name."
            )
    manifest = BakingManifest(packages=tuple(sorted(baked, key=lambda p: p.name)))
    write_durably(destination, canonical_json(manifest.to_json()))
    return manifest


def read_baking_manifest(path: Path) -> BakingManifest:
    """Reads a manifest back; its totals must be those of its packages.

    Raises:
        DamagedCheckpointError: It is not a baking manifest: totals and packages disagree, two
            packages have one name, or one has a status, a score or a file that none can have.
    """
    try:
        stored = read_canonical(path.read_bytes())
        manifest = BakingManifest(
            packages=tuple(
                _described(
                    entry["name"],
                    entry["status"],
                    entry["quality_score"],
                    tuple(_file(file) for file in entry["files"]),
                )
                for entry in stored["packages"]
            )
        )
        if len({package.name for package in manifest.packages}) < len(manifest.packages):
            raise ValueError("two of its packages have one name")
        if canonical_json(manifest.to_json()) != canonical_json(stored):
            raise ValueError("its totals are not those of its packages")
        return manifest
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise DamagedCheckpointError(
            f"{path} is no sound baking manifest ({error}); bake it again.", path=str(path)
        ) from error


def _baked(package: Path) -> BakedPackage:
    verify_manifest(package)
    description = present_fields(package)[DESCRIPTION]
    try:
        return _described(
            description["name"],
            description["readiness"]["status"],
            description["quality_score"],
            tuple(
                BakedFile(
                    path=path.relative_to(package).as_posix(),
                    bytes=path.stat().st_size,
                    sha256=file_sha256(path),
                )
                for path in sorted(package.rglob("*"))
                if path.is_file()
            ),
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{package} is no export package ({DESCRIPTION} lacks {error}); export it first."
        ) from error


def _described(
    name: object, status: object, score: object, files: tuple[BakedFile, ...]
) -> BakedPackage:
    """Returns a package; raises TypeError over what none can have."""
    if not is_name(name) or status not in get_args(Status) or not _is_score(score):
        raise TypeError(f"a name, status or quality score: {name!r}, {status!r}, {score!r}")
    return BakedPackage(
        name=name,
        status=cast(Status, status),
        quality_score=cast("float | None", score),
        files=files,
    )


def _file(entry: Mapping[str, Any]) -> BakedFile:
    """Returns a file below its package; raises TypeError over what is none."""
    file = BakedFile(**entry)
    inside = isinstance(file.path, str) and all(map(is_name, file.path.split("/")))
    counted = type(file.bytes) is int and file.bytes >= 0
    if not (inside and counted and isinstance(file.sha256, str) and _SHA256.fullmatch(file.sha256)):
        raise TypeError(f"a path, bytes or sha256: {file.path!r}, {file.bytes!r}, {file.sha256!r}")
    return file


def _is_score(value: object) -> bool:
    """Whether a value is a share from 0 to 1, or None for one that was not measured."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (is_number and 0 <= cast(float, value) <= 1)

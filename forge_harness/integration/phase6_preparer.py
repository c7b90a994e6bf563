"""`Phase6Preparer` hands models to phase 6 (baking): packages, readiness, manifest, handoff."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from forge_harness import __version__
from forge_harness.canonical import canonical_json, tree_digest
from forge_harness.durable import staged_directory
from forge_harness.errors import CheckpointError, UsageError
from forge_harness.formats import FORMATS, ReadOptions, WriteOptions
from forge_harness.formats.convert import check_outside, convert
from forge_harness.formats.detect import open_checkpoint
from forge_harness.formats.manifest import verify_manifest, write_manifest
from forge_harness.formats.native import open_native, write_native
from forge_harness.formats.sizes import sizes_of
from forge_harness.paths import resolved_path
from forge_harness.policy import Policy
from forge_harness.training import data_digest, evaluate_package
from forge_harness.training.start import TASK_OF, builder_of

from .baking_manifest import BakingManifest, bake
from .readiness import (
    DESCRIPTION,
    LABELS,
    LINEAGE,
    METRICS,
    REQUIRED,
    TOKENIZER,
    Criterion,
    Evaluate,
    Readiness,
    assess,
    is_name,
    model_bytes,
    present_fields,
)

SCHEMA = "forge-export/1"


class NotReadyError(CheckpointError):
    """A package does not meet every criterion; nothing was written."""

    def __init__(self, message: str, readiness: Readiness) -> None:
        super().__init__(message)
        self.readiness = readiness


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedPackage:
    """A package that was written.

    Attributes:
        path: Its directory.
        name: Its name.
        readiness: Every criterion.
        bytes: Of all its files.
        digest: `sha256:<hex>` over them.
    """

    path: Path
    name: str
    readiness: Readiness
    bytes: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Handoff:
    """A package that reached phase 6.

    Attributes:
        path: Where it is now.
        digest: Of its files, the same on both sides.
        state: "handed off", or "already there" when the same package was there.
    """

    path: Path
    digest: str
    state: Literal["handed off", "already there"]


class Phase6Preparer:
    """Prepares packages for phase 6 and hands them over.

    Args:
        evaluate: Held-out metrics of (task, package); None: the reference data.
        data: Digest of a task's data; None: of the reference data.
        classes: Whether a task tells classes apart, which have a limit of accuracy; None: unless
            the model is of a family of language models.
        policy: Whose gates are the readiness criteria; None: the shipped one.
    """

    def __init__(
        self,
        *,
        evaluate: Evaluate | None = None,
        data: Callable[[str], str] | None = None,
        classes: Callable[[str], bool] | None = None,
        policy: Policy | None = None,
    ) -> None:
        self._evaluate = evaluate or evaluate_shipped
        self._data = data or data_digest
        self._classes = classes
        self._policy = policy

    def export(
        self,
        source: Path,
        destination: Path,
        *,
        name: str | None = None,
        task: str | None = None,
        lineage: Mapping[str, Any] | None = None,
        formats: Sequence[str] = (),
        read: ReadOptions | None = None,
        allow_not_ready: bool = False,
    ) -> ExportedPackage:
        """Writes an export package; the same source gives the same bytes.

        Args:
            source: Checkpoint in any readable format; of a `train` directory, its package.
            destination: New directory.
            name: Of the package, and of its directory at phase 6; None: the destination's.
            task: Whose held-out data it is measured on, where the source names none.
            lineage: More about where it comes from (parent digest, recipe, commit), beside what is
                found out here: source, digests, task, version.
            formats: Further formats to put beside it, each in a directory of its name.
            read: What the source's files cannot say.
            allow_not_ready: Whether a package that is not ready is written all the same.

        Raises:
            NotReadyError: It is not ready. Nothing was written.
            CheckpointError: The source cannot be read, the name is none of a directory, what is
                told is no JSON or is found out here, something is at the destination, or that lies
                inside the source.
            DamagedCheckpointError: The source does not hold what it claims to hold.
        """
        origin = origin_of(source)
        check_outside(origin, destination)
        title = name or resolved_path(destination).name
        _check_told(title, formats, lineage or {})
        try:
            with staged_directory(destination) as stage:
                self._fill(origin, stage, task, dict(lineage or {}), read)
                readiness = self._described(stage, title, formats)
                if readiness.status != "READY" and not allow_not_ready:
                    raise NotReadyError(_refusal(title, readiness), readiness)
        except FileExistsError as error:
            raise CheckpointError(
                f"{str(destination)!r} exists and is not an empty directory; name a new one."
            ) from error
        except OSError as error:
            raise CheckpointError(
                f"Cannot write {str(destination)!r}: {error.strerror or error}. Nothing was "
                "written."
            ) from error
        return ExportedPackage(
            path=destination,
            name=title,
            readiness=readiness,
            bytes=sum(p.stat().st_size for p in destination.rglob("*") if p.is_file()),
            digest=tree_digest(destination),
        )

    def assess(self, package: Path) -> Readiness:
        """Judges a package from its files alone; see `readiness.assess`."""
        return assess(package, self._evaluate, self._policy, classes=self._classes)

    def bake_manifest(self, packages: Sequence[Path], destination: Path) -> BakingManifest:
        """Writes the manifest of a fleet; see `baking_manifest.bake`."""
        return bake(packages, destination)

    def hand_off(self, package: Path, inbox: Path) -> Handoff:
        """Copies a package into phase 6's directory, whole or not at all.

        Raises:
            NotReadyError: A criterion is not met, whether or not the package is there already.
            CheckpointError: Another package of that name is there, the directory lies inside the
                package, or the copy failed. Both sides are as they were.
            DamagedCheckpointError: The package, or the same one that is there, is not what its
                manifest says.
        """
        verify_manifest(package)
        digest = tree_digest(package)
        name = present_fields(package)[DESCRIPTION].get("name")
        if not is_name(name):
            raise CheckpointError(
                f"{package} has no usable name in {DESCRIPTION}; export it again."
            )
        check_outside(package, inbox)
        target = inbox / name
        is_there = _is_there(target, digest)
        # What is there already may have come under other limits, or by hand.
        readiness = self.assess(package)
        if readiness.status != "READY":
            raise NotReadyError(_refusal(name, readiness), readiness)
        if is_there:
            return Handoff(path=target, digest=digest, state="already there")
        try:
            with staged_directory(target) as stage:
                shutil.copytree(package, stage, dirs_exist_ok=True)
                if tree_digest(stage) != digest:
                    raise CheckpointError(f"The copy of {name!r} differs; nothing was handed off.")
        except OSError as error:
            raise CheckpointError(
                f"Cannot hand off {name!r} to {str(inbox)!r}: {error.strerror or error}. Nothing "
                "was handed off."
            ) from error
        return Handoff(path=target, digest=digest, state="handed off")

    def verify_handoff(self, inbox: Path, name: str, digest: str) -> None:
        """Raises unless the package that arrived is the one that was sent.

        Raises:
            CheckpointError: It is not there, or another one.
            DamagedCheckpointError: It is not what its manifest says.
        """
        target = inbox / name
        if not target.is_dir():
            raise CheckpointError(f"{str(target)!r} is not there; hand the package off again.")
        verify_manifest(target)
        if tree_digest(target) != digest:
            raise CheckpointError(f"{str(target)!r} is another package than was handed off.")

    def _fill(
        self,
        source: Path,
        stage: Path,
        told: str | None,
        lineage: dict[str, Any],
        read: ReadOptions | None,
    ) -> None:
        """Writes model, metrics, lineage and labels."""
        with open_checkpoint(source, read) as opened:
            write_native(opened, stage, WriteOptions(), extras=opened.extras)
            family, extras = opened.model.family, opened.extras
        task = _task(source, extras, told, family)
        facts = {
            "source": source.name,
            "source_digest": tree_digest(source),
            "task": task,
            "data_digest": self._digest_of(task, told) if task else None,
            "harness_version": __version__,
            **{key: extras[key] for key in ("seed", "step", "recipe") if key in extras},
            **lineage,
        }
        _write(stage / LINEAGE, facts)
        if family == "digits":
            _write(stage / LABELS, {"classes": [str(digit) for digit in range(10)]})
        elif family == "byte-lm":
            _write(stage / TOKENIZER, {"type": "byte", "vocabulary": 256})
        write_manifest(stage)
        measured: Mapping[str, float] = {}
        if task:
            try:
                measured = self._evaluate(task, stage)
            except (CheckpointError, UsageError, ValueError, KeyError):
                measured = {}
        units = {"accuracy": "1", "loss": "nats"}
        # JSON has no NaN; what is not finite is not recorded, and the package is not ready.
        finite = {k: v for k, v in measured.items() if math.isfinite(v)}
        metrics = {k: {"value": v, "unit": units.get(k, "1")} for k, v in finite.items()}
        _write(stage / METRICS, metrics)

    def _digest_of(self, task: str, told: str | None) -> str | None:
        """Returns the digest of a task's data; None where its name is recorded, and no data here.

        Raises:
            UsageError: The task was told.
        """
        try:
            return self._data(task)
        except UsageError:
            if task == told:
                raise
            return None

    def _described(self, stage: Path, title: str, formats: Sequence[str]) -> Readiness:
        """Judges the package, writes its description and its manifest."""
        write_manifest(stage)
        readiness = assess(
            stage, self._evaluate, self._policy, described=False, classes=self._classes
        )
        with open_native(stage, ReadOptions()) as opened:
            sizes = sizes_of(stage, opened.infos.values())
            family = opened.model.family
        package_bytes = model_bytes(stage)
        _write_beside(stage, formats)
        description = {
            "schema": SCHEMA,
            "name": title,
            "task": present_fields(stage)[LINEAGE].get("task"),
            "family": family,
            "parameters": sizes.ternary_weights + sizes.plain_weights,
            "ternary_parameters": sizes.ternary_weights,
            "quality_score": readiness.quality_score,
            "metadata_completeness": readiness.completeness,
            "readiness": readiness.to_json(),
            "compression": {
                "package_bytes": package_bytes,
                "fp32_bytes": sizes.fp32_bytes,
                "bf16_bytes": sizes.bf16_bytes,
                "fp32_ratio": sizes.fp32_bytes / package_bytes,
                "bf16_ratio": sizes.bf16_bytes / package_bytes,
            },
        }
        _write(stage / DESCRIPTION, description)
        write_manifest(stage)
        return readiness


def _check_told(title: str, formats: Sequence[str], lineage: Mapping[str, Any]) -> None:
    """Refuses formats, a name and a lineage that no package has."""
    unknown = [to for to in formats if to not in FORMATS]
    if unknown:
        raise CheckpointError(f"Unknown format {unknown[0]!r}; expected {', '.join(FORMATS)}.")
    if not is_name(title):
        raise CheckpointError(
            f"{title!r} is no name of a package; expected one of a directory, printable."
        )
    # As in lineage that was taken over from another package.
    own = [fact for fact in REQUIRED[LINEAGE] if fact in lineage]
    if own:
        raise CheckpointError(
            f"The lineage is told {own[0]!r}, which the export finds out itself; leave it out, or "
            "give it another name."
        )


def _task(source: Path, extras: Mapping[str, Any], told: str | None, family: str) -> str | None:
    task = extras.get("task") or told or TASK_OF.get(family)
    if not isinstance(task, str | None):
        raise CheckpointError(f"{source} records task {task!r:.80}; expected a task's name.")
    return task


def origin_of(source: Path) -> Path:
    """Returns the checkpoint an export reads: of a `train` directory, its package."""
    return source / "package" if (source / "package" / "forge.json").exists() else source


def evaluate_shipped(task: str, package: Path) -> Mapping[str, float]:
    """Returns held-out metrics of the model a package describes, built from its files alone."""
    with open_native(package, ReadOptions()) as opened:
        build = builder_of(opened.model)
    return evaluate_package(task, package, build_model=build)


def _is_there(target: Path, digest: str) -> bool:
    """Whether a package reached phase 6 before; raises CheckpointError where another one did."""
    if not (target.is_symlink() or target.exists()):
        return False
    if target.is_symlink() or tree_digest(target) != digest:
        raise CheckpointError(
            f"{str(target)!r} is there and is another package; hand off under another name."
        )
    # A digest of a tree says nothing of links and pipes in it.
    verify_manifest(target)
    return True


def _write_beside(stage: Path, formats: Sequence[str]) -> None:
    """Converts the package into directories of its own, through one outside that is compared."""
    for to in dict.fromkeys(formats):
        outside = stage.with_name(f"{stage.name}.{to}")
        try:
            target = outside / "model.gguf" if to.startswith("gguf") else outside
            convert(stage, target, to)
            shutil.copytree(outside, stage / to)
            write_manifest(stage)
        finally:
            shutil.rmtree(outside, ignore_errors=True)


def _write(path: Path, value: Mapping[str, Any]) -> None:
    try:
        path.write_bytes(canonical_json(dict(value)))
    except ValueError as error:
        raise CheckpointError(
            f"{path.name} cannot hold what it is told ({error}); leave it out, or tell it as text."
        ) from error


def _refusal(name: str, readiness: Readiness) -> str:
    unmet = "; ".join(map(_unmet, readiness.blocking))
    return f"Package {name!r} is not ready: {unmet}. Nothing was written."


def _unmet(criterion: Criterion) -> str:
    found = "not measured" if criterion.value is None else f"{criterion.value:g}"
    return (
        f"{criterion.name} is {found}, required {criterion.direction.value} {criterion.limit:g} "
        f"({criterion.reason or criterion.unit})"
    )

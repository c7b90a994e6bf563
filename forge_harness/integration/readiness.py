"""Whether a package may go to phase 6: criteria held against its files alone.

Nothing is taken from what training claimed: metrics are recomputed from the package, sizes from the
file system, codes from the weights. What could not be measured is no pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

from forge_harness.errors import CheckpointError, UsageError
from forge_harness.formats import Checkpoint, ReadOptions
from forge_harness.formats.architecture import style_of
from forge_harness.formats.inspection import count_codes
from forge_harness.formats.manifest import verify_manifest
from forge_harness.formats.native import open_native
from forge_harness.formats.sizes import Sizes, sizes_of
from forge_harness.formats.strict_json import read_object
from forge_harness.policy import Policy, load_policy
from forge_harness.types import Direction

METRICS, LINEAGE, DESCRIPTION = "metrics.json", "lineage.json", "package.json"
LABELS, TOKENIZER = "labels.json", "tokenizer.json"
MODEL_FILES = ("forge.json", "model.safetensors")
"""What `package_bytes` counts: the model itself. The whole directory is in the baking manifest."""
CLAIM_TOLERANCE = 1e-6
"""Between a recorded metric and the recomputed one: printing and reading a float loses nothing, so
only another model or other data exceed it."""
REQUIRED: Mapping[str, tuple[str, ...]] = {
    METRICS: ("accuracy", "loss"),
    LINEAGE: ("source", "source_digest", "task", "data_digest", "harness_version"),
    DESCRIPTION: ("schema", "name", "task", "family", "parameters", "quality_score"),
}
"""Fields a package must have, by file."""

Status = Literal["READY", "NOT_READY"]
Evaluate = Callable[[str, Path], Mapping[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """One condition and what was found.

    Attributes:
        name: What is judged.
        value: Measured; None when it could not be.
        unit: Of value and limit.
        limit: What it is held against.
        direction: On which side of the limit it must be.
        met: Whether it is; a value that was not measured, or is not finite, is not.
        reason: Why it was judged so.
    """

    name: str
    value: float | None
    unit: str
    limit: float
    direction: Direction
    met: bool
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """Every criterion of a package.

    Attributes:
        criteria: In the order they were judged.
        quality_score: Held-out accuracy recomputed from the files; None when not measured.
        completeness: Share of the required fields that are there.
    """

    criteria: tuple[Criterion, ...]
    quality_score: float | None
    completeness: float

    @property
    def status(self) -> Status:
        """READY when every criterion is met."""
        return "READY" if all(criterion.met for criterion in self.criteria) else "NOT_READY"

    @property
    def blocking(self) -> tuple[Criterion, ...]:
        """The criteria that are not met."""
        return tuple(criterion for criterion in self.criteria if not criterion.met)

    def to_json(self) -> dict[str, Any]:
        """Returns status and criteria as JSON values."""
        rows = [{**asdict(c), "direction": c.direction.value} for c in self.criteria]
        return {"status": self.status, "criteria": rows}


def judge(
    name: str, value: float | None, limit: float, direction: Direction, unit: str, reason: str = ""
) -> Criterion:
    """Holds a value against a limit; None and non-finite values are never met."""
    met = value is not None and math.isfinite(value)
    if met:
        assert value is not None
        met = {
            Direction.AT_LEAST: value >= limit,
            Direction.AT_MOST: value <= limit,
            Direction.EQUAL: value == limit,
        }[direction]
    finite = value if value is None or math.isfinite(value) else None
    why = reason or ("not measured" if value is None else "")
    if value is not None and finite is None:
        why = f"{value} is not finite"
    return Criterion(
        name=name,
        value=finite,
        unit=unit,
        limit=limit,
        direction=direction,
        met=met,
        reason=why,
    )


def assess(
    package: Path,
    evaluate: Evaluate,
    policy: Policy | None = None,
    *,
    described: bool = True,
    classes: Callable[[str], bool] | None = None,
) -> Readiness:
    """Judges a package from its files.

    Args:
        package: Directory of a native package with the files of an export.
        evaluate: Held-out metrics of (task, package).
        policy: Whose gate thresholds hold; None: the shipped one.
        described: Whether `package.json` is there already (it is written after the first
            assessment).
        classes: Whether a task tells classes apart, which have a limit of accuracy; None: unless
            the model is of a family of language models.

    Raises:
        DamagedCheckpointError: The package does not hold what its manifest says.
        CheckpointError: It is no package.
    """
    policy = policy or load_policy()
    verify_manifest(package)
    fields = present_fields(package)
    with open_native(package, ReadOptions()) as opened:
        sizes = sizes_of(package, opened.infos.values())
        degenerate = _degenerate(opened)
    task = fields[LINEAGE].get("task")
    measured, why = _measured(task, package, evaluate)
    accuracy = measured.get("accuracy")
    weights = sizes.ternary_weights + sizes.plain_weights
    applies = gate_applies("accuracy", package, task, classes)
    criteria = [
        _gate(policy, "accuracy", accuracy, "1", why, applies=applies),
        _claims(fields[METRICS], measured, why),
        _gate(policy, "compression_ratio", compression(package, sizes), "1"),
        _gate(policy, "model_complexity", weights, "parameters"),
        judge(
            "degenerate_tensors",
            float(len(degenerate)),
            0.0,
            Direction.EQUAL,
            "tensors",
            "; ".join(degenerate[:3]),
        ),
    ]
    completeness, missing = completeness_of(fields, described=described)
    criteria.append(
        judge("completeness", completeness, 1.0, Direction.EQUAL, "1", "; ".join(missing))
    )
    known = accuracy if accuracy is not None and math.isfinite(accuracy) else None
    return Readiness(criteria=tuple(criteria), quality_score=known, completeness=completeness)


def gate_applies(
    gate: str, package: Path, task: object, classes: Callable[[str], bool] | None = None
) -> bool:
    """Whether the limit of a gate holds for a package.

    That of accuracy holds where classes are told apart; the share of right next tokens is bounded
    by the text's entropy, not by a limit.

    Args:
        gate: Name of the gate.
        package: Directory of the package.
        task: As its `lineage.json` states it.
        classes: As for `assess`.
    """
    if gate != "accuracy":
        return True
    if classes is not None and isinstance(task, str):
        return classes(task)
    # Of the model itself: a file beside it, such as the labels, may have been left out.
    with open_native(package, ReadOptions()) as opened:
        return style_of(opened.model.family) is None


def compression(package: Path, sizes: Sizes) -> float:
    """Returns fp32 bytes of all weights over the bytes of the model's files."""
    return sizes.fp32_bytes / model_bytes(package)


def model_bytes(package: Path) -> int:
    """Returns the bytes of `MODEL_FILES`."""
    return sum((package / name).stat().st_size for name in MODEL_FILES)


def present_fields(package: Path) -> dict[str, dict[str, Any]]:
    """Returns the JSON objects of a package by file; {} for one that is not there.

    Raises:
        DamagedCheckpointError: A file is there and is no JSON object that all readers take alike.
    """
    paths = {name: package / name for name in REQUIRED}
    return {name: read_object(path) if path.exists() else {} for name, path in paths.items()}


def is_name(value: object) -> TypeGuard[str]:
    """Whether a value can be the name of a package, and so of a directory below another one."""
    if not isinstance(value, str) or value in ("", ".."):
        return False
    return value.isprintable() and Path(value).name == value


def completeness_of(
    fields: Mapping[str, Mapping[str, Any]], *, described: bool = True
) -> tuple[float, list[str]]:
    """Returns the share of required fields that are there and not empty, and the others."""
    wanted = [
        (file, field)
        for file, names in REQUIRED.items()
        for field in names
        if described or file != DESCRIPTION
    ]
    missing = [f"{file} lacks {field}" for file, field in wanted if not _there(fields, file, field)]
    return 1 - len(missing) / len(wanted), missing


def _there(fields: Mapping[str, Mapping[str, Any]], file: str, field: str) -> bool:
    value = fields[file].get(field)
    return value is not None and value not in ("", {}, [])


def _measured(task: object, package: Path, evaluate: Evaluate) -> tuple[Mapping[str, float], str]:
    if not isinstance(task, str):
        return {}, "lineage.json names no task whose held-out data could be used"
    try:
        return evaluate(task, package), ""
    except (CheckpointError, UsageError, KeyError, ValueError) as error:
        return {}, f"not measured: {error}"


def _gate(
    policy: Policy,
    name: str,
    value: float | None,
    unit: str,
    why: str = "",
    *,
    applies: bool = True,
) -> Criterion:
    for direction in (Direction.AT_LEAST, Direction.AT_MOST):
        key = f"gates.{name}.{direction.value}"
        if key in policy.thresholds:
            limit = policy.threshold(key)
            if not applies:
                reason = "no limit for next-token accuracy; it must be measured"
                return judge(name, value, 0.0, Direction.AT_LEAST, unit, why or reason)
            return judge(name, None if value is None else float(value), limit, direction, unit, why)
    raise CheckpointError(f"The policy has no threshold gates.{name}; add one to its gates.")


def _claims(stated: Mapping[str, Any], measured: Mapping[str, float], why: str) -> Criterion:
    """The largest distance between what metrics.json says and what the files give."""
    distances = []
    for name, value in measured.items():
        claim = _claim(stated.get(name))
        if claim is None:
            why = why or f"{METRICS} states no number for {name}"
        else:
            distances.append(abs(claim - value))
    complete = measured and len(distances) == len(measured)
    # NaN is neither above nor below anything: max() would pass over it.
    worst = [d for d in distances if not math.isfinite(d)] or [max(distances, default=0.0)]
    return judge(
        "claimed_metrics",
        worst[0] if complete else None,
        CLAIM_TOLERANCE,
        Direction.AT_MOST,
        "1",
        why,
    )


def _claim(entry: object) -> float | None:
    """Returns the number of `{"value": number, ...}`; None for anything else."""
    value = entry.get("value") if isinstance(entry, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:  # An integer of hundreds of digits.
        return math.inf


def _degenerate(opened: Checkpoint) -> list[str]:
    """Names tensors that are all zero or all one sign: no training leaves them."""
    found = []
    for name in opened.ternary_names():
        counts = count_codes(opened.ternary(name))
        if not counts.minus + counts.plus or (counts.zero == 0 and not counts.minus * counts.plus):
            found.append(name)
    return found

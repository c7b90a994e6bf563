"""The compatibility matrix: what each kind of phase-4 checkpoint loses on its way into phase 5.

Every number is measured on a model that was trained and frozen (`fixtures/models`): codes and
scales after loading against those it was frozen with, held-out accuracy after conversion against
that of the model as its own format defines it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from forge_harness import oracles
from forge_harness.errors import CheckpointError
from forge_harness.evidence import largest
from forge_harness.formats import Checkpoint, Detection, ReadOptions
from forge_harness.formats.convert import convert
from forge_harness.formats.detect import detect, open_checkpoint
from forge_harness.formats.digests import codes_sha256
from forge_harness.paths import fixtures_dir
from forge_harness.training import evaluate_package

Evaluate = Callable[[str, Path], Mapping[str, float]]
"""(task, native package) -> held-out metrics, `accuracy` among them."""
_CONVERSION = {"native": "No", "native-0.9": "Minor"}
_IMPORT = "Yes"
_DETECTED = "Auto-detect"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompatibilityCase:
    """A frozen model in one kind of checkpoint.

    Attributes:
        model_type: Row of the matrix.
        path: File or directory.
        task: Whose held-out data it is evaluated on.
        accuracy: Of the model as its own format defines it, share of held-out samples.
        codes_sha256: Weight name -> digest of its codes; None: quantized on import, and held
            against the float64 quantization of the stored weights.
        scales: Weight name -> scale, where codes are stored.
    """

    model_type: str
    path: Path
    task: str
    accuracy: float
    codes_sha256: Mapping[str, str] | None = None
    scales: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompatibilityRow:
    """One measured row.

    Attributes:
        model_type: As in the specification.
        format: What it was detected as.
        conversion: "No", "Minor", "Yes" or "Auto-detect".
        tensors: Ternary tensors compared.
        codes_changed: Codes, or tensors where only digests are known, that differ.
        scale_change: Largest relative change of a scale.
        accuracy_before: Share of held-out samples, as the source's own format defines the model.
        accuracy_after: The same of the converted package.
    """

    model_type: str
    format: str
    conversion: str
    tensors: int
    codes_changed: int
    scale_change: float
    accuracy_before: float
    accuracy_after: float

    @property
    def impact(self) -> float:
        """Share of the accuracy that is lost; negative when it grew."""
        return 1 - self.accuracy_after / self.accuracy_before


def reference_cases() -> list[CompatibilityCase]:
    """Returns the four kinds of the specification, on the frozen digits model.

    Raises:
        FileNotFoundError: The fixtures are not installed.
    """
    root = fixtures_dir() / "models"
    truth = json.loads((root / "truth.json").read_text(encoding="utf-8"))
    scales = {name: float.fromhex(value) for name, value in truth["scales"].items()}
    rows = (("BitNet v1.0", "v1.0"), ("BitNet v0.9", "v0.9"), ("Custom BitNet", "custom"))
    cases = [
        CompatibilityCase(
            model_type=label,
            path=root / directory,
            task=truth["task"],
            accuracy=truth["ternary_accuracy"],
            codes_sha256=truth["codes_sha256"],
            scales=scales,
        )
        for label, directory in rows
    ]
    legacy = CompatibilityCase(
        model_type="Legacy Models",
        path=root / "legacy",
        task=truth["task"],
        accuracy=truth["full_accuracy"],
    )
    return [*cases[:2], legacy, cases[2]]


def measure(
    case: CompatibilityCase,
    *,
    evaluate: Evaluate = evaluate_package,
    read: ReadOptions | None = None,
) -> CompatibilityRow:
    """Loads, converts and evaluates one case.

    Raises:
        CheckpointError: It cannot be read or converted.
    """
    detection = detect(case.path)
    with open_checkpoint(case.path, read) as opened:
        changed, change = _against(case, opened)
        count = len(opened.ternary_names())
    with tempfile.TemporaryDirectory(prefix="forge-compatibility-") as directory:
        package = Path(directory) / "package"
        convert(case.path, package, "native", read=read)
        after = evaluate(case.task, package)["accuracy"]
    return CompatibilityRow(
        model_type=case.model_type,
        format=detection.format,
        conversion=conversion_of(detection),
        tensors=count,
        codes_changed=changed,
        scale_change=change,
        accuracy_before=case.accuracy,
        accuracy_after=after,
    )


def conversion_of(detection: Detection) -> str:
    """Says what conversion a format needs, in the specification's words."""
    if detection.format in _CONVERSION:
        return _CONVERSION[detection.format]
    return _IMPORT if detection.format.startswith("legacy") else _DETECTED


def compatibility_json(rows: Sequence[CompatibilityRow]) -> list[dict[str, Any]]:
    """Returns the matrix as JSON values."""
    return [{**asdict(row), "impact": row.impact} for row in rows]


def _against(case: CompatibilityCase, opened: Checkpoint) -> tuple[int, float]:
    if case.codes_sha256 is None or case.scales is None:
        return _against_oracle(opened)
    names = opened.ternary_names()
    if set(names) != set(case.codes_sha256):
        raise CheckpointError(
            f"{case.path} has ternary tensors {sorted(names)[:4]}; the frozen model has "
            f"{sorted(case.codes_sha256)[:4]}."
        )
    changed = sum(codes_sha256(opened.ternary(n)) != case.codes_sha256[n] for n in names)
    changes = [abs(float(opened.scales(n)[0]) / case.scales[n] - 1) for n in names]
    return changed, largest(changes)


def _against_oracle(opened: Checkpoint) -> tuple[int, float]:
    """Codes that float64 leaves no doubt about, and scales, of weights quantized on import."""
    changed, change = 0, 0.0
    for name in opened.ternary_names():
        found, expected = opened.ternary(name), oracles.ternary(opened.master(name))
        wrong = oracles.int64(found.codes()) != expected.codes
        changed += int((wrong & (expected.margin > oracles.TERNARY_MARGIN)).sum())
        off = abs(float(found.scales[0]) / float(expected.scale) - 1)
        change = largest((change, off))
    return changed, change

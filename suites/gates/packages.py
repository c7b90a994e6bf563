"""The exported package of a run of the quality study, measured again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forge_harness.errors import CheckpointError
from forge_harness.formats.detect import open_checkpoint
from forge_harness.protocols import BuildsModel, ExportsWeights, QualityRun
from forge_harness.subject.study import unpacked

LIMITS = {"loss": 3e-5, "accuracy": 2e-4}
"""Relative for the loss: those of training.eval_is_quantized, which has where they come from."""


def hold(evidence: Any, subject: Any, runs: Sequence[QualityRun], seed: int, folder: Path) -> None:
    """Holds a run against the package it shows; records what could not be held against any.

    Args:
        evidence: Of the check.
        subject: Evaluates the package.
        runs: Ternary runs of one task.
        seed: Chooses among them, so that no one run is known to be looked at.
        folder: Empty; the package goes there.
    """
    task = runs[0].task
    shown = [run for run in runs if run.package]
    evidence.record(
        f"packages_shown.{task}",
        len(shown),
        unit="runs",
        reason=f"of {len(runs)}; one is measured again"
        if shown
        else "no run shows its package: accuracy, loss and size are the subject's own word",
    )
    if not shown:
        return
    run = shown[seed % len(shown)]
    package = unpacked(run, folder)
    size = sum(path.stat().st_size for path in package.rglob("*") if path.is_file())
    evidence.equal(
        f"package_size.{task}",
        size,
        expected=run.package_bytes,
        unit="bytes",
        reason=f"of the files seed {run.seed} shows, against what it says",
    )
    _ternary(evidence, subject, task, package)
    if not isinstance(subject, ExportsWeights):
        evidence.record(f"remeasured.{task}", False, reason="the subject evaluates no package")
        return
    found = subject.evaluate_package(run.package_task or task, package)
    differences = {
        "loss": abs(found["loss"] - run.loss) / abs(found["loss"]),
        "accuracy": abs(found["accuracy"] - run.accuracy),
    }
    for metric, difference in differences.items():
        evidence.at_most(
            f"package_{metric}_difference.{task}",
            difference,
            limit=LIMITS[metric],
            reason=f"seed {run.seed}: what the study says against its package, measured again",
        )


def _ternary(evidence: Any, subject: Any, task: str, package: Path) -> None:
    """Records how many weights are stored as codes, and that none that should be is not."""
    declared = subject.model_spec(task).quantized if isinstance(subject, BuildsModel) else ()
    try:
        with open_checkpoint(package) as opened:
            infos = list(opened.infos.values())
    except CheckpointError as error:
        evidence.record(f"ternary_weights.{task}", "not read", reason=str(error))
        return
    # A file of masters is quantized by its reader: what it stores is full precision.
    coded = [info for info in infos if info.kind == "ternary" and not info.master]
    other = [info.name for info in infos if info not in coded and _among(info.name, declared)]
    evidence.at_least(
        f"ternary_weights.{task}",
        len(coded),
        limit=1,
        unit="weights",
        reason="the package stores codes, which hold nothing but -1, 0 and 1",
    )
    evidence.equal(
        f"full_precision_weights.{task}",
        len(other),
        expected=0,
        unit="weights",
        reason=f"stored in full though declared ternary: {', '.join(other[:3]) or 'none'}",
    )


def _among(weight: str, modules: Sequence[str]) -> bool:
    return weight.removesuffix(".weight") in modules

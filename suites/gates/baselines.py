"""The full-precision model of a run of the quality study, measured again."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load
from torch import nn

from forge_harness.protocols import InfersPacked, LoadsData, QualityRun

from .packages import LIMITS

SAMPLES = 32
"""Validation samples read at a time: logits of 128 tokens and 256 classes are 4 MB."""


def hold_baseline(evidence: Any, subject: Any, runs: Sequence[QualityRun], seed: int) -> None:
    """Holds a run against the weights it shows; records what could not be held against any.

    Args:
        evidence: Of the check.
        subject: Builds the full-precision model and delivers the validation split.
        runs: Full-precision runs of one task.
        seed: Chooses among those that show their weights.
    """
    task = runs[0].task
    able = isinstance(subject, InfersPacked) and isinstance(subject, LoadsData)
    shown = [run for run in runs if run.weights] if able else []
    evidence.record(
        f"baselines_shown.{task}",
        len(shown),
        unit="runs",
        reason=f"of {len(runs)}; one is measured again"
        if shown
        else "no full-precision run shows weights that can be measured again: what the baseline "
        "reaches, and on which data, is the study's own word",
    )
    if not shown:
        return
    run = shown[seed % len(shown)]
    loss, accuracy = _measured(subject, run)
    differences = {
        "loss": abs(loss - run.loss) / abs(loss),
        "accuracy": abs(accuracy - run.accuracy),
    }
    for metric, difference in differences.items():
        evidence.at_most(
            f"baseline_{metric}_difference.{task}",
            difference,
            limit=LIMITS[metric],
            reason=f"seed {run.seed}: what the study says against its weights, measured again on "
            "the validation split",
        )


@torch.no_grad()
def _measured(subject: Any, run: QualityRun) -> tuple[float, float]:
    """Returns loss and accuracy of a run's weights on the whole validation split."""
    task = run.package_task or run.task
    model = _model(subject, task, run)
    info = subject.data_info(task)
    loss, correct, count = 0.0, 0, 0
    for start in range(0, info.validation_size, SAMPLES):
        ids = range(start, min(start + SAMPLES, info.validation_size))
        batch = subject.batch(task, "validation", ids)
        logits, targets = model(batch.inputs).flatten(0, -2), batch.targets.flatten()
        known = torch.ones_like(targets, dtype=torch.bool)
        if info.ignored_target is not None:
            known = targets != info.ignored_target
        logits, targets = logits[known], targets[known]
        loss += float(F.cross_entropy(logits.double(), targets, reduction="sum"))
        correct += int((logits.argmax(-1) == targets).sum())
        count += len(targets)
    return loss / count, correct / count


def _model(subject: Any, task: str, run: QualityRun) -> nn.Module:
    model: nn.Module = subject.inference_model(task, "full", seed=run.seed)
    model.load_state_dict(load(base64.b64decode(run.weights)))
    return model.eval()

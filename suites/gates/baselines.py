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
NO_TARGET = -100
"""What torch's cross entropy leaves out."""


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
    size = subject.data_info(task).validation_size
    loss, correct, count = 0.0, 0, 0
    for start in range(0, size, SAMPLES):
        batch = subject.batch(task, "validation", range(start, min(start + SAMPLES, size)))
        logits, targets = model(batch.inputs).flatten(0, -2), batch.targets.flatten()
        loss += float(F.cross_entropy(logits.double(), targets, reduction="sum"))
        correct += int((logits.argmax(-1) == targets).sum())
        count += int((targets != NO_TARGET).sum())
    return loss / count, correct / count


def _model(subject: Any, task: str, run: QualityRun) -> nn.Module:
    model: nn.Module = subject.inference_model(task, "full", seed=run.seed)
    model.load_state_dict(load(base64.b64decode(run.weights)))
    return model.eval()

"""Micro-batches of a classifier: what waits is computed together, and nothing waits for company.

A window is opened only after a batch of some size, so a lone request is computed at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from .engine import CanaryError, Step
from .jobs import Delivery, Job
from .package import Classifier
from .problems import INTERNAL, UNPROCESSABLE, Problem

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer to one request.

    Attributes:
        logits: fp32 (rows, classes).
        labels: int64 (rows,), of the largest logit each.
    """

    logits: NDArray[np.float32]
    labels: NDArray[np.int64]


class BatchScheduler:
    """Computes all jobs it is given as one batch.

    Args:
        served: The model.
        max_batch: Rows of a batch; a request with more is a batch of its own.
    """

    by_cost = True
    busy = 0

    def __init__(self, served: Classifier, *, max_batch: int) -> None:
        self._served, self.room = served, max_batch

    def step(self, jobs: Sequence[Job]) -> Step:
        """Predicts the rows of all jobs."""
        work = sum(job.cost for job in jobs)
        for job in jobs:
            job.mates = len(jobs)
        try:
            deliveries = self._predict(jobs)
        except Exception as error:
            deliveries = self._one_by_one(jobs, error)
        return Step(deliveries, work, len(jobs))

    def canary(self) -> None:
        """Predicts the canary and compares every bit."""
        logits = self._logits(self._served.canary)
        if logits.tobytes() != self._served.expected.tobytes():
            raise CanaryError("The logits of the canary are not those of when it was loaded.")

    def _predict(self, jobs: Sequence[Job]) -> list[Delivery]:
        rows = jobs[0].work if len(jobs) == 1 else np.concatenate([job.work for job in jobs])
        logits = self._logits(rows)
        labels = logits.argmax(axis=1)
        deliveries, start = [], 0
        for job in jobs:
            part = slice(start, start + job.cost)
            deliveries.append(_delivery(job, logits[part], labels[part]))
            start += job.cost
        return deliveries

    def _one_by_one(self, jobs: Sequence[Job], error: Exception) -> list[Delivery]:
        """Finds the job at fault, so that its mates get their answers."""
        if len(jobs) == 1:
            detail = (
                f"The model failed on the input ({type(error).__name__}); see the server's log."
            )
            return [Delivery(jobs[0], problem=Problem(INTERNAL, detail))]
        found: list[Delivery] = []
        for job in jobs:
            try:
                found += self._predict([job])
            except Exception as own:
                found += self._one_by_one([job], own)
        return found

    @torch.inference_mode()
    def _logits(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self._served.model(torch.from_numpy(rows)).numpy()
        return logits


def _delivery(job: Job, logits: NDArray[np.float32], labels: NDArray[np.int64]) -> Delivery:
    if not np.isfinite(logits).all():
        detail = (
            "The inputs are so large that the logits are not finite; scale them as in training."
        )
        return Delivery(job, problem=Problem(UNPROCESSABLE, detail))
    return Delivery(job, result=Prediction(logits, labels))

"""Quality of the ternary model beside the full-precision one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

Arm = Literal["ternary", "full", "post_training"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityRun:
    """One trained and evaluated model of a quality comparison."""

    task: str
    arm: Arm
    seed: int
    steps: int
    """Steps trained; the same in all arms of a seed."""
    learning_rate: float
    parameters: int
    """The same in all arms of a seed: `post_training` is the `full` model, ternarized."""
    accuracy: float
    """Share of correct predictions on held-out data."""
    loss: float
    """Mean cross-entropy on held-out data, nats."""
    block_correct: tuple[int, ...]
    """Correct predictions a block of held-out data; the blocks are the same in all arms."""
    block_size: tuple[int, ...]
    """Predictions a block."""
    curve: tuple[tuple[int, float, float], ...]
    """(step, training loss, held-out accuracy or -1 where not evaluated)."""
    finite: bool
    seconds: float
    peak_rss_bytes: int
    data_digest: str
    package_bytes: int = 0
    """Size on disk of the exported ternary package; 0 for other arms."""
    full_precision_bytes: int = 0
    """Size on disk of the same model's fp32 weights."""
    bf16_bytes: int = 0
    """Size on disk of the same model's weights in bf16; 0 where it was not measured."""
    package: Mapping[str, str] = field(default_factory=dict, hash=False)
    """The exported package, so that its quality can be measured again: base64 of each file by its
    relative path. Runs end in processes of their own, so it is no path. Empty: not shown."""
    package_task: str = ""
    """What `ExportsWeights.evaluate_package` calls the task of the package, and of `weights`, where
    it is not `task`: a fold of its data, a smaller model."""
    weights: str = ""
    """Of a `full` run, base64 of a safetensors file: the state of its model, as
    `InfersPacked.inference_model(task, "full")` loads it, so that the baseline can be measured
    again. Some runs of a task are enough. Empty: not shown."""


@runtime_checkable
class MeasuresQuality(Protocol):
    """Trains its tasks in each arm, so that quantized quality can be set against full precision."""

    def quality_plan(self, profile: str) -> Sequence[tuple[str, Arm, int]]:
        """(task, arm, seed) of every run of the comparison, most expensive first.

        `post_training` rows come with the `full` run of the same seed and are not listed.
        """
        ...

    def quality_run(self, task: str, arm: Arm, seed: int, profile: str) -> Sequence[QualityRun]:
        """Trains and evaluates; the `full` arm also returns its `post_training` row."""
        ...

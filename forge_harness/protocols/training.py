"""Training: sessions that advance step by step, checkpoints, several processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from .model import Precision

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """What a check asks of a training session; None leaves the subject's recipe in force."""

    seed: int = 0
    steps: int = 20
    """Optimizer steps of the whole schedule."""
    precision: Precision = "ternary"
    batch_size: int | None = None
    """Samples of one optimizer step, over all its micro-batches."""
    accumulation: int = 1
    """Micro-batches an optimizer step is split into."""
    learning_rate: float | None = None
    clip_norm: float | None = None
    fixed_batch: tuple[int, ...] | None = None
    """Train on these sample ids at every step (for overfitting one batch)."""
    validation_canaries: tuple[bytes, ...] = ()
    """Documents added to the validation split only, before anything is loaded."""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleStep:
    """Learning rate and weight decay of one optimizer step (of the decayed parameters)."""

    learning_rate: float
    weight_decay: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleSpec:
    """A declared schedule, in the terms an independent formula needs.

    With t the 0-based optimizer step, S = total_steps, W = warmup_steps, all in float64:

    - both kinds below, t < W: rate = peak * (t + 1) / W, weight decay as given.
    - two_stage, t >= W: f = t / S (warmup counts as done). f < boundary: rate =
      peak * (1 - f / 2), weight decay as given. Otherwise rate = peak * (1 - f), weight decay 0
      (BitNet b1.58 training notes: the rate drops and decay ends at the boundary).
    - cosine, t >= W: g = (t - W) / max(1, S - 1 - W), rate = peak * (final_fraction +
      (1 - final_fraction) * (1 + cos(pi * g)) / 2), weight decay constant. The last step,
      t = S - 1, is at final_fraction * peak.

    Any other kind has no formula here: sessions are then held to `Trains.planned_schedule`, and
    the plan itself is not measured.
    """

    kind: str
    peak: float
    warmup_steps: int
    total_steps: int
    weight_decay: float
    boundary: float = 0.5
    final_fraction: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What one optimizer step reports."""

    step: int
    """0-based index of the step just made."""
    loss: float
    learning_rate: float
    weight_decay: float
    grad_norm: float
    """L2 norm over all gradients before clipping."""
    sample_ids: tuple[int, ...]
    """Train samples whose mean loss the step descended, in the order they were used."""
    seconds: float


@runtime_checkable
class TrainingSession(Protocol):
    """A training run that can be stepped, interrupted and looked into.

    A session whose `model` holds averages of the weights that are trained (EMA) has those in
    `trained_model`, a module whose parameters have the names of `model`; elsewhere the attribute
    is left out, and `model` is what is trained. What watches the optimizer looks there.

    A session that begins in full precision and quantizes later has the number of such steps in
    `full_precision_steps`, fewer than `TrainOptions.steps`; elsewhere it is left out.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step_index: int
    """Optimizer steps made so far."""

    def step(self) -> StepRecord:
        """Makes one optimizer step.

        Raises, or reports it, when the loss or a gradient is not finite; nothing is updated then,
        and the next step is one like any other.
        """
        ...

    def evaluate(self) -> Mapping[str, float]:
        """`loss` (nats) and `accuracy` (share) of the quantized model on the validation split.

        The weights are those `model` holds and `export_package` writes, and the loss is the mean
        of `BuildsModel.loss` over every target: both are recomputed. Averaged weights (EMA) that
        are evaluated are therefore those of `model`, with the ones that are trained in
        `trained_model`.
        Training goes on as if it had not been evaluated, bit for bit.
        """
        ...

    def state_tensors(self) -> Mapping[str, Tensor]:
        """Every tensor the future of the run depends on, by a stable name.

        Weights, buffers, optimizer state, generator states, position in the data.
        """
        ...


@runtime_checkable
class Trains(Protocol):
    """Runs quantization-aware training."""

    def session(self, task: str, options: TrainOptions) -> TrainingSession:
        """A new session at step 0."""
        ...

    def schedule_spec(self, task: str, options: TrainOptions) -> ScheduleSpec:
        """The schedule the session of these options declares."""
        ...

    def planned_schedule(self, task: str, options: TrainOptions) -> Sequence[ScheduleStep]:
        """Learning rate and weight decay of each of the `options.steps` steps."""
        ...


@runtime_checkable
class Checkpoints(Protocol):
    """Interrupts and resumes training bit-identically."""

    def save_session(self, session: TrainingSession, path: Path) -> None:
        """Writes all a resumed run needs to `path`, a file or a directory of shards.

        Returns once it is durable. What is there is replaced, and stays as it was where saving
        fails (a full disk): write beside it, then rename.

        The name says nothing of the format: it has no suffix that means one.
        """
        ...

    def resume_session(self, task: str, options: TrainOptions, path: Path) -> TrainingSession:
        """A session that continues where the saved one stopped."""
        ...


@runtime_checkable
class TrainsDistributed(Protocol):
    """Trains over several processes."""

    def train_distributed(
        self, task: str, options: TrainOptions, *, ranks: int
    ) -> Mapping[str, Tensor]:
        """State dict after `options.steps` steps over `ranks` gloo processes on this machine.

        Each rank takes 1 / ranks of every batch, as one of `options.accumulation` micro-batches
        in a single process would.
        """
        ...

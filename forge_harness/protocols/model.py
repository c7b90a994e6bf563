"""Models as they are built, and what goes in and out of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn


Precision = Literal["ternary", "full"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What the subject declares about one of its models."""

    task: str
    parameters: int
    """Trainable parameters by a closed formula, not by counting."""
    max_parameters: int
    quantized: tuple[str, ...]
    """Names of all modules whose weight is ternary in forward."""
    full_precision: tuple[str, ...]
    """Names of the modules with a 2-D or larger weight that stay in full precision."""
    sub_norms: tuple[str, ...] = ()
    """Names of the normalisation modules in front of quantized projections."""
    causal: bool = False
    """Whether outputs at a position may depend on earlier positions only."""
    tied: tuple[tuple[str, str], ...] = ()
    """Pairs of state-dict keys that share one tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One batch: integer or float inputs and int64 targets, both with B first."""

    inputs: Tensor
    targets: Tensor


@runtime_checkable
class BuildsModel(Protocol):
    """Builds the model of each reference task."""

    def tasks(self) -> Sequence[str]:
        """Task names; the first is the cheapest to train."""
        ...

    def model_spec(self, task: str) -> ModelSpec:
        """What is declared about the task's model."""
        ...

    def build_model(self, task: str, *, seed: int) -> nn.Module:
        """A freshly initialised ternary model in training mode; same seed, same weights."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The training loss: a scalar, the mean over the batch's targets.

        In evaluation mode (`model.training`) it may be another: cross-entropy where training
        smooths labels, for example. `TrainingSession.evaluate` reports that one.
        """
        ...

    def example_batch(self, task: str, *, batch_size: int, seed: int) -> Batch:
        """Valid random inputs and targets of the task (not necessarily from its data)."""
        ...

    def effective_weights(self, model: nn.Module) -> Mapping[str, Tensor]:
        """Quantized module name -> weight values (N, K) the forward uses in the current mode."""
        ...

    def latent_weights(self, model: nn.Module) -> Mapping[str, nn.Parameter]:
        """Quantized module name -> the parameter (N, K) the optimizer updates."""
        ...

"""Trained models as they are exported, stored and packed for inference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from .training import TrainingSession

if TYPE_CHECKING:
    from torch import nn


@runtime_checkable
class ExportsWeights(Protocol):
    """Writes the trained model as inference weights, and evaluates such a package."""

    def export_package(self, session: TrainingSession, path: Path) -> None:
        """Writes ternary codes, scales and the full-precision rest into directory `path`."""
        ...

    def evaluate_package(self, task: str, path: Path) -> Mapping[str, float]:
        """`loss` and `accuracy` on the validation split, from the files alone.

        Of what `export_package` wrote, and of the native package that phase 6 gets of it
        (`forge_harness.formats.detect.open_checkpoint` reads both).
        """
        ...


@runtime_checkable
class HoldsCheckpoint(Protocol):
    """Has a checkpoint of its own: what phase 4 handed over."""

    def provide_checkpoint(self, directory: Path) -> Path:
        """Returns a file or directory in any readable format.

        It is there already, or is written below `directory`, which exists and is empty.
        """
        ...


@runtime_checkable
class InfersPacked(Protocol):
    """Runs its models from packed codes, without latent weights."""

    def inference_model(
        self, task: str, form: Literal["packed", "full"], *, seed: int
    ) -> nn.Module:
        """Returns a model in evaluation mode that maps `Batch.inputs` to logits.

        "packed" is the ternary model of `BuildsModel.build_model(task, seed=seed)`, and "full" its
        full-precision twin, both as they would be deployed: what they hold in memory are their
        parameters and buffers.
        """
        ...

"""The reference fleet: eight digits models of four sizes and two seeds, trained and exported."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from forge_harness.model import DigitsConfig, DigitsModel
from forge_harness.protocols import Precision, TrainOptions
from forge_harness.training import QATSession, export_package
from forge_harness.training.randomness import RandomState

from .baking_manifest import BakingManifest
from .phase6_preparer import ExportedPackage, Phase6Preparer

STEPS = 322
WIDTHS = (48, 64, 80, 96)
SEEDS = (0, 1)
MANIFEST = "baking-manifest.json"


@dataclass(frozen=True, slots=True)
class Member:
    """One model of the fleet: width of its residual stream, and seed."""

    width: int
    seed: int

    @property
    def name(self) -> str:
        """Name of its package."""
        return f"digits-w{self.width}-s{self.seed}"


def reference_fleet() -> tuple[Member, ...]:
    """Returns the members, smallest first."""
    return tuple(Member(width, seed) for width in WIDTHS for seed in SEEDS)


def train_member(member: Member, steps: int = STEPS) -> QATSession:
    """Trains one member; deterministic."""

    def build(task: str, seed: int, precision: Precision) -> nn.Module:
        with RandomState(seed).active():
            config = DigitsConfig(width=member.width, hidden=2 * member.width)
            return DigitsModel(config, precision=precision)

    session = QATSession("digits", TrainOptions(seed=member.seed, steps=steps), build_model=build)
    for _ in range(steps):
        session.step()
    return session


def export_fleet(
    destination: Path,
    preparer: Phase6Preparer,
    *,
    members: tuple[Member, ...] | None = None,
    steps: int = STEPS,
    told: Callable[[ExportedPackage], None] | None = None,
) -> BakingManifest:
    """Trains and exports every member below a directory, and bakes their manifest.

    Raises:
        NotReadyError: A member is not ready; members exported before it stay.
        CheckpointError: A package is in the way, or there is no member.
    """
    packages = []
    for member in reference_fleet() if members is None else members:
        with tempfile.TemporaryDirectory(prefix="forge-fleet-") as directory:
            source = Path(directory) / member.name
            export_package(train_member(member, steps), source)
            exported = preparer.export(
                source, destination / member.name, lineage={"seed": member.seed, "steps": steps}
            )
        packages.append(exported.path)
        if told is not None:
            told(exported)
    return preparer.bake_manifest(packages, destination / MANIFEST)

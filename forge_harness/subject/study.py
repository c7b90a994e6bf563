"""Quality runs and their packages: those of the reference pipeline, and how any is unpacked."""

from __future__ import annotations

import base64
import binascii
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save
from torch import nn

from forge_harness import training
from forge_harness.paths import resolved_path
from forge_harness.protocols import Arm, Precision, QualityRun, TrainingSession, TrainOptions
from forge_harness.training.data import DataSource
from forge_harness.training.ingredients import BuildModel

Export = Callable[[TrainingSession, Path], None]


def study_run(
    task: str,
    arm: Arm,
    seed: int,
    profile: str,
    *,
    build_model: BuildModel,
    load: DataSource,
    export: Export,
) -> list[QualityRun]:
    """Trains and evaluates one arm as `training.quality_run` does; shows what it trained.

    A ternary run shows its package, and the full-precision run of seed 0 its weights: those of all
    seeds would make a study of the quick profile 30 MB.

    Args:
        task: `digits` or `bytes`.
        arm: `ternary` or `full`.
        seed: Of the run.
        profile: `quick`, `full` or `nightly`.
        build_model: As given to `training.quality_run`.
        load: As given to `training.quality_run`.
        export: Writes the package of a session.
    """
    built: list[tuple[str, nn.Module]] = []

    def kept(variant: str, model_seed: int, precision: Precision) -> nn.Module:
        model = build_model(variant, model_seed, precision)
        built.append((variant, model))
        return model

    runs = training.quality_run(task, arm, seed, profile, build_model=kept, load=load)
    variant, model = built[0]
    if arm == "full" and seed == 0 and runs[0].finite:
        return [replace(runs[0], weights=_weights(model), package_task=variant), *runs[1:]]
    if arm != "ternary" or not runs[0].finite:
        return runs
    session = training.QATSession(
        variant,
        TrainOptions(seed=seed, steps=runs[0].steps, extra={"profile": profile}),
        build_model=lambda *_: model,
        load=load,
        initial_weights=model.state_dict(),  # Given weights are not scaled as fresh ones are.
    )
    session.step_index = runs[0].steps
    with tempfile.TemporaryDirectory(prefix="forge-package-") as directory:
        package = Path(directory) / "package"
        export(session, package)
        files = {
            path.relative_to(package).as_posix(): base64.b64encode(path.read_bytes()).decode()
            for path in sorted(package.rglob("*"))
            if path.is_file()
        }
    return [replace(run, package=files, package_task=variant) for run in runs]


def _weights(model: nn.Module) -> str:
    # Copies: safetensors refuses tensors that share their memory, as tied ones do.
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return base64.b64encode(save(state)).decode()


def unpacked(run: QualityRun, directory: Path) -> Path:
    """Writes the package a run shows, below a directory, and returns where.

    Args:
        run: With a `package`.
        directory: There or not; gets a folder named after task and seed of the run.

    Raises:
        ValueError: A file of the package is no base64, or would lie outside of it.
    """
    package = directory / f"{run.task}-{run.seed}"
    for name, content in run.package.items():
        path = package / name
        if not resolved_path(path).is_relative_to(resolved_path(package)):
            raise ValueError(f"The package of {run.task} has a file outside of it: {name!r}.")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.write_bytes(base64.b64decode(content, validate=True))
        except binascii.Error as error:
            raise ValueError(f"The package's file {name!r} is no base64: {error}.") from error
    return package

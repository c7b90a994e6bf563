"""The quality comparison: ternary against tuned full precision, with post-training as control.

Both arms share architecture, data, order and steps; each has its own best learning rate and
residual gain. The `post_training` arm ternarizes the trained full-precision model without any
training: a task on which it keeps up would prove nothing about training.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from forge_harness.errors import NonFiniteError, UsageError
from forge_harness.formats.sizes import bytes_on_disk
from forge_harness.protocols import Arm, Precision, QualityRun, TrainOptions
from forge_harness.training.data import DataSource
from forge_harness.training.evaluation import Evaluation, evaluate_model
from forge_harness.training.ingredients import BuildModel, Loss, ingredients, set_compute
from forge_harness.training.package import PackageError, export_package
from forge_harness.training.session import QATSession
from forge_harness.training.splits import DIGITS_FOLDS, base_task

BLOCKS = {"digits": 16, "bytes": 32}
"""Blocks of held-out data: about 22 images, or 8 windows of 128 bytes."""
_CURVE_POINTS = 60
_EVALUATIONS = 10
# Held-out windows a point of the curve; 2,048 bytes, 0.1 s.
_CURVE_SAMPLES = {"digits": 400, "bytes": 16}


@dataclass(frozen=True, slots=True)
class Study:
    """Seeds and steps of a task in one profile."""

    seeds: int
    steps: int


STUDIES: dict[tuple[str, str], Study] = {
    # Many seeds of the small model rather than few of the large: the ratio of the arms varies by
    # 1.6 % from seed to seed, and with three seeds Student's t makes that +-4 %.
    ("bytes", "quick"): Study(seeds=11, steps=300),
    ("bytes", "full"): Study(seeds=11, steps=300),
    # Of the larger model: two core-minutes and more a run.
    ("bytes", "nightly"): Study(seeds=5, steps=1400),
    # 14 epochs; every image is held out twice, or four times.
    ("digits", "quick"): Study(seeds=10, steps=322),
    ("digits", "full"): Study(seeds=20, steps=322),
    ("digits", "nightly"): Study(seeds=20, steps=322),
}


def quality_plan(profile: str) -> list[tuple[str, Arm, int]]:
    """Returns (task, arm, seed) of every run, most expensive first.

    Args:
        profile: `quick`, `full` (more seeds) or `nightly` (longer runs of a larger model too).
    """
    arms: tuple[Arm, ...] = ("full", "ternary")
    return [
        (task, arm, seed)
        for task in ("bytes", "digits")
        for arm in arms
        for seed in range(STUDIES[(task, profile)].seeds)
    ]


def quality_run(
    task: str,
    arm: Arm,
    seed: int,
    profile: str,
    *,
    build_model: BuildModel | None = None,
    load: DataSource | None = None,
    loss: Loss | None = None,
) -> list[QualityRun]:
    """Trains and evaluates one arm (see `MeasuresQuality.quality_run`).

    A run of `digits` holds fold `seed` modulo 5 out; but for `nightly` it is `bytes#small` that is
    trained. A run that meets a non-finite value ends there, is evaluated with the weights it had,
    and says so in `finite`.

    Args:
        task: `digits` or `bytes`.
        arm: `ternary`, or `full`, which also returns the `post_training` row.
        seed: Of initial weights and data order.
        profile: `quick`, `full` or `nightly`.
        build_model: As given to `QATSession`.
        load: As given to `QATSession`.
        loss: As given to `QATSession`.

    Raises:
        UsageError: The arm has no run of its own.
    """
    if arm == "post_training":
        raise UsageError("Arm 'post_training' comes with the 'full' run of the same seed.")
    parts = ingredients(build_model, load, loss)
    precision: Precision = "ternary" if arm == "ternary" else "full"
    options = TrainOptions(
        seed=seed,
        steps=STUDIES[(base_task(task), profile)].steps,
        precision=precision,
        extra={"profile": profile},
    )
    session = QATSession(
        _variant(task, seed, profile), options, build_model=build_model, load=parts.data, loss=loss
    )
    if has_fast_int8():
        set_compute(session.model, "int8")
    run = _trained(session, arm)
    if arm == "ternary":
        return [replace(run, package_bytes=_package_bytes(session, run.finite))]
    quantized = parts.build_model(session.task, seed, "ternary")
    quantized.load_state_dict(session.model.state_dict())
    control = evaluate_model(quantized, parts.data, session.task)
    return [run, _with_quality(replace(run, arm="post_training", curve=()), control)]


def has_fast_int8() -> bool:
    """Whether this CPU multiplies int8 and bf16 in hardware; `exact` is faster where not."""
    capability = torch.backends.cpu.get_cpu_capability()
    return "AVX512" in capability and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _variant(task: str, seed: int, profile: str) -> str:
    if task == "digits":
        return f"digits#{seed % DIGITS_FOLDS}"
    return "bytes#small" if task == "bytes" and profile != "nightly" else task


def _trained(session: QATSession, arm: Arm) -> QualityRun:
    started = time.perf_counter()
    curve, finite = _train(session)
    seconds = time.perf_counter() - started
    result = evaluate_model(session.model, session.data, session.task)
    if curve:
        step, training_loss, _ = curve[-1]
        curve[-1] = (step, training_loss, result.accuracy)
    blank = QualityRun(
        task=base_task(session.task),
        arm=arm,
        seed=session.options.seed,
        steps=session.step_index,
        learning_rate=session.recipe.learning_rate,
        parameters=sum(parameter.numel() for parameter in session.model.parameters()),
        accuracy=0.0,
        loss=0.0,
        block_correct=(),
        block_size=(),
        curve=tuple(curve),
        finite=finite,
        seconds=seconds,
        peak_rss_bytes=_peak_rss_bytes(),
        data_digest=session.data.data_digest(session.task),
        full_precision_bytes=_bytes_as(session.model, torch.float32),
        bf16_bytes=_bytes_as(session.model, torch.bfloat16),
    )
    return _with_quality(blank, result)


def _train(session: QATSession) -> tuple[list[tuple[int, float, float]], bool]:
    """Returns the curve, and whether every value was finite.

    A point holds the mean training loss since the point before it.
    """
    steps = session.options.steps
    marks = _marks(steps, _CURVE_POINTS)
    evaluated = _marks(steps, _EVALUATIONS)
    curve: list[tuple[int, float, float]] = []
    losses: list[float] = []
    while session.step_index < steps:
        try:
            record = session.step()
        except NonFiniteError:
            return curve, False
        losses.append(record.loss)
        if record.step in marks or record.step in evaluated:
            accuracy = _accuracy(session) if record.step in evaluated else -1.0
            curve.append((record.step, sum(losses) / len(losses), accuracy))
            losses.clear()
    return curve, True


def _marks(steps: int, count: int) -> set[int]:
    return {(index + 1) * steps // count - 1 for index in range(count)}


def _accuracy(session: QATSession) -> float:
    """Accuracy on evenly spaced held-out samples; the last point is replaced by all of them."""
    if session.step_index == session.options.steps:
        return -1.0
    size = session.data.data_info(session.task).validation_size
    count = min(size, _CURVE_SAMPLES[base_task(session.task)])
    ids = [index * size // count for index in range(count)]
    return evaluate_model(session.model, session.data, session.task, ids=ids).accuracy


def _with_quality(run: QualityRun, result: Evaluation) -> QualityRun:
    correct, sizes = result.blocks(BLOCKS[run.task])
    return replace(
        run, accuracy=result.accuracy, loss=result.loss, block_correct=correct, block_size=sizes
    )


def _package_bytes(session: QATSession, finite: bool) -> int:
    """Size on disk of every file of the package; 0 for a run whose values went astray."""
    with tempfile.TemporaryDirectory(prefix="forge-package-") as directory:
        package = Path(directory) / "package"
        try:
            export_package(session, package)
        except PackageError:
            if finite:
                raise
            return 0
        return bytes_on_disk(package)


def _bytes_as(model: nn.Module, dtype: torch.dtype) -> int:
    """Size of the model's weights in a safetensors file, floating ones in `dtype`, tied once."""
    unique = {id(t): (key, t.detach()) for key, t in model.state_dict(keep_vars=True).items()}
    return len(
        save(
            {
                key: tensor.to(dtype) if tensor.is_floating_point() else tensor
                for key, tensor in unique.values()
            }
        )
    )


def _peak_rss_bytes() -> int:
    """Peak resident memory of this process so far: of all runs in it, the largest."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

"""What a quantization-aware step costs beside a full-precision one, interleaved in one process."""

from __future__ import annotations

import time
from dataclasses import dataclass

from forge_harness.errors import UsageError
from forge_harness.protocols import Precision, TrainOptions
from forge_harness.quant import Compute
from forge_harness.training.ingredients import BuildModel
from forge_harness.training.session import QATSession


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of paired steps: entry i of both was taken back to back.

    Attributes:
        quantized_s: Wall seconds of each quantization-aware step.
        full_precision_s: Wall seconds of the full-precision fp32 eager step beside it.
    """

    quantized_s: tuple[float, ...]
    full_precision_s: tuple[float, ...]


def measure_step_cost(
    task: str = "bytes",
    *,
    pairs: int = 12,
    batch_size: int = 8,
    compute: Compute = "int8",
    compile_model: bool = False,
    warmup: int = 2,
    build_model: BuildModel | None = None,
) -> StepCost:
    """Times whole steps (forward, backward, clipping, AdamW) of both arms on the same samples.

    The order within a pair alternates, so that drift of the machine's clock hits both alike.

    Args:
        task: Task of both sessions.
        pairs: Timed pairs.
        batch_size: Samples a step.
        compute: Arithmetic of the ternary layers; `int8` is the fastest on CPUs with AVX-512
            VNNI and BF16, `exact` elsewhere.
        compile_model: Compile the quantization-aware step; the first step then takes tens of
            seconds, and a C++ compiler is needed.
        warmup: Pairs made before timing starts.
        build_model: As for `QATSession`.

    Raises:
        UsageError: `pairs` is below 1.
    """
    if pairs < 1:
        raise UsageError(f"pairs {pairs} must be at least 1.")
    extra = {"compute": compute, "compile": compile_model}

    def session(precision: Precision) -> QATSession:
        options = TrainOptions(
            steps=warmup + pairs,
            precision=precision,
            batch_size=batch_size,
            extra=extra if precision == "ternary" else {},
        )
        return QATSession(task, options, build_model=build_model)

    arms = {precision: session(precision) for precision in ("ternary", "full")}
    seconds: dict[str, list[float]] = {"ternary": [], "full": []}
    for index in range(warmup + pairs):
        order = ("ternary", "full") if index % 2 else ("full", "ternary")
        for precision in order:
            started = time.perf_counter()
            arms[precision].step()
            seconds[precision].append(time.perf_counter() - started)
    return StepCost(tuple(seconds["ternary"][warmup:]), tuple(seconds["full"][warmup:]))

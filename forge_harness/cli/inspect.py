"""`forge-harness inspect`: what a checkpoint is, and whether it is sound."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from forge_harness.cli.checkpoints import READING, read_options, reading_options, refuse_idle
from forge_harness.cli.options import NamedPath, examples, json_option
from forge_harness.cli.terminal import echo_json, printable, several, table
from forge_harness.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from forge_harness.formats.inspection import InspectedTensor, Inspection
    from forge_harness.formats.sizes import Sizes


@click.command(
    "inspect",
    epilog=examples(
        "forge-harness inspect checkpoints/bitnet-2b",
        "forge-harness inspect --matrix",
        "forge-harness inspect model.gguf --i2s-layout x86-act --json",
    ),
)
@click.argument("path", metavar="[PATH]", required=False, type=NamedPath())
@click.option(
    "--matrix", is_flag=True, help="Measure the compatibility matrix on frozen models instead."
)
@reading_options
@json_option
def inspect_command(
    path: Path | None,
    matrix: bool,
    as_json: bool,
    **reading: Any,  # noqa: ANN401 - the options of `reading_options`
) -> int:
    """Say what a checkpoint is, why, and whether it is sound; read every tensor.

    Exit code 8 when it does not hold what it claims, 4 when it is no checkpoint or a question is
    open that only you can answer.
    """
    if matrix == (path is not None):
        raise UsageError("Name a checkpoint to inspect, or --matrix.")
    if path is None:
        refuse_idle(READING, "--matrix")
        return _matrix(as_json)
    from forge_harness.formats.inspection import inspect_checkpoint

    inspection = inspect_checkpoint(path, read_options(reading))
    if as_json:
        echo_json(inspection_json(inspection))
    else:
        click.echo(inspection_text(inspection))
    if inspection.damage:
        return ExitCode.VERIFICATION_FAILED
    return ExitCode.PASS if inspection.sound else ExitCode.USAGE


def _matrix(as_json: bool) -> int:
    from forge_harness.integration.compatibility import compatibility_json
    from forge_harness.integration.phase4_connector import Phase4Connector

    rows = Phase4Connector().compatibility()
    if as_json:
        echo_json(compatibility_json(rows))
        return ExitCode.PASS
    cells = [
        (
            row.model_type,
            row.format,
            row.conversion,
            row.codes_changed,
            f"{row.scale_change:.1g}",
            f"{100 * row.accuracy_before:.2f} %",
            f"{100 * row.accuracy_after:.2f} %",
            f"{100 * row.impact:.2f} %",
        )
        for row in rows
    ]
    headers = ("model type", "detected as", "conversion", "codes changed", "scale change")
    click.echo(table((*headers, "accuracy before", "after", "impact"), cells))
    return ExitCode.PASS


def inspection_json(inspection: Inspection) -> dict[str, Any]:
    """Returns an inspection as JSON values."""
    detection, checkpoint, sizes = inspection.detection, inspection.checkpoint, inspection.sizes
    return {
        "path": str(inspection.path),
        "format": detection.format,
        "version": detection.version,
        "reasons": list(detection.reasons),
        "questions": [] if checkpoint else list(detection.questions),
        "sound": inspection.sound,
        "damage": list(inspection.damage),
        "anomalies": [{"tensor": a.tensor, "what": a.what} for a in inspection.anomalies],
        "model": checkpoint
        and {"family": checkpoint.model.family, "config": dict(checkpoint.model.config)},
        "quantization": checkpoint and dict(checkpoint.quantization),
        "tied": checkpoint and dict(checkpoint.tied),
        "totals": sizes and _totals(sizes),
        "tensors": [_tensor_json(tensor) for tensor in inspection.tensors],
    }


def _totals(sizes: Sizes) -> dict[str, Any]:
    return {
        "file_bytes": sizes.file_bytes,
        "ternary_weights": sizes.ternary_weights,
        "plain_weights": sizes.plain_weights,
        "bits_per_ternary_weight": sizes.bits_per_ternary_weight,
        "fp32_bytes": sizes.fp32_bytes,
        "bf16_bytes": sizes.bf16_bytes,
        "fp32_ratio": sizes.fp32_bytes / sizes.file_bytes,
        "bf16_ratio": sizes.bf16_bytes / sizes.file_bytes,
    }


def _tensor_json(tensor: InspectedTensor) -> dict[str, Any]:
    info, counts = tensor.info, tensor.counts
    common = {
        "name": info.name,
        "kind": info.kind,
        "shape": list(info.shape),
        "layout": info.layout,
        "bytes": info.nbytes,
        "sha256": tensor.sha256,
    }
    if counts is None:
        return common
    return common | {
        "parts": list(info.parts),
        "scales": list(tensor.scales),
        "counts": {"-1": counts.minus, "0": counts.zero, "1": counts.plus},
        "density": counts.density,
        "bits_per_weight": _bits(tensor),
    }


def inspection_text(inspection: Inspection) -> str:
    """Returns an inspection as text: what it is, sizes, ternary tensors, what is odd."""
    detection, checkpoint = inspection.detection, inspection.checkpoint
    version = f" {detection.version}" if detection.version else ""
    head = [f"{inspection.path}: {detection.format}{version}"]
    head += [f"  because {reason}" for reason in detection.reasons]
    if checkpoint is not None:
        facts = ", ".join(f"{key} {value}" for key, value in checkpoint.quantization.items())
        head.append(f"Model family {checkpoint.model.family}; {facts or 'no quantization stated'}")
        head += [f"Tied: {alias} is {name}" for alias, name in checkpoint.tied.items()]
    found = []
    if inspection.sizes is not None:
        found = [_sizes_text(inspection.sizes), "", _tensors_text(inspection), ""]
    tail = [f"Odd: {a.tensor + ': ' if a.tensor else ''}{a.what}" for a in inspection.anomalies]
    tail += [f"Damaged: {sentence}" for sentence in inspection.damage]
    if checkpoint is None:
        tail += [f"Open question: {question}" for question in detection.questions]
    # Names and paths are a stranger's, who must not write lines of his own.
    lines = [*map(printable, head), *found, *map(printable, tail)]
    return "\n".join([*lines, _conclusion(inspection)])


def _conclusion(inspection: Inspection) -> str:
    if inspection.damage:
        return f"Not sound: {len(inspection.damage)} damaged."
    if not inspection.sound:
        return "Not read: answer the open question."
    count, odd = len(inspection.tensors), several(len(inspection.anomalies), "oddity", "oddities")
    read = f"all {count} tensors were" if count != 1 else "its 1 tensor was"
    return f"Sound: {read} read, {odd}."


def _sizes_text(sizes: Sizes) -> str:
    return (
        f"{sizes.ternary_weights:,} ternary weights at {sizes.bits_per_ternary_weight:.3f} bits, "
        f"{sizes.plain_weights:,} others; {sizes.file_bytes:,} bytes on disk, "
        f"{sizes.fp32_bytes / sizes.file_bytes:.2f} times smaller than fp32, "
        f"{sizes.bf16_bytes / sizes.file_bytes:.2f} than bf16"
    )


def _tensors_text(inspection: Inspection) -> str:
    rows = []
    for tensor in inspection.tensors:
        info, counts = tensor.info, tensor.counts
        shape = " x ".join(map(str, info.shape)) or "scalar"
        if counts is None:
            rows.append((info.name, shape, info.layout, "-", "-", "-"))
            continue
        scales = " ".join(f"{scale:.6g}" for scale in tensor.scales)
        rows.append(
            (info.name, shape, info.layout, f"{counts.density:.3f}", f"{_bits(tensor):.3f}", scales)
        )
    return table(("tensor", "shape", "layout", "density", "bits", "scale"), rows)


def _bits(tensor: InspectedTensor) -> float:
    return 8 * tensor.info.nbytes / max(1, prod(tensor.info.shape))

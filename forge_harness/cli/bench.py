"""`forge-harness bench`: speed, as ratios measured in one run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from forge_harness.canonical import canonical_json
from forge_harness.durable import is_written_through, write_durably
from forge_harness.errors import ExitCode, UsageError
from forge_harness.paths import resolved_path

from .options import NamedPath, WholeNumber, check_target, examples, once
from .terminal import say

if TYPE_CHECKING:
    from forge_harness.benchmarks.conversion import ConversionRow
    from forge_harness.benchmarks.products import Case, Row

_MAX_WEIGHTS = 1 << 30
"""4 GiB of them in fp32, which peers multiply with; a layer of a 70B model has at most as many."""
_THREADS = WholeNumber(min=1, max=max(256, os.cpu_count() or 1))
"""Far more threads than processors end the process that asks for them."""
_PROMPT = WholeNumber(min=1, max=1 << 17)
"""Longer ones than models are made for take hours."""
_BATCH = WholeNumber(min=1, max=1 << 12)
"""Half a million tokens a step; activations of more do not fit in memory."""


@click.group("bench", epilog=examples("forge-harness bench kernels --tokens 1 --threads 1"))
def bench_group() -> None:
    """Measure speed, as ratios over ceilings and peers timed in the same run."""


@bench_group.command(
    "kernels",
    epilog=examples(
        "forge-harness bench kernels",
        "forge-harness bench kernels --shape 2560x6912 --tokens 1 --threads 2 --json bench.json",
        "forge-harness bench kernels --path avx2 --no-peers --plot bench.svg",
    ),
)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    callback=once,
    metavar="NxK",
    help="Weight sizes; repeatable.",
)
@click.option(
    "--tokens", multiple=True, callback=once, type=WholeNumber(min=1), help="M; repeatable."
)
@click.option("--threads", multiple=True, callback=once, type=_THREADS, help="Repeatable.")
@click.option("--path", "kernel_path", help="Instruction set; the fastest one by default.")
@click.option("--rounds", default=15, type=WholeNumber(min=6), help="Batches of a candidate.")
@click.option("--peers/--no-peers", default=True, help="Also time torch's products.")
@click.option(
    "--ggml",
    "ggml_path",
    metavar="PATH",
    type=NamedPath(exists=True),
    help="Also time TQ2_0 of this build of ggml: libggml-cpu.so, or a directory above it.",
)
@click.option(
    "--i2s",
    "i2s_path",
    metavar="FILE",
    type=NamedPath(exists=True, dir_okay=False),
    help="Also time I2_S of this shared library of bitnet.cpp's ggml-bitnet-mad.cpp (one thread).",
)
@click.option("--inductor", is_flag=True, help="Also time torch.compile with frozen bf16 weights.")
@click.option("--json", "json_file", type=NamedPath(), help="Write everything here.")
@click.option("--plot", "plot_file", type=NamedPath(), help="Write an SVG here.")
def kernels_command(
    shapes: tuple[str, ...],
    tokens: tuple[int, ...],
    threads: tuple[int, ...],
    kernel_path: str | None,
    rounds: int,
    peers: bool,
    ggml_path: Path | None,
    i2s_path: Path | None,
    inductor: bool,
    json_file: Path | None,
    plot_file: Path | None,
) -> int:
    """Time the ternary products on this processor.

    Ceilings (the path's multiply-add on registers, and reading the packed bytes) and peers (torch
    fp32, bf16, int8) take turns with ours in the same process; ratios are medians over paired
    rounds. "cold" rotates through copies of the weights that no cache holds; small weights are
    timed hot only.
    """
    from forge_harness.benchmarks import products
    from forge_harness.benchmarks.ggml import GgmlLibrary
    from forge_harness.benchmarks.i2s import I2sLibrary
    from forge_harness.integration.stops import interrupted_once

    ggml = None if ggml_path is None else GgmlLibrary(ggml_path)
    i2s = None if i2s_path is None else I2sLibrary(i2s_path)
    sizes = [_shape(text) for text in shapes] or list(products.SHAPES)
    counts = tokens or products.TOKENS
    cores = threads or _cores()
    cases = _cases(sizes, counts, cores)
    if 1 in counts:
        _say_hot_only(sizes)
    if ggml is not None:
        taken = [case for case in cases if products.ggml_takes(case)]
        _say_left_out(products.GGML, taken, cases, "whole blocks of 256 columns")
    if i2s is not None:
        taken = [case for case in cases if products.i2s_takes(case)]
        _say_left_out(products.I2S, taken, cases, "one thread and whole blocks of 128 columns")
    for target in (json_file, plot_file):
        check_target(target)
    if json_file is not None and plot_file is not None:
        _check_apart(json_file, plot_file)
    started = datetime.now(UTC)
    rows: list[Row] = []
    with interrupted_once():
        try:
            for index, case in enumerate(cases):
                rows.append(
                    products.measure(
                        case,
                        path=kernel_path,
                        peers=peers,
                        rounds=rounds,
                        ggml=ggml,
                        i2s=i2s,
                        inductor=inductor,
                    )
                )
                say(f"{index + 1}/{len(cases)} {case.label}")
        finally:
            # Minutes of measuring are shown and kept also where the rest failed or was interrupted.
            if rows:
                _show_products(rows, len(cases), started, json_file, plot_file)
    return ExitCode.PASS


def _check_apart(json_file: Path, plot_file: Path) -> None:
    if resolved_path(json_file) == resolved_path(plot_file) and not is_written_through(json_file):
        raise UsageError(
            f"--json and --plot are both {json_file}; expected two files: the second would replace "
            "the first."
        )


def _show_products(
    rows: list[Row],
    planned: int,
    started: datetime,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    from forge_harness.benchmarks import report

    is_complete = len(rows) == planned
    shown = (
        f"{report.table(rows)}\nceiling: the slower of multiplying on registers and reading the "
        "packed bytes, measured in the same rounds; x: times faster, median of paired rounds."
    )
    if not is_complete:
        shown += f"\nNot complete: {len(rows)} of {planned} products were measured."
    with _shown_at_last(shown):
        if json_file is not None:
            document = report.document(rows, started=started, is_complete=is_complete)
            write_durably(json_file, canonical_json(document))
        if plot_file is not None:
            write_durably(plot_file, report.plot(rows).encode())


@contextmanager
def _shown_at_last(table: str) -> Iterator[None]:
    """Shows what was measured once it is kept, or could not be; it took minutes.

    The other way round, nothing was kept where nobody read all of it (`| head`).
    """
    try:
        yield
    finally:
        click.echo(table)


@contextmanager
def _kept(
    benchmark: str, table: Callable[[Any], str], json_file: Path | None
) -> Iterator[Callable[[Any], object]]:
    """Gives a function to call with what was found so far; at the end shows and keeps the last.

    Also where the rest failed or was interrupted, by the first of several signals.
    """
    from dataclasses import asdict

    from forge_harness.benchmarks import report
    from forge_harness.integration.stops import interrupted_once

    started = datetime.now(UTC)
    found: list[Any] = []
    is_complete = False
    with interrupted_once():
        try:
            yield found.append
            is_complete = True
        finally:
            if found:
                rest = "" if is_complete else "\nNot complete: the rest was not measured."
                with _shown_at_last(table(found[-1]) + rest):
                    if json_file is not None:
                        content = {
                            **report.heading(benchmark, started),
                            "is_complete": is_complete,
                            **asdict(found[-1]),
                        }
                        write_durably(json_file, canonical_json(content))


@bench_group.command(
    "lm",
    epilog=examples(
        "forge-harness bench lm",
        "forge-harness bench lm --width 512 --layers 4 --threads 1 --json lm.json",
    ),
)
@click.option("--width", default=1024, type=WholeNumber(min=64), help="Model width.")
@click.option("--layers", default=8, type=WholeNumber(min=1), help="Blocks.")
@click.option("--prompt", default=128, type=_PROMPT, help="Tokens in front.")
@click.option("--threads", multiple=True, callback=once, type=_THREADS, help="Repeatable.")
@click.option("--rounds", default=11, type=WholeNumber(min=6), help="Batches of a contender.")
@click.option("--json", "json_file", type=NamedPath(), help="Write everything here.")
def lm_command(
    width: int,
    layers: int,
    prompt: int,
    threads: tuple[int, ...],
    rounds: int,
    json_file: Path | None,
) -> int:
    """Time a whole language model: packed against dense fp32 and bf16, batch 1.

    All run the same decoder with a cache and differ in their linear layers and dtype alone. The
    packed model's logits are compared with those of the model it was packed from.
    """
    _check_model(width, layers)
    check_target(json_file)
    from forge_harness.benchmarks import language_model, report

    cores = threads or _cores()
    with _kept("lm", report.language_model_table, json_file) as so_far:
        language_model.measure(
            width=width, layers=layers, prompt=prompt, threads=cores, rounds=rounds, so_far=so_far
        )
    return ExitCode.PASS


@bench_group.command(
    "train",
    epilog=examples(
        "forge-harness bench train",
        "forge-harness bench train --threads 1 --compiled --torchao --json train.json",
    ),
)
@click.option("--width", default=256, type=WholeNumber(min=64), help="Model width.")
@click.option("--layers", default=2, type=WholeNumber(min=1), help="Blocks.")
@click.option("--batch", default=16, type=_BATCH, help="Samples of 128 tokens a step.")
@click.option("--threads", multiple=True, callback=once, type=_THREADS, help="Repeatable.")
@click.option("--rounds", default=15, type=WholeNumber(min=6), help="Steps of a contender.")
@click.option("--compiled", is_flag=True, help="Also time each through torch.compile (minutes).")
@click.option("--torchao", "with_torchao", is_flag=True, help="Also time torchao's training.")
@click.option("--json", "json_file", type=NamedPath(), help="Write everything here.")
def train_command(
    width: int,
    layers: int,
    batch: int,
    threads: tuple[int, ...],
    rounds: int,
    compiled: bool,
    with_torchao: bool,
    json_file: Path | None,
) -> int:
    """Time a training step: ternary against full precision, in the same trainer.

    Steps of all contenders take turns on the same samples, from the same weights; the losses of
    their first steps show what the arithmetic changes. --torchao needs torchao installed.
    """
    _check_model(width, layers)
    check_target(json_file)
    from forge_harness.benchmarks import report, training

    cores = threads or _cores()
    with _kept("train", report.training_table, json_file) as so_far:
        training.measure(
            width=width,
            layers=layers,
            batch=batch,
            threads=cores,
            rounds=rounds,
            compiled=compiled,
            with_torchao=with_torchao,
            so_far=so_far,
        )
    return ExitCode.PASS


@bench_group.command(
    "store",
    epilog=examples(
        "forge-harness bench store",
        "forge-harness bench store --dir /data --blob-mib 256 --json store.json",
    ),
)
@click.option(
    "--dir",
    "place",
    type=NamedPath(file_okay=False, exists=True),
    default=Path(),
    help="A directory on the disk to measure (default: here).",
)
@click.option("--blob-mib", default=1024, type=WholeNumber(min=1), help="Large content.")
@click.option("--states", default=10_000, type=WholeNumber(min=1), help="In the opened store.")
@click.option("--rounds", default=7, type=WholeNumber(min=6), help="Turns of a candidate.")
@click.option("--json", "json_file", type=NamedPath(), help="Write everything here.")
def store_command(
    place: Path, blob_mib: int, states: int, rounds: int, json_file: Path | None
) -> int:
    """Time the state store against the least a durable store can do on this disk.

    Commits against bare SQLite transactions, a large content against write, fsync and sha256 of the
    same bytes, sealing against AES-256-GCM in memory; each pair takes turns.
    """
    from forge_harness.benchmarks import report, storage

    check_target(json_file)
    # Ended otherwise, it would leave gigabytes in `place`.
    with _kept("store", report.storage_table, json_file) as so_far:
        storage.measure(
            place,
            blob_bytes=blob_mib << 20,
            states=states,
            rounds=rounds,
            told=say,
            so_far=so_far,
        )
    return ExitCode.PASS


@bench_group.command(
    "convert",
    epilog=examples(
        "forge-harness bench convert",
        "forge-harness bench convert --source runs/lm/package --to gguf-tq2_0 --json convert.json",
    ),
)
@click.option(
    "--dir",
    "place",
    type=NamedPath(file_okay=False, exists=True),
    default=Path(),
    help="A directory on the disk to measure (default: here).",
)
@click.option(
    "--source",
    type=NamedPath(exists=True),
    help="Checkpoint to convert (default: random codes in the shapes of a 7B model).",
)
@click.option(
    "--to",
    "targets",
    multiple=True,
    callback=once,
    metavar="FORMAT",
    help="Repeatable; all by default.",
)
@click.option("--blocks", default=2, type=WholeNumber(min=1), help="Blocks of the random model.")
@click.option("--rounds", default=7, type=WholeNumber(min=6), help="Turns of a candidate.")
@click.option("--json", "json_file", type=NamedPath(), help="Write everything here.")
def convert_command(
    place: Path,
    source: Path | None,
    targets: tuple[str, ...],
    blocks: int,
    rounds: int,
    json_file: Path | None,
) -> int:
    """Time conversions against reading the source and writing the result durably.

    Each with and without the comparison of result and source, which `convert` makes unless it is
    told not to; conversion and copy take turns.
    """
    from forge_harness.benchmarks import conversion
    from forge_harness.errors import unknown_choice
    from forge_harness.formats import FORMATS
    from forge_harness.integration.stops import interrupted_once

    for target in targets:
        if target not in FORMATS:
            raise UsageError(unknown_choice("format", target, FORMATS))
    check_target(json_file)
    chosen = targets or FORMATS
    started = datetime.now(UTC)
    rows: list[ConversionRow] = []
    with interrupted_once():
        try:
            for row in conversion.measured(
                place, source=source, targets=chosen, blocks=blocks, rounds=rounds, told=say
            ):
                rows.append(row)
        finally:
            # As in `kernels_command`: a format may be unable to hold the source.
            if rows:
                _show_conversions(rows, 2 * len(chosen), started, json_file)
    return ExitCode.PASS


def _show_conversions(
    rows: list[ConversionRow], planned: int, started: datetime, json_file: Path | None
) -> None:
    from dataclasses import asdict

    from forge_harness.benchmarks import report

    is_complete = len(rows) == planned
    shown = report.conversion_table(rows)
    if not is_complete:
        shown += f"\nNot complete: {len(rows)} of {planned} conversions were measured."
    with _shown_at_last(shown):
        if json_file is not None:
            content = {
                **report.heading("convert", started),
                "is_complete": is_complete,
                "rows": [asdict(row) for row in rows],
            }
            write_durably(json_file, canonical_json(content))


def _cores() -> tuple[int, ...]:
    """Returns one and two threads, as far as this process may use as many processors."""
    affinity = getattr(os, "sched_getaffinity", None)
    usable = os.cpu_count() or 1 if affinity is None else len(affinity(0))
    return tuple(range(1, min(2, usable) + 1))


def _check_model(width: int, layers: int) -> None:
    if width % 64:
        raise UsageError(f"--width {width} is no multiple of 64, the size of a head.")
    # 4 width^2 of attention and 9 of the feed-forward a block.
    if 13 * width**2 * layers > _MAX_WEIGHTS:
        raise UsageError(
            f"--width {width} with --layers {layers} is too large; expected at most "
            f"{_MAX_WEIGHTS:,} weights in all."
        )


def _cases(
    sizes: list[tuple[int, int]], tokens: tuple[int, ...], threads: tuple[int, ...]
) -> list[Case]:
    from forge_harness.benchmarks.products import Case, can_be_cold

    widest, most = max(max(size) for size in sizes), max(tokens)
    if most * widest > _MAX_WEIGHTS:
        raise UsageError(
            f"--tokens {most} is too many for {widest:,} features; expected at most "
            f"{_MAX_WEIGHTS // widest:,}: activations and results have to fit in memory."
        )
    return [
        Case(m, n, k, cold, count)
        for count in threads
        for m in tokens
        for n, k in sizes
        # More tokens than one are bound by arithmetic wherever the weights are.
        for cold in ((True, False) if m == 1 and can_be_cold(n, k) else (False,))
    ]


def _say_hot_only(sizes: list[tuple[int, int]]) -> None:
    from forge_harness.benchmarks.products import can_be_cold

    for rows, columns in sizes:
        if not can_be_cold(rows, columns):
            say(f"{rows}x{columns} is timed hot only: thousands of copies of it fit in caches.")


def _say_left_out(peer: str, taken: list[Case], cases: list[Case], needs: str) -> None:
    if len(taken) < len(cases):
        say(f"{peer} is timed for {len(taken)} of {len(cases)} products: it takes {needs}.")


def _shape(text: str) -> tuple[int, int]:
    from forge_harness.kernels import MAX_COLUMNS

    # Longer numbers than any size has are not even read.
    match = re.fullmatch(r"0*([1-9]\d{0,11})x0*([1-9]\d{0,11})", text.lower(), re.ASCII)
    if match is None:
        raise UsageError(f"--shape {text!r} is no size; expected rows x columns, as 2560x6912.")
    rows, columns = int(match[1]), int(match[2])
    if columns > MAX_COLUMNS or rows * columns > _MAX_WEIGHTS:
        raise UsageError(
            f"--shape {text!r} is too large; expected at most {MAX_COLUMNS:,} columns and "
            f"{_MAX_WEIGHTS:,} weights."
        )
    return rows, columns

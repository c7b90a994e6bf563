"""`forge-harness convert`: a checkpoint in another format."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from forge_harness.cli.checkpoints import read_options, reading_options
from forge_harness.cli.options import NamedPath, examples, json_option
from forge_harness.cli.terminal import echo_json
from forge_harness.errors import ExitCode, UsageError, several

if TYPE_CHECKING:
    from forge_harness.formats.convert import ConversionReport

# Stated here, not imported: `--help` must not import torch. A test holds them equal.
FORMATS = ("hf-packed", "hf-online", "gguf-tq1_0", "gguf-tq2_0", "native")
_CHOICES = {"hf_scale": "hf-packed", "gguf_scale": "gguf-", "master_dtype": "hf-online"}
"""Option -> the format, or the start of those, that it is a choice within."""


@click.command(
    "convert",
    epilog=examples(
        "forge-harness convert runs/lm/package lm-hf --to hf-packed",
        "forge-harness convert checkpoints/bitnet-2b bitnet.gguf --to gguf-tq2_0",
    ),
)
@click.argument("source", metavar="SRC", type=NamedPath())
@click.argument("destination", metavar="DST", type=NamedPath())
@click.option("--to", required=True, type=click.Choice(FORMATS), help="Format to write.")
@click.option(
    "--hf-scale",
    type=click.Choice(["multiply", "divide"]),
    show_default="multiply; divide where a ternary layer has a bias",
    help="hf-packed: autobitlinear (multiply) or bitlinear (divide).",
)
@click.option(
    "--gguf-scale",
    type=click.Choice(["block", "tensor"]),
    default="block",
    show_default=True,
    help="GGUF: fp16 scale in every block, or exact in a tensor of its own.",
)
@click.option(
    "--master-dtype",
    type=click.Choice(["F32", "BF16"]),
    default="F32",
    show_default=True,
    help="hf-online: dtype of weights that are made from codes.",
)
@click.option("--no-compare", is_flag=True, help="Do not read the result back and compare it.")
@reading_options
@json_option
def convert_command(
    source: Path,
    destination: Path,
    to: str,
    hf_scale: Any,  # noqa: ANN401 - one of the choices
    gguf_scale: Any,  # noqa: ANN401
    master_dtype: Any,  # noqa: ANN401
    no_compare: bool,
    as_json: bool,
    **reading: Any,  # noqa: ANN401 - the options of `reading_options`
) -> int:
    """Write checkpoint SRC as DST in another format, and compare the two.

    SRC is a file or directory in any readable format. DST is a new directory, or for GGUF a new
    file. It appears whole, on disk and compared with the source, or not at all.
    """
    from forge_harness.formats import WriteOptions
    from forge_harness.formats.convert import convert

    _refuse_unwritten(to)
    report = convert(
        source,
        destination,
        to,
        read=read_options(reading),
        write=WriteOptions(
            scale_convention=hf_scale, gguf_scale=gguf_scale, master_dtype=master_dtype
        ),
        compare=not no_compare,
    )
    if as_json:
        echo_json(asdict(report))
    else:
        click.echo(_text(report))
    return ExitCode.PASS


def _refuse_unwritten(to: str) -> None:
    """Refuses a choice within another format than the one that is written."""
    context = click.get_current_context()
    for name, format_ in _CHOICES.items():
        given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if given and not to.startswith(format_):
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} changes nothing in {to}; leave it out.")


def _text(report: ConversionReport) -> str:
    lines = [
        f"{report.source} ({report.source_format}) -> {report.destination} ({report.format}): "
        f"{report.source_bytes:,} -> {report.destination_bytes:,} bytes",
        *(f"Note: {note}" for note in report.notes),
    ]
    if (found := report.comparison) is None:
        lines.append("Not compared.")
    else:
        lines.append(
            f"Compared: {several(found.ternary, 'ternary tensor')}, {found.ternary_weights:,} "
            f"weights; codes changed in {found.codes_changed}, scales by at most "
            f"{found.scale_change:.2g}, other tensors changed {found.plain_changed}."
        )
    return "\n".join(lines)

"""`forge-harness export`: packages for phase 6, judged from their files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from forge_harness.cli.checkpoints import READING, read_options, reading_options, refuse_idle
from forge_harness.cli.options import NamedPath, examples, json_option
from forge_harness.cli.terminal import echo_json, several, table
from forge_harness.errors import ExitCode, UsageError
from forge_harness.paths import is_utf8, resolved_path

if TYPE_CHECKING:
    from forge_harness.integration.phase6_preparer import ExportedPackage

FORMATS = ("hf-packed", "hf-online", "gguf-tq1_0", "gguf-tq2_0")
MANIFEST = "baking-manifest.json"


@click.command(
    "export",
    epilog=examples(
        "forge-harness export runs/digits --out packages/digits",
        "forge-harness export runs/a runs/b --out packages",
        "forge-harness export --fleet --out packages",
    ),
)
@click.argument("sources", metavar="[SOURCE]...", nargs=-1, type=NamedPath())
@click.option(
    "--out",
    required=True,
    type=NamedPath(),
    metavar="DIR",
    help="New directory: the package, or one directory a package for several sources.",
)
@click.option("--fleet", is_flag=True, help="Train and export the reference fleet of 8 models.")
@click.option("--name", help="Name of the package (default: that of DIR); one source only.")
@click.option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice(FORMATS),
    help="Also in this format, in a directory of its name (repeatable).",
)
@click.option("--allow-not-ready", is_flag=True, help="Write a package that is not ready too.")
@reading_options
@json_option
def export_command(
    sources: tuple[Path, ...],
    out: Path,
    fleet: bool,
    name: str | None,
    formats: tuple[str, ...],
    allow_not_ready: bool,
    as_json: bool,
    **reading: Any,  # noqa: ANN401 - the options of `reading_options`
) -> int:
    """Write export packages: weights, metrics recomputed from them, lineage, manifest.

    SOURCE is a directory of `forge-harness train` or a checkpoint in any readable format. A package
    that is not ready is refused (exit code 1) and nothing of it is written.
    """
    if fleet == bool(sources):
        raise UsageError("Name one or more sources, or --fleet.")
    if fleet:
        refuse_idle(("formats", "allow_not_ready", *READING), "--fleet")
    if name is not None and (fleet or len(sources) > 1):
        raise UsageError("--name names one package; leave it out for several.")
    if name is not None:
        _check_name(name)
    for path in (*sources, out):
        if not is_utf8(resolved_path(path)):
            raise UsageError(
                f"The path {str(path)!r} is not UTF-8, and a package names where it comes from; "
                "rename it."
            )
    targets = _targets(sources, out)
    from forge_harness.formats.convert import check_outside
    from forge_harness.integration.phase6_preparer import NotReadyError, Phase6Preparer, origin_of

    for source, target in product(sources, targets):
        check_outside(origin_of(source), target)
    preparer = Phase6Preparer()
    try:
        if fleet:
            packages = _fleet(preparer, out)
        else:
            packages = [
                preparer.export(
                    source,
                    target,
                    name=name,
                    formats=formats,
                    read=read_options(reading),
                    allow_not_ready=allow_not_ready,
                )
                for source, target in zip(sources, targets, strict=True)
            ]
            if len(sources) > 1:
                preparer.bake_manifest([package.path for package in packages], out / MANIFEST)
    except NotReadyError as error:
        click.echo(f"Error: {error}", err=True)
        return ExitCode.GATE_FAILED
    _show(packages, as_json)
    return ExitCode.PASS


def _check_name(name: str) -> None:
    if name in ("", ".", "..") or not name.isprintable() or "/" in name or "\\" in name:
        raise UsageError(
            f"--name {name!r} is no plain name; expected printable characters without '/' or '\\'."
        )


def _targets(sources: Sequence[Path], out: Path) -> list[Path]:
    """Returns the directory of each source's package; refuses a clash before any is written."""
    if len(sources) == 1:
        return [out]
    # The name of `runs/a/..` or `.` is only known once the dots are gone.
    targets = [out / Path(os.path.abspath(source)).name for source in sources]
    by_target: dict[Path, Path] = {}
    for source, target in zip(sources, targets, strict=True):
        if target in by_target:
            raise UsageError(
                f"{by_target[target]} and {source} would both be the package {target.name!r} in "
                f"{out}; export one of them alone, under another name."
            )
        by_target[target] = source
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise UsageError(f"{target} exists and is not an empty directory; give another --out.")
    return targets


def _fleet(preparer: Any, out: Path) -> list[ExportedPackage]:  # noqa: ANN401
    from forge_harness.integration.fleet import export_fleet

    packages: list[ExportedPackage] = []

    def told(package: ExportedPackage) -> None:
        packages.append(package)
        click.echo(f"{package.name}: trained and exported", err=True)

    export_fleet(out, preparer, told=told)
    return packages


def _show(packages: Sequence[ExportedPackage], as_json: bool) -> None:
    if as_json:
        rows = [
            {
                "name": package.name,
                "path": str(package.path),
                "bytes": package.bytes,
                "digest": package.digest,
                "quality_score": package.readiness.quality_score,
                "readiness": package.readiness.to_json(),
            }
            for package in packages
        ]
        echo_json(rows)
        return
    lines = [
        (
            package.name,
            package.readiness.status,
            _score(package.readiness.quality_score),
            f"{package.bytes:,}",
            "; ".join(criterion.name for criterion in package.readiness.blocking),
        )
        for package in packages
    ]
    click.echo(table(("package", "status", "quality", "bytes", "not met"), lines))
    click.echo(f"\n{several(len(packages), 'package')}, {sum(p.bytes for p in packages):,} bytes")


def _score(score: float | None) -> str:
    return "not measured" if score is None else f"{score:.4f}"

"""`forge-harness doctor`: what is here, and what the subject offers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from forge_harness.cli.options import (
    NamedText,
    config_option,
    examples,
    json_option,
    load,
    policy_in_force,
)
from forge_harness.cli.terminal import echo_json, table
from forge_harness.errors import ExitCode

if TYPE_CHECKING:
    from forge_harness.cli.subject_child import Offer
    from forge_harness.policy import Policy


@click.command(
    "doctor",
    epilog=examples(
        "forge-harness doctor", "forge-harness doctor --subject my_project.forge:subject"
    ),
)
@config_option
@click.option(
    "--subject",
    type=NamedText(),
    metavar="SPEC",
    help="Subject to look at (default: run.subject).",
)
@json_option
def doctor_command(config_file: Path | None, subject: str | None, as_json: bool) -> int:
    """Show this environment, the native module, and which checks the subject's capabilities open.

    Exits 7 when something that checks need is missing: the native module, the instruction set that
    FORGE_KERNELS_PATH names, a capability, or a program, library, driver or accelerator that some
    check calls. Else 0.
    """
    from forge_harness.cli.needs import missing
    from forge_harness.cli.subject_child import offer_of
    from forge_harness.subject.loader import REFERENCE_SPEC

    loaded = load(config_file, {"run.subject": subject})
    policy = policy_in_force(loaded)
    kernel_path, refused_path = _kernel_path()
    environment = {
        **_environment(),
        **_torch(),
        "native_module": _native(),
        "kernel_path": kernel_path,
    }
    found = offer_of(loaded.subject or REFERENCE_SPEC)
    capabilities = capability_rows(found, policy)
    closed = {check for row in capabilities if not row["offered"] for check in row["checks"]}
    opened = {entry.id for entry in policy.catalogue} - closed
    problems = [
        *_environment_problems(environment),
        *refused_path,
        *(need.problem() for need in missing(loaded.config.declared, opened)),
        *_capability_problems(found, capabilities),
    ]
    if as_json:
        echo_json(
            {
                "environment": environment,
                "subject": {"spec": found.spec, "name": found.name, "digest": found.digest},
                "capabilities": capabilities,
                "problems": problems,
            }
        )
    else:
        _print(environment, found, capabilities, problems)
    return ExitCode.INCOMPLETE if problems else ExitCode.PASS


def _environment() -> dict[str, Any]:
    from forge_harness.environment import collect_environment

    return collect_environment()


def _torch() -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        return {"torch": f"missing: {error}"}
    return {
        "torch": torch.__version__,
        "torch_build": _build(torch.version.cuda, torch.version.hip),
        "torch_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
    }


def _build(cuda: str | None, hip: str | None) -> str:
    if cuda or hip:
        return f"CUDA {cuda}" if cuda else f"ROCm {hip}"
    return "CPU"


def _native() -> str:
    from forge_harness.kernels import native_problem, native_version

    problem = native_problem()
    return f"missing: {problem}" if problem else f"{native_version()}"


def _kernel_path() -> tuple[str | None, list[str]]:
    """Returns the instruction set that products use, and why the one that was asked for is none."""
    from forge_harness.errors import BackendUnavailableError
    from forge_harness.kernels import cpu_path, native_problem

    if native_problem():
        return None, []
    try:
        return cpu_path(), []
    except BackendUnavailableError as error:
        return None, [str(error)]


def capability_rows(subject: Offer, policy: Policy) -> list[dict[str, Any]]:
    """Returns one row a capability: offered, missing methods, checks that ask for it."""
    rows = []
    for name, missing in subject.missing.items():
        gated = [entry for entry in policy.catalogue if name in entry.requires]
        rows.append(
            {
                "capability": name,
                "offered": not missing,
                "missing_methods": missing,
                "checks": [entry.id for entry in gated],
                "severities": Counter(entry.severity.value for entry in gated),
            }
        )
    return rows


def _environment_problems(environment: dict[str, Any]) -> list[str]:
    remedies = {
        "torch": "install it (pip install -c constraints/cpu.txt -e .)",
        "native_module": "reinstall with a C++17 compiler at hand (pip install -e .)",
    }
    return [
        f"The {key.replace('_', ' ')} is {environment[key]}; {remedy}."
        for key, remedy in remedies.items()
        if str(environment[key]).startswith("missing")
    ]


def _capability_problems(subject: Offer, rows: list[dict[str, Any]]) -> list[str]:
    return [
        f"Subject {subject.name!r} does not offer {row['capability']}: "
        f"{_stay(len(row['checks']))} not measured, or not applicable where the catalogue says so."
        for row in rows
        if not row["offered"] and row["checks"]
    ]


def _stay(count: int) -> str:
    return "1 check is" if count == 1 else f"{count} checks are"


def _print(
    environment: dict[str, Any],
    subject: Offer,
    capabilities: list[dict[str, Any]],
    problems: list[str],
) -> None:
    click.echo("Environment")
    for key, value in environment.items():
        shown = value if not isinstance(value, dict) else _pairs(value)
        click.echo(f"  {key.replace('_', ' '):<16} {'-' if shown is None else shown}")
    click.echo(f"\nSubject {subject.name!r} ({subject.spec})\n")
    rows = [
        (
            row["capability"],
            "offered" if row["offered"] else "missing",
            len(row["checks"]),
            row["severities"]["critical"] + row["severities"]["high"],
            "" if row["offered"] else "lacks " + ", ".join(row["missing_methods"]),
        )
        for row in capabilities
    ]
    click.echo(table(("capability", "state", "checks", "critical/high", ""), rows))
    click.echo("")
    for problem in problems:
        click.echo(problem)
    if not problems:
        click.echo("Nothing is missing.")


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())

"""`forge-harness load`: open-loop load on a server, its peak, and what became of each request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from forge_harness.cli.options import (
    PROFILES,
    FiniteRange,
    NamedPath,
    WholeNumber,
    examples,
    existing,
    json_option,
)
from forge_harness.cli.terminal import coloured, echo_json, say, shown
from forge_harness.errors import ExitCode, LoadError
from forge_harness.paths import resolved_path

if TYPE_CHECKING:
    from forge_harness.integration.pipeline_validator import ProgressCallback
    from forge_harness.load.driver import Base, SearchLimits
    from forge_harness.load.peak import Peak, Probe
    from forge_harness.load.plan import LoadPlan, Shape
    from forge_harness.load.report import LoadReport
    from forge_harness.load.session import Step

_Command = TypeVar("_Command", bound=Callable[..., Any])

_SHARE = 0.1
"""Base rate as a share of the capacity."""
_EXITS = (
    "\n\n\b\nExit codes: 0 every gate holds, 1 one does not, or the server was lost in the search,"
    "\n7 something was not measured, or the load was not what it was meant to be (INVALID)."
)


@click.group("load", epilog=examples("forge-harness load run --url http://localhost:8000 --out l1"))
def load_group() -> None:
    """Load a server with requests that do not wait for earlier answers."""


def _target_options(command: _Command) -> _Command:
    """Adds what both `run` and `peak` need to know of the server and the requests."""
    options = (
        click.option("--url", required=True, metavar="URL", help="Address of the server."),
        click.option(
            "--profile",
            type=click.Choice(PROFILES),
            default="quick",
            show_default=True,
            help="How long the search and the phases take.",
        ),
        click.option(
            "--requests",
            "requests_file",
            metavar="FILE",
            type=NamedPath(),
            help="What is sent, and the answers expected: a JSON object a line (default: seeded "
            "8x8 digits to /v1/predict, of whose answers only the form is checked).",
        ),
        click.option(
            "--token-env", metavar="NAME", help="Environment variable with the bearer token."
        ),
        click.option(
            "--ca",
            metavar="FILE",
            type=NamedPath(),
            help="Certificates that sign the server's (default: the system's).",
        ),
        click.option(
            "--slo",
            default=0.5,
            show_default=True,
            metavar="SECONDS",
            type=FiniteRange(min=0, min_open=True),
            help="Objective of the response time.",
        ),
        click.option(
            "--timeout",
            default=5.0,
            show_default=True,
            metavar="SECONDS",
            type=FiniteRange(min=0, min_open=True, max=86_400),
            help="For a whole answer; also sent as X-Deadline-Ms.",
        ),
        click.option(
            "--concurrency",
            default=1024,
            show_default=True,
            metavar="N",
            type=WholeNumber(min=1),
            help="Requests in flight at which the generator gives up, and says INVALID.",
        ),
        click.option(
            "--seed",
            default=0,
            # Probes add their number to it, and a digest takes integers under 2**53.
            type=WholeNumber(min=0, max=2**52),
            metavar="N",
            help="Of the schedule.",
        ),
        click.option("-q", "--quiet", is_flag=True, help="No progress."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@load_group.command(
    "run",
    epilog=examples(
        "forge-harness load run --url http://localhost:8000 --out l1",
        "forge-harness load run --url https://localhost:8443 --ca ca.pem --token-env TOKEN \\",
        "    --requests digits.jsonl --profile full --out l2",
        "forge-harness load run --url http://localhost:8000 --rate 20 --phases 1x:10,50x:5,1x:8 \\",
        "    --out l3",
    )
    + _EXITS,
)
@click.option(
    "--out",
    required=True,
    metavar="DIR",
    type=NamedPath(),
    help="New directory for the records and the report.",
)
@_target_options
@click.option(
    "--rate",
    type=FiniteRange(min=0, min_open=True),
    metavar="R",
    help="Base rate (1x), requests a second.",
)
@click.option(
    "--capacity",
    metavar="auto|R",
    default="auto",
    show_default=True,
    help="Requests a second the server can serve; auto searches for it. Unless --rate is given.",
)
@click.option(
    "--share",
    show_default=f"{_SHARE:g}",
    type=FiniteRange(min=0, min_open=True),
    metavar="F",
    help="Base rate as a share of the capacity, in place of --rate.",
)
@click.option(
    "--phases",
    metavar="SHAPE",
    help="Multiples of the base rate and seconds, as 1x:10,23x:5,1x:8 (default: by profile).",
)
@click.option("--dry-run", is_flag=True, help="Only write the plan, for Locust by hand.")
@json_option
def run_command(
    out: Path,
    rate: float | None,
    capacity: str,
    share: float | None,
    phases: str | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **target: Any,  # noqa: ANN401 - the options of `_target_options`
) -> int:
    """Send base load, overloads of up to 50 times as much, and base load again.

    Requests are sent when a seeded schedule says so, so that a stall of the server meets all the
    requests it would meet. Each has one record, and each must be accounted for.
    """
    from forge_harness.load.driver import Base, measure
    from forge_harness.load.plan import parse_shape

    template = _template(target)
    shape = None if phases is None else parse_shape(phases)
    if rate is not None and share is not None:
        raise LoadError(
            f"--rate {rate:g} is the base rate, and --share {share:g} would make it from the "
            "capacity; give one of them."
        )
    base = Base(rate=rate, capacity=_capacity(capacity), share=share or _SHARE)
    if dry_run:
        return _write_plan(template, out, base, shape, target["profile"])
    with _stoppable(out), _progress(quiet) as told:
        report = measure(
            template,
            out,
            profile=target["profile"],
            shape=shape,
            base=base,
            on_step=told.step,
            on_probe=told.probe(template.slo_s),
        )
        told.end()
    return _conclude(out, report, as_json)


@load_group.command(
    "peak",
    epilog=examples("forge-harness load peak --url http://localhost:8000 --slo 0.2")
    + "\n\n\b\nExit codes: 0 found, 1 nothing was served within the objective, or the server was "
    "lost, 7 only\na lower bound was found: the time was over, or the generator could not send "
    "more.",
)
@click.option(
    "--out",
    metavar="DIR",
    type=NamedPath(),
    help="New directory for the records of the probes (default: they are not kept).",
)
@_target_options
@click.option(
    "--start",
    default=20.0,
    show_default=True,
    type=FiniteRange(min=1),
    metavar="R",
    help="First rate, requests a second.",
)
@click.option("--cap", type=FiniteRange(min=1), metavar="SECONDS", help="Most the search may take.")
@click.option(
    "--probe",
    "probe_s",
    type=FiniteRange(min=0.5),
    metavar="SECONDS",
    help="Length of one probe.",
)
@json_option
def peak_command(
    out: Path | None,
    start: float,
    cap: float | None,
    probe_s: float | None,
    as_json: bool,
    quiet: bool,
    **target: Any,  # noqa: ANN401 - the options of `_target_options`
) -> int:
    """Find the highest rate that is served: doubling, then bisection.

    A rate is served when 98 % of its requests are answered right and within the objective, and
    so is their p95.
    """
    from dataclasses import replace
    from tempfile import TemporaryDirectory

    from forge_harness.integration.stops import interrupted_once
    from forge_harness.load.driver import LIMITS
    from forge_harness.load.report import peak_json, peak_table, peak_text

    template = _template(target)
    limits = replace(LIMITS[target["profile"]], start=start)
    limits = replace(limits, cap_s=cap or limits.cap_s, probe_s=probe_s or limits.probe_s)
    with (
        TemporaryDirectory(prefix="forge-load-") as scratch,
        interrupted_once(),
        _progress(quiet) as told,
    ):
        peak = _find_peak(template, out or Path(scratch), limits, told)
    if as_json:
        echo_json(peak_json(peak))
    else:
        click.echo(peak_table(peak))
        click.echo(f"Peak: {peak_text(peak)}")
    if peak.bound == "nothing":
        return ExitCode.GATE_FAILED
    return ExitCode.INCOMPLETE if peak.is_lower_bound else ExitCode.PASS


def _find_peak(
    template: LoadPlan, directory: Path, limits: SearchLimits, told: _LoadProgress
) -> Peak:
    from forge_harness.load.driver import GENERATOR_LOG, find_peak, fresh_directory
    from forge_harness.load.session import Generator, server_of

    server_of(template).check()
    fresh_directory(directory)
    with Generator(directory / GENERATOR_LOG) as generator:
        return find_peak(
            generator,
            template,
            directory,
            limits,
            on_step=told.step,
            on_probe=told.probe(template.slo_s),
        )


@load_group.command("report", epilog=examples("forge-harness load report l1") + _EXITS)
@click.argument("directory", metavar="DIR", type=NamedPath())
@json_option
def report_command(directory: Path, as_json: bool) -> int:
    """Make the report of the run in DIR again, from its records: report.json, load.html, plots."""
    from forge_harness.load.driver import write_report

    return _conclude(directory, write_report(directory), as_json)


def _template(target: dict[str, Any]) -> LoadPlan:
    """Refuses what cannot be run before anything is written or sent."""
    from forge_harness.load.plan import LoadPlan, bearer_token, check_address
    from forge_harness.load.traffic import read_requests

    check_address(target["url"])
    _check_certificates(target["ca"])
    file = target["requests_file"]
    plan = LoadPlan(
        url=target["url"],
        seed=target["seed"],
        phases=(),
        requests=None if file is None else str(resolved_path(file)),
        timeout_s=target["timeout"],
        slo_s=target["slo"],
        concurrency=target["concurrency"],
        token_env=target["token_env"],
        ca=None if target["ca"] is None else str(resolved_path(target["ca"])),
    )
    bearer_token(plan)
    if file is not None:
        read_requests(file)
    return plan


def _check_certificates(file: Path | None) -> None:
    import ssl

    existing(file, "The certificate file --ca")
    if file is None:
        return
    try:
        ssl.create_default_context(cafile=file)
    except OSError as error:  # of SSL too
        why = getattr(error, "reason", None) or error.strerror or error
        raise LoadError(
            f"--ca {file} holds no certificate that can be read ({why}); expected PEM."
        ) from error


def _capacity(text: str) -> float | None:
    if text == "auto":
        return None
    try:
        value = float(text) if text.isascii() and "_" not in text else 0.0
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise LoadError(f"--capacity {text!r} is no rate; expected auto, or requests a second.")
    return value


def _write_plan(
    template: LoadPlan, out: Path, base: Base, shape: Shape | None, profile: str
) -> int:
    from dataclasses import replace

    from forge_harness.load.driver import fresh_directory, shaped
    from forge_harness.load.session import LOCUSTFILE

    rate = base.rate or (base.share * base.capacity if base.capacity else None)
    if rate is None:
        raise LoadError("--dry-run sends nothing, so it cannot find the capacity; give --rate.")
    plan = shaped(replace(template, capacity=base.capacity), rate, shape, profile)
    fresh_directory(out)
    path = plan.write(out)
    click.echo(f"Plan: {shown(path)}")
    click.echo(f"By hand: FORGE_LOAD_PLAN={resolved_path(path)} locust -f {LOCUSTFILE}")
    click.echo(f"Then: forge-harness load report {shown(out)}")
    return ExitCode.PASS


def _conclude(directory: Path, report: LoadReport, as_json: bool) -> int:
    from forge_harness.load.report import table
    from forge_harness.report.load import PAGE, write_load_report

    write_load_report(directory, report)
    if as_json:
        echo_json(report.document())
    else:
        *lines, verdict = table(report).splitlines()
        click.echo("\n".join(lines))
        click.echo(coloured(verdict))
        click.echo(f"Report: {shown(directory / PAGE)}")
    return report.exit_code


@dataclass(slots=True)
class _LoadProgress:
    """Tells each second or so how far the run is, and each probe's end."""

    callback: ProgressCallback | None
    last: tuple[str, int] = ("", -1)
    scheduled: int = 0

    def step(self, step: Step) -> None:
        """Takes what the generator says; what it repeats while it waits for answers is left out."""
        stage = step.phase if step.phase.endswith("/s") else "load"
        if (stage, step.sent) == self.last or step.sent >= step.scheduled:
            return
        self.last, self.scheduled = (stage, step.sent), step.scheduled
        self._tell(stage, step.sent, step.scheduled, step.phase if stage == "load" else "")

    def probe(self, slo_s: float) -> Callable[[Probe], None]:
        """Returns what takes the end of each probe of a search."""
        from forge_harness.load.percentiles import milliseconds

        def ended(probe: Probe) -> None:
            word = "served" if probe.serves(slo_s) else "not served"
            word = word if probe.valid else "generator too slow"
            label = f"{word}, p95 {milliseconds(probe.p95_s)}"
            self._tell(f"{probe.rate:.0f}/s", probe.offered, probe.offered, label)

        return ended

    def end(self) -> None:
        """Says that the phases are over."""
        if self.last[0] == "load":
            self._tell("load", self.scheduled, self.scheduled, "done")

    def _tell(self, stage: str, done: int, total: int, label: str) -> None:
        from forge_harness.integration.pipeline_validator import Progress

        if self.callback is not None:
            self.callback(Progress(stage=stage, done=done, total=total, label=label))


@contextmanager
def _stoppable(directory: Path) -> Iterator[None]:
    """Lets a run be stopped in order: the generator is gone, and what was sent is on record."""
    from forge_harness.integration.stops import interrupted_once
    from forge_harness.load.report import REPORT

    try:
        with interrupted_once():
            yield
    except KeyboardInterrupt:
        if (directory / REPORT).exists():
            say(f"Stopped. What was sent until then: {shown(directory / REPORT)}")
        raise


@contextmanager
def _progress(quiet: bool) -> Iterator[_LoadProgress]:
    from forge_harness.cli.progress import progress_of

    with progress_of(quiet) as callback:
        yield _LoadProgress(callback)

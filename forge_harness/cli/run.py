"""`forge-harness run`: pipeline, suites, score, report."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from forge_harness.cli.options import (
    PROFILES,
    NamedText,
    config_option,
    examples,
    existing,
    keys_option,
    load,
    sealer_of,
)
from forge_harness.errors import (
    ExitCode,
    RunDirectoryError,
    UsageError,
    unknown_choice,
)

if TYPE_CHECKING:
    from forge_harness.cli.run_store import RunStore
    from forge_harness.config import LoadedConfig
    from forge_harness.integration.pipeline_validator import PipelineValidator
    from forge_harness.sharding import Shard

FORMATS = ("html", "json", "md", "junit", "ctrf", "sarif")
DEFAULT_FORMATS = "html,md,junit"
_MOST_WORKERS = 4
_MOST_NAMES = 100


def parse_formats(context: click.Context, parameter: click.Parameter, text: str) -> tuple[str, ...]:
    """Reads "html,md" into names of report formats.

    Raises:
        UsageError: There is no such format.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in FORMATS:
            raise UsageError(unknown_choice("report format", name, FORMATS))
    if not names:
        raise UsageError(f"No report format given; expected some of {', '.join(FORMATS)}.")
    return names


_FLAGS: tuple[Callable[..., Any], ...] = (
    click.option(
        "--run-dir",
        type=NamedText(),
        metavar="DIR",
        help="New or empty directory of the run (default: forge-runs/<UTC time>).",
    ),
    click.option("--profile", metavar="|".join(PROFILES), help="Scope and size (default: quick)."),
    click.option(
        "--suite",
        "suites",
        multiple=True,
        metavar="NAME",
        help="Only this suite (repeatable), and what --check names; the verdict is then PARTIAL at "
        "best.",
    ),
    click.option(
        "--check",
        "checks",
        multiple=True,
        metavar="ID",
        help="Only this check (repeatable), and the suites that --suite names.",
    ),
    click.option(
        "--shard",
        type=NamedText(),
        metavar="I/N",
        help="Only part I of N of the profile, for N jobs side by side; `merge` makes one run of "
        "them.",
    ),
    click.option(
        "--subject",
        type=NamedText(),
        metavar="SPEC",
        help="What is validated: module:object, file.py:object, an entry point, or the path of a "
        "checkpoint (default: the reference pipeline).",
    ),
    click.option("--seed", metavar="N", help="Seed of every random choice (default: 0)."),
    click.option(
        "--policy", type=NamedText(), metavar="FILE", help="Policy laid over the shipped one."
    ),
    click.option(
        "--waivers", type=NamedText(), metavar="FILE", help="Waivers: owned, dated known failures."
    ),
    click.option("--workers", metavar="N", help="Processes side by side; 0: one a CPU, at most 4."),
    click.option(
        "--suite-path",
        "suite_paths",
        multiple=True,
        type=NamedText(),
        metavar="DIR",
        help="Directory of your own checks (repeatable).",
    ),
    click.option(
        "--timeout", metavar="SECONDS", help="Longest time of one check; 0: the catalogue's limits."
    ),
    click.option("--deadline", metavar="SECONDS", help="Longest time of the whole run; 0: none."),
    click.option(
        "--state",
        type=NamedText(),
        metavar="ROOT",
        help="Keep the finished run in this state store as well.",
    ),
    keys_option(required=False),
    config_option,
    click.option(
        "--format",
        "formats",
        default=DEFAULT_FORMATS,
        show_default=True,
        callback=parse_formats,
        help="Reports to write: html, json, md, junit, ctrf, sarif.",
    ),
    click.option("-q", "--quiet", is_flag=True, help="No progress; the summary only."),
)


def _with_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    for flag in reversed(_FLAGS):
        command = flag(command)
    return command


@click.command(
    "run",
    epilog=examples(
        "forge-harness run",
        "forge-harness run --subject my_project.forge:subject --run-dir first",
        "forge-harness run --check training.ste_weight_gradient",
        "forge-harness run --shard 1/3 --run-dir shard-1",
    ),
)
@_with_flags
def run_command(
    config_file: Path | None,
    formats: tuple[str, ...],
    quiet: bool,
    **given: Any,  # noqa: ANN401
) -> int:
    """Validate a subject: train it, run the suites, score them, write the reports.

    Every flag has a key in forge.toml, see `forge-harness config show --origin`.
    """
    selection = _selection(given.pop("suites"), given.pop("checks"), given.pop("shard"))
    keys = given.pop("keys")
    loaded = load(config_file, _flags(given))
    store = _store(loaded.path("paths.state"), keys)
    with (
        run_directory(loaded) as directory,
        tempfile.TemporaryDirectory(prefix="forge-config-") as scratch,
    ):
        in_force = Path(scratch) / "forge.toml"
        in_force.write_text(loaded.to_toml(absolute=True), encoding="utf-8")
        validator = make_validator(loaded, selection, in_force)
        with _resolved_environment():
            return _validate(validator, directory, formats, quiet, store)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which part of a profile is run; all of it when everything is empty."""

    suites: tuple[str, ...] = ()
    checks: tuple[str, ...] = ()
    shard: Shard | None = None


def _selection(suites: tuple[str, ...], checks: tuple[str, ...], shard: str | None) -> Selection:
    from forge_harness.sharding import parse_shard

    if shard and (suites or checks):
        raise UsageError(
            f"--shard {shard} cuts the whole profile; leave --suite and --check out, or --shard."
        )
    return Selection(suites, checks, parse_shard(shard) if shard else None)


def _store(root: Path | None, keys: str | None) -> RunStore | None:
    from forge_harness.cli.run_store import RunStore

    if root is None and keys is not None:
        raise UsageError("--keys needs --state, whose contents they seal.")
    if root is None:
        return None
    return RunStore(root, None if keys is None else sealer_of(keys))


@contextmanager
def _resolved_environment() -> Iterator[None]:
    """Hides our variables from child processes.

    Their values are in the resolved file; in a child they would beat the flags they lost against.
    """
    from forge_harness.config import configuration_variables

    hidden = {name: os.environ.pop(name) for name in configuration_variables(os.environ)}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _flags(given: dict[str, Any]) -> dict[str, Any]:
    """Returns flags under their configuration keys; a flag that was not given is None."""
    names = {"timeout": "run.timeout_s", "deadline": "run.deadline_s", "state": "paths.state"}
    flags = {names.get(name, f"run.{name}"): value for name, value in given.items()}
    flags["run.suite_paths"] = list(given["suite_paths"]) or None
    return flags


@contextmanager
def run_directory(loaded: LoadedConfig) -> Iterator[Path]:
    """Yields run.run_dir, or a new empty directory under paths.runs, named by the time.

    The directory is made here, seconds before the run needs it, so that runs which start at the
    same time get different ones; it is removed again when nothing was put into it.
    """
    explicit = loaded.path("run.run_dir")
    if explicit is not None:
        yield explicit
        return
    runs = loaded.path("paths.runs")
    assert runs is not None
    missing = [path for path in (runs, *runs.parents) if not path.exists()]
    try:
        runs.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise RunDirectoryError(
            f"{error.filename} is a file; expected the directory of runs (paths.runs)."
        ) from error
    made = _new_directory(runs, datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ"))
    try:
        yield made
    finally:
        # Deepest first; one that is not empty stays, and with it all above.
        with suppress(OSError):
            for path in (made, *missing):
                path.rmdir()


def _new_directory(runs: Path, stamp: str) -> Path:
    """Makes a directory that no other run can have made.

    Raises:
        RunDirectoryError: A hundred runs started in this second.
    """
    for name in (stamp, *(f"{stamp}-{n}" for n in range(2, _MOST_NAMES))):
        with suppress(FileExistsError):
            (runs / name).mkdir()
            return runs / name
    raise RunDirectoryError(f"{runs} holds {_MOST_NAMES} runs of {stamp}; give --run-dir.")


def make_validator(loaded: LoadedConfig, selection: Selection, in_force: Path) -> PipelineValidator:
    """Returns the validator a configuration describes.

    Args:
        loaded: The configuration.
        selection: What of the profile is run.
        in_force: The configuration as a file, for the processes that run the checks.

    Raises:
        UsageError: A file or directory that is named does not exist.
        ConfigError: Policy or waivers cannot be read.
    """
    from forge_harness.integration.pipeline_validator import PipelineValidator
    from forge_harness.selection import build_policy
    from forge_harness.waivers import load_waivers

    run = loaded.config.run
    policy_file, waivers = loaded.path("run.policy"), loaded.path("run.waivers")
    existing(policy_file, "Policy")
    existing(waivers, "Waiver file")
    for path in loaded.suite_paths():
        existing(path, "Suite directory")
    return PipelineValidator(
        build_policy(policy_file),
        loaded.subject or None,
        profile=run.profile,
        suites=selection.suites,
        checks=selection.checks,
        shard=selection.shard,
        seed=run.seed,
        workers=run.workers or default_workers(),
        suite_paths=loaded.suite_paths(),
        timeout_s=run.deadline_s or None,
        check_timeout_s=run.timeout_s,
        waivers=load_waivers(waivers) if waivers is not None else (),
        declared=loaded.config.declared,
        config_file=in_force,
        command=["forge-harness", *sys.argv[1:]],
    )


def default_workers() -> int:
    """Returns one worker for each CPU this process may use, at most 4."""
    from forge_harness.probes import cgroup

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = cgroup.cpu_quota()
    return max(1, min(usable or 1, _MOST_WORKERS, int(quota) if quota else _MOST_WORKERS))


def _validate(
    validator: PipelineValidator,
    directory: Path,
    formats: tuple[str, ...],
    quiet: bool,
    store: RunStore | None,
) -> int:
    from forge_harness.cli.progress import progress_of
    from forge_harness.cli.summary import summary
    from forge_harness.cli.terminal import printable, say, shown, unread
    from forge_harness.finish import finish_run
    from forge_harness.integration.stops import uninterrupted
    from forge_harness.rundir import check_is_free
    from forge_harness.scoring import exit_code_for

    # Before the subject is loaded, which takes seconds.
    check_is_free(directory)
    if store is not None:
        store.refuse(directory)
    plan = validator.plan()
    if store is not None:
        store.open_once()
    if not quiet:
        say(
            f"Validating subject {plan.subject.name!r}: {len(plan.entries)} of "
            f"{len(plan.policy.catalogue)} checks, {plan.scope.profile} profile, "
            f"{validator.workers} worker{'' if validator.workers == 1 else 's'}. "
            f"Run: {shown(directory)}"
        )
    for gap in validator.gaps:
        say(f"Not collected: {printable(gap)}")
    with uninterrupted():
        with progress_of(quiet) as progress:
            record = validator.validate(directory, progress)
        if record.state == "interrupted" and not quiet:
            say("Stopped. What was measured is written now.")
        written = finish_run(directory, record, plan.policy, formats)
        code = exit_code_for(record)
    try:
        click.echo(summary(record, plan.policy, directory, written, code))
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        # A closed terminal. A closed pipe never gets here (`results_stand`).
        unread(sys.stdout)
        code = ExitCode.INTERRUPTED
    finally:
        # Also when nobody reads the summary any more.
        if store is not None:
            code = store.keep_or_say(record, directory, code)
    return code

"""Which code rendered the reports of a run directory, and whether it renders the same again."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from forge_harness import __version__
from forge_harness.canonical import canonical_json, file_sha256, read_canonical, sha256_hex
from forge_harness.durable import read_plain, write_durably
from forge_harness.integration.baselines import AcceptedRun, Baseline
from forge_harness.integration.kept_runs import History
from forge_harness.policy import Policy, load_policy
from forge_harness.record import RunRecord
from forge_harness.report.write import WRITERS, render_reports
from forge_harness.scoring import Discrepancy

REPORTS = "reports.json"
_PACKAGE = Path(__file__).parents[1]
_DRAWING = ("matplotlib", "jinja2", "markupsafe")
_STRICT = ConfigDict(extra="forbid", frozen=True)


class Rendered(BaseModel):
    """How one report file came about."""

    model_config = _STRICT

    renderer: str
    baseline: Baseline | None = None
    """What it compares the run with."""
    history: History | None = None
    """The runs of its trend."""


class Renderings(BaseModel):
    """The content of reports.json."""

    model_config = _STRICT

    schema_version: Literal["1.0"] = "1.0"
    files: dict[str, Rendered] = {}


@dataclass(frozen=True, slots=True)
class RenderedAgain:
    """What rendering the reports of a run again gave."""

    problems: list[Discrepancy] = field(default_factory=list)
    same: list[str] = field(default_factory=list)
    """Files that have the same bytes."""
    unknown: dict[str, str] = field(default_factory=dict)
    """File -> why it could not be rendered again."""
    leaning: dict[str, str] = field(default_factory=dict)
    """File -> the other runs it speaks of, as reports.json has them."""


@cache
def renderer() -> str:
    """Returns what decides on the bytes of a report besides the run.

    That is our code, the policy that ships, which a page compares the run's with, and what draws.
    Code by its digest: between two releases the version stays the same while pages change.
    """
    files = [path for path in _PACKAGE.rglob("*") if path.suffix in (".py", ".j2", ".css", ".toml")]
    named = "\n".join(
        f"{path.relative_to(_PACKAGE).as_posix()} {file_sha256(path)}" for path in sorted(files)
    )
    drawing = " ".join(f"{name} {version(name)}" for name in _DRAWING)
    code = sha256_hex(named.encode())[:12]
    # Of the policy as it is read: its files lie outside the package in a checkout.
    policy = load_policy().digest.removeprefix("sha256:")[:12]
    ours = f"forge-harness {__version__} {code}, policy {policy}"
    return f"{ours}, {drawing}, Python {platform.python_version()}"


def forget(run_dir: Path, formats: Sequence[str]) -> None:
    """Takes the reports that are about to be written out of reports.json.

    A writing that is cut short then leaves files of which nothing is said, not a false statement.
    """
    try:
        kept = _read(run_dir)
    except (ValueError, RecursionError):
        # It says nothing of any report; those that are not made anew are then held to be plain.
        (run_dir / REPORTS).unlink()
        return
    names = {WRITERS[name][0] for name in formats if name in WRITERS}
    if names & kept.files.keys():
        _write(run_dir, {file: how for file, how in kept.files.items() if file not in names})


def note(
    run_dir: Path,
    written: Sequence[Path],
    baseline: AcceptedRun | None,
    history: History | None = None,
) -> None:
    """Writes down which code rendered reports, and what they compare the run with.

    Args:
        run_dir: The run directory.
        written: The report files in it.
        baseline: What they compare with; of a record nothing is noted, as it is not kept.
        history: The runs of their trend.
    """
    # A record alone is no baseline that can be written down; the page cannot be rendered again.
    if isinstance(baseline, RunRecord):
        return
    how = Rendered(renderer=renderer(), baseline=baseline, history=history)
    kept = _read(run_dir).files
    _write(run_dir, {**kept, **{path.name: how for path in written}})


def render_again(run_dir: Path, record: RunRecord, policy: Policy) -> RenderedAgain:
    """Renders the reports of a run directory again and compares the bytes.

    Bytes that differ are no report of the run where the same code made them. A later release draws
    other pages, of which nothing can be said. Where reports.json does not say what made a report,
    it is the plain one; only runs recorded before there was such a file may hold another.

    Args:
        run_dir: A run directory that verifies.
        record: Its record.
        policy: Its policy.
    """
    result = RenderedAgain()
    try:
        noted = _read(run_dir).files
    except (ValueError, RecursionError) as error:
        expected = "what rendered each report"
        found = Discrepancy(REPORTS, "cannot be read", expected, str(error).splitlines()[0])
        return RenderedAgain(problems=[found])
    for name, (file, _) in WRITERS.items():
        if not (run_dir / file).is_file():
            continue
        how = noted.get(file)
        compared: dict[str, Any] = {}
        if how is not None:
            compared = {"baseline": how.baseline, "history": how.history}
        ((_, text),) = render_reports(run_dir, record, policy, (name,), **compared)
        if (run_dir / file).read_bytes() == text.encode():
            result.same.append(file)
            if how is not None and (leans := _leans_on(how)):
                result.leaning[file] = leans
        elif how is not None and how.renderer != renderer():
            result.unknown[file] = f"made by {how.renderer}"
        elif how is None and record.files is None:
            result.unknown[file] = "nothing says what made it"
        else:
            result.problems.append(_difference(run_dir / file, text.encode(), how))
    return result


def _difference(file: Path, expected: bytes, how: Rendered | None) -> Discrepancy:
    what = "is not the report of this run"
    if how is None:
        what = f"is not the plain report of this run, and {REPORTS} says of no other"
    return Discrepancy(
        file.name, what, f"sha256:{sha256_hex(expected)}", f"sha256:{file_sha256(file)}"
    )


def _leans_on(how: Rendered) -> str:
    """Returns what of other runs is in a page: nothing of it can be recomputed from this one."""
    parts = []
    if how.baseline is not None:
        digest = f" (run.json {how.baseline.run_digest})" if how.baseline.run_digest else ""
        parts.append(f"baseline {how.baseline.run_id}{digest}")
    if how.history is not None:
        count = len(how.history.runs)
        parts.append(f"{count} kept {'run' if count == 1 else 'runs'}")
    return " and ".join(parts)


def _read(run_dir: Path) -> Renderings:
    """Returns what is noted; nothing where there is no file.

    Raises:
        ValueError: The file is none of ours.
    """
    try:
        values = read_canonical(read_plain(run_dir / REPORTS))
        return Renderings.model_validate(values)
    except FileNotFoundError:
        return Renderings()
    except OSError as error:
        raise ValueError(str(error.strerror)) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{where}: {first['msg']}") from error


def _write(run_dir: Path, files: dict[str, Rendered]) -> None:
    content = Renderings(files=files).model_dump(mode="json")
    write_durably(run_dir / REPORTS, canonical_json(content))

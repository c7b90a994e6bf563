"""Command line options of the plugin."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from dataclasses import dataclass
from pathlib import Path

import pytest

PROFILES = ("quick", "full", "nightly")
_MOST_SEED = 2**32 - 1
_MOST_SECONDS = 86_400.0
"""The bounds of run.seed and run.timeout_s, which cannot be imported here without pydantic."""


def add_options(parser: pytest.Parser) -> None:
    """Adds the group `forge`; every option starts with `--forge-`."""
    group = parser.getgroup("forge", "forge-harness: validation of a subject")
    group.addoption(
        "--forge-run-dir",
        metavar="DIR",
        type=_named,
        default=None,
        help="keep the run: run.json, reports and manifest go to DIR (new or empty)",
    )
    group.addoption(
        "--forge-profile",
        choices=PROFILES,
        default=None,
        help="which checks are in scope and how large they are (default: quick)",
    )
    group.addoption(
        "--forge-subject",
        metavar="S",
        type=_named,
        default=None,
        help="what is validated: module:object, file.py:object or an entry point "
        "(default: the reference pipeline)",
    )
    group.addoption(
        "--forge-policy",
        metavar="F",
        type=_named,
        default=None,
        help="policy file laid over the shipped one",
    )
    group.addoption(
        "--forge-suite",
        metavar="NAME",
        action="append",
        default=[],
        help="run this suite only (repeatable)",
    )
    group.addoption(
        "--forge-check",
        metavar="ID",
        action="append",
        default=[],
        help="run this check only (repeatable)",
    )
    group.addoption(
        "--forge-shard",
        metavar="I/N",
        type=_named,
        default=None,
        help="run part I of N of the profile only; `forge-harness merge` makes one run of all",
    )
    group.addoption(
        "--forge-seed", metavar="N", type=_seed, default=None, help="seed of the run (default: 0)"
    )
    group.addoption(
        "--forge-waivers", metavar="F", type=_named, default=None, help="file of waivers"
    )
    group.addoption(
        "--forge-config", metavar="F", type=_named, default=None, help="configuration file"
    )
    group.addoption(
        "--forge-study",
        metavar="FILE",
        type=_named,
        default=None,
        help="quality study made beforehand",
    )
    group.addoption(
        "--forge-timeout",
        metavar="S",
        type=_seconds,
        default=None,
        help="longest time one check may take, in seconds (default: the catalogue's limit)",
    )
    # How `forge-harness run` listens to the pytest process it starts.
    group.addoption("--forge-events", metavar="FILE", default=None, help="write events to FILE")


def _named(text: str) -> str:
    """A shell makes an empty text of a variable that is not set, which would name a default."""
    if not text:
        raise ArgumentTypeError("it is empty; give a value, or leave the option out")
    return text


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= _MOST_SEED):
        raise ArgumentTypeError(f"{text!r} is no integer from 0 to {_MOST_SEED}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= _MOST_SECONDS:
        raise ArgumentTypeError(f"{text!r} is no number of seconds from 0 to {_MOST_SECONDS:g}")
    return seconds


@dataclass(frozen=True, slots=True)
class Options:
    """The options as given; None where the user said nothing."""

    run_dir: Path | None
    profile: str | None
    subject: str | None
    policy: Path | None
    suites: tuple[str, ...]
    checks: tuple[str, ...]
    shard: str | None
    seed: int | None
    waivers: Path | None
    config: Path | None
    study: Path | None
    timeout_s: float | None
    events: Path | None


def read_options(config: pytest.Config) -> Options:
    """Returns the plugin's options of one pytest session."""

    def path(name: str) -> Path | None:
        value = config.getoption(name)
        return None if value is None else Path(value)

    kept = path("forge_run_dir")
    return Options(
        # A check that changes the directory must not move where the run is kept.
        run_dir=None if kept is None else config.invocation_params.dir / kept,
        profile=config.getoption("forge_profile"),
        subject=config.getoption("forge_subject"),
        policy=path("forge_policy"),
        suites=tuple(config.getoption("forge_suite")),
        checks=tuple(config.getoption("forge_check")),
        shard=config.getoption("forge_shard"),
        seed=config.getoption("forge_seed"),
        waivers=path("forge_waivers"),
        config=path("forge_config"),
        study=path("forge_study"),
        timeout_s=config.getoption("forge_timeout"),
        events=path("forge_events"),
    )

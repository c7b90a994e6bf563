"""Options and loaders several commands share."""

from __future__ import annotations

import errno
import math
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from forge_harness.errors import RunDirectoryError, UsageError

if TYPE_CHECKING:
    from forge_harness.config import LoadedConfig
    from forge_harness.policy import Policy
    from forge_harness.record import RunRecord
    from forge_harness.security.sealing import KeyringSealer

_Command = TypeVar("_Command", bound=Callable[..., Any])

PROFILES = ("quick", "full", "nightly")
_WHOLE = re.compile(r"[+-]?[0-9]{1,40}")
_LONGEST_SHOWN = 60


class WholeNumber(click.IntRange):
    """An integer within a range, in the digits 0 to 9.

    `int`, which click asks, takes those of any script, underscores and spaces as well.
    """

    def convert(
        self,
        value: Any,  # noqa: ANN401 - click's own signature
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> int:
        """Reads an integer; click's own error where it is none or out of the range."""
        if isinstance(value, str) and not _WHOLE.fullmatch(value):
            self.fail(
                f"{_cut(value)!r} is not a valid integer; expected digits from 0 to 9.", param, ctx
            )
        return int(super().convert(value, param, ctx))

    def _describe_range(self) -> str:
        # click's help page would say "x<=None" of a range without ends.
        return "" if self.min is None and self.max is None else super()._describe_range()


class FiniteRange(click.FloatRange):
    """A number within a range; never NaN, which click lets through every range, nor an infinity."""

    def convert(
        self,
        value: Any,  # noqa: ANN401 - click's own signature
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> float:
        """Reads a number; click's own error where it is none, not finite or out of the range."""
        if isinstance(value, str) and not (value.isascii() and "_" not in value):
            self.fail(
                f"{_cut(value)!r} is not a valid number; expected digits from 0 to 9.", param, ctx
            )
        number = click.FLOAT.convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return float(super().convert(number, param, ctx))


class NamedPath(click.Path):
    """A path, which is never empty: of that pathlib makes the current directory.

    An empty text is what a shell makes of a variable that is not set.
    """

    def __init__(
        self, *, exists: bool = False, file_okay: bool = True, dir_okay: bool = True
    ) -> None:
        super().__init__(exists=exists, file_okay=file_okay, dir_okay=dir_okay, path_type=Path)

    def convert(
        self,
        value: Any,  # noqa: ANN401 - click's own signature
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Path:
        """Reads a path; click's own error where it is empty or not what it must be."""
        if value == "":
            self.fail("It is empty; expected a path (. is the current directory).", param, ctx)
        return Path(os.fsdecode(super().convert(value, param, ctx)))


class NamedText(click.types.StringParamType):
    """The name of a subject, a file or a place as configuration takes it, which is never empty.

    In a file an empty text is the default; a flag has it from a variable of the shell that is
    not set, and would quietly mean something else than what its user names.
    """

    def convert(
        self,
        value: Any,  # noqa: ANN401 - click's own signature
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> str:
        """Reads a text; click's own error where it is empty."""
        if value == "":
            self.fail("It is empty; give a value, or leave the option out.", param, ctx)
        return str(super().convert(value, param, ctx))


def once(
    context: click.Context, option: click.Parameter, values: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Callback of a repeatable option: what is given twice counts once."""
    return tuple(dict.fromkeys(values))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def examples(*lines: str) -> str:
    """Returns the end of a help page: command lines that click must not rewrap."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


def config_option(command: _Command) -> _Command:
    """Adds `-c/--config FILE`."""
    return click.option(
        "-c",
        "--config",
        "config_file",
        type=NamedPath(),
        metavar="FILE",
        help="Configuration file (default: forge.toml or pyproject.toml, found upwards).",
    )(command)


def json_option(command: _Command) -> _Command:
    """Adds `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def keys_option(*, required: bool) -> Callable[[_Command], _Command]:
    """Adds `--keys SOURCE`, where a keyring comes from."""
    return click.option(
        "--keys",
        required=required,
        metavar="SOURCE",
        help="Keyring: FILE, env:NAME (base64) or command:PROGRAM ARGUMENTS.",
    )


def sealer_of(keys: str) -> KeyringSealer:
    """Returns what seals and opens the contents of a store with the keyring `--keys` names.

    Raises:
        UsageError: It names none.
        SecurityError: There is no keyring, or others may read it.
    """
    from forge_harness.security.key_sources import followed_keyring
    from forge_harness.security.sealing import KeyringSealer

    if not keys:
        raise UsageError("--keys is empty; expected a FILE, env:NAME or command:PROGRAM ARGUMENTS.")
    return KeyringSealer(followed_keyring(keys))


def run_dir_argument(command: _Command) -> _Command:
    """Adds the argument DIR, the directory of a run."""
    return click.argument("directory", metavar="DIR", type=NamedPath())(command)


def baseline_option(command: _Command) -> _Command:
    """Adds `--baseline DIR|FILE`."""
    return click.option(
        "--baseline",
        "accepted_at",
        type=NamedPath(),
        metavar="DIR|FILE",
        help="The run that was accepted before, or the file of `baseline accept`; compared by "
        "score and gate values.",
    )(command)


def load(config_file: Path | None, flags: dict[str, Any] | None = None) -> LoadedConfig:
    """Loads the configuration with the flags of a command over it."""
    from forge_harness.config import load_config

    return load_config(file=config_file, flags=flags)


def policy_in_force(loaded: LoadedConfig) -> Policy:
    """Returns the policy of a configuration, catalogues of the user's suites included."""
    from forge_harness.selection import build_policy, catalogues_beside

    return build_policy(loaded.path("run.policy"), catalogues_beside(loaded.suite_paths()))


def open_run(directory: Path) -> tuple[RunRecord, Policy]:
    """Reads a run's record and policy.

    Raises:
        RunDirectoryError: The directory is missing or does not hold a run.
    """
    from forge_harness.rundir import RUN, read_policy, read_record

    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise RunDirectoryError(f"{directory} {what}; expected the directory of a run.")
    if not (directory / RUN).exists():
        raise RunDirectoryError(
            f"{directory} holds no {RUN}; expected the directory of a run "
            "(`forge-harness run --run-dir DIR` makes one)."
        )
    return read_record(directory), read_policy(directory)


def check_target(path: Path | None) -> None:
    """Refuses a file that could not be written when the work for it is done.

    Its directory is made, as writing would make it.

    Raises:
        IsADirectoryError: It is a directory.
        UsageError: It is within a run, which it would damage.
        OSError: Nothing can be written beside it, or through it where it is a device, a pipe or the
            name of an open file.
    """
    from forge_harness.durable import is_written_through
    from forge_harness.rundir import run_around

    if path is None:
        return
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if is_written_through(path):
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return
    if around := run_around(path):
        raise UsageError(
            f"{path} is within a run ({around}), which would no longer verify; choose a file "
            "outside of it."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        # Of a path below a file: that the file exists is no fault, that it is none of a directory.
        raise NotADirectoryError(
            errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename
        ) from error
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def existing(path: Path | None, what: str) -> None:
    """Refuses a path that was named and is not there.

    Raises:
        UsageError: With the path.
    """
    if path is not None and not path.exists():
        raise UsageError(f"{what} {path} does not exist.")

"""The command group: subcommands loaded on use, exit codes, errors as one sentence."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import click

from forge_harness import __version__
from forge_harness.errors import ExitCode, ForgeError, unknown_choice
from forge_harness.integration.stops import interrupted_like_sigint
from forge_harness.paths import is_utf8
from forge_harness.probes.masking import Masker

COMMANDS = {
    "init": ("init:init_command", "Write forge.toml, an example check and a CI workflow."),
    "doctor": ("doctor:doctor_command", "Show this environment and what the subject offers."),
    "list": ("listing:list_group", "List checks, suites or waivers."),
    "run": ("run:run_command", "Validate a subject: run the suites, score, report."),
    "merge": ("merge:merge_command", "Make one run from the shards of several jobs."),
    "gate": ("gate:gate_command", "Exit by the verdict of a run; for CI."),
    "report": ("report:report_command", "Write the reports of a run again."),
    "compare": ("compare:compare_command", "Show what changed from one run to another."),
    "baseline": ("baseline:baseline_group", "Accept a run as what later ones are held against."),
    "history": ("history:history_group", "Show, export or rescore the runs that are kept."),
    "explain": ("explain:explain_command", "Show which checks cost how many points."),
    "verify": ("verify:verify_command", "Recompute what a run claims, or a signature."),
    "train": ("train:train_command", "Train a reference model."),
    "bench": ("bench:bench_group", "Measure speed against ceilings and peers."),
    "drill": ("drill:drill_group", "Put faults in on purpose: seed defects, crash a state store."),
    "load": ("load:load_group", "Load a server, find its peak, watch it recover."),
    "inspect": ("inspect:inspect_command", "Say what a checkpoint is and whether it is sound."),
    "export": ("export:export_command", "Write packages for phase 6, judged from their files."),
    "convert": ("convert:convert_command", "Write a checkpoint in another format."),
    "serve": ("serve:serve_command", "Answer requests with a packed model."),
    "tokens": ("tokens:tokens_group", "Issue, list and revoke the access tokens of a server."),
    "state": ("state:state_group", "Keep the states of the phases: list, verify, restore."),
    "keys": ("keys:keys_group", "Make, rotate and list the keys that seal and sign."),
    "sign": ("sign:sign_command", "Sign a package: every file, by name and digest."),
    "audit": ("audit:audit_group", "Read and verify an audit log."),
    "scan": ("scan:scan_command", "Look for advisories, secrets, licenses and unsafe code."),
    "power-of-ten": (
        "power_of_ten:power_of_ten_command",
        "Count the Power of Ten, adapted, over a source tree.",
    ),
    "config": ("config:config_group", "Show or check the configuration, print its schema."),
}
"""Command -> (module:object under forge_harness.cli, one line of help), in the order of use."""

_WRITABLE = "name a place that can be written to"
_SPACE = "free some, or name another place"
_REMEDIES = {
    errno.EACCES: _WRITABLE,
    errno.EPERM: _WRITABLE,
    errno.EROFS: _WRITABLE,
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: _SPACE,
    errno.EISDIR: "name a file",
    errno.ENOTDIR: "name a path whose parts are directories",
    errno.EEXIST: "name something that does not exist yet",
    errno.ENOTEMPTY: "name an empty directory",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "remove the link that leads to itself",
    errno.ENOENT: "check the path",
    errno.ENXIO: "name a plain file",
    errno.ENODEV: "name a plain file",
    errno.EBUSY: "try again when nothing else uses it",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "check the disk, and run again with --debug",
}
"""What to do about errors of the operating system; others are ours, and stay internal errors."""

_EPILOG = """\
\b
Example:
  forge-harness run --run-dir first
  forge-harness gate first

\b
Exit codes: 0 pass, 1 gate failed, 2 interrupted, 3 internal error, 4 usage or
configuration, 5 nothing collected, 7 incomplete, 8 verification failed,
9 baseline missing or not comparable."""


class LazyGroup(click.Group):
    """A group that imports a subcommand's module only when that subcommand is used.

    `--help` lists commands from COMMANDS: loading them all would cost pydantic and rich.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Returns the command names in the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports and returns a command, or None when there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(f"forge_harness.cli.{module}"), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Finds the command of the first argument; an unknown one gets the nearest name."""
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            raise click.UsageError(unknown_choice("command", args[0], COMMANDS), ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the command list without importing a command."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, help_line) in COMMANDS.items()])

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:  # noqa: ANN401 - click's own signature
        """Runs the command line and exits with one of our codes, never with click's own."""
        from forge_harness.cli.terminal import hold_standard_streams, results_stand

        hold_standard_streams()
        kwargs["standalone_mode"] = False
        with results_stand():
            code = _run(lambda: super(LazyGroup, self).main(*args, **kwargs))
        sys.exit(code)


def _run(call: Any) -> int:  # noqa: ANN401 - a callable of no arguments
    try:
        with interrupted_like_sigint():
            returned = call()
    except click.exceptions.Abort:
        return _say("Interrupted.", ExitCode.INTERRUPTED)
    except click.ClickException as error:
        error.show()
        return ExitCode.USAGE
    except ForgeError as error:
        _trace()
        return _say(f"Error: {error}", error.exit_code)
    except KeyboardInterrupt:
        return _say("Interrupted.", ExitCode.INTERRUPTED)
    except SystemExit as error:
        return _exited(error)
    except OSError as error:
        return _refused(error) if error.errno in _REMEDIES else _internal_error(error)
    except UnicodeEncodeError as error:
        return _internal_error(error) if is_utf8(error.object) else _no_text(error)
    except Exception as error:
        return _internal_error(error)
    return returned if isinstance(returned, int) else ExitCode.PASS


def _exited(error: SystemExit) -> int:
    """Says what ended the process; whatever it was, it is no result of a command.

    click itself still exits below here when it meets a broken pipe, which is then one that was
    named as a file (`--json /dev/fd/3`): with 1, which is the code of a failed gate. All it leaves
    to see is its wrapper of the stream.
    """
    if "PacifyFlushWrapper" in type(sys.stdout).__name__:
        return ExitCode.INTERRUPTED
    _trace()
    return _say(
        f"Error: Code that was imported called sys.exit({error.code!r}); expected a subject or "
        "plugin that only defines things when it is imported.",
        ExitCode.USAGE,
    )


def _refused(error: OSError) -> int:
    """Says what the operating system refused, and where."""
    _trace()
    # Of a rename, the second name is the one the user gave.
    path = error.filename2 or error.filename
    where = "" if path is None else f"{_given_name(path)}: "
    sentence = f"{where}{error.strerror}; {_REMEDIES[error.errno or 0]}."
    return _say(f"Error: {sentence}", ExitCode.USAGE)


def _no_text(error: UnicodeEncodeError) -> int:
    """Says which name has bytes that are no UTF-8, where something writes names in it."""
    _trace()
    start = max(0, error.start - 40)
    near = error.object[start : error.start + 40].encode("utf-8", "backslashreplace").decode()
    return _say(f"Error: A name here is not UTF-8: '{near}'; rename it.", ExitCode.USAGE)


def _given_name(path: object) -> str:
    """Returns a path as the user gave it: without our temporary name, `.NAME.PID.partial`."""
    text = os.fsdecode(path) if isinstance(path, bytes) else str(path)
    directory, name = os.path.split(text)
    if name.startswith(".") and name.endswith(".partial"):
        name = name.removesuffix(".partial").rpartition(".")[0].removeprefix(".") or name
    return os.path.join(directory, name)


def _internal_error(error: Exception) -> int:
    _trace()
    hint = "" if debugging() else " Run again with --debug for the traceback."
    kind = type(error).__name__
    return _say(f"Internal error: {kind}: {error}.{hint}", ExitCode.INTERNAL_ERROR)


def _say(sentence: str, code: ExitCode) -> int:
    from forge_harness.cli.terminal import say

    say(Masker().text(sentence))
    return code


def _trace() -> None:
    if debugging():
        traceback.print_exc()


def debugging() -> bool:
    """Returns whether tracebacks are wanted: `--debug` or FORGE_HARNESS_DEBUG."""
    return os.environ.get("FORGE_HARNESS_DEBUG", "") not in ("", "0")


def _set_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        os.environ["FORGE_HARNESS_DEBUG"] = "1"


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_EPILOG,
)
@click.version_option(__version__, "--version", prog_name="forge-harness")
@click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_set_debug,
    help="Show tracebacks (also FORGE_HARNESS_DEBUG=1).",
)
def app() -> None:
    """Validate BitNet b1.58 quantization-aware training."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line; never returns.

    Args:
        arguments: Command line without the program's name; `sys.argv[1:]` when None.
    """
    app.main(args=None if arguments is None else list(arguments), prog_name="forge-harness")

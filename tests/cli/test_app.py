"""The command group: light start, our exit codes, errors as one sentence."""

import errno
import importlib
import os
import subprocess
import sys

import click
import pytest

from forge_harness import __version__
from forge_harness.cli import app
from forge_harness.cli.app import COMMANDS
from forge_harness.errors import ConfigError, ExitCode, VerificationError
from forge_harness.paths import fixtures_dir

HEAVY = ("torch", "numpy", "locust", "gevent", "mlflow", "matplotlib", "pydantic", "rich", "pytest")


@pytest.fixture
def broken(monkeypatch):
    """Makes `doctor` raise what a test wants."""

    def install(error):
        @click.command("doctor")
        def raising():
            raise error

        module = importlib.import_module("forge_harness.cli.doctor")
        monkeypatch.setattr(module, "doctor_command", raising)

    return install


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_the_commands_that_exist_and_the_exit_codes(invoke, flag):
    result = invoke(flag)
    assert result.exit_code == 0
    for name, (_, line) in COMMANDS.items():
        assert f"  {name} " in result.output
        assert line in result.output
    for code in ExitCode:
        assert f"{int(code)} " in result.output.partition("Exit codes:")[2]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["config", "--help"]])
def test_starting_imports_nothing_heavy(arguments):
    code = (
        "import sys\nfrom forge_harness.cli import app\n"
        f"try:\n    app.main({arguments!r})\n"
        f"except SystemExit as e:\n    assert not e.code, e.code\n"
        f"print('loaded', sorted(set(sys.modules) & set({HEAVY!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded []"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_loads_has_an_example_and_the_help_line_of_the_list(invoke, name):
    result = invoke(name, "--help")
    assert result.exit_code == 0
    assert "Example:\n" in result.output
    assert f"forge-harness {name}" in result.output.partition("Example:")[2]
    command = app.get_command(click.Context(app), name)
    assert command.name == name


@pytest.mark.parametrize(
    "arguments",
    [["list", name] for name in ("checks", "suites", "waivers")]
    + [["config", name] for name in ("show", "check", "schema")]
    + [["bench", name] for name in ("kernels", "lm", "train", "store", "convert")],
)
def test_every_subcommand_has_an_example(invoke, arguments):
    result = invoke(*arguments, "-h")
    assert result.exit_code == 0
    assert f"forge-harness {' '.join(arguments)}" in result.output.partition("Example:")[2]


def test_the_version_is_printed(invoke):
    assert invoke("--version").output == f"forge-harness, version {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["rnu"], "Unknown command 'rnu'. Did you mean 'run'?"),
        (["gate"], "Missing argument 'DIR'"),
        (["gate", "x", "--fail-on", "never"], "'never' is not one of"),
        (["run", "--suites", "x"], "No such option '--suites'"),
        (["config", "chek"], "No such command 'chek'"),
        (["explain", "x", "--limit", "-1"], "-1 is not in the range"),
        ([], "Usage: "),
        (["config"], "Usage: "),
    ],
)
def test_wrong_usage_is_4_never_clicks_2(invoke, arguments, sentence):
    result = invoke(*arguments)
    assert result.exit_code == ExitCode.USAGE
    assert sentence in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    "error", [ConfigError("The seed is wrong; use 3."), VerificationError("It differs.")]
)
def test_an_error_the_user_can_act_on_is_one_sentence(invoke, broken, error):
    broken(error)
    result = invoke("doctor")
    assert result.exit_code == error.exit_code
    assert result.stderr == f"Error: {error}\n"


def test_an_unexpected_exception_is_3_with_a_hint_and_no_traceback(invoke, broken):
    broken(ZeroDivisionError("by nought"))
    result = invoke("doctor")
    assert result.exit_code == ExitCode.INTERNAL_ERROR
    assert result.stderr == (
        "Internal error: ZeroDivisionError: by nought. Run again with --debug for the traceback.\n"
    )


@pytest.mark.parametrize(
    ("number", "path", "sentence"),
    [
        (
            errno.EROFS,
            "/ro/x",
            "/ro/x: Read-only file system; name a place that can be written to.",
        ),
        (errno.EACCES, "/x", "/x: Permission denied; name a place that can be written to."),
        (errno.ENOSPC, None, "No space left on device; free some, or name another place."),
        (errno.EISDIR, "/d", "/d: Is a directory; name a file."),
        (errno.ENAMETOOLONG, "/n", "/n: File name too long; choose a shorter name."),
        (errno.ENOENT, b"/n", "/n: No such file or directory; check the path."),
        (errno.ENOENT, "/a/.n.x.12.partial", "/a/n.x: No such file or directory; check the path."),
        (errno.EIO, "/n", "/n: Input/output error; check the disk, and run again with --debug."),
    ],
)
def test_an_operating_system_error_is_one_sentence(invoke, broken, number, path, sentence):
    broken(OSError(number, os.strerror(number), path))
    result = invoke("doctor")
    assert result.exit_code == ExitCode.USAGE
    assert result.stderr == f"Error: {sentence}\n"


def test_a_failed_rename_names_the_target(invoke, broken):
    broken(OSError(errno.EISDIR, "Is a directory", "/a/.n.1.partial", None, "/a/n"))
    assert invoke("doctor").stderr == "Error: /a/n: Is a directory; name a file.\n"


def test_an_operating_system_error_without_a_number_stays_internal(invoke, broken):
    broken(OSError("could not get source code"))
    assert invoke("doctor").exit_code == ExitCode.INTERNAL_ERROR


def test_an_operating_system_error_keeps_its_traceback_for_debugging(invoke, broken):
    broken(OSError(errno.EISDIR, "Is a directory", "/d"))
    assert "Traceback (most recent call last)" in invoke("--debug", "doctor").stderr


def test_an_output_that_cannot_be_written_is_one_sentence(invoke, tmp_path):
    result = invoke("keys", "new", tmp_path / ("n" * 300))
    assert result.exit_code == ExitCode.USAGE
    assert "File name too long; choose a shorter name." in result.stderr


@pytest.mark.parametrize("code", [0, 1, None, "bye"])
def test_user_code_that_exits_is_named_and_never_a_pass(invoke, broken, code):
    broken(SystemExit(code))
    result = invoke("doctor")
    assert result.exit_code == ExitCode.USAGE
    assert f"called sys.exit({code!r})" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_subject_file_that_exits_is_no_pass(invoke, tmp_path):
    (tmp_path / "bye.py").write_text("import sys\nsys.exit(0)\n")
    result = invoke("doctor", "--subject", f"{tmp_path / 'bye.py'}:Toy")
    assert result.exit_code == ExitCode.USAGE
    assert "exit" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_debugging_shows_the_traceback(invoke, broken, monkeypatch, how):
    monkeypatch.setenv("FORGE_HARNESS_DEBUG", "1" if how == "variable" else "0")
    broken(ZeroDivisionError("by nought"))
    result = invoke(*(["--debug"] if how == "flag" else []), "doctor")
    assert result.exit_code == ExitCode.INTERNAL_ERROR
    assert "Traceback (most recent call last)" in result.stderr
    assert "Run again" not in result.stderr


def test_interrupting_is_2(invoke, broken):
    broken(KeyboardInterrupt())
    result = invoke("doctor")
    assert result.exit_code == ExitCode.INTERRUPTED
    assert result.stderr.strip() == "Interrupted."


@pytest.mark.parametrize(
    ("number", "words"),
    [
        ("SIGTERM", ("convert", "{model}", "{out}", "--to", "native")),
        ("SIGHUP", ("convert", "{model}", "{out}", "--to", "native")),
        ("SIGTERM", ("export", "{model}", "--out", "{out}")),
    ],
)
def test_a_stop_signal_leaves_no_stage_behind(tmp_path, number, words):
    """A command that handles no signals itself died where it was, half of its output on disk."""
    model, out = fixtures_dir() / "models" / "v1.0", tmp_path / "out"
    program = (
        "import os, signal, sys; from forge_harness import durable\n"
        f"signal.signal(signal.{number}, signal.SIG_DFL)\n"
        f"durable.sync_tree = lambda stage: os.kill(os.getpid(), signal.{number})\n"
        "from forge_harness.cli import main; main(sys.argv[1:])"
    )
    given = [word.format(model=model, out=out) for word in words]
    done = subprocess.run(
        [sys.executable, "-c", program, *given], capture_output=True, text=True, check=False
    )
    assert done.returncode == ExitCode.INTERRUPTED, done.stderr
    assert done.stderr.strip() == "Interrupted."
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [ExitCode.PASS, ExitCode.GATE_FAILED, ExitCode.INCOMPLETE])
def test_what_a_command_returns_is_the_exit_code_of_the_process(forge, tmp_path, code):
    # `-c` instead of a real command: only the way from return value to process is at stake.
    program = (
        "import click\nfrom forge_harness.cli import app, main\n"
        "import forge_harness.cli.doctor as doctor\n"
        f"doctor.doctor_command = click.Command('doctor', callback=lambda: {int(code)})\n"
        "main(['doctor'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == code


@pytest.mark.parametrize("code", [ExitCode.PASS, ExitCode.GATE_FAILED, ExitCode.INCOMPLETE])
def test_a_reader_that_goes_away_changes_no_exit_code(code):
    program = (
        "import click\nfrom forge_harness.cli import main\n"
        "import forge_harness.cli.doctor as doctor\n"
        "def chatter():\n    [click.echo('x' * 1000) for _ in range(1000)]\n"
        f"    return {int(code)}\n"
        "doctor.doctor_command = click.Command('doctor', callback=chatter)\n"
        "main(['doctor'])\n"
    )
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    os.close(reader)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert stderr == ""


def test_a_pipe_that_was_named_as_a_file_is_2(tmp_path, forge):
    """What it was to hold is not kept: that is no pass, and no failed gate."""
    reader, writer = os.pipe()
    os.close(reader)
    words = ("drill", "storage", "--campaign", "newer_schema", "-q", "--json", f"/dev/fd/{writer}")
    done = forge(*words, pass_fds=[writer], cwd=tmp_path)
    os.close(writer)
    assert done.returncode == ExitCode.INTERRUPTED


def test_the_module_is_the_command(forge):
    done = forge("--version")
    assert (done.returncode, done.stdout) == (0, f"forge-harness, version {__version__}\n")

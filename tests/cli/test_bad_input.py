"""What no command should be given: one sentence, exit code 4, nothing written, nothing hangs."""

import json
import os
import shutil

import pytest

from forge_harness.cli.app import COMMANDS, _run
from forge_harness.errors import ExitCode
from forge_harness.paths import fixtures_dir

CHECKPOINT = fixtures_dir() / "checkpoints" / "hf-packed-autobitlinear-tied"


def refused(result):
    assert result.exit_code == ExitCode.USAGE, result.output
    assert "Traceback" not in result.stderr
    assert "Internal error" not in result.stderr
    return result.stderr


@pytest.fixture
def loop(tmp_path):
    path = tmp_path / "loop"
    path.symlink_to(path)
    return path


@pytest.fixture
def keys(invoke, tmp_path):
    assert invoke("keys", "new", tmp_path / "keys.json").exit_code == ExitCode.PASS
    return tmp_path / "keys.json"


@pytest.mark.parametrize("below", ["", "x"])
def test_a_link_to_itself_is_no_destination(invoke, loop, below):
    result = invoke("convert", CHECKPOINT, loop / below, "--to", "hf-packed")
    assert refused(result) == (
        f"Error: {loop / below}: Too many levels of symbolic links; remove the link that leads to "
        "itself.\n"
    )


def test_a_link_to_itself_is_not_signed(invoke, loop, keys, tmp_path):
    assert "remove the link" in refused(invoke("sign", loop, "--keys", keys))
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "file").write_text("x")
    said = refused(invoke("sign", tmp_path / "package", "--keys", keys, "--signature", loop))
    assert "remove the link" in said


@pytest.mark.parametrize("option", ["--requests", "--ca"])
def test_a_link_to_itself_holds_no_requests(invoke, loop, tmp_path, option):
    out = tmp_path / "out"
    refused(invoke("load", "run", "--url", "https://h", "--out", out, option, loop))
    assert not out.exists()


def test_a_subject_of_nobodys_home_is_not_there(invoke):
    said = refused(invoke("doctor", "--subject", "~no-such-user/x.py:S"))
    assert said == "Error: Subject file '~no-such-user/x.py' does not exist.\n"


def test_a_credential_that_looks_like_a_path_ends_no_command(invoke, monkeypatch, loop):
    """A base64 secret may start with a slash, and be too long for a path."""
    monkeypatch.setenv("SOME_TOKEN", "/" + "a" * 400)
    monkeypatch.setenv("OTHER_TOKEN", "~no-such-user-here")
    refused(invoke("gate", loop))


WRONG_INTEGERS = ("٣", "1_0", "", "1e3", "0x10", "9" * 5000)
INTEGER_OPTIONS = (
    ("train", "--task", "digits", "--steps"),
    ("load", "run", "--url", "http://x", "--seed"),
    ("serve", "--package", "p", "--port"),
    ("run", "--seed"),
    ("run", "--workers"),
)
WRONG = [(command, given) for command in INTEGER_OPTIONS for given in WRONG_INTEGERS]
# The options of `run` may come from the environment, whose values are stripped.
WRONG += [(command, " 5") for command in INTEGER_OPTIONS if command[0] != "run"]


@pytest.mark.parametrize(
    ("command", "given"), WRONG, ids=[f"{c[0]} {c[-1]} {given[:9]!r}" for c, given in WRONG]
)
def test_an_integer_is_written_in_the_digits_0_to_9(invoke, tmp_path, command, given):
    where = {"train": ("--out",), "load": ("--out",), "run": ("--run-dir",)}.get(command[0], ())
    options = [part for name in where for part in (name, str(tmp_path / "out"))]
    said = refused(invoke(*command, given, *options))
    assert "integer" in said
    assert len(said) < 400
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", ["٣", "1_0", "nan", "inf", "1e999", "-1"])
def test_a_rate_is_a_finite_number_in_plain_digits(invoke, tmp_path, given):
    out = tmp_path / "out"
    refused(invoke("load", "run", "--url", "http://x", "--out", out, "--rate", given))
    said = refused(invoke("load", "run", "--url", "http://x", "--out", out, "--capacity", given))
    assert "is no rate" in said
    refused(invoke("run", "--run-dir", out, "--timeout", given))
    refused(invoke("train", "--task", "digits", "--out", out, "--learning-rate", given))
    assert not out.exists()


def test_every_integer_option_is_of_one_type():
    """`click.INT` and `click.IntRange` take the digits of any script."""
    from importlib import import_module

    import click

    from forge_harness.cli.options import FiniteRange, WholeNumber

    def options(command):
        yield from ((command.name, parameter) for parameter in command.params)
        for below in getattr(command, "commands", {}).values():
            yield from options(below)

    numbers = (click.types.IntParamType, click.types.FloatParamType)
    wrong = []
    for module, name in (place.split(":") for place, _ in COMMANDS.values()):
        command = getattr(import_module(f"forge_harness.cli.{module}"), name)
        wrong += [
            f"{owner} {parameter.name}"
            for owner, parameter in options(command)
            if isinstance(parameter.type, numbers)
            and not isinstance(parameter.type, WholeNumber | FiniteRange)
        ]
    assert wrong == []


SUBJECT = """
import threading, time
threading.Thread(target=lambda: time.sleep(600)).start()
class Toy:
    name = "toy"
    def pack(self, codes): ...
    def unpack(self, packed, rows): ...
"""


def test_a_thread_the_subject_left_running_is_not_waited_for(forge, tmp_path):
    (tmp_path / "toy.py").write_text(SUBJECT)
    result = forge("doctor", "--subject", f"{tmp_path / 'toy.py'}:Toy")
    assert result.returncode == ExitCode.INCOMPLETE, result.stderr
    assert "Subject 'toy'" in result.stdout


NO_UTF8 = os.fsdecode(b"bytes\xff")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8:surrogateescape"])
def test_a_name_that_is_no_utf_8_is_shown_with_escapes(forge, tmp_path, monkeypatch, encoding):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    place = tmp_path / NO_UTF8
    shutil.copytree(CHECKPOINT, place)
    result = forge("inspect", place, "--json")
    assert result.returncode == ExitCode.PASS, result.stderr
    assert json.loads(result.stdout)["path"].endswith(NO_UTF8)
    assert forge("inspect", place).stdout.splitlines()[0].endswith(r"bytes\udcff: hf-packed")
    assert forge("init", tmp_path / f"new{NO_UTF8}").returncode == ExitCode.PASS


def test_a_name_that_is_no_utf_8_is_not_signed_nor_exported(invoke, keys, tmp_path):
    place = tmp_path / NO_UTF8
    shutil.copytree(CHECKPOINT, place)
    assert "is not UTF-8" in refused(invoke("sign", place, "--keys", keys))
    assert "is not UTF-8" in refused(invoke("export", place, "--out", tmp_path / "out"))
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / NO_UTF8).write_text("x")
    assert "is not UTF-8" in refused(invoke("sign", tmp_path / "package", "--keys", keys))
    assert [path.name for path in tmp_path.glob("*.dsse.json")] == []


def test_the_net_under_names_that_are_no_utf_8(capsys):
    assert _run(lambda: f"name {NO_UTF8}".encode()) == ExitCode.USAGE
    assert "A name here is not UTF-8: 'name bytes\\udcff'; rename it." in capsys.readouterr().err
    assert _run(lambda: "é".encode("ascii")) == ExitCode.INTERNAL_ERROR


def test_what_has_no_name_is_no_file_to_write(invoke, keys, tmp_path, monkeypatch):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "file").write_text("x")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for place in (".", "/"):
        said = refused(invoke("sign", tmp_path / "package", "--keys", keys, "--signature", place))
        assert said == f"Error: {place}: Is a directory; name a file.\n"
        options = ("--keys", keys, "--name", "a", "--role", "client")
        assert "Is a directory" in refused(invoke("tokens", "issue", place, *options))
    monkeypatch.chdir(tmp_path / "package")
    assert invoke("sign", ".", "--keys", keys).exit_code == ExitCode.PASS
    assert (tmp_path / "package.dsse.json").is_file()


@pytest.mark.parametrize("kind", ["text", "empty", "directory"])
def test_a_file_without_a_certificate_is_refused_before_anything_is_sent(invoke, tmp_path, kind):
    ca, out = tmp_path / "ca", tmp_path / "out"
    ca.mkdir() if kind == "directory" else ca.write_text("x" if kind == "text" else "")
    said = refused(invoke("load", "run", "--url", "https://h", "--out", out, "--ca", ca))
    assert f"--ca {ca} holds no certificate that can be read" in said
    assert not out.exists()


def test_a_pipe_is_no_checkpoint_to_start_from(forge, tmp_path):
    """It would be waited for, and signals only end a training between two steps."""
    os.mkfifo(tmp_path / "pipe")
    given = ("--task", "digits", "--steps", "1", "--out", tmp_path / "out")
    result = forge("train", *given, "--from-checkpoint", tmp_path / "pipe")
    assert result.returncode == ExitCode.USAGE
    assert "is a pipe, a socket or a device" in result.stderr
    assert not (tmp_path / "out").exists()

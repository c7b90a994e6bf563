"""`forge-harness bench kernels` as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from forge_harness.benchmarks import conversion, language_model, products, storage, training
from forge_harness.cli import app
from forge_harness.errors import UsageError


def test_a_table_and_a_file(tmp_path):
    json_file, plot_file = tmp_path / "b.json", tmp_path / "b.svg"
    command = ["bench", "kernels", "--shape", "64x32", "--tokens", "2", "--threads", "1"]
    command += ["--rounds", "6", "--json", str(json_file), "--plot", str(plot_file)]
    command = [sys.executable, "-m", "forge_harness", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "M=2 64x32 hot 1T" in done.stdout
    document = json.loads(json_file.read_bytes())
    assert [r["tokens"] for r in document["rows"]] == [2]
    assert plot_file.read_text().startswith("<?xml")


@pytest.mark.parametrize("shape", ["64", "64x", "0x64", "axb", "64x-1"])
def test_a_shape_that_is_none_is_named(shape, invoke):
    result = invoke("bench", "kernels", "--shape", shape)
    assert result.exit_code == 4
    assert f"{shape!r} is no size; expected rows x columns" in result.stderr


@pytest.mark.parametrize("shape", ["64x200000", "99999999999x64", f"{'9' * 5000}x64"])
def test_a_shape_no_kernel_takes_is_named(shape, invoke):
    result = invoke("bench", "kernels", "--shape", shape)
    assert result.exit_code == 4
    assert shape in result.stderr


def test_a_small_weight_is_timed_hot_only(tmp_path, invoke):
    """Copies of 1x1 that no cache holds took gigabytes and minutes."""
    json_file = tmp_path / "b.json"
    command = ["kernels", "--shape", "1x1", "--tokens", "1", "--threads", "1", "--rounds", "6"]
    result = invoke("bench", *command, "--json", str(json_file))
    assert result.exit_code == 0
    assert "1x1 is timed hot only" in result.stderr
    rows = json.loads(json_file.read_bytes())["rows"]
    assert [(row["columns"], row["cold"]) for row in rows] == [(1, False)]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Needs processor affinity.")
def test_what_is_asked_for_twice_is_timed_once(tmp_path, invoke):
    json_file = tmp_path / "b.json"
    twice = ("--shape", "64x32", "--tokens", "2", "--threads", "1") * 2
    done = invoke("bench", "kernels", *twice, "--rounds", "6", "--no-peers", "--json", json_file)
    assert done.exit_code == 0, done.stderr
    assert len(json.loads(json_file.read_bytes())["rows"]) == 1


def test_no_more_threads_are_timed_than_the_process_may_use_processors():
    """On one core of two, half of the figures were void: two threads wait for each other."""
    core = min(os.sched_getaffinity(0))
    start = f"import os, runpy; os.sched_setaffinity(0, {{{core}}}); "
    start += "runpy.run_module('forge_harness', run_name='__main__')"
    options = ["--shape", "1x1", "--tokens", "1", "--rounds", "6", "--no-peers"]
    command = [sys.executable, "-c", start, "bench", "kernels", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "hot 1T" in done.stdout
    assert "2T" not in done.stdout


@pytest.mark.parametrize("threads", ["20000", "100000"])
@pytest.mark.parametrize("what", ["kernels", "lm"])
def test_threads_the_machine_cannot_start_are_refused(threads, what, invoke):
    result = invoke("bench", what, "--threads", threads)
    assert result.exit_code == 4
    assert threads in result.stderr


def test_a_language_model_is_timed_and_compared(tmp_path):
    json_file = tmp_path / "lm.json"
    command = ["lm", "--width", "64", "--layers", "1", "--prompt", "8", "--threads", "1"]
    command += ["--rounds", "6", "--json", str(json_file)]
    result = CliRunner().invoke(app, ["bench", *command], catch_exceptions=False)
    assert result.exit_code == 0
    assert "decode 1T, tokens/s" in result.output
    assert "prefill 1T, tokens/s" in result.output
    document = json.loads(json_file.read_bytes())
    assert document["same_tokens"] == 1
    assert document["difference"] <= 1e-5
    assert [p["name"] for p in document["phases"]] == ["decode", "prefill"]
    assert all(p["over_bf16"]["packed"][1] > 0 for p in document["phases"])


@pytest.mark.parametrize("what", ["lm", "train"])
def test_a_width_without_whole_heads_is_named(what, invoke):
    result = invoke("bench", what, "--width", "100")
    assert result.exit_code == 4
    assert "--width 100 is no multiple of 64" in result.stderr


def test_the_store_is_timed_against_what_it_is_built_on(tmp_path):
    json_file = tmp_path / "store.json"
    command = ["store", "--dir", str(tmp_path), "--blob-mib", "1", "--states", "50"]
    command += ["--rounds", "6", "--json", str(json_file)]
    result = CliRunner().invoke(app, ["bench", *command], catch_exceptions=False)
    assert result.exit_code == 0
    document = json.loads(json_file.read_bytes())
    names = [row["name"] for row in document["rows"]]
    assert names[0] == "commit of one state of 1 KiB"
    assert all(row["rate"] > 0 and row["times"][1] <= row["times"][2] for row in document["rows"])
    assert len(document["open_seconds"]) == 6
    assert "opens and lists" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["store.json"]


SMALL = ("kernels", "--shape", "64x32", "--threads", "1", "--rounds", "6", "--no-peers")
STORE = ("store", "--blob-mib", "1", "--states", "10", "--rounds", "6")


@pytest.mark.parametrize(
    ("command", "option"),
    [(SMALL, "--json"), (SMALL, "--plot"), (STORE, "--json"), (("convert",), "--json")],
)
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    command, option, tmp_path, monkeypatch, invoke
):
    """It was refused after minutes, and what had been measured was gone."""
    monkeypatch.setattr(products, "measure", pytest.fail)
    monkeypatch.setattr(storage, "measure", pytest.fail)
    monkeypatch.setattr(conversion, "measured", pytest.fail)
    result = invoke("bench", *command, option, str(tmp_path))
    assert result.exit_code == 4
    assert f"{tmp_path}: Is a directory; name a file." in result.stderr


def test_one_file_for_two_things_is_refused_before_anything_is_measured(
    tmp_path, monkeypatch, invoke
):
    """The plot took the place of the numbers."""
    monkeypatch.setattr(products, "measure", pytest.fail)
    (tmp_path / "link").symlink_to(tmp_path / "bench")
    files = ("--json", str(tmp_path / "bench"), "--plot", str(tmp_path / "link"))
    result = invoke("bench", *SMALL, *files)
    assert result.exit_code == 4
    assert "are both" in result.stderr


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_file_goes_through_a_device_and_never_takes_its_place(tmp_path):
    """As root, --json /dev/null and /dev/stdout put a plain file there for the whole machine."""
    pipe, link = tmp_path / "pipe", tmp_path / "stdout"
    os.mkfifo(pipe)
    link.symlink_to("/proc/self/fd/1")
    command = [sys.executable, "-m", "forge_harness", "bench", *SMALL, "--json", str(link)]
    command += ["--tokens", "2", "--plot", str(pipe)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as done:
        assert pipe.read_text().startswith("<?xml")
        said, errors = done.communicate(timeout=120)
    assert done.returncode == 0, errors
    document, end = json.JSONDecoder().raw_decode(said.decode())
    assert document["rows"]
    assert "ceiling" in said.decode()[end:]
    assert pipe.is_fifo()
    assert link.is_symlink()


def test_where_native_is_missing_what_needs_none_is_still_written(tmp_path, monkeypatch):
    """The heading asked for the instruction sets of an extension that was not there."""
    monkeypatch.setitem(sys.modules, "forge_kernels._native", None)
    json_file = tmp_path / "store.json"
    command = [*STORE, "--dir", str(tmp_path), "--json", str(json_file)]
    CliRunner().invoke(app, ["bench", *command], catch_exceptions=False)
    environment = json.loads(json_file.read_bytes())["environment"]
    assert (environment["native"], environment["paths"]) == (None, [])


@pytest.mark.parametrize("error", [UsageError("no such peer"), KeyboardInterrupt()])
def test_what_was_measured_is_shown_when_the_rest_is_not(error, tmp_path, monkeypatch):
    measure = products.measure

    def measure_one(case, **options):
        if case.tokens == 3:
            raise error
        return measure(case, **options)

    monkeypatch.setattr(products, "measure", measure_one)
    json_file = tmp_path / "b.json"
    command = [*SMALL, "--tokens", "2", "--tokens", "3", "--json", str(json_file)]
    result = CliRunner().invoke(app, ["bench", *command])
    assert result.exit_code != 0
    assert "M=2 64x32 hot 1T" in result.output
    assert "Not complete: 1 of 2 products were measured." in result.output
    document = json.loads(json_file.read_bytes())
    assert document["is_complete"] is False
    assert [row["tokens"] for row in document["rows"]] == [2]


LM = ("lm", "--width", "64", "--layers", "1", "--prompt", "4", "--rounds", "6")
TRAIN = ("train", "--width", "64", "--layers", "1", "--batch", "1", "--rounds", "6")


@pytest.mark.parametrize(
    ("command", "module", "function", "few", "kept"),
    [
        ((*LM, "--threads", "1"), language_model, "_phase", 1, "phases"),
        ((*TRAIN, "--threads", "1", "--threads", "2"), training, "_steps", 1, "steps"),
        (STORE, storage, "_row", 2, "rows"),
        (STORE, storage, "_opening", 0, "rows"),
    ],
    ids=["lm", "train", "store", "store-opening"],
)
@pytest.mark.parametrize("error", [UsageError("no such peer"), KeyboardInterrupt()])
def test_what_was_measured_is_shown_when_its_rest_is_not(
    error, command, module, function, few, kept, tmp_path, monkeypatch
):
    real, calls = getattr(module, function), []

    def measure_few(*arguments, **options):
        calls.append(1)
        if len(calls) > few:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(module, function, measure_few)
    json_file = tmp_path / "b.json"
    command = [*command, *(("--dir", str(tmp_path)) if command == STORE else ())]
    result = CliRunner().invoke(app, ["bench", *command, "--json", str(json_file)])
    assert result.exit_code != 0
    assert "Not complete: the rest was not measured." in result.output
    document = json.loads(json_file.read_bytes())
    assert document["is_complete"] is False
    assert len(document[kept]) == (few or 5)
    assert list(tmp_path.iterdir()) == [json_file]


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ((*SMALL, "--tokens", "1000000000000"), "--tokens 1000000000000"),
        (("lm", "--width", "6400000"), "--width 6400000 with --layers 8"),
        (("train", "--width", "6400000"), "--width 6400000 with --layers 2"),
        (("lm", "--prompt", "100000000000"), "100000000000"),
    ],
)
def test_sizes_no_memory_holds_are_refused(command, named, invoke):
    """They were internal errors of torch's allocator."""
    result = invoke("bench", *command)
    assert result.exit_code == 4
    assert named in result.stderr


def test_a_training_step_is_timed(tmp_path, invoke):
    json_file = tmp_path / "train.json"
    options = ["--width", "64", "--layers", "1", "--batch", "1", "--threads", "1", "--rounds", "6"]
    result = invoke("bench", "train", *options, "--json", json_file)
    assert result.exit_code == 0
    assert "ternary, int8 1T" in result.output
    document = json.loads(json_file.read_bytes())
    assert (document["benchmark"], document["is_complete"]) == ("train", True)
    assert document["tokens"] == 128
    assert all(low <= high for _, low, high in document["steps"][0]["over_full"].values())

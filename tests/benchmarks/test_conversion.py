"""Conversions against a durable copy: what is written, what is compared, nothing left behind."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from forge_harness.benchmarks import conversion
from forge_harness.cli.app import app
from forge_harness.errors import ExitCode
from forge_harness.formats.convert import convert

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "checkpoints"


def test_every_target_is_converted_and_copied_in_turns(tmp_path, monkeypatch):
    calls = []

    def counted(source, target, to, *, compare):
        calls.append((to, compare))
        return convert(source, target, to, compare=compare)

    monkeypatch.setattr(conversion, "convert", counted)
    monkeypatch.setattr(conversion, "SHAPES", ((256, 512), (512, 256)))
    targets = ("gguf-tq2_0", "native")
    rows = list(conversion.measured(tmp_path, targets=targets, blocks=1, rounds=6))
    assert [(row.to, row.compared) for row in rows] == [
        ("gguf-tq2_0", False),
        ("gguf-tq2_0", True),
        ("native", False),
        ("native", True),
    ]
    # The first one, two that say how long one takes, and the rounds.
    assert all(calls.count((row.to, row.compared)) >= 9 for row in rows)
    for row in rows:
        assert row.read_bytes > 2 * 256 * 512 // 4
        assert row.seconds > 0 < row.copy_seconds
        low, high = row.times[1:]
        assert 0 < low <= row.times[0] <= high
    assert list(tmp_path.iterdir()) == []


def test_the_copy_reads_all_and_writes_as_much_as_asked(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a").write_bytes(b"x" * 3_000_000)
    (source / "b").write_bytes(b"y" * 10)
    for size in (0, 7, 2_500_000, 9_000_001):
        conversion._copy(source, tmp_path / "copy", size)
        assert (tmp_path / "copy").stat().st_size == size


def test_the_command_prints_a_row_each_and_writes_json(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "SHAPES", ((256, 512),))
    out = tmp_path / "c.json"
    arguments = ["bench", "convert", "--dir", str(tmp_path), "--to", "gguf-tq1_0"]
    done = CliRunner().invoke(
        app, [*arguments, "--blocks", "1", "--rounds", "6", "--json", str(out)]
    )
    assert done.exit_code == ExitCode.PASS, done.output
    assert done.output.count("gguf-tq1_0") >= 2
    document = json.loads(out.read_bytes())
    assert [row["compared"] for row in document["rows"]] == [False, True]
    assert document["is_complete"] is True
    unknown = CliRunner().invoke(app, ["bench", "convert", "--to", "gguf"])
    assert unknown.exit_code == ExitCode.USAGE
    assert "gguf-tq2_0" in unknown.output


@pytest.mark.parametrize("error", [None, KeyboardInterrupt()])
def test_what_was_measured_is_shown_and_kept_when_the_rest_is_not(error, tmp_path, monkeypatch):
    """A format that cannot hold the source, and an interruption, cost all that was before them."""

    def ended(source, target, to, *, compare):
        if error is not None and to == "gguf-tq2_0":
            raise error
        return convert(source, target, to, compare=compare)

    monkeypatch.setattr(conversion, "convert", ended)
    source, out = FIXTURES / "native-0.9", tmp_path / "c.json"
    arguments = ["bench", "convert", "--dir", str(tmp_path), "--source", str(source)]
    arguments += ["--to", "native", "--to", "gguf-tq2_0", "--rounds", "6", "--json", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code != ExitCode.PASS
    assert ("which a GGUF file cannot hold" in done.output) is (error is None)
    assert "native" in done.output
    assert "Not complete: 2 of 4 conversions were measured." in done.output
    document = json.loads(out.read_bytes())
    assert document["is_complete"] is False
    assert [(row["to"], row["compared"]) for row in document["rows"]] == [
        ("native", False),
        ("native", True),
    ]
    assert list(tmp_path.iterdir()) == [out]

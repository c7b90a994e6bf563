"""`forge-harness bench kernels` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from forge_harness.cli.bench import bench_group


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
def test_a_shape_that_is_none_is_named(shape):
    result = CliRunner().invoke(bench_group, ["kernels", "--shape", shape])
    assert shape in str(result.exception)
    assert "expected rows x columns" in str(result.exception)

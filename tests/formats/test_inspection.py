"""Inspection: counts, digests and oddities against numpy; damage and questions end where stated."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from forge_harness.cli import app
from forge_harness.formats import TernaryTensor, WriteOptions, tensors
from forge_harness.formats.digests import codes_sha256, values_sha256
from forge_harness.formats.hf_writer import write_hf_packed
from forge_harness.formats.inspection import CodeCounts, count_codes, inspect_checkpoint
from forge_harness.formats.inspection import _odd_codes as odd_codes

from .memory import hf_checkpoint, memory_checkpoint, random_ternary


@pytest.fixture
def chunks_of_a_few_rows(monkeypatch):
    monkeypatch.setattr(tensors, "CHUNK_CODES", 100)


@pytest.fixture
def packed(tmp_path):
    """A sound packed directory and the checkpoint it was written from."""
    source = hf_checkpoint()
    directory = tmp_path / "packed"
    directory.mkdir()
    write_hf_packed(source, directory, WriteOptions())
    return directory, source


@pytest.mark.usefixtures("chunks_of_a_few_rows")
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 130), (129, 33), (130, 130)])
def test_counts_and_digest_of_codes_are_those_of_numpy(shape):
    ternary = random_ternary(*shape, seed=shape[0])
    codes = ternary.codes().numpy()
    counts = count_codes(ternary)
    assert (counts.minus, counts.zero, counts.plus) == tuple(
        int(np.sum(codes == code)) for code in (-1, 0, 1)
    )
    assert codes_sha256(ternary) == hashlib.sha256(codes.astype("i1").tobytes()).hexdigest()


@pytest.mark.usefixtures("chunks_of_a_few_rows")
def test_digest_of_values_sees_values_and_shape_but_no_lossless_cast():
    values = torch.randn(31, 9).bfloat16()
    digest = values_sha256(values)
    assert digest == values_sha256(values.float())
    assert digest != values_sha256(values.reshape(9, 31))
    changed = values.clone()
    changed[30, 8] += 1
    assert digest != values_sha256(changed)
    assert values_sha256(torch.tensor(1.0)) != values_sha256(torch.tensor([1.0]))


def test_an_inspection_names_every_tensor_with_its_codes(packed):
    directory, source = packed
    inspection = inspect_checkpoint(directory)
    assert (inspection.detection.format, inspection.sound) == ("hf-packed", True)
    found = {tensor.info.name: tensor for tensor in inspection.tensors}
    for name in source.ternary_names():
        ternary = source.ternary(name)
        assert found[name].sha256 == codes_sha256(ternary)
        assert found[name].scales == (float(ternary.scales[0]),)
    for name in source.plain_names():
        assert found[name].sha256 == values_sha256(source.plain(name))
    assert inspection.anomalies == ()


def test_sizes_are_those_of_the_files(packed):
    directory, source = packed
    sizes = inspect_checkpoint(directory).sizes
    assert sizes.file_bytes == sum(file.stat().st_size for file in directory.iterdir())
    weights = sum(np.prod(info.shape) for info in source.infos.values())
    assert (sizes.fp32_bytes, sizes.bf16_bytes) == (4 * weights, 2 * weights)
    assert sizes.ternary_weights == sum(source.ternary(n).codes().numel() for n in source.coded)
    # Two bits a weight, and four bytes of scale a tensor.
    assert sizes.ternary_bytes == sizes.ternary_weights // 4 + 4 * len(source.coded)


@pytest.mark.parametrize(
    ("counts", "word"),
    [
        (CodeCounts(80, 840, 80), "density 0.160"),
        (CodeCounts(480, 20, 500), "density 0.980"),
        (CodeCounts(100, 310, 590), "more uneven"),
        (CodeCounts(345, 310, 345), ""),
        (CodeCounts(1, 0, 0), ""),
    ],
)
def test_odd_codes_are_those_no_training_leaves(counts, word):
    found = odd_codes(counts)
    assert [word in sentence for sentence in found] == ([True] if word else [])


def test_a_scale_out_of_line_is_odd(tmp_path):
    coded = {
        "a.weight": random_ternary(64, 64, scales=(2e-5,)),
        "b.weight": random_ternary(64, 64, scales=(1.0,), seed=1),
    }
    write_hf_packed(memory_checkpoint(coded, {}), tmp_path, WriteOptions())
    assert ["scales span" in a.what for a in inspect_checkpoint(tmp_path).anomalies][-1:] == [True]


def test_a_damaged_tensor_is_named_and_the_others_are_read(packed, tmp_path):
    directory, source = packed
    name = source.ternary_names()[1]
    file = directory / "model.safetensors"
    raw = bytearray(file.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    start = json.loads(raw[8 : 8 + length])[name]["data_offsets"][0]
    raw[8 + length + start + 5] |= 0b1100
    file.write_bytes(raw)
    inspection = inspect_checkpoint(directory)
    assert not inspection.sound
    assert [name in sentence and "code 3" in sentence for sentence in inspection.damage] == [True]
    read = [tensor.info.name for tensor in inspection.tensors if tensor.sha256]
    assert set(inspection.checkpoint.infos) - set(read) == {name}
    result = CliRunner().invoke(app, ["inspect", str(directory), "--json"])
    assert result.exit_code == 8
    assert json.loads(result.stdout)["sound"] is False


def test_an_open_question_is_asked_and_not_guessed(packed):
    directory, _ = packed
    (directory / "config.json").unlink()
    inspection = inspect_checkpoint(directory)
    assert (inspection.sound, inspection.tensors) == (False, ())
    assert "--scale-convention" in inspection.detection.questions[0]
    result = CliRunner().invoke(app, ["inspect", str(directory)])
    assert result.exit_code == 4
    assert "Open question" in result.stdout


def test_the_command_prints_what_the_inspection_found(packed):
    directory, source = packed
    result = CliRunner().invoke(app, ["inspect", str(directory), "--json"])
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["format"] == "hf-packed"
    assert document["quantization"]["scale_convention"] == "multiply"
    rows = {row["name"]: row for row in document["tensors"]}
    for name in source.ternary_names():
        codes = source.ternary(name).codes()
        assert rows[name]["counts"] == {str(c): int((codes == c).sum()) for c in (-1, 0, 1)}
        assert rows[name]["scales"] == [float(source.ternary(name).scales[0])]
    text = CliRunner().invoke(app, ["inspect", str(directory)]).stdout
    assert "Sound: all" in text


def test_a_zero_tensor_counts_zero():
    ternary = TernaryTensor.from_codes(torch.zeros(5, 3, dtype=torch.int8), torch.tensor([1.0]))
    assert count_codes(ternary) == CodeCounts(0, 15, 0)
    assert CodeCounts(0, 0, 0).density == 0.0

"""Biases of ternary layers: what transformers computes from the files, in both conventions."""

from __future__ import annotations

import pytest
import torch

from forge_harness.errors import CheckpointError
from forge_harness.formats import WriteOptions
from forge_harness.formats.convert import convert
from forge_harness.formats.detect import open_checkpoint
from forge_harness.integration.reader_agreement import LAYER_RTOL, compare
from forge_harness.integration.third_party import read_with_transformers

from ..hf_checkpoints import LLAMA, masters, write

BIASED = {**LLAMA, "num_hidden_layers": 1, "attention_bias": True, "mlp_bias": True}
BIAS = "model.layers.0.self_attn.q_proj.bias"


def stored(directory, layout):
    return write(directory, BIASED, masters(BIASED), layout)


def agreement_with_transformers(directory, out):
    reading = read_with_transformers(directory, [[1, 5, 9, 13], [0, 31, 4, 4]], out=out)
    assert reading.complaints == ()
    with open_checkpoint(directory) as opened:
        return compare(reading, opened)


def test_a_bias_is_read_as_transformers_adds_it(tmp_path):
    source = stored(tmp_path / "model", "autobitlinear")
    found = agreement_with_transformers(source, tmp_path / "out")
    assert len(found.layers) == 7
    assert max(layer.relative_error for layer in found.layers) <= LAYER_RTOL
    assert found.logits.max_over_std <= found.logits.limits[0]


def test_a_biased_layer_is_written_so_that_transformers_leaves_its_bias_alone(tmp_path):
    source = stored(tmp_path / "source", "online")
    report = convert(source, tmp_path / "packed", "hf-packed")
    assert "weight_scale divides (bitlinear), since autobitlinear would multiply 7 biases" in (
        " ".join(report.notes)
    )
    found = agreement_with_transformers(tmp_path / "packed", tmp_path / "out")
    assert max(layer.relative_error for layer in found.layers) <= LAYER_RTOL
    with open_checkpoint(source) as one, open_checkpoint(tmp_path / "packed") as two:
        assert torch.equal(one.plain(BIAS), two.plain(BIAS))


def test_a_convention_that_would_scale_biases_is_refused_when_asked_for(tmp_path):
    source = stored(tmp_path / "source", "online")
    with pytest.raises(CheckpointError, match=r"_proj\.bias' is the bias .* --hf-scale divide"):
        convert(
            source,
            tmp_path / "packed",
            "hf-packed",
            write=WriteOptions(scale_convention="multiply"),
        )
    assert not (tmp_path / "packed").exists()


def test_a_scaled_bias_keeps_its_value_on_the_way_to_other_formats(tmp_path):
    source = stored(tmp_path / "source", "autobitlinear")
    with open_checkpoint(source) as opened:
        value = opened.plain(BIAS)
        scale = opened.scales(BIAS.replace("bias", "weight"))
        assert any("7 biases of ternary layers read times" in a.what for a in opened.anomalies)
    assert torch.equal(value, masters(BIASED)[BIAS] * scale)
    for to in ("native", "hf-packed", "hf-online"):
        convert(source, tmp_path / to, to)
        with open_checkpoint(tmp_path / to) as opened:
            assert torch.equal(opened.plain(BIAS), value)

"""Ternary heads in Hugging Face directories: listed so that transformers makes them ternary too."""

from __future__ import annotations

import json

import pytest

from forge_harness.errors import CheckpointError
from forge_harness.formats import ReadOptions
from forge_harness.formats.convert import convert
from forge_harness.formats.detect import open_checkpoint
from forge_harness.integration.reader_agreement import LAYER_RTOL, compare
from forge_harness.integration.third_party import read_with_transformers

from ..hf_checkpoints import LLAMA, masters, write

SMALL = {**LLAMA, "num_hidden_layers": 1}
HEAD = ReadOptions(quantize=("*_proj", "lm_head"))


@pytest.fixture
def dense(tmp_path):
    return write(tmp_path / "dense", SMALL, masters(SMALL), None)


@pytest.mark.parametrize("to", ["hf-packed", "hf-online"])
def test_a_ternary_head_is_one_to_transformers_too(to, dense, tmp_path):
    convert(dense, tmp_path / "out", to, read=HEAD)
    reading = read_with_transformers(tmp_path / "out", [[1, 5, 9, 13]], out=tmp_path / "reading")
    assert reading.complaints == ()
    assert "lm_head" in reading.ternary
    with open_checkpoint(tmp_path / "out") as opened:
        found = compare(reading, opened)
    assert found.unread == ()
    assert max(layer.relative_error for layer in found.layers) <= LAYER_RTOL


def test_what_a_list_spares_beside_a_ternary_head_is_all_it_names(dense, tmp_path):
    read = ReadOptions(quantize=HEAD.quantize, exclude=("*o_proj",))
    convert(dense, tmp_path / "out", "hf-packed", read=read)
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stated["modules_to_not_convert"] == ["model.layers.0.self_attn.o_proj"]


def test_a_head_that_transformers_would_refuse_is_odd(dense, tmp_path):
    convert(dense, tmp_path / "out", "hf-packed", read=HEAD)
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].pop("modules_to_not_convert", None)
    file.write_text(json.dumps(config))
    with open_checkpoint(tmp_path / "out") as opened:
        assert any("transformers refuses the files" in a.what for a in opened.anomalies)


@pytest.mark.parametrize("to", ["hf-packed", "hf-online"])
def test_a_ternary_embedding_is_refused(to, dense, tmp_path):
    with pytest.raises(CheckpointError, match=r"'model\.embed_tokens\.weight' is ternary and"):
        convert(dense, tmp_path / "out", to, read=ReadOptions(quantize=("*",)))

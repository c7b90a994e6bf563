"""Ternary heads in Hugging Face directories: listed so that transformers makes them ternary too."""

from __future__ import annotations

import json

import pytest
import torch

from forge_harness.errors import CheckpointError, DamagedCheckpointError
from forge_harness.formats import ReadOptions
from forge_harness.formats.convert import convert
from forge_harness.formats.detect import open_checkpoint
from forge_harness.integration.reader_agreement import LAYER_RTOL, compare
from forge_harness.integration.third_party import read_with_transformers

from ..hf_checkpoints import BITNET, LLAMA, masters, write

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


@pytest.mark.parametrize("layout", [None, "autobitlinear"])
def test_a_configuration_that_ties_nothing_has_a_head_of_its_own(layout, tmp_path):
    """The default of transformers' BitNet class, whose published model says that it ties."""
    config = {**BITNET, "num_hidden_layers": 1, "tie_word_embeddings": False}
    tensors = masters(config)
    del config["tie_word_embeddings"]
    with open_checkpoint(write(tmp_path / "own", config, tensors, layout)) as opened:
        assert "lm_head.weight" in opened.plain_names()
        assert opened.tied == {}
    convert(tmp_path / "own", tmp_path / "native", "native")
    del tensors["lm_head.weight"]
    with pytest.raises(DamagedCheckpointError, match=r"'lm_head\.weight' is missing"):
        open_checkpoint(write(tmp_path / "none", config, tensors, layout))


def test_a_tied_embedding_may_be_stored_under_the_name_of_the_head(tmp_path):
    """As `safetensors.torch.save_model` does, and as transformers loads it."""
    config = {**BITNET, "num_hidden_layers": 1}
    tensors = masters(config)
    embedding = tensors.pop("model.embed_tokens.weight")
    start = write(tmp_path / "head", config, {**tensors, "lm_head.weight": embedding}, None)
    convert(start, tmp_path / "packed", "hf-packed")
    for directory in (start, tmp_path / "packed"):
        with open_checkpoint(directory) as opened:
            assert opened.tied == {"lm_head.weight": "model.embed_tokens.weight"}
            assert torch.equal(opened.plain("model.embed_tokens.weight"), embedding)


@pytest.mark.parametrize(
    "name", ["LlamaForSequenceClassification", "LlamaModel", "BitnetForCausalLM"]
)
def test_another_class_of_transformers_is_no_damage(name, tmp_path):
    tensors = masters(SMALL)
    del tensors["lm_head.weight"]
    if name == "BitnetForCausalLM":  # As 1bitLLM published them, with norms of their own.
        tensors["model.layers.0.self_attn.inner_attn_ln.weight"] = torch.ones(64)
    start = write(tmp_path / "other", {**SMALL, "architectures": [name]}, tensors, None)
    with pytest.raises(CheckpointError, match=f"names the class '{name}'; expected") as caught:
        open_checkpoint(start)
    assert not isinstance(caught.value, DamagedCheckpointError)

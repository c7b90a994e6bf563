"""What a GGUF file cannot hold, or cannot hold exactly: said, not met by accident."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from forge_harness.errors import CheckpointError, DamagedCheckpointError
from forge_harness.formats import TernaryTensor, WriteOptions
from forge_harness.formats.convert import convert
from forge_harness.formats.detect import open_checkpoint
from forge_harness.model.from_checkpoint import model_from_checkpoint

from ..hf_checkpoints import LLAMA as SMALL_LLAMA
from ..hf_checkpoints import masters, write
from .memory import hf_checkpoint, memory_checkpoint, random_ternary
from .test_convert import written

LLAMA = {"model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": False}


def test_heads_that_cannot_be_turned_are_refused_when_written(tmp_path):
    odd = hf_checkpoint(**LLAMA, num_attention_heads=64, num_key_value_heads=64)
    start = written(odd, tmp_path / "start")
    with pytest.raises(CheckpointError, match=r"'blk\.0\.attn_[qk]\.weight' cannot .* 64 heads"):
        convert(start, tmp_path / "out.gguf", "gguf-tq2_0")


def test_heads_that_cannot_be_turned_are_damage_when_read(tmp_path):
    width = 4
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "llama")
    writer.add_context_length(8)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(width)
    writer.add_head_count(width)
    writer.add_layer_norm_rms_eps(1e-5)
    matrices = [f"attn_{part}" for part in ("q", "k", "v", "output")]
    matrices += [f"ffn_{part}" for part in ("gate", "up", "down")]
    for name in ("token_embd.weight", *(f"blk.0.{matrix}.weight" for matrix in matrices)):
        writer.add_tensor(name, np.ones((width, width), np.float32))
    for name in ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"):
        writer.add_tensor(name, np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(DamagedCheckpointError, match="4 rows are no even number for each of 4"):
        open_checkpoint(tmp_path / "odd.gguf")


def test_a_configuration_beyond_canonical_json_is_refused(tmp_path):
    start = written(hf_checkpoint(), tmp_path / "start")
    convert(start, tmp_path / "hf", "hf-packed")
    file = tmp_path / "hf" / "config.json"
    file.write_text(file.read_text().replace("{", f'{{"seed": {2**60}, ', 1))
    with pytest.raises(CheckpointError, match=r"cannot be written to a GGUF file: .*1152921504606"):
        convert(tmp_path / "hf", tmp_path / "out.gguf", "gguf-tq2_0")


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_a_scale_a_block_is_no_damage(kind, tmp_path):
    """As llama-quantize makes it of a model in full precision."""
    weight = np.random.default_rng(0).standard_normal((8, 512)).astype(np.float32)
    number = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(tmp_path / "any.gguf", "other")
    writer.add_tensor("a.weight", gguf.quants.quantize(weight, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with (
        pytest.raises(CheckpointError, match=r"'a\.weight' has 16 scales, each block") as caught,
        open_checkpoint(tmp_path / "any.gguf") as opened,
    ):
        opened.ternary("a.weight")
    assert not isinstance(caught.value, DamagedCheckpointError)


@pytest.mark.filterwarnings("error")
def test_a_number_beyond_fp32_is_one_sentence(tmp_path):
    start = written(hf_checkpoint(**LLAMA, rms_norm_eps=1e300), tmp_path / "start")
    with pytest.raises(
        CheckpointError, match=r"rms_norm_eps 1e\+300; expected a positive number of"
    ):
        convert(start, tmp_path / "out.gguf", "gguf-tq2_0")


def source_of_scale(scale, directory):
    coded = {"a.weight": random_ternary(8, 256, scales=(scale,))}
    return written(memory_checkpoint(coded, {"b.weight": torch.ones(3)}), directory)


def test_what_fp16_makes_of_a_scale_is_noted_for_other_readers(tmp_path):
    start = source_of_scale(0.037, tmp_path / "start")
    moved = abs(float(np.float16(np.float32(0.037))) / float(np.float32(0.037)) - 1)
    report = convert(start, tmp_path / "out.gguf", "gguf-tq2_0")
    assert report.comparison.scale_change == 0
    assert any(f"by up to {moved:.2g}" in note for note in report.notes)
    apart = convert(
        start, tmp_path / "apart.gguf", "gguf-tq2_0", write=WriteOptions(gguf_scale="tensor")
    )
    assert not any("fp16" in note for note in apart.notes)
    assert any("other readers take the weights for -1, 0, 1" in note for note in apart.notes)


def test_a_scale_that_fp16_holds_is_no_note(tmp_path):
    report = convert(source_of_scale(0.25, tmp_path / "start"), tmp_path / "out.gguf", "gguf-tq2_0")
    assert not any("fp16" in note for note in report.notes)


@pytest.mark.parametrize("scale", [1e-5, 1e6])
def test_a_scale_that_multiplies_only_zeros_is_in_nobodys_way(scale, tmp_path):
    """A layer that begins at zero has the floor of the quantizer, which fp16 does not hold."""
    nothing = TernaryTensor.from_codes(torch.zeros(8, 256, dtype=torch.int8), torch.tensor([scale]))
    start = written(memory_checkpoint({"a.weight": nothing}, {}), tmp_path / "start")
    report = convert(start, tmp_path / "out.gguf", "gguf-tq2_0")
    assert report.comparison.scale_change == 0
    assert not any("fp16" in note for note in report.notes)
    (stored,) = gguf.GGUFReader(tmp_path / "out.gguf").tensors
    assert not gguf.quants.dequantize(stored.data, stored.tensor_type).any()
    some = source_of_scale(scale, tmp_path / "some")
    with pytest.raises(CheckpointError, match="which fp16 does not hold"):
        convert(some, tmp_path / "some.gguf", "gguf-tq2_0")


NUMBERS = {
    "counts": torch.arange(5)[None],
    "small": torch.arange(4, dtype=torch.int8),
    "exact": torch.tensor([0.1], dtype=torch.float64),
}


def plain_only(plain, directory):
    return written(memory_checkpoint({"a.weight": random_ternary(8, 256)}, plain), directory)


def test_numbers_that_are_no_fp32_keep_their_type_where_only_we_read_the_file(tmp_path):
    start = plain_only(NUMBERS, tmp_path / "start")
    assert convert(start, tmp_path / "out.gguf", "gguf-tq2_0").comparison.plain_changed == 0
    convert(tmp_path / "out.gguf", tmp_path / "back", "native")
    with open_checkpoint(tmp_path / "back") as back:
        for name, tensor in NUMBERS.items():
            assert back.plain(name).dtype == tensor.dtype
            assert torch.equal(back.plain(name), tensor)


@pytest.mark.parametrize("tensor", [torch.ones(3, dtype=torch.bool), torch.ones(3).byte()])
def test_numbers_without_a_type_of_ggml_are_refused_by_name(tensor, tmp_path):
    start = plain_only({"mask": tensor}, tmp_path / "start")
    with pytest.raises(CheckpointError, match=r"'mask' is (BOOL|U8), which .* cannot hold"):
        convert(start, tmp_path / "out.gguf", "gguf-tq2_0")


def test_llama_cpp_is_not_given_numbers_it_cannot_compute_with(tmp_path):
    config = {**SMALL_LLAMA, "num_hidden_layers": 1}
    tensors = masters(config)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].double()
    start = write(tmp_path / "start", config, tensors, None)
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' is F64, .* 'llama' cannot"):
        convert(start, tmp_path / "out.gguf", "gguf-tq2_0")


def test_a_tensor_of_more_dimensions_than_ggml_has_is_refused_by_name(tmp_path):
    start = plain_only({"deep": torch.ones(1, 1, 1, 1, 2)}, tmp_path / "start")
    with pytest.raises(CheckpointError, match=r"'deep' has shape \(1, 1, 1, 1, 2\), which"):
        convert(start, tmp_path / "out.gguf", "gguf-tq2_0")


def test_a_part_of_a_split_model_is_no_damage(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=1)
    for name in ("token_embd.weight", "output_norm.weight"):
        writer.add_tensor(name, np.ones((2, 4), np.float32))
    writer.write_header_to_file(tmp_path / "m.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for part in sorted(tmp_path.glob("m-*.gguf")):
        with pytest.raises(CheckpointError, match="is one of 2 files of a split model") as caught:
            open_checkpoint(part)
        assert not isinstance(caught.value, DamagedCheckpointError)


def llama_cpp_file(path, *tensors, **keys):
    """A BitNet model as llama.cpp's converter describes it, of the tensors every layer has."""
    width = 4
    writer = gguf.GGUFWriter(path, "bitnet")
    for add in (writer.add_embedding_length, writer.add_feed_forward_length):
        add(width)
    for add in (writer.add_block_count, writer.add_head_count):
        add(1)
    writer.add_context_length(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(1.0)
    for key, value in keys.items():
        kinds = {float: writer.add_float32, int: writer.add_uint32, list: writer.add_array}
        kinds[type(value)](f"bitnet.{key.replace('__', '.')}", value)
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    for name in ("token_embd", *(f"blk.0.{matrix}" for matrix in matrices)):
        writer.add_tensor(f"{name}.weight", np.eye(width, dtype=np.float32))
    norms = [f"blk.0.{kind}{sub}_norm" for kind in ("attn", "ffn") for sub in ("", "_sub")]
    for name in ("output_norm", *norms, *tensors):
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_scaling_by_one_of_every_bitnet_file_of_llama_cpp_is_none(tmp_path):
    source = llama_cpp_file(tmp_path / "bitnet.gguf")
    with open_checkpoint(source) as opened:
        assert opened.model.config["rope_parameters"]["rope_type"] == "default"
        logits = model_from_checkpoint(opened)(torch.tensor([[1, 2, 3]]))
    assert logits.shape == (1, 3, 4)
    convert(source, tmp_path / "again.gguf", "gguf-tq2_0")
    with open_checkpoint(tmp_path / "again.gguf") as opened:
        assert opened.quantization["architecture"] == "bitnet"


def test_frequencies_no_configuration_follows_from_are_no_damage(tmp_path):
    source = llama_cpp_file(tmp_path / "scaled.gguf", "rope_freqs")
    with pytest.raises(CheckpointError, match=r"'rope_freqs\.weight', the scaled") as found:
        open_checkpoint(source)
    assert not isinstance(found.value, DamagedCheckpointError)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"attention__sliding_window": 4}, r"sliding_window' 4; expected no such key"),
        ({"attention__sliding_window": [0, 4]}, r"sliding_window' array\(\[0, 4\]"),
        ({"expert_count": 2}, r"expert_count' 2; expected no such key"),
        ({"logit_scale": 0.5}, r"logit_scale' 0\.5; expected no such key"),
        (
            {"rope__dimension_count": 2, "attention__key_length": 4},
            "dimension_count' 2; expected all 4 features of a head",
        ),
    ],
)
def test_keys_that_make_another_model_are_not_passed_over(keys, said, tmp_path):
    source = llama_cpp_file(tmp_path / "other.gguf", **keys)
    with pytest.raises(CheckpointError, match=said) as found:
        open_checkpoint(source)
    assert not isinstance(found.value, DamagedCheckpointError)


def test_keys_that_say_nothing_are_none(tmp_path):
    open_checkpoint(llama_cpp_file(tmp_path / "zero.gguf", expert_count=0)).close()

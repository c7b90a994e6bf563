"""Readers we did not write, over golden checkpoints and over what we write ourselves."""

from __future__ import annotations

import json
import shutil

import gguf
import pytest
import torch

from forge_harness.errors import UsageError
from forge_harness.formats import gguf_reader, gguf_rope, gguf_writer
from forge_harness.formats.convert import convert
from forge_harness.formats.detect import open_checkpoint
from forge_harness.integration import third_party_child
from forge_harness.integration.reader_agreement import LAYER_RTOL, compare
from forge_harness.integration.third_party import (
    NotAvailable,
    ReaderFailedError,
    read_with_gguf,
    read_with_llama_cpp,
    read_with_transformers,
)
from forge_harness.integration.third_party_gguf import tensor_results
from forge_harness.paths import fixtures_dir

from ..hf_checkpoints import LLAMA, masters, write

ROOT = fixtures_dir() / "checkpoints"
TOKENS = [[1, 5, 9, 13, 2, 30, 7, 7], [0, 31, 4, 4, 8, 15, 16, 23]]


def reading_of(directory, tmp_path):
    found = read_with_transformers(directory, TOKENS, out=tmp_path / "reading")
    assert not isinstance(found, NotAvailable)
    return found


@pytest.mark.parametrize("to", ["golden", "multiply", "online"])
def test_transformers_computes_what_the_codes_say(to, tmp_path):
    golden = ROOT / "hf-packed-bitlinear-untied"
    directory = tmp_path / "written"
    if to == "golden":
        shutil.copytree(golden, directory)
    else:
        convert(golden, directory, "hf-online" if to == "online" else "hf-packed")
    reading = reading_of(directory, tmp_path)
    assert reading.complaints == ()
    assert reading.model_class == "BitNetForCausalLM"
    with open_checkpoint(directory) as opened:
        agreement = compare(reading, opened)
    assert len(agreement.layers) == 14
    assert agreement.unread == ()
    assert max(layer.relative_error for layer in agreement.layers) <= LAYER_RTOL
    largest, mean = agreement.logits.limits
    assert agreement.logits.max_over_std <= largest
    assert agreement.logits.mean_over_std <= mean


def test_a_swapped_scale_convention_shows_in_every_layer(tmp_path):
    directory = shutil.copytree(ROOT / "hf-packed-autobitlinear-tied", tmp_path / "copy")
    reading = reading_of(directory, tmp_path)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["linear_class"] = "bitlinear"
    (directory / "config.json").write_text(json.dumps(config))
    with open_checkpoint(directory) as opened:
        agreement = compare(reading, opened)
    assert min(layer.relative_error for layer in agreement.layers) > 0.1


class AutoBitLinear(torch.nn.Module):
    """What transformers before 5.13 makes of a packed layer has the dtype it is stored in."""

    def __init__(self, dtype):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=dtype), requires_grad=False)


def test_a_loader_that_leaves_codes_packed_is_no_reader():
    layers = {"a": AutoBitLinear(torch.float32), "b": AutoBitLinear(torch.uint8)}
    assert third_party_child._undecoded(layers) == "b"
    assert third_party_child._undecoded({"a": layers["a"]}) == ""


def test_what_the_loader_did_not_take_is_listed(tmp_path):
    directory = shutil.copytree(ROOT / "hf-packed-autobitlinear-tied", tmp_path / "copy")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    complaints = reading_of(directory, tmp_path).complaints
    assert any("model.layers.2" in complaint for complaint in complaints)


@pytest.mark.parametrize("to", ["gguf-tq1_0", "gguf-tq2_0"])
def test_gguf_decodes_exactly_what_was_written(to, tmp_path):
    convert(ROOT / "hf-packed-autobitlinear-tied", tmp_path / "model.gguf", to)
    reading = read_with_gguf(tmp_path / "model.gguf")
    assert not isinstance(reading, NotAvailable)
    assert sum(tensor.layout.startswith("TQ") for tensor in reading.tensors) == 14
    assert [tensor.name for tensor in reading.tensors if tensor.differing] == []


@pytest.mark.parametrize("key_heads", [4, 2])
def test_gguf_sees_the_rows_of_a_llama_as_llama_cpp_turns_them(key_heads, tmp_path):
    """Queries and keys, with biases and fewer heads of keys; in the order of transformers none."""
    config = {**LLAMA, "num_key_value_heads": key_heads, "attention_bias": True}
    dense = write(tmp_path / "dense", config, masters(config), None)
    convert(dense, tmp_path / "model.gguf", "gguf-tq2_0")
    reading = read_with_gguf(tmp_path / "model.gguf")
    with open_checkpoint(dense) as opened:
        assert {tensor.name for tensor in reading.tensors} == set(opened.infos)
    assert [tensor.name for tensor in reading.tensors if tensor.differing] == []


def test_rows_in_another_order_than_llama_cpp_has_differ(tmp_path, monkeypatch):
    """Reader and writer of this package agree on it, so their own comparison cannot tell."""
    same = lambda rows, heads: torch.arange(rows)  # noqa: E731
    for module in (gguf_rope, gguf_reader, gguf_writer):
        monkeypatch.setattr(module, "interleaving", same)
    dense = write(tmp_path / "dense", LLAMA, masters(LLAMA), None)
    convert(dense, tmp_path / "model.gguf", "gguf-tq2_0")
    wrong = [t["name"] for t in tensor_results(gguf, tmp_path / "model.gguf") if t["differing"]]
    assert len(wrong) == 2 * LLAMA["num_hidden_layers"]
    assert all(name.endswith(("q_proj.weight", "k_proj.weight")) for name in wrong)


def test_a_reader_that_is_not_installed_says_so(tmp_path):
    found = read_with_llama_cpp(
        ROOT / "gguf-tq2_0" / "model.gguf", TOKENS, out=tmp_path / "reading"
    )
    if isinstance(found, NotAvailable):
        assert "llama" in found.reason
    else:
        assert found.arrays.is_file()


def test_a_reader_that_hangs_is_stopped(tmp_path):
    with pytest.raises(ReaderFailedError, match=r"did not answer within 0\.01 s"):
        read_with_transformers(
            ROOT / "hf-packed-sharded", TOKENS, out=tmp_path / "reading", timeout_s=0.01
        )


def test_ragged_tokens_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"lengths \[1, 2\]"):
        read_with_transformers(ROOT / "hf-packed-sharded", [[1], [1, 2]], out=tmp_path)


def test_the_child_knows_every_reader():
    assert set(third_party_child.READERS) == {"transformers", "gguf", "llama_cpp"}

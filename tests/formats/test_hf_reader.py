"""Full precision on its way in: quantized to the bit as the trainer does, chosen and said so."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from forge_harness.errors import CheckpointError, DamagedCheckpointError
from forge_harness.formats import ReadOptions, tensors
from forge_harness.formats.detect import detect, open_checkpoint
from forge_harness.paths import fixtures_dir
from forge_harness.quant import absmean_ternary

ROOT = fixtures_dir() / "checkpoints"


@settings(max_examples=60)
@given(
    rows=st.integers(1, 130),
    columns=st.integers(1, 130),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    chunk=st.sampled_from([1, 100, 1000, 1 << 20]),
    seed=st.integers(0, 999),
)
def test_weights_read_in_pieces_quantize_as_the_whole(
    rows, columns, dtype, chunk, seed, tmp_path_factory
):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    file = tmp_path_factory.mktemp("hf") / "model.safetensors"
    save_file({"a.weight": weight}, file)
    before = tensors.CHUNK_CODES
    try:
        tensors.CHUNK_CODES = chunk
        with open_checkpoint(file) as opened:
            if not opened.infos["a.weight"].master:
                return  # three values at most: codes and scale are taken as they are
            found, scales = opened.ternary("a.weight"), opened.scales("a.weight")
            codes = found.codes()
    finally:
        tensors.CHUNK_CODES = before
    expected, scale = absmean_ternary(weight)
    assert torch.equal(codes, expected)
    assert torch.equal(scales, scale.reshape(1))
    assert torch.equal(found.scales, scales)


def state(**named):
    return {name.replace("__", "."): tensor for name, tensor in named.items()}


@pytest.fixture
def model(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weights = state(
        tok_embeddings__weight=torch.randn(9, 8, generator=generator),
        layer__weight=torch.randn(8, 8, generator=generator),
        norm__weight=torch.ones(8),
        lm_head__weight=torch.randn(9, 8, generator=generator),
    )
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path


def test_the_rule_spares_embeddings_heads_and_norms_and_says_so(model):
    assert "embedding, an output head or a norm" in detect(model).reasons[-1]
    with open_checkpoint(model) as opened:
        assert opened.ternary_names() == ["layer.weight"]


def test_an_embedding_may_be_called_emb(tmp_path):
    spared = ["emb.weight", "net.tok_emb.weight", "pos_emb.weight", "emb_in.weight"]
    ternary = ["ensemble.0.weight", "member.weight"]
    weights = {name: torch.randn(8, 8) for name in (*spared, *ternary)}
    save_file(weights, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as opened:
        assert sorted(opened.ternary_names()) == ternary


def test_patterns_win_over_the_rule(model):
    options = ReadOptions(quantize=("*",), exclude=("lm_head",))
    with open_checkpoint(model, options) as opened:
        assert sorted(opened.ternary_names()) == ["layer.weight", "tok_embeddings.weight"]
    with pytest.raises(CheckpointError, match="'nothing' matches no floating matrix"):
        open_checkpoint(model, ReadOptions(quantize=("nothing",)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named(value, tmp_path):
    weight = torch.randn(5, 7)
    weight[3, 2] = value
    save_file({"a.weight": weight}, tmp_path / "model.safetensors")
    with (
        pytest.raises(DamagedCheckpointError, match=r"'a\.weight' has (nan|inf) as value 23"),
        open_checkpoint(tmp_path) as opened,
    ):
        opened.ternary("a.weight")


def test_dense_codes_are_never_quantized_again(tmp_path):
    codes = torch.randint(-1, 2, (16, 16)).float()
    save_file({"a.weight": 0.25 * codes}, tmp_path / "model.safetensors")
    assert detect(tmp_path).format == "hf-fake-quant"
    with open_checkpoint(tmp_path) as opened:
        assert torch.equal(opened.ternary("a.weight").codes().float(), codes)
        assert opened.scales("a.weight").tolist() == [0.25]


def test_a_state_dict_under_a_key_is_found_and_anything_else_is_not(tmp_path):
    weights = {"a.weight": torch.randn(4, 4)}
    torch.save({"model": weights, "step": 3}, tmp_path / "nested.pt")
    assert "under the key 'model'" in detect(tmp_path / "nested.pt").reasons[1]
    torch.save({"model": weights, "state_dict": weights}, tmp_path / "two.pt")
    with pytest.raises(CheckpointError, match="expected a state dict"):
        detect(tmp_path / "two.pt")
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    with pytest.raises(CheckpointError, match="expected a state dict"):
        detect(tmp_path / "tensor.pt")


def test_an_option_that_contradicts_the_configuration_is_refused():
    with pytest.raises(CheckpointError, match=r"contradicts config\.json"):
        open_checkpoint(
            ROOT / "hf-packed-autobitlinear-tied", ReadOptions(scale_convention="divide")
        )


def test_a_list_that_forgets_the_head_is_odd(tmp_path):
    directory = shutil.copytree(ROOT / "hf-packed-autobitlinear-untied", tmp_path / "copy")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["model.nothing"]
    (directory / "config.json").write_text(json.dumps(config))
    with open_checkpoint(directory) as opened:
        assert any("does not name lm_head" in anomaly.what for anomaly in opened.anomalies)


def test_a_tied_head_that_is_stored_must_be_its_embedding(tmp_path):
    from safetensors.torch import load_file

    directory = shutil.copytree(ROOT / "hf-packed-autobitlinear-tied", tmp_path / "copy")
    weights = load_file(directory / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, directory / "model.safetensors")
    with open_checkpoint(directory) as opened:
        assert any("tied" in anomaly.what for anomaly in opened.anomalies)
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(DamagedCheckpointError, match=r"lm_head\.weight.*other values"):
        open_checkpoint(directory)


def test_a_configuration_of_more_layers_than_tensors_is_refused_at_once(tmp_path):
    """A billion layers are more names than memory."""
    copy = tmp_path / "deep"
    shutil.copytree(ROOT / "hf-packed-bitlinear-untied", copy)
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    with pytest.raises(DamagedCheckpointError, match="num_hidden_layers 1000000000, and only 25"):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (26, "the model has num_hidden_layers 26, and only 25 tensors are stored"),
        # So many names can be listed, and the first that is missing is of more use.
        (25, "model.layers.2."),
        (3, "model.layers.2."),
    ],
)
def test_more_layers_than_there_are_name_a_tensor_where_they_can(tmp_path, layers, words):
    copy = tmp_path / "deep"
    shutil.copytree(ROOT / "hf-packed-bitlinear-untied", copy)
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    with pytest.raises(DamagedCheckpointError) as caught:
        open_checkpoint(copy)
    assert words in str(caught.value)
    assert ("only 25 tensors" in str(caught.value)) is (layers > 25)


def test_a_link_to_itself_is_damage(tmp_path):
    copy = tmp_path / "loop"
    shutil.copytree(ROOT / "hf-packed-bitlinear-untied", copy)
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(DamagedCheckpointError, match=r"'model\.safetensors', a link that ends"):
        open_checkpoint(copy)

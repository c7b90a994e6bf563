"""The Llama and BitNet models: transformers' own numbers, names and sizes, and what is refused."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from forge_harness.errors import CheckpointError
from forge_harness.model import CausalLM, CausalLMConfig

from ..hf_checkpoints import BITNET, LLAMA, is_projection, masters, write

WIDE = {**LLAMA, "head_dim": 32, "attention_bias": True, "mlp_bias": True}
CASES = {
    "bitnet-online": (BITNET, "online"),
    "bitnet-packed": (BITNET, "autobitlinear"),
    "bitnet-bias-silu": ({**BITNET, "attention_bias": True, "hidden_act": "silu"}, "online"),
    "llama-packed": (LLAMA, "bitlinear"),
    # transformers' AutoBitLinear multiplies biases by the scale, so biases go with its BitLinear.
    "llama-wide-heads-biases": (WIDE, "bitlinear"),
    "llama-dense": ({**WIDE, "rope_theta": 500.0, "rope_parameters": None}, None),
    "bitnet-dense-tied": (BITNET, None),
}
READ = """
import json, sys
from pathlib import Path
from forge_harness.integration.third_party_child import with_transformers
for request in json.loads(Path(sys.argv[1]).read_text()):
    out = Path(request["path"])
    (out / "result.json").write_text(json.dumps(with_transformers(request, out)))
"""


@pytest.fixture(scope="module")
def readings(tmp_path_factory):
    """Every case read and run by transformers, in one process: case -> (result, arrays)."""
    root = tmp_path_factory.mktemp("transformers")
    tokens = torch.randint(0, 96, (2, 17), generator=torch.Generator().manual_seed(3)).tolist()
    requests = []
    for name, (config, layout) in CASES.items():
        directory = write(root / name, config, masters(config), layout)
        requests.append({"path": str(directory), "tokens": tokens, "hooks": True})
    (root / "requests.json").write_text(json.dumps(requests))
    command = [sys.executable, "-c", READ, str(root / "requests.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return torch.tensor(tokens), {
        name: (
            json.loads((root / name / "result.json").read_text()),
            load_file(root / name / "arrays.safetensors"),
        )
        for name in CASES
    }


def ours(name):
    config, layout = CASES[name]
    model = CausalLM.from_transformers(
        config["model_type"], config, ternary=() if layout is None else None
    )
    model.load_state_dict(masters(config), strict=not config["tie_word_embeddings"])
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_transformers_takes_the_same_names(readings, name):
    result, _ = readings[1][name]
    complaints = {key: result[key] for key in ("missing", "unexpected", "mismatched", "errors")}
    assert not any(complaints.values()), complaints
    assert sorted(ours(name).quantized_names()) == result["ternary"]


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][1] is not None])
@torch.no_grad()
def test_every_layer_answers_as_in_transformers(readings, name):
    result, arrays = readings[1][name]
    model = ours(name)
    assert len(result["ternary"]) == 14
    for layer in result["ternary"]:
        expected = arrays[f"{layer}.output"]
        found = model.get_submodule(layer)(arrays[f"{layer}.input"])
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max(), layer


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_agree_with_transformers(readings, name):
    tokens, cases = readings
    expected = cases[name][1]["logits"]
    difference = (ours(name)(tokens) - expected).abs().max()
    assert difference <= 1e-5 * expected.std()


@pytest.mark.parametrize("config", [config for config, _ in CASES.values()])
def test_the_formula_counts_the_parameters(config):
    model = CausalLM.from_transformers(config["model_type"], config)
    stored = sum(tensor.numel() for tensor in masters(config).values())
    assert model.parameter_formula() == sum(p.numel() for p in model.parameters()) == stored


def test_the_published_size():
    config = {
        "vocab_size": 128_256,
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "num_hidden_layers": 30,
        "num_attention_heads": 20,
        "num_key_value_heads": 5,
        "tie_word_embeddings": True,
    }
    with torch.device("meta"):
        model = CausalLM.from_transformers("bitnet", config)
    assert model.parameter_formula() == 2_412_820_480
    assert model.config.hidden_act == "relu2"
    assert model.config.rope_theta == 500_000.0


def test_what_is_declared():
    model = CausalLM.from_transformers("bitnet", BITNET)
    projections = [name.removesuffix(".weight") for name in masters(BITNET) if is_projection(name)]
    assert sorted(model.quantized_names()) == sorted(projections)
    assert model.full_precision_names() == ("model.embed_tokens", "lm_head")
    assert len(model.sub_norm_names()) == 4
    assert set(model.sub_norm_names()) <= {name for name, _ in model.named_modules()}
    assert model.tied() == (("model.embed_tokens.weight", "lm_head.weight"),)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    llama = CausalLM.from_transformers("llama", LLAMA)
    assert (llama.sub_norm_names(), llama.tied()) == ((), ())
    assert llama.lm_head.weight is not llama.model.embed_tokens.weight


def test_only_chosen_projections_are_ternary():
    chosen = ("model.layers.1.mlp.up_proj", "lm_head")
    model = CausalLM.from_transformers("llama", LLAMA, ternary=chosen)
    assert set(model.quantized_names()) == set(chosen)
    assert "model.layers.0.mlp.up_proj" in model.full_precision_names()
    with pytest.raises(ValueError, match="Unknown projection 'lm_head'"):
        CausalLM.from_transformers("bitnet", BITNET, ternary=["lm_head"])


def test_no_sequences_have_no_logits_and_one_alone_is_refused():
    model = CausalLM.from_transformers("bitnet", BITNET)
    tokens = torch.zeros((0, 5), dtype=torch.int64)
    assert model(tokens).shape == (0, 5, 96)
    with pytest.raises(ValueError, match=r"tokens have shape \(5,\); expected \(B, T\)"):
        model(tokens.new_zeros(5))


def test_a_later_token_never_moves_an_earlier_output():
    model = CausalLM.from_transformers("bitnet", BITNET)
    before = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    after = before.clone()
    after[:, 7] = (after[:, 7] + 1) % 96
    difference = (model(before) - model(after)).abs().amax((0, 2))
    assert difference[:7].eq(0).all()
    assert difference[7:].gt(0).all()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_scaling.rope_type 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, r"rope_parameters.rope_type 'yarn'"),
        ({"rope_parameters": [1]}, r"rope_parameters \[1\]; expected an object"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor 0.5"),
        ({"sliding_window": 128}, r"sliding_window 128"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, r"'sliding_attention'"),
        ({"layer_types": 5}, r"layer_types 5; expected a list"),
        ({"tie_word_embeddings": "false"}, r"tie_word_embeddings 'false'; expected true or false"),
        ({"attention_bias": [0]}, r"attention_bias \[0\]; expected true or false"),
        ({"hidden_act": "gelu"}, r"hidden_act 'gelu'; supported is 'relu2' or 'silu'"),
        ({"hidden_size": "64"}, r"hidden_size '64'; expected a positive count"),
        ({"hidden_size": None}, r"hidden_size None"),
        ({"vocab_size": 0}, r"vocab_size 0"),
        ({"num_hidden_layers": True}, r"num_hidden_layers True"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads 3"),
        ({"head_dim": 15, "num_key_value_heads": 2}, r"heads of 15 features"),
        ({"head_dim": 32}, r"4 heads of 32 features with hidden_size 64"),
        ({"rms_norm_eps": -1e-5}, r"rms_norm_eps -1e-05"),
        ({"rope_parameters": {"rope_theta": "big"}}, r"rope_theta 'big'"),
    ],
)
def test_a_configuration_that_asks_for_another_model_is_refused(change, sentence):
    with pytest.raises(CheckpointError, match=sentence) as error:
        CausalLMConfig.from_transformers("bitnet", {**BITNET, **change})
    assert "\n" not in str(error.value)


def test_what_changes_nothing_is_taken():
    harmless = {
        "rope_scaling": {"rope_type": "default"},
        "sliding_window": 4096,
        "use_sliding_window": False,
        "partial_rotary_factor": 1.0,
        "layer_types": ["full_attention"] * 2,
        "mlp_bias": True,
    }
    config = CausalLMConfig.from_transformers("bitnet", {**BITNET, **harmless})
    assert config == CausalLMConfig.from_transformers("bitnet", BITNET)


def test_another_family_is_refused():
    with pytest.raises(CheckpointError, match="Unknown model family 'mistral'"):
        CausalLM.from_transformers("mistral", LLAMA)

"""Models out of checkpoints: the stored codes and scales themselves, and latents that give them."""

import json
from dataclasses import asdict

import pytest
import torch

from forge_harness import oracles
from forge_harness.errors import CheckpointError, DamagedCheckpointError
from forge_harness.formats.checkpoint import ReadOptions, WriteOptions
from forge_harness.formats.native import open_native, write_native
from forge_harness.formats.tensors import TernaryTensor
from forge_harness.model import ByteLM, ByteLMConfig, CausalLM, DigitsConfig, DigitsModel
from forge_harness.model.from_checkpoint import StoredCodes, model_from_checkpoint
from forge_harness.quant import absmean_ternary

from ..hf_checkpoints import BITNET, LLAMA, MemoryCheckpoint, masters

SMALL_LM = ByteLMConfig(width=32, heads=2, hidden=48, context=24, sub_norm=True)
FUSED_LM = ByteLMConfig(width=32, heads=2, hidden=48, context=24, fused_qkv=True)


class Own(MemoryCheckpoint):
    """A model of this package as a checkpoint: its codes, with one scale a part."""

    def __init__(self, family, model, **facts):
        self.parts = {
            f"{name}.weight": model.get_submodule(name).parts for name in model.quantized_names()
        }
        tied = dict((second, first) for first, second in model.tied())
        state = {k: v for k, v in model.state_dict().items() if k not in tied}
        super().__init__(
            family, asdict(model.config), state, ternary=self.parts.__contains__, tied=tied, **facts
        )
        for name, parts in self.parts.items():
            if parts:
                info = self.infos[name]
                self.infos[name] = type(info)(
                    name, "ternary", info.shape, "F32", info.nbytes, parts=parts
                )

    def ternary(self, name):
        parts = self.parts[name] or (self.tensors[name].shape[0],)
        found = oracles.ternary_parts(self.tensors[name], parts)
        codes = torch.cat([torch.from_numpy(part.codes) for part in found])
        scales = torch.tensor([part.scale for part in found])
        return TernaryTensor.from_codes(codes, scales, parts)


def digits():
    torch.manual_seed(0)
    return DigitsModel(DigitsConfig(width=16, hidden=24))


def byte_lm(config):
    torch.manual_seed(0)
    return ByteLM(config)


def bitnet(**facts):
    return MemoryCheckpoint("bitnet", BITNET, masters(BITNET), **facts)


CHECKPOINTS = {
    "bitnet": bitnet,
    "llama": lambda **facts: MemoryCheckpoint("llama", LLAMA, masters(LLAMA), **facts),
    "byte-lm": lambda **facts: Own("byte-lm", byte_lm(SMALL_LM), **facts),
    "byte-lm-fused": lambda **facts: Own("byte-lm", byte_lm(FUSED_LM), **facts),
    "digits": lambda **facts: Own("digits", digits(), **facts),
}


def inputs(model):
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, DigitsModel):
        return torch.rand(3, 64, generator=generator)
    return torch.randint(0, 96, (2, 11), generator=generator)


def stored_values(checkpoint, name):
    ternary = checkpoint.ternary(f"{name}.weight")
    return ternary.codes() * ternary.row_scales()


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_inference_multiplies_by_what_is_stored(kind):
    checkpoint = CHECKPOINTS[kind]()
    model = model_from_checkpoint(checkpoint)
    assert not model.training
    assert len(model.quantized_names()) == len(checkpoint.ternary_names()) > 0
    for name in model.quantized_names():
        layer = model.get_submodule(name)
        assert torch.equal(layer.effective_weight(), stored_values(checkpoint, name))
        with torch.no_grad():
            layer.weight.mul_(-3.0)  # nothing is derived from the latent
        assert torch.equal(layer.effective_weight(), stored_values(checkpoint, name))


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_training_starts_at_the_stored_codes_and_scales(kind):
    checkpoint = CHECKPOINTS[kind]()
    model = model_from_checkpoint(checkpoint, mode="qat")
    assert model.training
    for name in model.quantized_names():
        ternary = checkpoint.ternary(f"{name}.weight")
        latent = model.get_submodule(name).weight.detach()
        pieces = zip(
            latent.split(list(ternary.parts)),
            ternary.codes().split(list(ternary.parts)),
            ternary.scales,
            strict=True,
        )
        for weight, codes, scale in pieces:
            own_codes, own_scale = absmean_ternary(weight)
            assert torch.equal(own_codes, codes)
            # codes * (scale / share) rounds twice, and the mean of it once more.
            assert abs(own_scale - scale) <= 2 * oracles.ONE_ULP * scale


@pytest.mark.parametrize("kind", CHECKPOINTS)
@torch.no_grad()
def test_both_modes_compute_the_same_model(kind):
    checkpoint = CHECKPOINTS[kind]()
    inference, qat = (model_from_checkpoint(checkpoint, mode=m) for m in ("inference", "qat"))
    x = inputs(inference)
    expected = inference(x)
    assert (qat(x) - expected).abs().max() <= 1e-4 * expected.std()


def test_a_training_model_moves_with_its_latents():
    model = model_from_checkpoint(bitnet(), mode="qat")
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    before = layer.effective_weight()
    with torch.no_grad():
        layer.weight[::2] *= 3.0
    assert not torch.equal(layer.effective_weight(), before)
    model(inputs(model)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_the_stored_model_answers_as_the_one_it_was_made_of():
    model = CausalLM.from_transformers("bitnet", BITNET)
    model.load_state_dict(masters(BITNET), strict=False)
    loaded = model_from_checkpoint(bitnet())
    x = inputs(model)
    expected = model(x)
    assert (loaded(x) - expected).abs().max() <= 1e-4 * expected.std()


def test_stored_masters_become_the_latents_and_stay_what_they_are():
    checkpoint = bitnet(stored=True)
    model = model_from_checkpoint(checkpoint, mode="qat")
    for name in checkpoint.ternary_names():
        assert torch.equal(model.get_parameter(name), checkpoint.tensors[name])


def test_weights_of_other_dtypes_become_fp32():
    tensors = {name: value.bfloat16() for name, value in masters(BITNET).items()}
    checkpoint = MemoryCheckpoint("bitnet", BITNET, tensors, stored=True)
    model = model_from_checkpoint(checkpoint, mode="qat")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.model.norm.weight, tensors["model.norm.weight"].float())


def test_the_tied_head_stays_the_embedding():
    for checkpoint in (bitnet(), bitnet(tied={"lm_head.weight": "model.embed_tokens.weight"})):
        model = model_from_checkpoint(checkpoint, mode="qat")
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_that_are_views_of_one_storage_are_told_apart():
    storage = torch.randn(96, 32)
    codes, scales = torch.randint(-1, 2, (96, 32), dtype=torch.int8), torch.tensor([1.0, 2.0, 4.0])
    stored = StoredCodes(codes, scales, (16, 32, 48))
    for start, stop, scale in ((0, 16, 1.0), (16, 48, 2.0), (48, 96, 4.0)):
        found_codes, found_scale = stored(storage[start:stop])
        assert torch.equal(found_codes, codes[start:stop])
        assert float(found_scale) == scale
    assert stored(storage)[1].tolist() == [1.0] * 16 + [2.0] * 32 + [4.0] * 48


@torch.no_grad()
def test_a_native_package_on_disk(tmp_path):
    write_native(Own("digits", digits()), tmp_path, WriteOptions())
    with open_native(tmp_path, ReadOptions()) as checkpoint:
        model = model_from_checkpoint(checkpoint)
    x = inputs(model)
    assert torch.equal(model(x), model_from_checkpoint(Own("digits", digits()))(x))
    assert json.loads((tmp_path / "forge.json").read_text())["model"]["family"] == "digits"


def changed(change, **facts):
    tensors = masters(BITNET)
    change(tensors)
    return MemoryCheckpoint("bitnet", BITNET, tensors, **facts)


LAYER = "model.layers.1.mlp.down_proj.weight"
NORM = "model.layers.0.mlp.ffn_sub_norm.weight"


@pytest.mark.parametrize(
    ("change", "sentence", "tensor"),
    [
        (lambda t: t.pop(NORM), f"'{NORM}' is missing", NORM),
        (lambda t: t.pop(LAYER), f"'{LAYER}' is missing", LAYER),
        (lambda t: t.update({NORM: torch.ones(64)}), r"shape \(64,\); .* calls for \(176,\)", NORM),
        (lambda t: t.update({LAYER: torch.ones(64, 64)}), r"calls for \(64, 176\)", LAYER),
        (lambda t: t.update({"extra": torch.ones(1)}), "'extra' has no place", "extra"),
        (
            lambda t: t.update({"lm_head.weight": torch.zeros(96, 64)}),
            "tied to .* stored with different values",
            "lm_head.weight",
        ),
    ],
)
def test_files_that_do_not_fit_the_configuration(change, sentence, tensor):
    with pytest.raises(DamagedCheckpointError, match=sentence) as error:
        model_from_checkpoint(changed(change))
    assert error.value.tensor == tensor


def test_what_says_nothing_new_is_taken():
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    model_from_checkpoint(changed(change))


def test_a_ternary_tensor_where_the_model_has_none():
    odd = MemoryCheckpoint(
        "bitnet", BITNET, masters(BITNET), ternary=lambda name: "embed_tokens" in name
    )
    with pytest.raises(CheckpointError, match=r"'model\.embed_tokens\.weight' is ternary in"):
        model_from_checkpoint(odd)
    partly = Own("digits", digits())
    partly.infos["stem.weight"] = partly.infos["blocks.0.norm.weight"]
    with pytest.raises(CheckpointError, match=r"'stem\.weight' is not ternary"):
        model_from_checkpoint(partly)


def test_parts_the_model_does_not_have():
    checkpoint = Own("byte-lm", byte_lm(FUSED_LM))
    checkpoint.parts["blocks.0.attention.qkv.weight"] = None
    with pytest.raises(DamagedCheckpointError, match=r"parts of \(96,\) rows; .* \(32, 32, 32\)"):
        model_from_checkpoint(checkpoint)


class Faint(MemoryCheckpoint):
    """A scale below the floor of the quantizer: no latent weight has it."""

    def ternary(self, name):
        found = super().ternary(name)
        return TernaryTensor(found.packed, found.rows, found.scales * 1e-6, found.parts)


def test_training_does_not_start_from_codes_no_latent_has():
    checkpoint = Faint("bitnet", BITNET, masters(BITNET))
    model_from_checkpoint(checkpoint)
    with pytest.raises(CheckpointError, match="Training cannot start from tensor 'model"):
        model_from_checkpoint(checkpoint, mode="qat")


def test_a_layer_of_zeros_is_no_obstacle_to_training():
    model = model_from_checkpoint(changed(lambda t: t[LAYER].zero_()), mode="qat")
    assert not model.get_submodule(LAYER.removesuffix(".weight")).effective_weight().any()


@pytest.mark.parametrize(
    ("family", "config", "sentence"),
    [
        ("mistral", {}, "Unknown model family 'mistral'"),
        ("unknown", {}, "does not say which model its tensors belong to; expected a config"),
        ("digits", {"depth": 3}, "digits configuration does not fit: .*'depth'"),
        (
            "byte-lm",
            asdict(ByteLMConfig()) | {"width": 30},
            "byte-lm configuration does not fit: width 30",
        ),
        ("llama", {**LLAMA, "hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ],
)
def test_models_that_cannot_be_built(family, config, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        model_from_checkpoint(MemoryCheckpoint(family, config, {}))


def test_the_arithmetic_is_the_stored_one():
    model = model_from_checkpoint(Own("digits", digits(), quantization={"compute": "fake"}))
    assert {model.get_submodule(n).linear.compute for n in model.quantized_names()} == {"fake"}
    with pytest.raises(CheckpointError, match="Unknown compute mode 'magic'"):
        model_from_checkpoint(Own("digits", digits(), quantization={"compute": "magic"}))
    with pytest.raises(ValueError, match="Unknown mode 'train'"):
        model_from_checkpoint(bitnet(), mode="train")

"""pack_model: the model's own outputs, smaller; and what it says of itself."""

import pytest
import torch
from torch import nn

from forge_harness.model import (
    BitLinear,
    ByteLM,
    ByteLMConfig,
    CausalLM,
    DigitsConfig,
    DigitsModel,
    PackedLinear,
    pack_model,
    resident_bytes,
)

from ..hf_checkpoints import BITNET


def digits(**options):
    torch.manual_seed(0)
    return DigitsModel(DigitsConfig(**options)).eval()


def pixels(rows=7):
    return torch.rand(rows, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("sub_norm", [False, True])
@torch.no_grad()
def test_digits_logits_have_the_same_bits(sub_norm):
    model = digits(sub_norm=sub_norm)
    packed = pack_model(model)
    assert torch.equal(packed(pixels()), model(pixels()))
    assert torch.equal(packed(pixels()[:1]), model(pixels())[:1])


@torch.no_grad()
def test_whole_language_models_have_the_same_bits():
    torch.manual_seed(0)
    config = ByteLMConfig(width=32, heads=2, hidden=48, context=24, fused_qkv=True)
    for model in (ByteLM(config), CausalLM.from_transformers("bitnet", BITNET)):
        tokens = torch.randint(0, 96, (2, 20))
        assert torch.equal(pack_model(model)(tokens), model(tokens))


def test_the_model_stays_and_its_copy_is_smaller():
    model = digits()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    packed = pack_model(model.train())
    assert model.training
    assert not packed.training
    assert isinstance(packed.stem, PackedLinear)
    assert isinstance(model.stem, BitLinear)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert not any(p.requires_grad for p in packed.parameters())
    # 37,504 weights at 4 bytes against 2 bits; norms in both, padding of 64 rows in the head.
    norms = 4 * sum(m.weight.numel() for n, m in model.named_modules() if n.endswith("norm"))
    assert resident_bytes(model) == 4 * 37_504 + norms
    padded = 37_504 + 54 * 64
    assert resident_bytes(packed) == padded // 4 + norms + 6 * 4


def test_a_packed_model_describes_itself_as_its_model():
    model = digits()
    packed = pack_model(model)
    assert packed.quantized_names() == model.quantized_names()
    assert packed.sub_norm_names() == model.sub_norm_names()
    assert packed.full_precision_names() == ()


def test_full_precision_layers_stay_and_ties_hold():
    model = CausalLM.from_transformers("bitnet", BITNET, ternary=["model.layers.0.mlp.up_proj"])
    packed = pack_model(model)
    assert packed.quantized_names() == ("model.layers.0.mlp.up_proj",)
    assert packed.lm_head.weight is packed.model.embed_tokens.weight
    assert packed.lm_head.weight is not model.lm_head.weight


def test_a_layer_alone_and_a_shared_one():
    layer = BitLinear(8, 8)
    assert isinstance(pack_model(layer), PackedLinear)
    packed = pack_model(nn.Sequential(layer, layer))
    assert packed[0] is packed[1]


@torch.no_grad()
def test_a_compiled_layer_is_packed_too():
    """torch.compile's wrapper hands on __deepcopy__: the latent layer was copied instead."""
    layer = BitLinear(8, 8)
    packed = pack_model(nn.Sequential(torch.compile(layer, backend="eager"), nn.ReLU()))
    x = torch.randn(3, 8)
    assert not any(isinstance(module, BitLinear) for module in packed.modules())
    assert torch.equal(packed(x), layer(x).relu())


def test_shared_memory_counts_once():
    layer = nn.Linear(8, 4, bias=False)
    layer.register_buffer("view", layer.weight.detach()[:2])
    assert resident_bytes(layer) == 8 * 4 * 4


def test_a_layer_that_cannot_be_packed_is_named():
    model = digits()
    with torch.no_grad():
        model.blocks[1].down.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"Layer 'blocks.1.down': .* scale nan"):
        pack_model(model)

"""PackedLinear: the bits of the layers it is packed from, its buffers, and what it refuses."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_harness import kernels
from forge_harness.errors import BackendUnavailableError, NonTernaryCodeError, ScaleError
from forge_harness.model import BitLinear, PackedLinear, RMSNorm
from forge_harness.model.from_checkpoint import StoredCodes
from forge_harness.quant import TernaryLinearOp, absmax_int8


def layer(inputs=24, outputs=12, *, seed=0, **options):
    torch.manual_seed(seed)
    made = BitLinear(inputs, outputs, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        for part in torch.split(made.weight, list(made.parts or (outputs,))):
            part *= 1 + torch.rand(())
    return made


def draw(*shape, seed=9, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@torch.no_grad()
def same(packed, reference, x):
    found, expected = packed(x), reference(x)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@settings(max_examples=60)
@given(
    inputs=st.integers(1, 70),
    parts=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    batch=st.lists(st.integers(1, 4), max_size=2),
    bias=st.booleans(),
    sub_norm=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scale=st.sampled_from([1e-7, 1.0, 1e4]),
    backend=st.sampled_from(["auto", "reference"]),
    seed=st.integers(0, 1000),
)
def test_the_bits_are_those_of_the_layer(
    inputs, parts, batch, bias, sub_norm, dtype, scale, backend, seed
):
    reference = layer(inputs, sum(parts), seed=seed, bias=bias, sub_norm=sub_norm, parts=parts)
    packed = PackedLinear.from_bitlinear(reference, backend=backend)
    same(packed, reference, (scale * draw(*batch, inputs, seed=seed)).to(dtype))


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 70), min_size=2, max_size=4),
    inputs=st.integers(1, 70),
    biased=st.integers(0, 15),
    seed=st.integers(0, 1000),
)
def test_fused_layers_answer_as_each_alone(sizes, inputs, biased, seed):
    layers = [
        layer(inputs, n, seed=seed + i, bias=bool(biased >> i & 1)) for i, n in enumerate(sizes)
    ]
    packed = PackedLinear.fused(layers)
    x = draw(3, inputs, seed=seed)
    outputs = packed.split(packed(x))
    assert [y.shape[-1] for y in outputs] == sizes
    for found, reference in zip(outputs, layers, strict=True):
        assert torch.equal(found, reference(x))


def test_a_token_has_the_same_bits_in_any_batch():
    packed = PackedLinear.from_bitlinear(layer(512, 96, sub_norm=True))
    x = draw(33, 512)
    alone = torch.cat([packed(row[None]) for row in x])
    assert torch.equal(packed(x), alone)


@pytest.mark.parametrize("parts", [None, (4, 8)])
def test_stored_codes_and_scales_are_taken_not_derived(parts):
    reference = layer(parts=parts)
    codes = torch.randint(-1, 2, (12, 24), generator=torch.Generator().manual_seed(1))
    scales = torch.tensor([0.125, 3.0] if parts else [0.5])
    stored = StoredCodes(codes.to(torch.int8), scales, parts or (12,))
    reference.linear = TernaryLinearOp(quantize_weight=stored)
    packed = PackedLinear.from_bitlinear(reference)
    assert torch.equal(kernels.unpack(packed.packed).int(), codes.int())
    rows = torch.repeat_interleave(scales, torch.tensor(parts or (12,)))
    assert torch.equal(packed.packed.scale.expand(12), rows)
    same(packed, reference, draw(5, 24))


@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_both_exact_modes_give_the_same_packed_layer(compute):
    reference = layer(linear=TernaryLinearOp(compute=compute))
    same(PackedLinear.from_bitlinear(reference), reference, draw(5, 24))


def test_nothing_is_shared_with_the_layer():
    reference = layer(bias=True, sub_norm=True)
    packed = PackedLinear.from_bitlinear(reference)
    x = draw(5, 24)
    before = packed(x)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.fill_(7.0)
    assert torch.equal(packed(x), before)


def test_latents_are_gone_and_bytes_are_counted():
    packed = PackedLinear.from_bitlinear(layer(256, 128, bias=True, sub_norm=True))
    state = packed.state_dict()
    assert state.pop("_extra_state").tolist() == [128, 256, *b"i2-64x16"]
    assert set(state) == {"data", "scale", "bias", "norm.weight"}
    assert packed.nbytes == sum(tensor.nbytes for tensor in state.values())
    assert state["data"].nbytes == 256 * 128 // 4
    assert packed.packed.data.data_ptr() == packed.data.data_ptr()


def test_another_dtype_rounds_the_norm_and_not_the_scale():
    reference = layer(parts=(4, 8), sub_norm=True)
    packed = PackedLinear.from_bitlinear(reference).to(torch.bfloat16)
    assert packed.norm.weight.dtype == torch.bfloat16
    assert packed.packed.scale.dtype == packed.scale.dtype == torch.float32
    with torch.no_grad():
        reference.norm.weight.copy_(packed.norm.weight)
    same(packed, reference, draw(5, 24, dtype=torch.bfloat16))


def test_copies_and_files_give_the_same_layer():
    packed = PackedLinear.from_bitlinear(layer(bias=True, sub_norm=True, parts=(4, 8)))
    other = PackedLinear.from_bitlinear(layer(seed=1, bias=True, sub_norm=True, parts=(4, 8)))
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    copied, read = copy.deepcopy(packed), torch.load(file, weights_only=False)
    assigned = copy.deepcopy(other)
    other.load_state_dict(packed.state_dict())
    assigned.load_state_dict(copy.deepcopy(packed.state_dict()), assign=True)
    x = draw(5, 24)
    expected = packed(x)
    packed.data.zero_()  # the others must not show it
    for made in (copied, read, other, assigned):
        assert torch.equal(made(x), expected)
        assert made.packed.data.data_ptr() == made.data.data_ptr()


def test_damaged_codes_are_refused_when_they_are_loaded():
    packed = PackedLinear.from_bitlinear(layer())
    state = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    state["data"][0, 0, 0] = 0xFF
    with pytest.raises(NonTernaryCodeError, match="damaged"):
        packed.load_state_dict(state)


def test_an_explicit_backend_never_falls_back(monkeypatch):
    with pytest.raises(BackendUnavailableError, match="cuda ternary_linear"):
        PackedLinear.from_bitlinear(layer(), backend="cuda")
    with pytest.raises(ValueError, match="Unknown kernel backend 'nativ'"):
        PackedLinear.from_bitlinear(layer(), backend="nativ")
    packed = PackedLinear.from_bitlinear(layer(), backend="reference")
    asked = []
    module = "forge_harness.model.packed_linear.ternary_linear"
    monkeypatch.setattr(module, lambda *_, backend: asked.append(backend))
    packed(draw(1, 24))
    assert asked == ["reference"]


def other_arithmetic(x, weight, bias):
    return x @ weight.t()


REFUSED = {
    "full": ({"precision": "full"}, r"precision 'full'; expected 'ternary'"),
    "foreign": ({"linear": other_arithmetic}, r"other_arithmetic.*expected a TernaryLinearOp"),
    "activations": (
        {"linear": TernaryLinearOp(quantize_activation=lambda x: absmax_int8(x))},
        r"quantizes activations by absmax_int8",
    ),
}


@pytest.mark.parametrize(("options", "sentence"), REFUSED.values(), ids=REFUSED)
def test_a_layer_that_packing_would_change_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        PackedLinear.from_bitlinear(layer(**options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_refused(bad):
    broken = layer(parts=(4, 8))
    with torch.no_grad():
        broken.weight[7, 3] = bad
    with pytest.raises(ValueError, match=f"has the scale {bad}; expected a finite one"):
        PackedLinear.from_bitlinear(broken)


def test_codes_that_are_not_ternary_are_refused():
    def five_levels(weight):
        return (2 * weight.sign()).to(torch.int8), torch.tensor(0.5)

    wrong = layer(linear=TernaryLinearOp(quantize_weight=five_levels))
    with pytest.raises(NonTernaryCodeError, match="row 0, column 0"):
        PackedLinear.from_bitlinear(wrong)


def test_layers_that_do_not_read_one_input_are_not_fused():
    with pytest.raises(ValueError, match=r"\[24, 25\] input features cannot be fused"):
        PackedLinear.fused([layer(24), layer(25)])
    with pytest.raises(ValueError, match="norm of its own cannot be fused"):
        PackedLinear.fused([layer(), layer(sub_norm=True)])
    with pytest.raises(ValueError, match="No layers to pack"):
        PackedLinear.fused([])


@pytest.mark.parametrize("sub_norm", [False, True])
def test_another_number_of_input_features_is_refused(sub_norm):
    packed = PackedLinear.from_bitlinear(layer(sub_norm=sub_norm))
    with pytest.raises(ValueError, match=r"x has shape \(5, 23\).*expected.*\(\.\.\., 24\)"):
        packed(draw(5, 23))


def test_what_does_not_fit_the_weight_is_refused():
    packed = kernels.pack(torch.zeros(12, 24, dtype=torch.int8), scale=1.0)
    with pytest.raises(ValueError, match=r"bias has shape \(11,\); expected \(12,\)"):
        PackedLinear(packed, torch.zeros(11))
    with pytest.raises(ValueError, match="norm has 23 features; expected the 24"):
        PackedLinear(packed, norm=RMSNorm(23))
    with pytest.raises(ValueError, match=r"parts \(4, 4\) sum to 8"):
        PackedLinear(packed, parts=(4, 4))


def test_a_weight_of_another_shape_with_as_many_blocks_is_refused_and_nothing_changes():
    torch.manual_seed(0)
    for (k, n), (wrong_k, wrong_n) in (((47, 99), (48, 99)), ((47, 99), (47, 100))):
        layer = PackedLinear.from_bitlinear(BitLinear(k, n))
        before = layer.state_dict()["data"].clone()
        other = PackedLinear.from_bitlinear(BitLinear(wrong_k, wrong_n)).state_dict()
        with pytest.raises(ValueError, match=rf"\({wrong_n}, {wrong_k}\); expected \({n}, {k}\)"):
            layer.load_state_dict(other)
        del other["_extra_state"]  # a file of before it was kept
        with pytest.raises(ValueError, match=f"codes beyond {n} x {k}"):
            layer.load_state_dict(other)
        assert torch.equal(layer.state_dict()["data"], before)


def test_a_smaller_weight_with_as_many_blocks_is_refused():
    """Its codes would fit: the outputs it does not have would be zeros."""
    small = PackedLinear.from_bitlinear(BitLinear(33, 65)).state_dict()
    with pytest.raises(ValueError, match=r"\(65, 33\); expected \(70, 40\)"):
        PackedLinear.from_bitlinear(BitLinear(40, 70)).load_state_dict(small)


def test_a_state_without_the_shape_is_taken_as_it_was_before_it_was_kept():
    model = torch.nn.Sequential(PackedLinear.from_bitlinear(layer()))
    other = torch.nn.Sequential(PackedLinear.from_bitlinear(layer(seed=1)))
    state = other.state_dict()
    del state["0._extra_state"]
    keys = model.load_state_dict(state)
    assert not keys.missing_keys
    assert torch.equal(model(draw(3, 24)), other(draw(3, 24)))


def test_a_state_of_another_layout_is_refused_and_nothing_changes():
    packed = PackedLinear.from_bitlinear(layer())
    before = packed.data.clone()
    state = PackedLinear.from_bitlinear(layer(seed=1)).state_dict()
    state["_extra_state"] = torch.tensor([*packed.packed.shape, *b"i2-32x32"])
    with pytest.raises(ValueError, match="'i2-32x32'; this version reads 'i2-64x16': pack the"):
        packed.load_state_dict(state)
    assert torch.equal(packed.data, before)


def test_a_state_of_before_the_layout_was_kept_is_taken():
    packed = PackedLinear.from_bitlinear(layer())
    state = PackedLinear.from_bitlinear(layer(seed=1)).state_dict()
    state["_extra_state"] = state["_extra_state"][:2]
    packed.load_state_dict(state)
    assert torch.equal(packed.data, state["data"])


def test_a_state_is_loaded_under_any_default_dtype():
    state = PackedLinear.from_bitlinear(layer()).state_dict()
    other = PackedLinear.from_bitlinear(layer(seed=1))
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        other.load_state_dict(state)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(other.data, state["data"])


@pytest.mark.parametrize("bad", [1e-40, 1e-300])
def test_a_scale_that_pack_refuses_is_refused_in_a_state_too(bad):
    packed = PackedLinear.from_bitlinear(layer())
    state = {**packed.state_dict(), "scale": torch.tensor(bad, dtype=torch.float64)}
    with pytest.raises(ScaleError, match="expected 0 or normal"):
        packed.load_state_dict(state)


def test_a_damaged_load_leaves_the_layer_as_it_was():
    torch.manual_seed(0)
    layer, x = PackedLinear.from_bitlinear(BitLinear(16, 8)), torch.randn(3, 16)
    before = layer(x)
    damaged = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    damaged["data"].view(-1)[0] = 0xFF
    with pytest.raises(NonTernaryCodeError):
        layer.load_state_dict(damaged)
    assert torch.equal(layer(x), before)
    damaged = {**layer.state_dict(), "scale": torch.tensor(float("nan"))}
    with pytest.raises(ValueError, match="expected 0 or normal numbers"):
        layer.load_state_dict(damaged)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("fill", [0xFF, 0x00])
def test_each_piece_of_a_load_is_checked_by_itself(fill):
    """Shards bring codes and scales apart, in any order, into a layer that holds nothing yet."""
    torch.manual_seed(0)
    source = PackedLinear.from_bitlinear(BitLinear(16, 8)).state_dict()
    layer, x = PackedLinear.from_bitlinear(BitLinear(16, 8)), torch.randn(3, 16)
    before = layer(x)
    bad = {"data": torch.full_like(source["data"], 0xFF), "scale": torch.tensor(float("nan"))}
    with pytest.raises(NonTernaryCodeError):
        layer.load_state_dict({"data": bad["data"]}, strict=False)
    with pytest.raises(ValueError, match="scale nan of row 0; expected 0"):
        layer.load_state_dict({"scale": bad["scale"]}, strict=False)
    too_large = torch.tensor(1e300, dtype=torch.float64)  # finite, but not in fp32
    with pytest.raises(ValueError, match=r"scale 1e\+300 of row 0; expected 0"):
        layer.load_state_dict({"scale": too_large}, strict=False)
    assert torch.equal(layer(x), before)
    layer.data.fill_(fill)
    layer.load_state_dict({"scale": source["scale"]}, strict=False)
    layer.load_state_dict({"data": source["data"]}, strict=False)
    expected = PackedLinear.from_bitlinear(BitLinear(16, 8))
    expected.load_state_dict(source)
    assert torch.equal(layer(x), expected(x))


def test_on_meta_it_has_the_shape_and_no_values():
    packed = PackedLinear.from_bitlinear(layer(bias=True, sub_norm=True)).to("meta")
    y = packed(torch.empty(2, 5, 24, device="meta", dtype=torch.bfloat16))
    assert (y.shape, y.dtype, y.device.type) == ((2, 5, 12), torch.bfloat16, "meta")
    with pytest.raises(ValueError, match="x is on cpu, the packed weight on meta"):
        kernels.ternary_linear(torch.zeros(2, 24), packed.packed)


def test_buffers_that_were_replaced_are_the_ones_that_count():
    torch.manual_seed(0)
    layer, x = PackedLinear.from_bitlinear(BitLinear(16, 8)), torch.randn(3, 16)
    before = layer(x)
    doubled = torch.func.functional_call(layer, {"scale": layer.scale * 2}, (x,))
    assert torch.equal(doubled, before * 2)
    assert torch.equal(layer(x), before)
    layer.scale = layer.scale * 2
    assert torch.equal(layer(x), before * 2)
    assert torch.equal(layer.packed.scale, layer.state_dict()["scale"])


class Doubled(BitLinear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_a_packed_layer_would_leave_out_is_refused():
    hooked, pre_hooked = BitLinear(16, 8), BitLinear(16, 8)
    hooked.register_forward_hook(lambda module, args, y: y + 1)
    pre_hooked.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    with pytest.raises(ValueError, match="Doubled has a forward of its own"):
        PackedLinear.from_bitlinear(Doubled(16, 8))
    for layer in (hooked, pre_hooked):
        with pytest.raises(ValueError, match="has forward hooks"):
            PackedLinear.from_bitlinear(layer)
    patched = BitLinear(16, 8)
    patched.forward = lambda x: 2 * BitLinear.forward(patched, x)
    with pytest.raises(ValueError, match="BitLinear was given a forward of its own"):
        PackedLinear.from_bitlinear(patched)
    normed = torch.nn.utils.parametrizations.weight_norm(BitLinear(16, 8))
    x = torch.randn(3, 16)
    assert torch.equal(PackedLinear.from_bitlinear(normed)(x), normed(x))


@pytest.mark.parametrize("kind", [torch.nn.LayerNorm, torch.nn.RMSNorm])
def test_another_norm_is_kept(kind):
    """Its weight and eps made an RMSNorm, which answered otherwise than the layer."""
    reference = layer(sub_norm=True)
    reference.norm = kind(24)
    reference.norm.register_forward_hook(lambda module, args, y: -y)
    same(PackedLinear.from_bitlinear(reference), reference, draw(5, 24) + 1)


def test_a_layer_shows_its_sizes():
    torch.manual_seed(0)
    one = PackedLinear.from_bitlinear(BitLinear(16, 8, bias=True))
    two = PackedLinear.fused([BitLinear(16, 8), BitLinear(16, 4)])
    assert repr(one) == "PackedLinear(16, 8, bias=True, backend=auto)"
    assert repr(two) == "PackedLinear(16, 12, bias=False, parts=(8, 4), backend=auto)"


@pytest.mark.parametrize(
    ("name", "given", "sentence"),
    [
        ("scale", torch.ones((), dtype=torch.float64), r"scale is torch.float64 \(\); expected"),
        ("scale", torch._neg_view(torch.ones(())), r"\(\), a negated view; expected contiguous"),
        ("data", torch.full((1, 256, 2), 85, dtype=torch.uint8).mT, r"\(1, 2, 256\) with strides"),
        ("data", torch._neg_view(torch.zeros(1, 2, 256, dtype=torch.uint8)), "a negated view"),
    ],
)
def test_what_kernels_cannot_read_is_not_assigned_and_nothing_changes(name, given, sentence):
    packed = PackedLinear.from_bitlinear(layer())
    x = draw(3, 24)
    before = packed(x)
    with pytest.raises(ValueError, match=sentence):
        packed.load_state_dict({**packed.state_dict(), name: given}, assign=True)
    assert torch.equal(packed(x), before)


def test_codes_and_scales_of_any_strides_are_copied():
    packed = PackedLinear.from_bitlinear(layer(parts=(4, 8)))
    state = PackedLinear.from_bitlinear(layer(seed=1, parts=(4, 8))).state_dict()
    strided = {**state, "data": state["data"].mT.contiguous().mT}
    strided["scale"] = torch.stack([state["scale"]] * 2, dim=1)[:, 0]
    packed.load_state_dict(strided)
    assert torch.equal(packed.data, state["data"])
    assert torch.equal(packed.scale, state["scale"])


@pytest.mark.parametrize(
    ("extra", "shown"),
    [
        ("x", "a str"),
        (None, "a NoneType"),
        (torch.tensor([]), r"torch.float32 \(0,\)"),
        (torch.tensor([12]), r"torch.int64 \(1,\)"),
        (torch.tensor([12, 24, 10**9]), r"\[12, 24, 1000000000\]"),
    ],
    ids=str,
)
def test_a_state_whose_shape_is_none_is_refused_in_one_sentence(extra, shown):
    packed = PackedLinear.from_bitlinear(layer())
    with pytest.raises(ValueError, match=f"_extra_state .* is {shown}; expected torch.int64 N, K"):
        packed.load_state_dict({**packed.state_dict(), "_extra_state": extra})


@pytest.mark.parametrize("name", ["data", "scale", "bias"])
def test_a_parameter_is_assigned_as_a_buffer(name):
    """It was registered as a parameter: the buffer was gone, and the layer with it."""
    packed, other = (PackedLinear.from_bitlinear(layer(seed=seed, bias=True)) for seed in (0, 1))
    state = packed.state_dict()
    state[name] = torch.nn.Parameter(state[name], requires_grad=False)
    other.load_state_dict(state, assign=True)
    assert not list(other.parameters())
    same(other, packed, draw(3, 24))

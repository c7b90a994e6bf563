"""The oracles against numbers worked out by hand, third parties, and the code they will judge."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forge_harness import oracles
from forge_harness.oracles import vectors
from forge_harness.protocols import ScheduleSpec
from forge_harness.quant import absmax_int8, absmean_ternary, binary_weight

# Never on a tie: a float within a rounding of k + 1/2 may go either way, by design.
FINITE = st.floats(-1e3, 1e3, width=32).filter(lambda v: v == 0 or abs(v) > 1e-3)


def spec(**changes):
    defaults = {"kind": "cosine", "peak": 0.1, "warmup_steps": 2, "total_steps": 7}
    return ScheduleSpec(**{**defaults, "weight_decay": 0.5, "final_fraction": 0.2, **changes})


def test_importing_costs_no_torch():
    code = "import sys, forge_harness.oracles; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_ternary_by_hand():
    result = oracles.ternary([[0.0, 0.3, -0.7], [2.0, -1.0, 0.5]])
    # Mean of magnitudes 4.5 / 6 = 0.75; threshold 0.375.
    assert result.scale == pytest.approx(0.75, rel=1e-15)
    assert result.codes.tolist() == [[0, 0, -1], [1, -1, 1]]
    assert result.margin[0, 1] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("weight", "codes"), [pytest.param(w, c, id=n) for n, w, c in vectors.weights_on_thresholds()]
)
def test_ternary_on_ties(weight, codes):
    assert oracles.ternary(weight).codes.tolist() == [list(row) for row in codes]


def test_ternary_floor():
    assert oracles.ternary(np.zeros((2, 3))).scale == oracles.EPS
    assert not oracles.ternary(np.full((2, 2), 4.9e-6)).codes.any()
    assert oracles.ternary(np.full((2, 2), 5.1e-6)).codes.all()


def test_parts_stand_alone():
    weight = np.concatenate([np.full((1, 4), 100.0), np.full((2, 4), 0.01)])
    large, small = oracles.ternary_parts(weight, (1, 2))
    assert (large.scale, small.scale) == (100.0, pytest.approx(0.01))
    assert small.codes.all()


def test_int8_by_hand():
    result = oracles.int8_tokens([[254.0, 1.0, -3.0, 0.9], [0.0, 0.0, 0.0, 0.0]])
    # Scale 2: 0.5 and -1.5 are ties, to even.
    assert result.codes.tolist() == [[127, 0, -2, 0], [0, 0, 0, 0]]
    assert result.scale[:, 0] == pytest.approx([2.0, oracles.EPS / 127])
    assert result.margin[0, 1] == 0.0


def test_int8_on_ties():
    codes = oracles.int8_tokens(vectors.ACTIVATION_TIES).codes
    assert codes.tolist() == [list(row) for row in vectors.ACTIVATION_TIE_CODES]


@given(st.lists(FINITE, min_size=1, max_size=40))
def test_oracles_and_quantizers_agree_where_float64_is_sure(values):
    array = np.array([values], dtype=np.float32)
    wanted, (codes, scale) = oracles.ternary(array), absmean_ternary(torch.from_numpy(array))
    sure = wanted.margin > oracles.TERNARY_MARGIN
    assert (codes.numpy() == wanted.codes)[sure].all()
    assert float(scale) == pytest.approx(wanted.scale, rel=oracles.SCALE_RTOL)
    tokens, (codes, scale) = oracles.int8_tokens(array), absmax_int8(torch.from_numpy(array))
    assert (codes.numpy() == tokens.codes)[tokens.margin > oracles.INT8_MARGIN].all()
    assert float(scale) == pytest.approx(tokens.scale.item(), rel=oracles.SCALE_RTOL)


def test_binary_sign_of_zero_is_minus_one():
    weight = np.array([[1.0, 3.0, 2.0, 2.0]])
    codes, scale = oracles.binary(weight)
    assert codes.tolist() == [[-1, 1, -1, -1]]
    assert scale == 2.0
    assert torch.equal(binary_weight(torch.from_numpy(weight))[0], torch.from_numpy(codes))


def test_linear_by_hand():
    q, s = [[2, -1], [127, 0]], [[0.5], [2.0]]
    codes, beta = [[1, 1], [0, -1], [-1, 0]], 0.25
    assert oracles.integer_product(q, codes).tolist() == [[1, 1, -2], [127, 0, -127]]
    y = oracles.output(q, s, codes, beta, [1.0, 2.0, 3.0])
    assert y.tolist() == [[1.125, 2.125, 2.75], [64.5, 2.0, -60.5]]
    assert oracles.l1(q, s, codes, beta)[0].tolist() == [0.375, 0.125, 0.25]


def test_gradients_are_those_of_autograd_through_a_detached_estimator():
    generator = torch.Generator().manual_seed(0)
    x, w, g = (
        torch.randn(*n, generator=generator).double() for n in ((3, 4, 5), (6, 5), (3, 4, 6))
    )
    (q, s, _), (codes, beta, _) = oracles.int8_tokens(x), oracles.ternary(w)
    leaves = [t.clone().requires_grad_() for t in (x, w, torch.zeros(6).double())]
    xq = leaves[0] + (torch.from_numpy(q * s) - leaves[0]).detach()
    wq = leaves[1] + (torch.from_numpy(codes * beta) - leaves[1]).detach()
    found = torch.autograd.grad(torch.nn.functional.linear(xq, wq, leaves[2]), leaves, g)
    wanted = (
        oracles.input_gradient(g, codes, beta),
        oracles.weight_gradient(g, q, s),
        oracles.bias_gradient(g),
    )
    for one, two in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one.numpy(), two, rtol=1e-12, atol=1e-12)


def test_packing_known_bytes():
    packed = oracles.pack_row_blocks(oracles.KNOWN_CODES)
    assert packed.tolist() == [list(row) for row in oracles.KNOWN_BYTES]
    assert oracles.unpack_row_blocks(packed, 8).tolist() == [list(c) for c in oracles.KNOWN_CODES]
    with pytest.raises(ValueError, match="multiple of 4"):
        oracles.pack_row_blocks(np.zeros((5, 1), dtype=np.int8))


def test_cosine_by_hand():
    rates = [rate.learning_rate for rate in oracles.schedule(spec())]
    # Two warmup steps, then (1 + cos(pi g)) / 2 = 1, 0.853553, 0.5, 0.146447, 0 over 0.2 ... 1.
    expected = [0.05, 0.1, 0.1, 0.0882843, 0.06, 0.0317157, 0.02]
    assert rates == pytest.approx(expected, abs=1e-7)
    assert {rate.weight_decay for rate in oracles.schedule(spec())} == {0.5}


def test_two_stage_by_hand():
    rates = oracles.schedule(spec(kind="two_stage", warmup_steps=1, total_steps=4))
    assert [r.learning_rate for r in rates] == pytest.approx([0.1, 0.0875, 0.05, 0.025])
    assert [r.weight_decay for r in rates] == [0.5, 0.5, 0.0, 0.0]


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="'linear'"):
        oracles.schedule(spec(kind="linear"))


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adamw_equals_torch(amsgrad):
    generator = torch.Generator().manual_seed(1)
    parameter = torch.nn.Parameter(torch.randn(4, 3, generator=generator, dtype=torch.float64))
    theirs = torch.optim.AdamW([parameter], betas=(0.8, 0.95), eps=1e-6, amsgrad=amsgrad)
    ours = oracles.AdamW((0.8, 0.95), 1e-6, amsgrad)
    for rate, decay in ((0.2, 0.3), (0.05, 0.0), (0.01, 0.1)):
        theirs.param_groups[0].update(lr=rate, weight_decay=decay)
        # Ever smaller: the largest second moment is not the last one.
        parameter.grad = rate * torch.randn(4, 3, generator=generator, dtype=torch.float64)
        before = parameter.detach().clone()
        change = ours.update(before, parameter.grad, rate, decay)
        theirs.step()
        np.testing.assert_allclose((parameter.detach() - before).numpy(), change, atol=1e-14)


def test_dequantized_values_are_no_codes():
    with pytest.raises(TypeError, match="dtype float64"):
        oracles.integer_product(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.int8))


def test_bf16_and_gradients_are_read():
    tensor = torch.full((2,), 0.5, dtype=torch.bfloat16, requires_grad=True)
    assert oracles.float64(tensor).tolist() == [0.5, 0.5]


def test_directed_inputs_are_what_they_say():
    for name, weight in vectors.weights():
        assert weight.dtype == np.float32, name
        assert np.abs(weight).mean() > 2e-5, name
    for name, x in vectors.activations():
        assert (np.abs(x).max(axis=-1) > 1.9e-5).all(), name
    assert (np.abs(vectors.floor_rows()).max(axis=-1) <= 1e-5).sum() == 7
    again = dict(vectors.weights())
    assert all(np.array_equal(weight, again[name]) for name, weight in vectors.weights())


@pytest.mark.parametrize("terms", [1, 10, 1000])
def test_gradient_limit_holds_for_random_sums_and_is_not_slack(terms):
    rng = vectors.generator(terms)
    a, b = rng.standard_normal((2, 500, terms)).astype(np.float32)
    exact = (a.astype(np.float64) * b).sum(axis=1)
    rough = torch.einsum("ij,ij->i", torch.from_numpy(a), torch.from_numpy(b)).numpy()
    error = np.abs(rough - exact) / np.abs(a.astype(np.float64) * b).sum(axis=1)
    assert error.max() < oracles.gradient_limit(terms)
    # bf16, the defect to be seen, is 65,536 units a rounding.
    assert oracles.gradient_limit(terms) < 2.0**-9


class Wrapping(torch.Tensor):
    """Holds its values in other tensors, as torchao's weights in training do."""

    @staticmethod
    def __new__(cls, *parts, shape=None):
        return torch.Tensor._make_wrapper_subclass(cls, shape or parts[0].shape)

    def __init__(self, *parts, shape=None):
        self.parts = [f"part{n}" for n in range(len(parts))]
        for name, part in zip(self.parts, parts, strict=True):
            setattr(self, name, part)

    def __tensor_flatten__(self):
        return self.parts, None

    @classmethod
    def __torch_dispatch__(cls, op, types, given, named=None):
        assert op is torch.ops.aten.detach.default
        return given[0]


def test_a_tensor_that_wraps_one_has_its_values():
    values = torch.arange(6.0).reshape(2, 3)
    assert np.array_equal(oracles.float64(Wrapping(Wrapping(values))), values.numpy())


class InShards(torch.Tensor):
    """A shard of a DTensor, whose whole is asked for."""

    def full_tensor(self):
        return torch.cat([self.as_subclass(torch.Tensor)] * 2)


def test_a_tensor_in_shards_has_the_values_of_all():
    shard = torch.ones(1, 3).as_subclass(InShards)
    assert oracles.float64(shard).shape == (2, 3)


@pytest.mark.parametrize(
    "parts", [(torch.ones(2, 3), torch.ones(2, 3)), (torch.ones(2),)], ids=["two", "other_shape"]
)
def test_a_tensor_that_is_made_of_others_is_not_guessed(parts):
    with pytest.raises((RuntimeError, AssertionError)):
        oracles.float64(Wrapping(*parts, shape=(2, 3)))

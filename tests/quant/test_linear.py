"""TernaryLinearOp: one set of codes, three ways to compute, the plain STE backward."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from forge_harness.quant import (
    COMPUTES,
    TernaryLinearOp,
    absmax_int8,
    absmean_ternary,
    absmean_ternary_parts,
    binary_weight,
    integer_linear,
)
from forge_harness.quant.bounds import FAKE_QUANT_RTOL_L1

# fp32 sums of a few hundred terms; bf16 rounds upstream gradient and result, 2**-9 each.
GRADIENT_RTOL = {"exact": 2e-6, "fake": 2e-6, "int8": 2 * 2**-8}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case(*shape: int, outputs: int = 11, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    x = draw(0, *shape).requires_grad_()
    w = (draw(1, outputs, shape[-1]) * 0.3).requires_grad_()
    return x, w, draw(2, outputs).requires_grad_() if bias else None


def oracle_gradients(x: Tensor, w: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dX = G (C beta), dW = G^T (q s), db = sum G, all in float64 from the same codes."""
    codes, beta = absmean_ternary(w)
    q, s = absmax_int8(x)
    g = grad.double().reshape(-1, grad.shape[-1])
    grad_x = g @ (codes.double() * beta.double())
    grad_w = g.t() @ (q.double() * s.double()).reshape(-1, x.shape[-1])
    return grad_x.reshape(x.shape), grad_w, g.sum(0)


def assert_elementwise(actual: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    assert actual.dtype == torch.float32
    assert ((actual.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("shape", [(9, 33), (2, 5, 64), (1, 7)])
def test_gradients_equal_the_float64_estimator_elementwise(compute, shape):
    x, w, bias = case(*shape)
    y = TernaryLinearOp(compute=compute)(x, w, bias)
    upstream = draw(3, *y.shape)
    y.backward(upstream)
    grad_x, grad_w, grad_bias = oracle_gradients(x, w, upstream)
    # Rounding is relative to the sum of magnitudes, not to a result that may cancel.
    magnitude_x, magnitude_w, magnitude_b = oracle_gradients(
        x.detach().abs(), w.detach().abs(), upstream.abs()
    )
    rtol = GRADIENT_RTOL[compute]
    assert_elementwise(x.grad, grad_x, rtol * magnitude_x)
    assert_elementwise(w.grad, grad_w, rtol * magnitude_w)
    assert_elementwise(bias.grad, grad_bias, 2e-6 * magnitude_b)


@settings(max_examples=25)
@given(st.integers(1, 60), st.integers(1, 130), st.integers(1, 40), st.integers(-3, 3))
def test_all_modes_compute_the_integer_path(tokens, k, n, exponent):
    x, w = draw(tokens, tokens, k) * 10.0**exponent, draw(1000 + n, n, k)
    accumulators, factor = integer_linear(x, w)
    expected = accumulators * factor
    assert torch.equal(TernaryLinearOp(compute="exact")(x, w), expected)
    assert torch.equal(TernaryLinearOp(compute="int8")(x, w), expected)
    q, s = absmax_int8(x)
    codes, beta = absmean_ternary(w)
    l1 = (q.abs().float() * s) @ (codes.abs().float() * beta).t()
    error = (TernaryLinearOp(compute="fake")(x, w) - expected).abs()
    assert (error <= FAKE_QUANT_RTOL_L1 * l1).all()


@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_outputs_do_not_depend_on_the_batch_size(compute):
    x, w, _ = case(77, 96)
    op = TernaryLinearOp(compute=compute)
    pieces = torch.cat([op(piece, w) for piece in x.split(13)])
    assert torch.equal(op(x, w), pieces)


@pytest.mark.parametrize("compute", COMPUTES)
def test_an_injected_quantizer_changes_forward_and_backward(compute):
    x, w, _ = case(6, 16)

    def constant(values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones(values.shape, dtype=torch.int8), torch.tensor(2.0)

    def unit(values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full(values.shape, 3, dtype=torch.int8), torch.ones(*values.shape[:-1], 1)

    op = TernaryLinearOp(quantize_weight=constant, quantize_activation=unit, compute=compute)
    y = op(x, w)
    y.sum().backward()
    assert y.eq(3 * 2 * 16).all()
    assert x.grad.eq(2 * 11).all()
    assert w.grad.eq(3 * 6).all()


@pytest.mark.parametrize("compute", COMPUTES)
def test_a_scale_a_row_reaches_every_gradient(compute):
    x, w, _ = case(6, 16)
    parts = (4, 7)

    def rows(values: Tensor) -> tuple[Tensor, Tensor]:
        codes, scales = absmean_ternary_parts(values, parts)
        return codes, scales.repeat_interleave(torch.tensor(parts))

    y = TernaryLinearOp(quantize_weight=rows, compute=compute)(x, w)
    upstream = draw(3, *y.shape)
    y.backward(upstream)
    split_x, split_w = x.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    op = TernaryLinearOp(compute=compute)
    expected = torch.cat([op(split_x, part) for part in split_w.split(list(parts))], dim=-1)
    expected.backward(upstream)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    tolerance = 0.05 if compute == "int8" else 1e-5
    torch.testing.assert_close(x.grad, split_x.grad, rtol=0, atol=tolerance)
    torch.testing.assert_close(w.grad, split_w.grad, rtol=0, atol=tolerance)


@pytest.mark.parametrize("compute", COMPUTES)
def test_the_bias_is_outside_the_scale(compute):
    x, w, bias = case(5, 24)
    op = TernaryLinearOp(compute=compute)
    torch.testing.assert_close(op(x, w, bias), op(x, w) + bias, rtol=1e-6, atol=1e-6)
    assert torch.equal(op(torch.zeros(2, 24), w, bias), bias.expand(2, -1))


@pytest.mark.parametrize("compute", COMPUTES)
def test_upstream_gradients_may_be_strided_and_are_not_changed(compute):
    x, w, bias = case(4, 6, 8)
    op = TernaryLinearOp(compute=compute)
    upstream = draw(4, 11, 6, 4).permute(2, 1, 0)
    before = upstream.clone()
    op(x, w, bias).backward(upstream)
    strided = x.grad, w.grad, bias.grad
    x.grad = w.grad = bias.grad = None
    op(x, w, bias).backward(before.contiguous())
    for left, right in zip(strided, (x.grad, w.grad, bias.grad), strict=True):
        torch.testing.assert_close(left, right)
    assert torch.equal(upstream, before)
    x.grad = None
    op(x, w, bias).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("compute", COMPUTES)
def test_unneeded_gradients_are_left_out(compute):
    x, w, _ = case(5, 8)
    TernaryLinearOp(compute=compute)(x.detach(), w).sum().backward()
    assert x.grad is None
    TernaryLinearOp(compute=compute)(x, w.detach()).sum().backward()
    assert x.grad is not None


def saved_bytes(compute: str) -> int:
    x, w, _ = case(256, 512, outputs=128)
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in (x.data_ptr(), w.data_ptr()):
            sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = TernaryLinearOp(compute=compute)(x, w)
    assert y.grad_fn is not None
    return sum(sizes.values())


@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_only_codes_and_scales_are_kept_for_backward(compute):
    codes = 256 * 512 + 128 * 512
    scales = 4 * (256 + 1)
    assert saved_bytes(compute) == codes + scales
    assert saved_bytes("fake") >= 4 * codes


@pytest.mark.parametrize("compute", COMPUTES)
def test_autocast_changes_nothing(compute):
    x, w, bias = case(9, 32)
    op = TernaryLinearOp(compute=compute)
    op(x, w, bias).sum().backward()
    expected = x.grad, w.grad
    x.grad = w.grad = None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = op(x, w, bias)
        assert y.dtype == torch.float32
        if compute != "fake":  # plain autograd: torch asks for backward outside autocast
            y.sum().backward()
    if compute == "fake":
        y.sum().backward()
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(w.grad, expected[1])


@pytest.mark.parametrize("compute", COMPUTES)
def test_shapes_are_inferred_on_meta(compute):
    x, w, bias = (t.detach().to("meta").requires_grad_() for t in case(2, 9, 32))
    y = TernaryLinearOp(compute=compute)(x, w, bias)
    assert (y.shape, y.device.type) == ((2, 9, 11), "meta")
    y.sum().backward()
    assert [t.grad.shape for t in (x, w, bias)] == [x.shape, w.shape, bias.shape]


@pytest.mark.parametrize("compute", COMPUTES)
def test_low_precision_parameters_keep_their_dtype(compute):
    x, w, bias = (t.detach().bfloat16().requires_grad_() for t in case(9, 32))
    y = TernaryLinearOp(compute=compute)(x, w, bias)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert {x.grad.dtype, w.grad.dtype, bias.grad.dtype} == {torch.bfloat16}


@pytest.mark.parametrize("compute", COMPUTES)
def test_non_finite_activations_reach_the_output_of_their_token(compute):
    x, w, _ = case(3, 8)
    broken = x.detach().clone()
    broken[1, 2] = float("nan")
    y = TernaryLinearOp(compute=compute)(broken, w)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_binary_weights_train_too():
    x, w, _ = case(9, 32)
    op = TernaryLinearOp(quantize_weight=binary_weight)
    op(x, w).sum().backward()
    assert op.effective_weight(w).unique().numel() == 2
    assert w.grad.isfinite().all()


def test_effective_weight_is_what_the_forward_multiplies_with():
    x, w, _ = case(9, 32)
    op = TernaryLinearOp()
    q, s = absmax_int8(x)
    expected = (q.double() * s.double()) @ op.effective_weight(w).double().t()
    torch.testing.assert_close(op(x, w).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compute", ["exact", "int8"])
@pytest.mark.parametrize("loss", [torch.sum, lambda y: y.square().sum()], ids=["sum", "square"])
def test_second_derivatives_are_refused(compute, loss):
    """Of a sum the upstream gradient is constant; what it becomes depends on the weight still."""
    x, w, _ = case(3, 8)
    y = TernaryLinearOp(compute=compute)(x, w)
    (grad_x,) = torch.autograd.grad(loss(y), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (y.sum() + grad_x.square().sum()).backward()


@pytest.mark.parametrize("compute", COMPUTES)
def test_gradients_are_taken_by_the_batch(compute):
    """As torch.autograd.functional.jacobian(vectorize=True) does: such tensors have no memory."""
    x, w, _ = case(3, 8)
    y = TernaryLinearOp(compute=compute)(x, w)
    upstream = draw(3, 2, *y.shape)
    found_x, found_w = torch.autograd.grad(y, (x, w), upstream, is_grads_batched=True)
    for one, grad_x, grad_w in zip(upstream, found_x, found_w, strict=True):
        expected_x, expected_w, _ = oracle_gradients(x, w, one)
        most_x, most_w, _ = oracle_gradients(x.detach().abs(), w.detach().abs(), one.abs())
        assert_elementwise(grad_x, expected_x, GRADIENT_RTOL[compute] * most_x)
        assert_elementwise(grad_w, expected_w, GRADIENT_RTOL[compute] * most_w)


def test_wrong_arguments_are_named():
    x, w, bias = case(3, 8)
    with pytest.raises(ValueError, match=r"compute mode 'int9'.*'int8'"):
        TernaryLinearOp(compute="int9")
    with pytest.raises(ValueError, match=r"\(3, 7\).*\(11, 8\)"):
        TernaryLinearOp()(x[:, :7], w)
    with pytest.raises(ValueError, match=r"bias has shape \(10,\)"):
        TernaryLinearOp()(x, w, bias[:10])


@pytest.mark.parametrize("compute", COMPUTES)
def test_quantizers_of_another_shape_are_refused(compute):
    """The kernels go by the shape: they would read beyond fewer codes, and beyond the bias."""
    x, w, bias = case(3, 8)

    def narrow(values: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = absmax_int8(values)
        return codes[..., :1], scale

    def doubled(values: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = absmean_ternary(values)
        return torch.cat([codes, codes]), scale

    op = TernaryLinearOp(quantize_activation=narrow, compute=compute)
    with pytest.raises(ValueError, match=r"quantize_activation.*\(3, 1\).*expected \(3, 8\)"):
        op(x, w, bias)
    op = TernaryLinearOp(quantize_weight=doubled, compute=compute)
    with pytest.raises(ValueError, match=r"quantize_weight.*\(22, 8\).*expected \(11, 8\)"):
        op(x, w, bias)


@pytest.mark.parametrize("compute", COMPUTES)
def test_an_activation_scale_that_lost_its_last_dimension_is_refused(compute):
    """With as many tokens as outputs, or features, torch would spread it over those instead."""
    w = draw(1, 11, 8)

    def flat(values: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = absmax_int8(values)
        return codes, scale.squeeze(-1)

    op = TernaryLinearOp(quantize_activation=flat, compute=compute)
    for tokens in (8, 11):
        said = rf"activation scale has shape \({tokens},\); expected \({tokens}, 1\)"
        with pytest.raises(ValueError, match=said):
            op(draw(0, tokens, 8), w)
        with pytest.raises(ValueError, match=said):
            integer_linear(draw(0, tokens, 8), w, quantize_activation=flat)


@pytest.mark.parametrize("compute", COMPUTES)
def test_a_scale_of_several_tokens_is_that_of_each(compute):
    x, w, _ = case(2, 3, 8)

    def of_all(values: Tensor) -> tuple[Tensor, Tensor]:
        q, scale = absmax_int8(values.reshape(len(values), -1))
        return q.reshape(values.shape), scale[:, None]

    def of_each(values: Tensor) -> tuple[Tensor, Tensor]:
        q, scale = of_all(values)
        return q, scale.expand(2, 3, 1).contiguous()

    found = []
    for quantize in (of_all, of_each):
        x.grad = w.grad = None
        y = TernaryLinearOp(quantize_activation=quantize, compute=compute)(x, w)
        y.square().sum().backward()
        found.append((y, x.grad, w.grad))
    for own, wanted in zip(*found, strict=True):
        assert torch.equal(own, wanted)


def test_what_would_be_cast_in_silence_is_refused():
    x, w, bias = case(3, 8)
    for compute in COMPUTES:
        with pytest.raises(TypeError, match=r"bias has dtype torch.complex64; expected real"):
            TernaryLinearOp(compute=compute)(x, w, bias.detach() + 1j)

    def floating(values: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = absmean_ternary(values)
        return codes.float(), scale

    op = TernaryLinearOp(quantize_weight=floating, compute="int8")
    with pytest.raises(TypeError, match=r"quantize_weight.*torch.float32; expected torch.int8"):
        op(x, w)


def test_the_op_can_be_pickled_for_worker_processes():
    op = TernaryLinearOp(compute="int8")
    assert pickle.loads(pickle.dumps(op)) == op


# Dynamo itself instantiates the function object while it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_one_graph_under_torch_compile(compute):
    # The tracing backend "aot_eager" needs no C++ compiler and no minutes.
    x, w, bias = case(9, 32)
    op = TernaryLinearOp(compute=compute)
    op(x, w, bias).sum().backward()
    expected = x.grad, w.grad, bias.grad
    x.grad = w.grad = bias.grad = None
    compiled = torch.compile(op.__call__, fullgraph=True, backend="aot_eager")
    y = compiled(x, w, bias)
    y.sum().backward()
    assert torch.equal(y, op(x, w, bias))
    for left, right in zip(expected, (x.grad, w.grad, bias.grad), strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("lead", [(), (3,), (2, 0)])
def test_a_weight_without_rows_has_gradients(compute, lead):
    """A projection that was pruned away: outputs without entries, gradients of zeros."""
    x, w = draw(0, *lead, 5).requires_grad_(), torch.zeros(0, 5).requires_grad_()
    y = TernaryLinearOp(compute=compute)(x, w)
    assert y.shape == (*lead, 0)
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert w.grad.shape == (0, 5)

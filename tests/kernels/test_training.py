"""What a training step asks of the native kernels has the bits of torch's own operations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from forge_harness import kernels, quant
from forge_harness.kernels import training
from forge_harness.kernels.backends import PATH_VARIABLE

ODD = (torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 3.4e38, -1e-42, 0.5, -0.5, 1.5, 2.5)
"""Values of which a rounding, or a comparison, gets one wrong."""


@pytest.fixture(params=kernels.cpu_paths())
def path(request, monkeypatch):
    """The instruction set that is used without being named."""
    with monkeypatch.context() as patch:
        patch.setenv(PATH_VARIABLE, request.param)
        kernels.cpu_path()
        yield request.param
    kernels.cpu_path()


@pytest.fixture(params=(1, 2))
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same_bits(a, b):
    """Whether all bits agree, of zeros too; any NaN is a NaN."""
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    apart = a.view(integer) != b.view(integer)
    return a.shape == b.shape and not bool((apart & ~(a.isnan() & b.isnan())).any())


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (65, 33), (300, 1000)])
@pytest.mark.parametrize("scale", [1.0, 0.037, 1e-5, 0.0, torch.nan, torch.inf])
def test_weight_codes_are_those_of_quant(path, threads, shape, scale):
    w = draw(*shape)
    w.view(-1)[: len(ODD)] = torch.tensor(ODD)[: w.numel()]
    factor = torch.tensor(scale)
    assert torch.equal(training.weight_codes(w, factor), quant.ternary.ternary_codes(w, factor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weight_codes_of_any_dtype_stride_and_sign(path, dtype):
    w = draw(40, 30).to(dtype)
    for view in (w, w.t(), w[::2, 1:], torch._neg_view(w)):
        scale = quant.absmean_ternary(view)[1]
        found = training.weight_codes(view, scale)
        assert torch.equal(found, quant.absmean_ternary(view)[0])


def test_halves_of_the_scale_round_to_even(path):
    w = torch.tensor([[0.5, -0.5, 0.50000006, -0.50000006, 1.5, -1.5, 0.49999997]])
    codes = training.weight_codes(w, torch.tensor(1.0))
    assert codes.tolist() == [[0, 0, 1, -1, 1, -1, 0]]


@settings(max_examples=60)
@given(
    m=st.integers(1, 70),
    n=st.integers(1, 70),
    k=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    rowwise=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_product_of_codes_has_the_bits_of_torch(m, n, k, dtype, rowwise, biased, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-128, 128, (m, k), generator=generator).to(torch.int8)
    codes = torch.randint(-1, 2, (n, k), generator=generator).to(torch.int8)
    s = torch.rand(m, 1, generator=generator)
    beta = torch.rand(n if rowwise else 1, generator=generator)
    bias = draw(n, seed=seed) if biased else None
    sums = torch.from_numpy(q.numpy().astype("i4") @ codes.numpy().astype("i4").T)
    expected = sums * (s * beta)
    expected = (expected if bias is None else expected + bias).to(dtype)
    for name in kernels.cpu_paths():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels.backends, "_default_path", name)
            found = training.linear_of_codes(q, s, codes, beta, bias, dtype)
        assert found.dtype == dtype
        assert torch.equal(found, expected), name


def test_the_product_of_codes_over_threads_and_leading_dimensions(path, threads):
    q = torch.randint(-128, 128, (4, 33, 520)).to(torch.int8)
    codes = torch.randint(-1, 2, (300, 520)).to(torch.int8)
    s, beta = torch.rand(4, 33, 1), torch.rand(1)
    found = training.linear_of_codes(q, s, codes, beta, None, torch.float32)
    sums = quant.integer.int8_matmul(q.reshape(-1, 520), codes).reshape(4, 33, 300)
    assert torch.equal(found, sums * (s * beta))


def test_scales_that_are_not_finite_are_kept(path):
    q = torch.ones(3, 20, dtype=torch.int8)
    s = torch.tensor([[torch.nan], [torch.inf], [1.0]])
    y = training.linear_of_codes(
        q, s, torch.ones(5, 20, dtype=torch.int8), torch.tensor([2.0]), None, torch.float32
    )
    assert y[0].isnan().all()
    assert y[1].isinf().all()
    assert y[2].eq(40).all()


def test_what_the_kernels_have_no_product_for_is_left_to_torch(path):
    q, s, beta = torch.ones(2, 8, dtype=torch.int8), torch.ones(2, 1), torch.ones(1)
    codes = torch.ones(3, 8, dtype=torch.int8)

    def product(q=q, s=s, codes=codes, beta=beta, bias=None):
        return training.linear_of_codes(q, s, codes, beta, bias, torch.float32)

    assert product() is not None
    wide = torch.zeros(1, kernels.MAX_COLUMNS + 1, dtype=torch.int8)
    four = codes.clone()
    four[1, 3] = 2
    assert product(codes=four) is None
    assert product(codes=codes.float()) is None
    assert product(q=q.to(torch.int16)) is None
    assert product(s=s.double()) is None
    assert product(beta=beta.bfloat16()) is None
    assert product(q=q[:0], s=s[:0]) is None
    assert product(s=s[:1]) is None
    assert product(s=s[:, 0]) is None
    assert product(q=wide, s=s[:1], codes=wide) is None
    # Sizes that do not agree: the kernels would read beyond the smaller one.
    assert product(q=q[:, :1]) is None
    assert product(codes=codes[:, :7]) is None
    assert product(codes=codes[0]) is None
    assert product(beta=torch.ones(2)) is None
    assert product(bias=torch.ones(2)) is None
    assert product(bias=torch.ones(3)) is not None


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (32, 16), (130, 33), (70, 1000)])
@pytest.mark.parametrize("columns", [1, None])
def test_scaled_gradients_round_as_torch_does(path, threads, shape, columns):
    g = draw(*shape) * torch.logspace(-30, 30, shape[0])[:, None]
    g.view(-1)[: len(ODD)] = torch.tensor(ODD)[: g.numel()]
    by_row, by_column = torch.rand(shape[0], 1), torch.rand(columns or shape[1])
    turned, columnwise = training.scaled_bf16(g, by_row, by_column)
    assert same_bits(turned, (g * by_row).bfloat16().t().contiguous())
    assert same_bits(columnwise, (g * by_column).bfloat16())
    alone = training.scaled_bf16(g, None, by_column)
    assert alone[0] is None
    assert same_bits(alone[1], columnwise)
    alone = training.scaled_bf16(g, by_row, None)
    assert alone[1] is None
    assert same_bits(alone[0], turned)


def test_scaled_gradients_of_any_stride():
    g = draw(40, 30)
    for view in (g.t(), g[::2, 3:], g.expand(40, 30), torch._neg_view(g), g[:1].expand(9, 30)):
        by_row = torch.rand(view.shape[0], 1)
        turned = training.scaled_bf16(view, by_row, None)[0]
        assert same_bits(turned, (view * by_row).bfloat16().t().contiguous())


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (4,), (4, 2)])
def test_factors_of_other_shapes_are_left_to_torch(shape):
    g, ones = torch.ones(4, 3), torch.ones(shape)
    assert training.scaled_bf16(g, ones, None) is None
    assert training.scaled_bf16(g, None, torch.ones(4)) is None
    assert training.scaled_bf16(g, torch.ones(4, 1, dtype=torch.float64), None) is None


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1), (6, 1)])
def test_an_activation_scale_for_all_tokens_or_some(shape):
    """A foreign quantizer's; the kernels read one a token, and must not read beyond fewer."""

    def static(x):
        s = x.abs().amax() / 127
        return (x / s).round().to(torch.int8), s.expand(shape)

    x, w = draw(50, 6, 40).requires_grad_(), draw(9, 40, seed=1).requires_grad_()
    grads = {}
    for compute in ("exact", "int8"):
        y = quant.TernaryLinearOp(quantize_activation=static, compute=compute)(x, w)
        grads[compute] = torch.autograd.grad(y.sum(), (x, w))
    for exact, fast in zip(*grads.values(), strict=True):
        assert torch.allclose(exact, fast, rtol=2e-2, atol=2e-2 * float(exact.abs().max()))


def test_only_plain_tensors_fit():
    plain = torch.ones(2)
    assert training.fits(plain, None, torch.nn.Parameter(plain))
    assert not training.fits(plain, plain.to("meta"))
    assert not training.fits(plain.to_sparse())
    assert not training.fits(torch._efficientzerotensor((2,)))
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(plain)
        assert not training.fits(plain)
    assert not training.fits(fake)


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace is deprecated, and warns of every if
def test_what_records_or_transforms_operators_gets_torch_s():
    op = quant.TernaryLinearOp(compute="int8")
    x, w = draw(6, 40), draw(9, 40, seed=1)
    expected, other = op(x, w), draw(6, 40, seed=2)
    traced = torch.jit.trace(lambda x: op(x, w), (x,), check_trace=False)
    assert torch.equal(traced(other), op(other, w))
    for pre_dispatch in (False, True):
        recorded = make_fx(lambda x: op(x, w), pre_dispatch=pre_dispatch)(x)
        assert torch.equal(recorded(other), op(other, w))
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.vmap(lambda x: op(x, w))(x[None])
    assert torch.equal(op(x, w), expected)


def test_a_gradient_without_memory_is_taken():
    x, w = draw(6, 40).requires_grad_(), draw(9, 40, seed=1).requires_grad_()
    quant.TernaryLinearOp(compute="int8")(x, w).backward(torch._efficientzerotensor((6, 9)))
    assert w.grad.eq(0).all()


def test_without_the_native_kernels_nothing_fits(monkeypatch):
    monkeypatch.setattr(training, "native_if_loaded", lambda: None)
    monkeypatch.setattr(training, "_can_load", lambda: False)
    assert not training.fits(torch.ones(2))


@pytest.mark.parametrize("backward", [False, True])
def test_int8_training_uses_the_kernels(monkeypatch, backward):
    used = []

    def noted(name, own):
        def call(*args):
            used.append(name)
            return own(*args)

        return call

    for name in ("weight_codes", "activation_codes", "linear_of_codes", "scaled_bf16"):
        monkeypatch.setattr(training, name, noted(name, getattr(training, name)))
    x, w = draw(6, 40).requires_grad_(), draw(9, 40, seed=1).requires_grad_()
    y = quant.TernaryLinearOp(compute="int8")(x, w)
    if backward:
        y.sum().backward()
    forward = ["weight_codes", "activation_codes", "linear_of_codes"]
    assert used == [*forward, *["scaled_bf16"] * backward]


def test_int8_training_has_the_same_bits_without_the_kernels(monkeypatch):
    x, w, b = draw(6, 40), draw(9, 40, seed=1), draw(9, seed=2)

    def step():
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        y = quant.TernaryLinearOp(compute="int8")(*leaves)
        y.pow(2).sum().backward()
        return [y.detach(), *(t.grad for t in leaves)]

    found = step()
    monkeypatch.setattr(training, "fits", lambda *tensors: False)
    assert all(torch.equal(a, b) for a, b in zip(found, step(), strict=True))

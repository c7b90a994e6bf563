"""The products under tracers, and on tensors that only look like plain ones."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

from forge_harness import kernels
from forge_harness.errors import BackendUnavailableError
from forge_harness.model import BitLinear, PackedLinear

N, K = 100, 48


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def packed():
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-1, 2, (N, K), dtype=torch.int8, generator=generator)
    return kernels.pack(codes, scale=draw(N).abs())


@pytest.fixture(scope="module", params=["plain", "norm-and-bias"])
def layer(request):
    torch.manual_seed(2)
    plain = request.param == "plain"
    made = BitLinear(K, N, bias=not plain, sub_norm=not plain)
    if not plain:
        torch.nn.init.normal_(made.bias)
    return PackedLinear.from_bitlinear(made)


@pytest.mark.parametrize(
    "trace",
    [
        pytest.param(lambda m, x: torch.jit.trace(m, x, check_trace=False), id="jit.trace"),
        pytest.param(lambda m, x: make_fx(m)(x), id="make_fx"),
        pytest.param(lambda m, x: torch.export.export(m, (x,)).module(), id="export"),
        pytest.param(lambda m, x: torch.compile(m, fullgraph=True, backend="eager"), id="compile"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch.jit.trace is deprecated, and warns of every if
@torch.no_grad()
def test_a_traced_layer_computes_on_new_inputs(layer, trace):
    traced = trace(layer, draw(5, K))
    for seed in range(3):
        x = draw(5, K, seed=seed)
        assert torch.equal(traced(x), layer(x))


def test_modes_that_watch_change_nothing(packed):
    x, bias, out = draw(5, K), draw(N), torch.empty(5, N)
    wanted = kernels.ternary_linear(x, packed, bias)
    with FlopCounterMode(display=False):
        assert torch.equal(kernels.ternary_linear(x, packed, bias), wanted)
        assert kernels.ternary_linear(x, packed, bias, out=out) is out
        with pytest.raises(BackendUnavailableError, match="'bogus' does not run"):
            kernels.ternary_linear(x, packed, path="bogus")
    assert torch.equal(out, wanted)


def gradient_beside(layer, run):
    """Gradient of a trainable layer in front of a packed one and of a path around it."""
    torch.manual_seed(3)
    front = torch.nn.Linear(K, K)

    def forward(x):
        hidden = front(x)
        return hidden.sum() + layer(hidden).sum()

    run(forward, draw(5, K)).backward()
    return front.weight.grad


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_packed_layer_among_trainable_ones_compiles(layer, backend):
    def compiled(forward, x):
        return torch.compile(forward, fullgraph=True, backend=backend)(x)

    found = gradient_beside(layer, compiled)
    torch.testing.assert_close(found, gradient_beside(layer, lambda forward, x: forward(x)))


def test_modes_that_watch_may_train_beside_a_packed_layer(layer):
    def watched(forward, x):
        with FlopCounterMode(display=False):
            return forward(x)

    found = gradient_beside(layer, watched)
    assert torch.equal(found, gradient_beside(layer, lambda forward, x: forward(x)))


def test_no_gradient_flows_to_scale_or_bias_when_watched(packed):
    scale, bias = packed.scale.clone().requires_grad_(), draw(N).requires_grad_()
    learned = kernels.PackedTernary(packed.data, N, K, scale)
    with FlopCounterMode(display=False):
        assert not kernels.ternary_linear(draw(5, K), learned, bias).requires_grad


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_product_writes_to_out(packed, backend):
    def product(x, out):
        return kernels.ternary_linear(x, packed, out=out)

    compiled = torch.compile(product, fullgraph=True, backend=backend)
    for seed in range(2):
        x, out = draw(5, K, seed=seed), torch.empty(5, N)
        found = compiled(x, out)
        assert torch.equal(found, kernels.ternary_linear(x, packed))
        assert torch.equal(out, found)


def test_fake_tensors_give_shapes_and_never_reach_the_kernels(packed):
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.randn(2, 3, K, dtype=torch.bfloat16)
        y = kernels.ternary_linear(x, packed)
        assert (y.shape, y.dtype) == ((2, 3, N), torch.bfloat16)
        q, scale = kernels.quantize_activations(x, backend="reference")
        assert (q.shape, scale.shape) == (x.shape, (2, 3, 1))
        with pytest.raises(BackendUnavailableError, match="cannot be traced"):
            kernels.quantize_activations(x)
        with pytest.raises(BackendUnavailableError, match="cannot be traced"):
            kernels.ternary_matmul(torch.ones(2, K, dtype=torch.int8), packed)


def test_wrappers_without_memory_are_refused(packed):
    x = draw(5, K)
    with pytest.raises(ValueError, match="no memory of its own"):
        kernels.ternary_linear(TwoTensor(x, x), packed)
    with pytest.raises(ValueError, match="no memory of its own"):
        kernels.quantize_activations(TwoTensor(x, x))
    bias = draw(N)
    with pytest.raises(ValueError, match="the bias has no memory of its own"):
        kernels.ternary_linear(x, packed, TwoTensor(bias, bias))


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda packed, x: kernels.ternary_linear(x, packed), "x"),
        (
            lambda packed, x: kernels.ternary_linear(torch.ones(K), packed, x.new_ones(N) + x[0]),
            "the bias",
        ),
        (lambda packed, x: kernels.quantize_activations(x)[0], "x"),
        (lambda packed, x: kernels.ternary_matmul(x[None].to(torch.int8), packed), "q"),
    ],
)
def test_vmap_is_refused_with_a_remedy(packed, call, what):
    def mapped(x):
        return call(packed, x)

    with pytest.raises(ValueError, match=f"{what} has no memory of its own.*vmap"):
        torch.vmap(mapped)(draw(5, K))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_sign_that_waits_in_a_view_counts(packed, backend):
    x, q = draw(5, K), torch.arange(2 * K).reshape(2, K).to(torch.int8)
    view = torch.complex(x, x).conj().imag
    assert view.is_neg()
    found = kernels.ternary_linear(view, packed, backend=backend)
    assert torch.equal(found, kernels.ternary_linear(-x, packed))
    found = kernels.ternary_linear(torch._neg_view(x), packed, backend=backend)
    assert torch.equal(found, kernels.ternary_linear(-x, packed))
    with pytest.raises(ValueError, match="out is a negated view"):
        kernels.ternary_linear(x, packed, out=torch._neg_view(found), backend=backend)
    bias = torch.complex(draw(N), draw(N)).conj().imag
    found = kernels.ternary_linear(x, packed, bias, backend=backend)
    assert torch.equal(found, kernels.ternary_linear(x, packed, -draw(N)))
    found = kernels.ternary_matmul(torch._neg_view(q), packed, backend=backend)
    assert torch.equal(found, kernels.ternary_matmul(-q, packed))
    found = kernels.quantize_activations(view, backend=backend)
    assert torch.equal(found[0], kernels.quantize_activations(-x)[0])


DEFAULT_DEVICE = """
import torch
from forge_harness import kernels
codes = torch.ones(8, 16, dtype=torch.int8)
packed, x, q = kernels.pack(codes, scale=0.5), torch.ones(2, 16), torch.ones(2, 16).to(torch.int8)
stored = kernels.pack_i2(codes)
torch.set_default_device("meta")
assert kernels.ternary_matmul(q, packed).eq(16).all()
assert kernels.ternary_linear(x, packed).shape == (2, 8)
assert kernels.quantize_activations(x)[0].eq(127).all()
for unpacked in (kernels.unpack(packed), kernels.unpack_i2(kernels.pack_i2(codes), 8)):
    assert unpacked.eq(1).all()
assert kernels.pack(codes, scale=0.5).data.equal(packed.data)
assert kernels.pack_stored(stored, 8, scale=0.5).data.equal(packed.data)
"""


def test_results_are_where_the_inputs_are_whatever_the_default_device():
    # In a process of its own: writing through another device's address ends it.
    done = subprocess.run([sys.executable, "-c", DEFAULT_DEVICE], capture_output=True, timeout=120)
    assert (done.returncode, done.stderr.decode()) == (0, "")

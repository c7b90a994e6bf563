"""The façade: choice of backend, packed weights, the inference linear."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import subprocess
import sys

import pytest
import torch
from forge_kernels import reference

from forge_harness import kernels, quant
from forge_harness.errors import BackendUnavailableError, NonTernaryCodeError, ScaleError


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def without_native(monkeypatch):
    # None in sys.modules makes the import fail as a missing extension does.
    monkeypatch.setitem(sys.modules, "forge_kernels._native", None)


def test_auto_says_which_backend_runs():
    assert kernels.which("pack_i2") == "native"
    assert kernels.which("pack_i2", device="cuda") == "reference"
    assert kernels.which("ternary_linear") == "native"
    assert kernels.which("ternary_linear", "reference") == "reference"
    assert kernels.which("unpack_i2", "reference") == "reference"


@pytest.mark.usefixtures("without_native")
def test_without_the_extension_auto_says_so_and_native_refuses():
    codes = torch.zeros(4, 4, dtype=torch.int8)
    assert kernels.which("pack_i2") == "reference"
    assert torch.equal(kernels.pack_i2(codes), kernels.pack_i2(codes, backend="reference"))
    assert kernels.native_problem()
    assert kernels.native_version() is None
    with pytest.raises(BackendUnavailableError, match="reinstall"):
        kernels.pack_i2(codes, backend="native")
    with pytest.raises(BackendUnavailableError, match="reinstall"):
        kernels.unpack_i2(codes.to(torch.uint8), 16, backend="native")


def test_an_explicit_choice_never_falls_back():
    packed = kernels.pack(torch.zeros(4, 4, dtype=torch.int8), scale=1.0)
    with pytest.raises(BackendUnavailableError, match="no cuda implementation"):
        kernels.pack(torch.zeros(4, 4, dtype=torch.int8), scale=1.0, backend="cuda")
    with pytest.raises(BackendUnavailableError, match=r"'neon'.*'scalar'"):
        kernels.ternary_linear(torch.zeros(1, 4), packed, backend="native", path="neon")
    with pytest.raises(BackendUnavailableError, match="not on cuda"):
        kernels.which("pack_i2", "native", device="cuda")


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"'nativ'.*Did you mean 'native'"):
        kernels.which("pack_i2", "nativ")
    with pytest.raises(ValueError, match=r"'pack_i3'.*Did you mean 'pack_i2'"):
        kernels.which("pack_i3")


def test_asking_for_backends_does_not_import_torch():
    code = (
        "import sys; from forge_harness import kernels; kernels.which('pack_i2');"
        "kernels.native_version(); print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


def test_the_native_version_is_that_of_the_package():
    from importlib.metadata import version

    assert kernels.native_version() == version("bitnet-forge-harness")


def test_packed_weights_carry_their_scale():
    codes, scale = quant.absmean_ternary(draw(0, 10, 64))
    packed = kernels.pack(codes, scale=scale)
    assert packed.shape == (10, 64)
    assert packed.scale.shape == ()
    # 10 rows take a whole group of 64.
    assert packed.nbytes == 64 * 64 // 4 + 4
    assert packed.bits_per_weight == pytest.approx(8 * 1028 / 640)
    assert torch.equal(kernels.unpack(packed), codes)
    assert kernels.pack(codes, scale=0.5).scale.item() == 0.5
    assert kernels.pack(codes, scale=torch.ones(10, 1)).scale.shape == (10,)
    with pytest.raises(ValueError, match=r"\(3,\).*10 rows"):
        kernels.pack(codes, scale=torch.ones(3))


@pytest.mark.parametrize("shape", [(1, 64), (5, 64), (2, 3, 64), (64,)])
def test_the_inference_linear_is_the_training_forward(shape):
    x, w, bias = draw(1, *shape), draw(2, 10, 64), draw(3, 10)
    codes, scale = quant.absmean_ternary(w)
    y = kernels.ternary_linear(x, kernels.pack(codes, scale=scale), bias)
    assert torch.equal(y, quant.TernaryLinearOp()(x, w, bias))
    assert (
        kernels.ternary_linear(x.bfloat16(), kernels.pack(codes, scale=scale)).dtype
        == torch.bfloat16
    )


def test_the_inference_linear_takes_a_scale_a_row():
    x, w = draw(1, 5, 64), draw(2, 10, 64)
    codes, scales = quant.absmean_ternary_parts(w, (4, 6))
    rows = scales.repeat_interleave(torch.tensor([4, 6]))
    y = kernels.ternary_linear(x, kernels.pack(codes, scale=rows))
    op = quant.TernaryLinearOp()
    assert torch.equal(y, torch.cat([op(x, w[:4]), op(x, w[4:])], dim=-1))


def test_the_kernels_quantize_as_quant_does():
    x = draw(4, 200, 33) * torch.logspace(-7, 7, 200)[:, None]
    x[0, 0], x[1, 0], x[2] = float("nan"), float("inf"), 0.0
    for own, theirs in zip(reference.absmax_int8(x), quant.absmax_int8(x), strict=True):
        assert torch.equal(own.nan_to_num(), theirs.nan_to_num())


def test_wrong_arguments_of_the_inference_linear_are_named():
    packed = kernels.pack(torch.zeros(4, 8, dtype=torch.int8), scale=1.0)
    with pytest.raises(ValueError, match=r"\(2, 7\).*\(4, 8\)"):
        kernels.ternary_linear(torch.zeros(2, 7), packed)
    packed.data.fill_(0xFF)
    with pytest.raises(NonTernaryCodeError, match="row 0, column 0"):
        kernels.ternary_linear(torch.zeros(2, 8), packed, backend="reference")
    for backend in ("native", "reference"):
        with pytest.raises(NonTernaryCodeError, match="row 0, column 0"):
            kernels.unpack(packed, backend=backend)
    with pytest.raises(TypeError, match="int64"):
        kernels.ternary_linear(torch.zeros(2, 8, dtype=torch.int64), packed)
    with pytest.raises(ValueError, match=r"bias has shape \(3,\)"):
        kernels.ternary_linear(torch.zeros(2, 8), packed, torch.zeros(3))
    with pytest.raises(ValueError, match="is on meta"):
        kernels.ternary_linear(torch.zeros(2, 8, device="meta"), packed)
    with pytest.raises(TypeError, match="float32"):
        kernels.ternary_matmul(torch.zeros(2, 8), packed)
    with pytest.raises(ValueError, match=r"\(2, 7\)"):
        kernels.ternary_matmul(torch.zeros(2, 7, dtype=torch.int8), packed)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"layout": "i2-64x16/2"}, r"layout 'i2-64x16/2'.*pack the codes again"),
        ({"rows": 65}, r"expected contiguous torch.uint8 \(2, 1, 256\)"),
        ({"rows": 0}, r"\(0, 8\); expected at least one row"),
        ({"columns": 0}, r"\(4, 0\)"),
        ({"columns": kernels.MAX_COLUMNS + 1}, "131,072 columns"),
        ({"scale": torch.ones(3)}, r"scale is torch.float32 \(3,\)"),
        ({"scale": torch.ones(4, dtype=torch.float64)}, "float64"),
        ({"data": torch.zeros(1, 1, 512, dtype=torch.uint8)[..., ::2]}, "contiguous"),
    ],
)
def test_a_packed_weight_that_is_none_is_refused(change, sentence):
    packed = kernels.pack(torch.zeros(4, 8, dtype=torch.int8), scale=1.0)
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(packed, **change)


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        (float("nan"), "scale nan of row 0"),
        (torch.tensor([1.0, 2.0, torch.inf, 4.0]), "scale inf of row 2"),
        (1e-300, "scale 1e-300 of row 0"),
        (torch.full((4,), 1e-300, dtype=torch.float64), "scale 1e-300 of row 0"),
        (1e300, r"scale 1e\+300 of row 0"),
        (1e-40, "scale 1e-40 of row 0"),
        (torch.tensor([1.0, 0.0, -1e-39, 4.0]), "e-39 of row 2"),
        (torch.ones(4, dtype=torch.complex64), "a torch.complex64 that fp32 cannot hold"),
        ("much", "a str that fp32 cannot hold"),
        (None, "a NoneType that fp32 cannot hold"),
        (10**400, "a int that fp32 cannot hold"),
        (quant.absmean_ternary(torch.full((4, 8), 3e38))[1], "scale inf of row 0"),
    ],
    ids=str,
)
def test_a_scale_that_fp32_does_not_hold_is_refused(scale, said):
    codes = torch.zeros(4, 8, dtype=torch.int8)
    with pytest.raises(ScaleError, match=said) as caught:
        kernels.pack(codes, scale=scale)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(ScaleError, match=said):
        kernels.pack_stored(kernels.pack_i2(codes), 4, scale=scale)


@pytest.mark.parametrize("scale", [2.0**-126, 0.0, -2.0, 3, float(torch.finfo().max)])
def test_a_scale_that_fp32_holds_is_packed_as_it_is(scale):
    packed = kernels.pack(torch.zeros(4, 8, dtype=torch.int8), scale=scale)
    assert (packed.scale.item(), packed.scale.dtype) == (scale, torch.float32)


def test_the_environment_names_the_path_and_an_argument_goes_first(monkeypatch):
    assert kernels.cpu_path() == kernels.cpu_paths()[0]
    monkeypatch.setenv(kernels.PATH_VARIABLE, "scalar")
    assert kernels.cpu_path() == "scalar"
    assert kernels.cpu_path(kernels.cpu_paths()[0]) == kernels.cpu_paths()[0]
    monkeypatch.setenv(kernels.PATH_VARIABLE, "sse9")
    with pytest.raises(BackendUnavailableError, match=r"'sse9' \(from FORGE_KERNELS_PATH\)"):
        kernels.cpu_path()


def test_out_is_refused_where_it_could_not_be_written_safely():
    x, packed = (
        draw(0, 5, 16),
        kernels.pack(torch.ones(16, 16, dtype=torch.int8), scale=torch.ones(16)),
    )
    wanted = kernels.ternary_linear(x, packed, torch.ones(16))
    out = torch.ones(5, 16)
    with pytest.raises(ValueError, match="out requires a gradient"):
        kernels.ternary_linear(x, packed, out=torch.empty(5, 16, requires_grad=True))
    with pytest.raises(ValueError, match="out shares memory with the bias"):
        kernels.ternary_linear(x, packed, out[4], out=out)
    scaled = kernels.PackedTernary(packed.data, 16, 16, out[0])
    with pytest.raises(ValueError, match="out shares memory with the scale"):
        kernels.ternary_linear(x, scaled, out=out)
    with pytest.raises(ValueError, match="out shares memory with the packed weight"):
        kernels.ternary_linear(
            x[:1], packed, out=packed.data.view(-1)[:64].view(torch.float32)[None]
        )
    assert out.eq(1).all()
    kernels.ternary_linear(x, packed, torch.ones(16), out=x)  # quantized before it is overwritten
    assert torch.equal(x, wanted)


def test_a_backward_notices_that_out_was_written_again():
    x, packed = draw(0, 5, 16), kernels.pack(torch.ones(8, 16, dtype=torch.int8), scale=1.0)
    weight, out = torch.ones(5, 8, requires_grad=True), torch.empty(5, 8)
    kernels.ternary_linear(x, packed, out=out)
    loss = (weight * out).sum()
    kernels.ternary_linear(2 * x, packed, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        kernels.ternary_linear(x, packed, out=torch.empty(5, 8))


def test_a_bias_elsewhere_is_refused():
    packed = kernels.pack(torch.ones(8, 16, dtype=torch.int8), scale=1.0)
    with pytest.raises(ValueError, match="bias is on meta, the packed weight on cpu"):
        kernels.ternary_linear(draw(0, 5, 16), packed, torch.ones(8, device="meta"))


def test_a_path_is_one_of_the_native_backend_or_refused():
    x, q = draw(0, 5, 16), torch.ones(5, 16, dtype=torch.int8)
    packed = kernels.pack(torch.ones(8, 16, dtype=torch.int8), scale=1.0)
    for call in (
        lambda **given: kernels.ternary_linear(x, packed, **given),
        lambda **given: kernels.ternary_matmul(q, packed, **given),
        lambda **given: kernels.quantize_activations(x, **given),
    ):
        with pytest.raises(BackendUnavailableError, match="'avx2' is one of the native backend"):
            call(backend="reference", path="avx2")
        with pytest.raises(BackendUnavailableError, match="path '' does not run"):
            call(path="")
        with pytest.raises(ValueError, match="Unknown kernel backend None"):
            call(backend=None)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_bias_counts_as_fp32_whatever_its_dtype(backend):
    x, bias = draw(0, 200, 16).double(), draw(1, 8).double() * 1.1
    packed = kernels.pack(torch.ones(8, 16, dtype=torch.int8), scale=0.3)
    found = kernels.ternary_linear(x, packed, bias, backend=backend)
    assert torch.equal(found, kernels.ternary_linear(x, packed, bias.float(), backend="reference"))
    latent = torch.full((8, 16), 0.3).double()
    assert torch.equal(
        quant.TernaryLinearOp()(x, latent, bias), quant.TernaryLinearOp()(x, latent, bias.float())
    )


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_no_gradient_flows_to_any_operand(backend):
    packed = kernels.pack(torch.ones(8, 16, dtype=torch.int8), scale=0.3)
    trained = dataclasses.replace(packed, scale=packed.scale.clone().requires_grad_())
    x, bias = draw(0, 2, 16).requires_grad_(), draw(1, 8).requires_grad_()
    assert not kernels.ternary_linear(x, trained, bias, backend=backend).requires_grad


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_sizes_that_cannot_be_packed_are_refused_before_anything_is_read(backend):
    wide = torch.zeros((1, 1), dtype=torch.int8).expand(1, kernels.MAX_COLUMNS + 1)
    for codes in (wide, wide[:0], wide[:, :0]):
        with pytest.raises(ValueError, match="at least one row and 1 to 131,072 columns"):
            kernels.pack(codes, scale=1.0, backend=backend)
        with pytest.raises(ValueError, match="at least one row and 1 to 131,072 columns"):
            kernels.pack_stored(codes.to(torch.uint8), codes.shape[0], scale=1.0, backend=backend)
    with pytest.raises(ValueError, match="9 rows do not fit"):
        kernels.pack_stored(torch.zeros(2, 4, dtype=torch.uint8), 9, scale=1.0, backend=backend)


def test_a_packed_weight_stays_where_it_is_and_shows_no_tensors():
    packed = kernels.pack(torch.ones(8, 16, dtype=torch.int8), scale=0.5)
    assert packed.to("cpu") is packed
    assert (packed.is_cpu, packed.is_rowwise) == (True, False)
    assert kernels.pack(torch.ones(8, 16, dtype=torch.int8), scale=torch.ones(8)).is_rowwise
    assert repr(packed) == "PackedTernary(rows=8, columns=16, layout='i2-64x16')"
    moved = packed.to("meta")
    assert (moved.data.device.type, moved.is_cpu) == ("meta", False)


def test_a_packed_weight_that_was_pickled_is_checked_again():
    packed = kernels.pack(torch.ones(8, 16, dtype=torch.int8), scale=0.5)
    written = pickle.dumps(packed)
    read = pickle.loads(written)
    assert torch.equal(read.data, packed.data)
    assert (read.shape, read.scale.item(), read.is_cpu) == ((8, 16), 0.5, True)
    assert written.count(b"i2-64x16") == 1
    with pytest.raises(ValueError, match=r"layout 'i2-64x17'.*pack the codes again"):
        pickle.loads(written.replace(b"i2-64x16", b"i2-64x17"))
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    assert not torch.load(file, map_location="meta", weights_only=False).is_cpu


def test_a_copied_packed_weight_shares_nothing():
    packed = kernels.pack(torch.ones(8, 16, dtype=torch.int8), scale=0.5)
    copied = copy.deepcopy(packed)
    assert torch.equal(copied.data, packed.data)
    assert copied.data.data_ptr() != packed.data.data_ptr()
    assert copied.scale.data_ptr() != packed.scale.data_ptr()


@pytest.mark.parametrize("backend", ["auto", "reference", "native"])
def test_tensors_without_values_are_refused(backend):
    codes = torch.ones(8, 16, dtype=torch.int8)
    packed, stored = kernels.pack(codes, scale=0.5), kernels.pack_i2(codes)
    for call in (
        lambda: kernels.pack(codes.to("meta"), scale=0.5, backend=backend),
        lambda: kernels.pack_stored(stored.to("meta"), 8, scale=0.5, backend=backend),
        lambda: kernels.pack_i2(codes.to("meta"), backend=backend),
        lambda: kernels.unpack_i2(stored.to("meta"), 8, backend=backend),
        lambda: kernels.unpack(packed.to("meta"), backend=backend),
        lambda: kernels.ternary_matmul(codes.to("meta"), packed.to("meta"), backend=backend),
    ):
        with pytest.raises(ValueError, match=r"on meta.*no values"):
            call()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_complex_bias_is_refused(backend):
    packed = kernels.pack(torch.ones(8, 16, dtype=torch.int8), scale=0.5)
    bias = torch.ones(8, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"bias has dtype torch.complex64"):
        kernels.ternary_linear(draw(0, 5, 16), packed, bias, backend=backend)

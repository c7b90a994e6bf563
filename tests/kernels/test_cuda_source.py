"""The CUDA decode kernel without a GPU: it compiles for every architecture, input and size."""

from __future__ import annotations

import shutil
import struct
import subprocess
from types import SimpleNamespace

import pytest
import torch
from forge_kernels import cuda, nvrtc

from forge_harness import kernels
from forge_harness.errors import BackendUnavailableError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


def nvrtc_is_there() -> bool:
    try:
        nvrtc.version()
    except OSError:
        return False
    return True


needs_nvrtc = pytest.mark.skipif(
    not nvrtc_is_there(),
    reason="NVRTC is not installed: pip install -c constraints/cpu.txt '.[gpu-sim]'",
)


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("tokens", [1, 8])
def test_the_kernel_compiles_and_is_kept(architecture, tokens, tmp_path, monkeypatch):
    monkeypatch.setenv(nvrtc.CACHE_VARIABLE, str(tmp_path))
    for dtype in DTYPES:
        options = cuda.options(tokens, dtype, 32, 128)
        cubin = nvrtc.compiled(cuda.source(), options, architecture)
        assert cubin.startswith(b"\x7fELF")
        assert nvrtc.compiled(cuda.source(), options, architecture) == cubin
    assert len(list(tmp_path.iterdir())) == len(DTYPES)


@needs_nvrtc
def test_a_source_that_does_not_compile_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv(nvrtc.CACHE_VARIABLE, str(tmp_path))
    with pytest.raises(nvrtc.CompileError, match="undefined"):
        nvrtc.compiled('extern "C" __global__ void f() { nothing(); }', (), "sm_80")
    assert not list(tmp_path.iterdir())


@needs_nvrtc
def test_a_cache_that_cannot_be_written_costs_only_the_compilation(monkeypatch):
    monkeypatch.setenv(nvrtc.CACHE_VARIABLE, "/dev/null/nowhere")
    options = cuda.options(1, torch.bfloat16, 16, 128)
    assert nvrtc.compiled(cuda.source(), options, "sm_80").startswith(b"\x7fELF")


@needs_nvrtc
def test_a_user_without_a_home_compiles_without_a_cache(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(nvrtc.CACHE_VARIABLE, raising=False)
    monkeypatch.setattr(nvrtc.Path, "home", homeless)
    assert nvrtc.cache_directory() is None
    options = cuda.options(1, torch.bfloat16, 16, 128)
    assert nvrtc.compiled(cuda.source(), options, "sm_80").startswith(b"\x7fELF")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_nvcc_takes_the_same_source(architecture, tmp_path):
    source = tmp_path / "kernel.cu"
    source.write_text(cuda.source())
    for dtype in DTYPES:
        command = [
            "nvcc",
            f"-arch={architecture}",
            "-cubin",
            "-o",
            str(tmp_path / "out"),
            str(source),
        ]
        options = [o for o in cuda.options(2, dtype, 64, 256) if "std" not in o]
        done = subprocess.run(
            [*command, "-std=c++17", *options], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("groups", "blocks"), [(1, 1), (40, 160), (320, 200), (216, 160), (5000, 1)]
)
def test_every_thread_block_is_resident_and_threads_cover_whole_blocks(groups, blocks):
    rows, threads = cuda.shape(groups, blocks, 132)
    assert rows in (16, 32, 64)
    assert threads in (128, 256, 512)
    assert threads % (rows // 4) == 0
    busiest = -(-groups * 64 // rows // 132)
    assert threads == 128 or busiest * threads <= 1024


def declared_shared(cubin: bytes) -> int:
    """Size of the section .nv.shared.ternary_gemv of an ELF file of 64 bits."""
    (at,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, at + i * size) for i in range(count)]
    start = headers[names][4]
    for header in headers:
        name = cubin[start + header[0] :].split(b"\0", 1)[0]
        if name == b".nv.shared.ternary_gemv":
            return header[5]
    return 0


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_what_the_kernel_declares_leaves_room_for_the_activations(
    architecture, tmp_path, monkeypatch
):
    """Both share what a thread block has; the driver refuses a launch that asks for more."""
    monkeypatch.setenv(nvrtc.CACHE_VARIABLE, str(tmp_path))
    for tokens, rows, threads in ((1, 16, 128), (8, 64, 512)):
        options = cuda.options(tokens, torch.bfloat16, rows, threads)
        declared = declared_shared(nvrtc.compiled(cuda.source(), options, architecture))
        known = cuda.static_bytes(tokens, rows, threads)
        assert known <= declared <= known + cuda._RESERVED


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that there is a GPU; returns how to set the shared memory of a thread block."""
    pytest.importorskip("triton")
    from forge_kernels import triton as triton_kernels

    def with_shared(size: int) -> None:
        for cached in (cuda._shape, cuda._room):
            cached.cache_clear()
        monkeypatch.setattr(nvrtc, "most_shared", lambda device: size)

    monkeypatch.setattr(cuda, "problem", lambda device="cuda": "")
    monkeypatch.setattr(triton_kernels, "problem", lambda device="cuda": "")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    yield with_shared
    for cached in (cuda._shape, cuda._room):
        cached.cache_clear()


H200, RTX_4090 = 232_448, 101_376


@pytest.mark.parametrize(
    ("shared", "weight", "tokens", "expected"),
    [
        (H200, (8192, 8192), 8, "cuda"),
        (H200, (8192, 28672), 4, "cuda"),
        # A 70B model's down projection: 229,376 bytes of activations.
        (H200, (8192, 28672), 5, "triton"),
        (H200, (2560, 131_072), 1, "cuda"),
        (H200, (2560, 131_072), 2, "triton"),
        (RTX_4090, (4096, 14336), 4, "cuda"),
        (RTX_4090, (4096, 14336), 8, "triton"),
    ],
)
def test_auto_takes_the_decode_kernel_only_where_the_activations_fit(
    gpu, shared, weight, tokens, expected
):
    gpu(shared)
    assert kernels.which("ternary_linear", device="cuda", tokens=tokens, weight=weight) == expected


def test_the_decode_kernel_refuses_rows_that_do_not_fit(gpu):
    gpu(H200)
    with pytest.raises(BackendUnavailableError, match=r"229,376 bytes .* room for .*'triton'"):
        kernels.which("ternary_linear", "cuda", device="cuda", tokens=8, weight=(8192, 28672))


def test_a_kernel_never_asks_for_more_shared_memory_than_there_is(gpu):
    """8 tokens of (8192, 8192): 200 KiB beside 33 KiB of its own, of the 227 an H200 has."""
    gpu(H200)
    for groups in (1, 40, 128, 132, 5000):
        for capacity in (1, 2, 4, 8):
            rows, threads = cuda._shape(groups, 512, 0)
            room = cuda._room(capacity, groups, 512, 0)
            assert room + cuda.static_bytes(capacity, rows, threads) + cuda._RESERVED <= H200
            assert room >= 190_000

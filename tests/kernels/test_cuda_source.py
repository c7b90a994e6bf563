"""The CUDA decode kernel without a GPU: it compiles for every architecture, input and size."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import torch
from forge_kernels import cuda, nvrtc

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

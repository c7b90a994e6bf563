"""Triton kernels without a GPU: interpreted, and compiled ahead of time."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from forge_harness import kernels
from forge_harness.errors import BackendUnavailableError

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed: pip install -c constraints/cpu.txt '.[gpu-sim]'",
)


def child(work: str):
    script = Path(__file__).with_name("triton_child.py")
    done = subprocess.run(
        [sys.executable, str(script), work], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_triton
def test_the_interpreted_kernels_have_the_reference_s_bits():
    assert child("interpret") == []


@needs_triton
def test_the_products_use_int8_tensor_cores():
    found = child("compile")
    assert found["80"] == ["mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"]
    assert found["90"]
    assert all("s32.s8.s8" in name and name.startswith("wgmma") for name in found["90"])
    assert found["gfx942"]
    assert all(name.endswith("_i8") for name in found["gfx942"])


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_without_a_gpu_the_choice_is_refused(backend, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailableError, match="runs on a GPU, not on cpu"):
        kernels.which("ternary_linear", backend)


@needs_triton
@pytest.mark.parametrize("op", ["quantize_activations", "ternary_matmul", "ternary_linear"])
def test_the_interpreter_is_taken_where_it_is_asked_for_only(op, monkeypatch):
    """`which` said triton, and products ran in Python, or natively after all."""
    before = kernels.which(op)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.which(op) == before
    assert kernels.which(op, "triton") == "triton"


def test_too_many_tokens_for_the_decode_kernel_are_refused():
    with pytest.raises(BackendUnavailableError, match="up to 8 tokens, not 9"):
        kernels.which("ternary_linear", "cuda", device="cuda", tokens=9)

"""Runs the Triton kernels in the interpreter, or compiles them for GPUs that are not there.

A process of its own: Triton decides when a kernel is defined which of the two it will be.
"""

from __future__ import annotations

import json
import os
import re
import sys

WORK = sys.argv[1]
if WORK == "interpret":
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from forge_kernels.triton import kernels as triton_kernels  # noqa: E402

from forge_harness import kernels, quant  # noqa: E402

SHAPES = [(1, 1, 1), (3, 5, 7), (1, 65, 17), (17, 70, 130), (5, 130, 129), (2, 64, 1040), (0, 8, 8)]


def interpret() -> list[str]:
    wrong = []
    for m, n, k in SHAPES:
        generator = torch.Generator().manual_seed(m * 1000 + k)
        q = torch.randint(-128, 128, (m, k), dtype=torch.int16, generator=generator).to(torch.int8)
        codes = torch.randint(-1, 2, (n, k), dtype=torch.int8, generator=generator)
        packed = kernels.pack(codes, scale=torch.rand(n, generator=generator) + 0.1)
        single = kernels.pack(codes, scale=0.3)
        if not torch.equal(
            kernels.ternary_matmul(q, packed, backend="triton"),
            kernels.ternary_matmul(q, packed, backend="reference"),
        ):
            wrong.append(f"sums {m} {n} {k}")
        x = torch.randn(m, k, generator=generator) * torch.logspace(-6, 4, max(m, 1))[:m, None]
        if m > 2:
            x[0, 0], x[1, -1] = torch.nan, torch.inf
        bias = torch.randn(n, generator=generator)
        for weight, addend in ((packed, bias), (single, None)):
            found = kernels.ternary_linear(x, weight, addend, backend="triton")
            expected = kernels.ternary_linear(x, weight, addend, backend="reference")
            if not torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0)):
                wrong.append(f"linear {m} {n} {k}")
            for dtype in (torch.bfloat16, torch.float16):
                narrow = x.clamp(-6e4, 6e4).to(dtype)
                found = kernels.ternary_linear(narrow, weight, addend, backend="triton")
                expected = kernels.ternary_linear(narrow, weight, addend, backend="reference")
                if found.dtype != dtype or not torch.equal(
                    found.nan_to_num(7.0), expected.nan_to_num(7.0)
                ):
                    wrong.append(f"linear {dtype} {m} {n} {k}")
        found_q, found_scale = kernels.quantize_activations(x, backend="triton")
        expected_q, expected_scale = quant.absmax_int8(x)
        if not torch.equal(found_q, expected_q):
            wrong.append(f"activation codes {m} {k}")
        if not torch.equal(found_scale.nan_to_num(7.0), expected_scale.nan_to_num(7.0)):
            wrong.append(f"activation scales {m} {k}")
    wrong += extremes() + weights()
    return wrong


def extremes() -> list[str]:
    q = torch.full((2, 2176), 127, dtype=torch.int8)
    packed = kernels.pack(torch.ones(3, 2176, dtype=torch.int8), scale=1.0)
    found = kernels.ternary_matmul(q, packed, backend="triton")
    return [] if found.eq(127 * 2176).all() else ["the largest sums"]


def weights() -> list[str]:
    from forge_kernels.triton import ops

    wrong = []
    for n, k in ((1, 1), (70, 130), (33, 1000)):
        w = torch.randn(n, k, generator=torch.Generator().manual_seed(n))
        codes, scale = ops.quantize_weight(w)
        expected, reference = quant.absmean_ternary(w)
        ratio = (w / reference).abs()
        near = ((ratio - 0.5).abs() < 1e-5) | ((ratio - 1.5).abs() < 1e-5)
        if abs(float(scale / reference) - 1) > 1e-6 or bool(((codes != expected) & ~near).any()):
            wrong.append(f"weight codes {n} {k}")
    return wrong


def compile_ahead() -> dict[str, list[str]]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {
        "planes_ptr": "*i8", "sums_ptr": "*i32", "scales_ptr": "*fp32", "data_ptr": "*u8",
        "weight_scale_ptr": "*fp32", "bias_ptr": "*fp32", "y_ptr": "*bf16",
        "tokens": "i32", "rows": "i32", "blocks": "i32", "tokens_key": "i32",
    }  # fmt: skip
    constants: dict[str, object] = {
        "SCALE_PER_ROW": False, "HAS_BIAS": False, "ACCUMULATORS": False,
        "BM": 128, "BN": 128, "BK": 64, "SPLIT": 1, "GROUP": 8,
    }  # fmt: skip
    found = {}
    for target in (
        GPUTarget("cuda", 80, 32),
        GPUTarget("cuda", 90, 32),
        GPUTarget("hip", "gfx942", 64),
    ):
        constants["PACKED"] = target.backend == "cuda"
        whole = signature | dict.fromkeys(constants, "constexpr")
        source = ASTSource(triton_kernels.matmul_kernel, whole, constants)
        options = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": False}
        assembly = triton.compile(source, target=target, options=options).asm
        text = assembly.get("ptx") or assembly["amdgcn"]
        pattern = r"wgmma\.mma_async\S*|mma\.sync\S*|v_mfma_i32\S*"
        found[str(target.arch)] = sorted(set(re.findall(pattern, text)))
    return found


print(json.dumps(interpret() if WORK == "interpret" else compile_ahead()))

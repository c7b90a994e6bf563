"""The Triton kernels of W1.58A8; `ops` launches them.

Activations are kept as four planes (M, 4, 4B): plane f holds column 16b + 4f + j at position
4b + j, where the packed weights hold it in bits 2f and 2f + 1 of byte 4b + j of their row. So a
tile of weight bytes is loaded once and multiplied four times, field by field, each time with a
contiguous run of one plane. Fields are 0, 1, 2 and not -1, 0, 1: the token's sum is subtracted at
the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Adding and subtracting 1.5 * 2**23 rounds an fp32 of magnitude below 2**22 to an integer, half to
# even; Triton's own rounding functions are not there for every target and the interpreter.
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def quantize_kernel(
    x_ptr, planes_ptr, sums_ptr, scales_ptr, columns, blocks, x_stride,
    BLOCK: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """One token: absmax, codes (in planes, or in order), their sum, scale."""
    token = tl.program_id(0).to(tl.int64)
    row = x_ptr + token * x_stride
    most = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, columns, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        value = tl.load(row + offset, mask=offset < columns, other=0.0).to(tl.float32)
        # Magnitudes order as integers, NaN above infinity.
        most = tl.maximum(most, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    bits = tl.max(most, axis=0)
    absmax = bits.to(tl.float32, bitcast=True)
    floor = tl.where(absmax < 1e-5, 1e-5, absmax)
    finite = bits < 0x7F800000
    inverse = tl.div_rn(1.0, floor) * 127.0
    tl.store(scales_ptr + token, tl.div_rn(floor, 127.0))
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    width = blocks * 16
    for start in range(0, width, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        value = tl.load(row + offset, mask=offset < columns, other=0.0).to(tl.float32)
        rounded = (tl.where(finite, value * inverse, 0.0) + _ROUND) - _ROUND
        code = tl.minimum(tl.maximum(rounded, -128.0), 127.0).to(tl.int32)
        total += code
        if PLANES:
            position = (offset // 4 % 4) * (4 * blocks) + offset // 16 * 4 + offset % 4
            inside = offset < width
        else:
            position = offset
            inside = offset < columns
        tl.store(planes_ptr + token * width + position, code.to(tl.int8), mask=inside)
    tl.store(sums_ptr + token, tl.sum(total, axis=0))


@triton.jit
def arrange_kernel(q_ptr, planes_ptr, sums_ptr, columns, blocks, q_stride, BLOCK: tl.constexpr):
    """One token of codes ready made: into planes, and their sum."""
    token = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    width = blocks * 16
    for start in range(0, width, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        code = tl.load(q_ptr + token * q_stride + offset, mask=offset < columns, other=0)
        total += code.to(tl.int32)
        position = (offset // 4 % 4) * (4 * blocks) + offset // 16 * 4 + offset % 4
        tl.store(planes_ptr + token * width + position, code, mask=offset < width)
    tl.store(sums_ptr + token, tl.sum(total, axis=0))


@triton.jit
def matmul_kernel(
    planes_ptr, sums_ptr, scales_ptr, data_ptr, weight_scale_ptr, bias_ptr, y_ptr,
    tokens, rows, blocks, tokens_key,
    SCALE_PER_ROW: tl.constexpr, HAS_BIAS: tl.constexpr, ACCUMULATORS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """A tile (BM tokens, BN rows); BK bytes of a weight row, 4 * BK columns, at a time."""
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(tokens, BM), tl.cdiv(rows, BN)
    # Tiles that share weights run together, so that they are found in the cache.
    in_group = GROUP * tiles_n
    first_m = program // in_group * GROUP
    size_m = tl.minimum(tiles_m - first_m, GROUP)
    tile_m = first_m + program % in_group % size_m
    tile_n = program % in_group // size_m

    m = (tile_m * BM + tl.arange(0, BM)).to(tl.int64)
    n = (tile_n * BN + tl.arange(0, BN)).to(tl.int64)
    k = tl.arange(0, BK)
    width = 4 * blocks  # bytes of a weight row; columns of a plane
    plane = planes_ptr + m[:, None] * (16 * blocks) + k[None, :]
    byte = (
        data_ptr
        + (n // 64 * (blocks * 256) + n % 64 * 4)[None, :]
        + (k // 4 * 256 + k % 4)[:, None]
    )
    known_m, known_n = m < tokens, n < (rows + 63) // 64 * 64
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    steps = tl.cdiv(tl.cdiv(width, BK), SPLIT)
    start = tl.program_id(1) * steps
    for step in range(start, start + steps):
        left = width - step * BK
        inside = k < left
        words = tl.load(byte + step * (BK * 64), mask=inside[:, None] & known_n[None, :], other=0)
        a_mask = known_m[:, None] & inside[None, :]
        at = plane + step * BK
        if PACKED:
            # Four bytes a register: a shift and a mask for four weights.
            f0 = tl.inline_asm_elementwise(
                "and.b32 $0, $1, 0x03030303;",
                "=r,r", [words], dtype=tl.int8, is_pure=True, pack=4,
            )  # fmt: skip
            f1 = tl.inline_asm_elementwise(
                "{ .reg .b32 t; shr.b32 t, $1, 2; and.b32 $0, t, 0x03030303; }",
                "=r,r", [words], dtype=tl.int8, is_pure=True, pack=4,
            )  # fmt: skip
            f2 = tl.inline_asm_elementwise(
                "{ .reg .b32 t; shr.b32 t, $1, 4; and.b32 $0, t, 0x03030303; }",
                "=r,r", [words], dtype=tl.int8, is_pure=True, pack=4,
            )  # fmt: skip
            f3 = tl.inline_asm_elementwise(
                "{ .reg .b32 t; shr.b32 t, $1, 6; and.b32 $0, t, 0x03030303; }",
                "=r,r", [words], dtype=tl.int8, is_pure=True, pack=4,
            )  # fmt: skip
        else:
            f0 = (words & 3).to(tl.int8)
            f1 = ((words >> 2) & 3).to(tl.int8)
            f2 = ((words >> 4) & 3).to(tl.int8)
            f3 = ((words >> 6) & 3).to(tl.int8)
        acc = tl.dot(tl.load(at, mask=a_mask, other=0), f0, acc, out_dtype=tl.int32)
        acc = tl.dot(tl.load(at + width, mask=a_mask, other=0), f1, acc, out_dtype=tl.int32)
        acc = tl.dot(tl.load(at + 2 * width, mask=a_mask, other=0), f2, acc, out_dtype=tl.int32)
        acc = tl.dot(tl.load(at + 3 * width, mask=a_mask, other=0), f3, acc, out_dtype=tl.int32)

    target = m[:, None] * rows + n[None, :]
    mask = known_m[:, None] & (n < rows)[None, :]
    if SPLIT > 1:
        tl.atomic_add(y_ptr + target, acc, mask=mask)
        return
    acc -= tl.load(sums_ptr + m, mask=known_m, other=0)[:, None]
    if ACCUMULATORS:
        tl.store(y_ptr + target, acc, mask=mask)
        return
    scale = tl.load(scales_ptr + m, mask=known_m, other=0.0)[:, None]
    if SCALE_PER_ROW:
        factor = scale * tl.load(weight_scale_ptr + n, mask=n < rows, other=0.0)[None, :]
    else:
        factor = scale * tl.load(weight_scale_ptr)
    value = acc.to(tl.float32) * factor
    if HAS_BIAS:
        value = value + tl.load(bias_ptr + n, mask=n < rows, other=0.0)[None, :]
    tl.store(y_ptr + target, value.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rescale_kernel(
    acc_ptr, sums_ptr, scales_ptr, weight_scale_ptr, bias_ptr, y_ptr, rows,
    SCALE_PER_ROW: tl.constexpr, HAS_BIAS: tl.constexpr, ACCUMULATORS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Finishes one token of a product whose columns were split."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = n < rows
    acc = tl.load(acc_ptr + token * rows + n, mask=mask, other=0) - tl.load(sums_ptr + token)
    if ACCUMULATORS:
        tl.store(y_ptr + token * rows + n, acc, mask=mask)
        return
    scale = tl.load(scales_ptr + token)
    if SCALE_PER_ROW:
        factor = scale * tl.load(weight_scale_ptr + n, mask=mask, other=0.0)
    else:
        factor = scale * tl.load(weight_scale_ptr)
    value = acc.to(tl.float32) * factor
    if HAS_BIAS:
        value = value + tl.load(bias_ptr + n, mask=mask, other=0.0)
    tl.store(y_ptr + token * rows + n, value.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def magnitude_kernel(w_ptr, partial_ptr, size, BLOCK: tl.constexpr):
    """Sum of |w| over a run of BLOCK * 16 weights: one stage of a sum that never changes order."""
    start = tl.program_id(0).to(tl.int64) * (BLOCK * 16)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(16):
        offset = start + i * BLOCK + tl.arange(0, BLOCK)
        total += tl.abs(tl.load(w_ptr + offset, mask=offset < size, other=0.0).to(tl.float32))
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def codes_kernel(w_ptr, scale_ptr, codes_ptr, size, BLOCK: tl.constexpr):
    """Codes of a run of weights: round half to even of w / scale, clamped to -1, 0, 1."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(w_ptr + offset, mask=offset < size, other=0.0).to(tl.float32)
    ratio = tl.div_rn(w, tl.load(scale_ptr))
    # Beyond 2 the rounding trick is not needed, and beyond 2**22 it would be wrong.
    near = tl.minimum(tl.maximum(ratio, -2.0), 2.0)
    code = tl.minimum(tl.maximum((near + _ROUND) - _ROUND, -1.0), 1.0)
    code = tl.where(ratio == ratio, code, 0.0)
    tl.store(codes_ptr + offset, code.to(tl.int8), mask=offset < size)

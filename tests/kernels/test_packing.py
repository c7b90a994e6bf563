"""Packing: every backend against an oracle written with plain Python integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_harness import kernels, quant
from forge_harness.errors import NonTernaryCodeError

BACKENDS = ("reference", "native")
KNOWN_COLUMN = [1, 0, -1, 0, 0, 1, -1, -1]
KNOWN_BYTES = [0x12, 0x25]


def oracle_pack(codes: np.ndarray) -> np.ndarray:
    """Field i of byte (r, c) is code (i R + r, c) plus 1; past the end it is 1."""
    rows, columns = codes.shape
    blocks = -(-rows // 4)
    packed = np.zeros((blocks, columns), dtype=np.uint8)
    for r in range(blocks):
        for c in range(columns):
            for i in range(4):
                row = i * blocks + r
                field = int(codes[row, c]) + 1 if row < rows else 1
                packed[r, c] += field * 4**i
    return packed


def random_codes(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (rows, columns), dtype=torch.int8, generator=generator)


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_bytes(backend):
    codes = torch.tensor(KNOWN_COLUMN, dtype=torch.int8)[:, None]
    packed = kernels.pack_i2(codes, backend=backend)
    assert packed.flatten().tolist() == KNOWN_BYTES
    assert torch.equal(kernels.unpack_i2(packed, 8, backend=backend), codes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", range(1, 131))
def test_round_trip_of_every_row_count(backend, rows):
    codes = random_codes(rows, 1 + rows % 7, rows)
    packed = kernels.pack_i2(codes, backend=backend)
    assert np.array_equal(packed.numpy(), oracle_pack(codes.numpy()))
    assert torch.equal(kernels.unpack_i2(packed, rows, backend=backend), codes)


@settings(max_examples=40)
@given(st.integers(0, 130), st.integers(0, 130), st.integers(0, 2**31))
def test_backends_agree_on_every_shape(rows, columns, seed):
    codes = random_codes(rows, columns, seed)
    packed = [kernels.pack_i2(codes, backend=backend) for backend in BACKENDS]
    assert packed[0].shape == (-(-rows // 4), columns)
    assert torch.equal(*packed)
    for backend in BACKENDS:
        assert torch.equal(kernels.unpack_i2(packed[0], rows, backend=backend), codes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_code_zero_and_is_not_read(backend):
    packed = kernels.pack_i2(torch.ones(5, 1, dtype=torch.int8), backend=backend)
    # Two bytes of four fields: rows 0, 2, 4, - and 1, 3, -, -.
    assert packed.flatten().tolist() == [0b01_10_10_10, 0b01_01_10_10]
    for padding in (0b00, 0b11):  # transformers writes 0 there
        foreign = packed & 0b00_11_11_11 | padding << 6
        foreign[1] = foreign[1] & 0b11_00_11_11 | padding << 4
        assert kernels.unpack_i2(foreign, 5, backend=backend).eq(1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [-128, -2, 2, 127])
def test_a_bad_code_is_named_with_its_place(backend, value):
    codes = torch.zeros(9, 5, dtype=torch.int8)
    codes[7, 3] = codes[8, 0] = value
    with pytest.raises(NonTernaryCodeError, match=f"code {value} at row 7, column 3 .*absmean"):
        kernels.pack_i2(codes, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_field_is_named_with_its_place(backend):
    packed = kernels.pack_i2(torch.zeros(9, 5, dtype=torch.int8), backend=backend)
    packed[1, 2] |= 0b11 << 4
    with pytest.raises(NonTernaryCodeError, match=r"field 3 at row 7, column 2 .*i2-rowblock"):
        kernels.unpack_i2(packed, 9, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_may_be_strided_and_are_not_changed(backend):
    codes = random_codes(40, 24, 0)
    strided = codes.t().contiguous().t()[::2, ::3]
    before = strided.clone()
    packed = kernels.pack_i2(strided, backend=backend)
    assert torch.equal(packed, kernels.pack_i2(before, backend=backend))
    assert torch.equal(strided, before)
    view = packed.t().contiguous().t()
    assert torch.equal(kernels.unpack_i2(view, 20, backend=backend), before)


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match=r"float32.*int8"):
        kernels.pack_i2(torch.zeros(2, 2))
    with pytest.raises(TypeError, match=r"int8.*uint8"):
        kernels.unpack_i2(torch.zeros(2, 2, dtype=torch.int8), 8)
    with pytest.raises(ValueError, match=r"\(4,\).*2-D"):
        kernels.pack_i2(torch.zeros(4, dtype=torch.int8))
    for rows in (4, 9, -1):
        with pytest.raises(ValueError, match=rf"{rows} rows.*expected 5 to 8"):
            kernels.unpack_i2(torch.zeros(2, 3, dtype=torch.uint8), rows)


def test_the_quant_package_packs_the_same():
    codes = random_codes(10, 3, 1)
    packed = quant.pack_i2(codes)
    assert np.array_equal(packed.numpy(), oracle_pack(codes.numpy()))
    assert torch.equal(quant.unpack_i2(packed, 10), codes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_whose_sign_waits_in_a_view_are_packed_as_they_read(backend):
    codes = random_codes(9, 20, seed=3)
    view = torch._neg_view(codes)
    assert torch.equal(kernels.pack_i2(view, backend=backend), kernels.pack_i2(-codes))
    packed = kernels.pack(view, scale=1.0, backend=backend)
    assert torch.equal(kernels.unpack(packed), -codes)

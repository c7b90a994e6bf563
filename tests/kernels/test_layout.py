"""The layout in memory: the reference packing, the native one, and a decoder from its text."""

from __future__ import annotations

import pytest
import torch
from forge_kernels import layout
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_harness import kernels
from forge_harness.errors import NonTernaryCodeError

BACKENDS = ("native", "reference")


def draw(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (rows, columns), dtype=torch.int8, generator=generator)


def decoded(data, row, column):
    """One code, as the text of `forge_kernels/layout.py` says, on the raw bytes."""
    group, r = divmod(row, 64)
    block, k = divmod(column, 16)
    f, j = divmod(k, 4)
    blocks = data.shape[1]
    byte = data.reshape(-1)[(group * blocks + block) * 256 + 4 * r + j]
    return (int(byte) >> (2 * f) & 3) - 1


@settings(max_examples=60)
@given(rows=st.integers(1, 130), columns=st.integers(1, 130), seed=st.integers(0, 999))
def test_every_code_is_where_the_text_says(rows, columns, seed):
    codes = draw(rows, columns, seed)
    packed = [kernels.pack(codes, scale=1.0, backend=b) for b in BACKENDS]
    assert torch.equal(packed[0].data, packed[1].data)
    data = packed[0].data
    for row, column in {(0, 0), (rows - 1, columns - 1), (rows // 2, columns // 3)}:
        assert decoded(data, row, column) == codes[row, column]
    for backend in BACKENDS:
        assert torch.equal(kernels.unpack(packed[0], backend=backend), codes)
    stored = kernels.pack_i2(codes)
    for backend in BACKENDS:
        again = kernels.pack_stored(stored, rows, scale=1.0, backend=backend)
        assert torch.equal(again.data, data)


def test_padding_holds_code_0():
    data = kernels.pack(torch.ones(65, 17, dtype=torch.int8), scale=1.0).data
    whole = layout.unpack_blocks(data, 128, 32)
    assert whole[:65, :17].eq(1).all()
    assert whole[65:].eq(0).all()
    assert whole[:, 17:].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [2, -2, 127, -128, 3])
def test_what_is_no_code_is_named(backend, value):
    codes = draw(70, 40)
    codes[69, 39] = value
    with pytest.raises(NonTernaryCodeError, match=f"code {value} at row 69, column 39"):
        kernels.pack(codes, scale=1.0, backend=backend)
    codes[3, 20] = value
    with pytest.raises(NonTernaryCodeError, match=f"code {value} at row 3, column 20"):
        kernels.pack(codes, scale=1.0, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stored_field_that_is_no_code_is_named(backend):
    stored = kernels.pack_i2(draw(70, 40))
    stored[1, 20] |= 3 << 4  # field 2: row 2 * 18 + 1
    with pytest.raises(NonTernaryCodeError, match="field 3 at row 37, column 20"):
        kernels.pack_stored(stored, 70, scale=1.0, backend=backend)


def test_a_transposed_operand_is_packed_by_its_values():
    codes = draw(33, 65)
    assert torch.equal(
        kernels.pack(codes.t().contiguous().t(), scale=1.0).data,
        kernels.pack(codes, scale=1.0).data,
    )

"""TQ blocks: the native way against numpy's, every byte, over odd shapes and damaged input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_harness.errors import BackendUnavailableError
from forge_harness.kernels import native_problem
from forge_harness.kernels.tq import BLOCK, TQ1, TQ2, decode_tq, encode_tq

native = pytest.mark.skipif(bool(native_problem()), reason=f"no extension: {native_problem()}")
LAYOUTS = pytest.mark.parametrize("layout", [TQ1, TQ2], ids=["tq1_0", "tq2_0"])


def packed_of(rng, rows, columns, sparse=False):
    """Row-block codes; sparse ones have whole blocks of zeros."""
    codes = rng.integers(0, 3, (4, rows, columns), dtype=np.uint8)
    if sparse:
        codes[rng.random((4, rows, columns)) < 0.999] = 1
    return sum(codes[i] << (2 * i) for i in range(4)).astype(np.uint8)


@native
@LAYOUTS
@settings(max_examples=60)
@given(
    rows=st.integers(1, 130),
    columns=st.integers(1, 800),
    sparse=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_native_blocks_are_those_of_the_reference(layout, rows, columns, sparse, seed):
    packed = packed_of(np.random.default_rng(seed), rows, columns, sparse)
    expected, sound = encode_tq(layout, packed, 0x3C01, backend="reference")
    found, also = encode_tq(layout, packed, 0x3C01, backend="native")
    assert (sound, also) == (True, True)
    assert np.array_equal(found, expected)


@native
@LAYOUTS
@settings(max_examples=40)
@given(rows=st.integers(1, 70), blocks=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_both_ways_back_give_the_codes(layout, rows, blocks, seed):
    packed = packed_of(np.random.default_rng(seed), rows, blocks * BLOCK)
    encoded, _ = encode_tq(layout, packed, 1, backend="native")
    for backend in ("native", "reference"):
        back = np.full_like(packed, 0xA5)
        assert decode_tq(layout, encoded, back, backend=backend)
        assert np.array_equal(back, packed)


@LAYOUTS
@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=native)])
def test_a_field_of_3_is_seen_wherever_it_is(layout, backend):
    rng = np.random.default_rng(1)
    for _ in range(200):
        packed = packed_of(rng, 5, 300)
        assert encode_tq(layout, packed, 1, backend=backend)[1]
        packed[rng.integers(5), rng.integers(300)] |= 3 << (2 * rng.integers(4))
        assert not encode_tq(layout, packed, 1, backend=backend)[1]


@LAYOUTS
@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=native)])
def test_every_byte_that_stands_for_no_code_is_seen(layout, backend):
    packed = packed_of(np.random.default_rng(2), 1, BLOCK)
    whole, _ = encode_tq(layout, packed, 1, backend="reference")
    seen = {False: 0, True: 0}
    for position in range(layout.nbytes - 2):
        for byte in range(256):
            blocks = whole.copy()
            blocks[2, 0, 0, position] = byte
            back = np.empty_like(packed)
            sound = decode_tq(layout, blocks, back, backend=backend)
            seen[sound] += 1
            if sound:
                again, _ = encode_tq(layout, back, 1, backend="reference")
                assert np.array_equal(again[..., :-2], blocks[..., :-2])
    # Bytes that stand for codes: 81 of TQ2_0, 243 of TQ1_0 and 81 where it holds four.
    legal = 64 * 81 if layout is TQ2 else 48 * 243 + 4 * 81
    assert seen[True] == legal


@native
def test_buffers_that_do_not_fit_are_refused_before_memory_is_touched():
    packed = np.full((3, 300), 0x55, np.uint8)
    with pytest.raises(ValueError, match="TQ blocks do not fit packed codes of 3 x 256"):
        decode_tq(TQ2, np.zeros((4, 2, 1, 66), np.uint8), packed[:, :256].copy(), backend="native")
    with pytest.raises(ValueError, match="300 columns are no whole TQ blocks"):
        decode_tq(TQ2, np.zeros((4, 3, 2, 66), np.uint8), packed, backend="native")
    with pytest.raises(TypeError):
        encode_tq(TQ2, packed.astype(np.int16), 1, backend="native")


def test_an_explicit_backend_that_has_no_such_op_is_an_error():
    with pytest.raises(BackendUnavailableError):
        encode_tq(TQ2, np.zeros((1, 256), np.uint8), 1, backend="triton")

"""Packing of ternary codes: lossless, two bits a weight, the byte order of the ecosystem."""

import numpy as np
import pytest
import torch

from forge_harness import oracles

from .support import Count, expect_none, layouts

_ROWS = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 96, 127, 128, 129, 130)
_COLUMNS = (1, 2, 3, 15, 16, 17, 64, 65, 130)


@pytest.mark.forge_check("architecture.bits_per_weight")
def test_bits_per_weight(subject, evidence):
    """Packing loses nothing, takes ceil(N / 4) K bytes, and its bytes are those others read.

    Oracle: a packer written from the definition of the Hugging Face row-block order, and bytes
    checked against `transformers.pack_weights`; a packer and unpacker that agree on another order
    pass every round trip. Exact. Inputs: 180 shapes up to 130 x 130, strided, only one code.
    """
    lossy, sizes, order, touched = Count(), Count(), Count(), Count()
    for case, codes in _codes():
        rows, columns = codes.shape
        before = codes.clone()
        packed = subject.pack(codes)
        touched.see(case, not torch.equal(codes, before))
        sized = packed.dtype == torch.uint8 and packed.shape == (-(-rows // 4), columns)
        sizes.see(case, not sized)
        lossy.see(case, not torch.equal(subject.unpack(packed, rows), before))
        if rows % 4 == 0 and sized:
            expected = oracles.pack_row_blocks(before)
            order.see(case, int(np.count_nonzero(packed.numpy() != expected)))
    expect_none(evidence, "wrong_sizes", sizes, "shapes", "uint8 (ceil(N / 4), K)")
    expect_none(evidence, "lossy_round_trips", lossy, "shapes", "unpack(pack(codes)) == codes")
    expect_none(
        evidence, "inputs_changed", touched, "shapes", "packing must not write to its input"
    )
    expect_none(evidence, "wrong_bytes", order, "bytes", "row blocks, lowest bits first, code + 1")
    known = subject.pack(torch.tensor(oracles.KNOWN_CODES, dtype=torch.int8))
    evidence.equal(
        "known_bytes",
        known.flatten().numpy().tobytes().hex(),
        expected=bytes(byte for (byte,) in oracles.KNOWN_BYTES).hex(),
        unit="hex",
        reason="eight codes whose bytes were checked against transformers.pack_weights",
    )
    large = subject.pack(torch.zeros(1024, 256, dtype=torch.int8))
    evidence.equal(
        "bits_per_weight",
        8 * large.numel() * large.element_size() / (1024 * 256),
        expected=2.0,
        unit="bit",
        reason="four codes a byte, nothing else",
    )


def _codes():
    generator = torch.Generator().manual_seed(41)
    for rows in _ROWS:
        for columns in _COLUMNS:
            codes = torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8)
            yield f"{rows}x{columns}", codes
    for code in (-1, 0, 1):
        yield f"all {code}", torch.full((8, 9), code, dtype=torch.int8)
    for layout, values in layouts(torch.randint(-1, 2, (64, 33), generator=generator).float()):
        if layout != "window":
            yield layout, values.to(torch.int8, memory_format=torch.preserve_format)
    buffer = torch.full((70, 40), 77, dtype=torch.int8)
    window = buffer[3:67, 4:37]
    window.copy_(torch.randint(-1, 2, (64, 33), generator=generator))
    yield "window", window

"""Packed ternary codes in another order, with codes lost, or with the input written to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from forge_harness.drill import observe
from forge_harness.drill.defect import Defect, Stage
from forge_harness.subject.reference import ReferenceSubject

from .quantizer import by_storage_order

BLOCK = 4
"""Codes a byte."""


class PackDefect(ReferenceSubject):
    """Packing with codes changed before, bytes changed after, and bytes changed before reading."""

    def __init__(
        self,
        before: Callable[[Tensor], Tensor] = lambda codes: codes,
        after: Callable[[Tensor], Tensor] = lambda packed: packed,
        undo: Callable[[Tensor], Tensor] = lambda packed: packed,
    ) -> None:
        self.before, self.after, self.undo = before, after, undo

    def pack(self, codes: Tensor) -> Tensor:
        """Bytes of the codes."""
        return self.after(super().pack(self.before(codes)))

    def unpack(self, packed: Tensor, rows: int) -> Tensor:
        """Codes of the bytes."""
        return super().unpack(self.undo(packed), rows)


class LosesTheTail(ReferenceSubject):
    """Rows behind the last whole block of four are not packed, and read as zero."""

    def pack(self, codes: Tensor) -> Tensor:
        """Bytes of the right shape, with ones (code 0) for the rows left out."""
        whole = codes.clone()
        whole[len(codes) // BLOCK * BLOCK :] = 0
        return super().pack(whole)


class FloorsTheShape(ReferenceSubject):
    """The packed shape is rounded down, and the reader makes do with what is there."""

    def pack(self, codes: Tensor) -> Tensor:
        """Bytes of whole blocks of rows."""
        return super().pack(codes)[: max(len(codes) // BLOCK, 1)]

    def unpack(self, packed: Tensor, rows: int) -> Tensor:
        """Codes, with zeros for the rows that are not there."""
        there = min(rows, BLOCK * len(packed))
        codes = torch.zeros(rows, packed.shape[1], dtype=torch.int8)
        codes[:there] = super().unpack(packed, there)
        return codes


class ZeroPointWraps(ReferenceSubject):
    """The zero point is taken off once more in the unsigned field: -1 becomes 3."""

    def pack(self, codes: Tensor) -> Tensor:
        """Bytes whose two-bit fields are the codes modulo 4 instead of the codes plus one."""
        packed = super().pack(codes)
        fields = [(((packed >> shift) & 3) - 1 & 3) << shift for shift in (0, 2, 4, 6)]
        return torch.stack(fields).sum(0).to(torch.uint8)

    def unpack(self, packed: Tensor, rows: int) -> Tensor:
        """Codes by the same zero point, without a mask: 3 stays 3."""
        fields = torch.cat([(packed >> shift) & 3 for shift in (0, 2, 4, 6)])
        return fields[:rows].to(torch.int8)


class ReadsSquaresTransposed(ReferenceSubject):
    """The reader unpacks along columns, which fits the shape of square layers."""

    def unpack(self, packed: Tensor, rows: int) -> Tensor:
        """Codes, transposed where rows and columns are as many."""
        codes = super().unpack(packed, rows)
        return codes.t().contiguous() if rows == packed.shape[1] else codes


class AddsOneInPlace(ReferenceSubject):
    """The packer adds one to its input where it should to a copy."""

    def pack(self, codes: Tensor) -> Tensor:
        """The right bytes; the caller's codes are one larger afterwards."""
        packed = super().pack(codes)
        codes.add_(1)
        return packed


def swap_fields(packed: Tensor) -> Tensor:
    """Highest bits first instead of lowest, or back."""
    fields = [((packed >> shift) & 3) << (6 - shift) for shift in (0, 2, 4, 6)]
    return torch.stack(fields).sum(0).to(torch.uint8)


def packed_transposed(subject: Any) -> object:
    """Packed bytes of codes that lie in memory column by column."""
    codes = torch.randint(-1, 2, (64, 32), generator=torch.Generator().manual_seed(6))
    return subject.pack(codes.to(torch.int8).t().contiguous().t())


_PACKED = partial(
    Defect,
    stage=Stage.PACKING,
    check="architecture.bits_per_weight",
    shows="lossy_round_trips is",
    alive=observe.packed,
)

DEFECTS = (
    _PACKED(
        id="P01_reader_order",
        title="The reader takes the highest bits of a byte first, the writer the lowest",
        subject=lambda: PackDefect(undo=swap_fields),
        source="microsoft/BitNet#600",
        subtlety=2,
    ),
    _PACKED(
        id="P05_tail_lost",
        title="Rows behind the last whole block of four are not packed",
        subject=LosesTheTail,
        source="microsoft/BitNet quantize_to_i2_s",
    ),
    _PACKED(
        id="P07_shape_rounded_down",
        title="The packed shape is N // 4 rows instead of the next whole number",
        shows="wrong_sizes is",
        subject=FloorsTheShape,
        source="huggingface/transformers integrations/bitnet.py",
        subtlety=2,
    ),
    _PACKED(
        id="P08_zero_point_wraps",
        title="Zero point minus one in an unsigned field: -1 wraps to 3 and comes back as 3",
        subject=ZeroPointWraps,
        source="AutoGPTQ/AutoGPTQ#331",
        subtlety=4,
    ),
    _PACKED(
        id="P09_square_transposed",
        title="The reader unpacks along columns what is packed along rows",
        subject=ReadsSquaresTransposed,
        source="intel/intel-extension-for-transformers#1407",
        subtlety=2,
    ),
    _PACKED(
        id="P10_storage_order",
        title="The packer takes a transposed matrix for a contiguous one",
        subject=lambda: PackDefect(before=lambda codes: by_storage_order(codes).clamp(-1, 1)),
        alive=packed_transposed,
        source="microsoft/T-MAC#63",
    ),
    _PACKED(
        id="P11_symmetric_order",
        title="Writer and reader agree on an order of bits that nobody else has",
        shows="wrong_bytes is",
        subject=lambda: PackDefect(after=swap_fields, undo=swap_fields),
        source="amd/Quark#30",
    ),
    _PACKED(
        id="Q20_packs_in_place",
        title="The packer adds one to its caller's codes",
        shows="inputs_changed is",
        subject=AddsOneInPlace,
        source="huggingface/transformers integrations/bitnet.py",
        subtlety=4,
    ),
    _PACKED(
        id="one_byte_a_code",
        title="Packed bytes are kept in 16 bits each",
        shows="wrong_sizes is",
        subject=lambda: PackDefect(
            after=lambda packed: packed.to(torch.int16), undo=lambda packed: packed.to(torch.uint8)
        ),
        subtlety=2,
    ),
)

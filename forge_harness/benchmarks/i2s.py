"""bitnet.cpp's I2_S product as a peer, from a build of its kernel given by path.

Of the library one function is used, `ggml_vec_dot_i2_i8_s` of bitnet.cpp's `ggml-bitnet-mad.cpp`:
sums of (code + 1) * q of one weight row with a number of tokens, in the layout that file calls
ACT_PARALLEL (x86-act in `formats/i2s.py`). Only these sums are timed: quantizing the activations
and rescaling the result, which our product also does, is not part of it. What it returns is held
against exact integers before anything is timed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from forge_harness.errors import UsageError
from forge_harness.kernels.backends import native

BLOCK = 128
"""Columns of a block: value j in byte j mod 32, bits 6 - 2 * (j div 32)."""
_SYMBOLS = (
    "ggml_vec_dot_i2_i8_s",
    "_Z20ggml_vec_dot_i2_i8_siPfmPKvmS1_mi",
)  # forge-scan: no secret
"""With C linkage, and as a C++ compiler names it."""


class I2sLibrary:
    """A loaded build of the kernel.

    Args:
        path: Shared library.

    Raises:
        UsageError: It cannot be loaded, or has no such function.
    """

    def __init__(self, path: Path) -> None:
        try:
            # A name without a directory would be looked for in those of the system.
            library = ctypes.CDLL(str(path.absolute()))
        except OSError as error:
            raise UsageError(
                f"{path} cannot be loaded ({error}); expected a shared library of bitnet.cpp's "
                "ggml-bitnet-mad.cpp (g++ -O3 -march=native -shared -fPIC)."
            ) from error
        found = (getattr(library, name, None) for name in _SYMBOLS)
        function = next((each for each in found if each is not None), None)
        if function is None:
            raise UsageError(f"{path} has no {_SYMBOLS[0]}; expected bitnet.cpp's kernel.")
        self.path = path
        self._library = library
        self._address = ctypes.cast(function, ctypes.c_void_p).value

    def product(self, codes: Tensor, q: Tensor) -> Callable[[], Tensor]:
        """Returns a call that computes the sums (N, M) fp32, overwritten next time.

        Args:
            codes: int8 (N, K) of -1, 0, +1.
            q: int8 (M, K).

        Raises:
            UsageError: K is no multiple of 128.
        """
        (rows, columns), tokens = codes.shape, len(q)
        if columns % BLOCK:
            raise UsageError(f"I2_S needs whole blocks of {BLOCK} columns, not {columns}.")
        packed, q = packed_i2s(codes), q.contiguous()
        sums = torch.empty(rows, tokens)
        addresses = (packed.data_ptr(), q.data_ptr(), sums.data_ptr())
        call_rows = native().call_vec_dot_rows

        def call() -> Tensor:
            call_rows(self._address, *addresses, rows, columns, tokens)
            return sums

        # The call uses their memory.
        call.kept = (packed, q)  # type: ignore[attr-defined]
        return call


def packed_i2s(codes: Tensor) -> Tensor:
    """Packs int8 codes (N, K), K of whole blocks, as uint8 (N, K / 4)."""
    fields = (codes + 1).to(torch.uint8).view(len(codes), -1, 4, 32)
    shifts = torch.tensor([6, 4, 2, 0], dtype=torch.uint8)[:, None]
    # Fields do not overlap, so their sum is their union.
    return (fields << shifts).sum(2, dtype=torch.uint8).view(len(codes), -1).contiguous()


def checked(call: Callable[[], Tensor], codes: Tensor, q: Tensor) -> None:
    """Holds a product against exact integers.

    Raises:
        UsageError: A sum is another one.
    """
    expected = ((codes.long() + 1) @ q.long().t()).float()
    wrong = int((call() != expected).sum())
    if wrong:
        raise UsageError(
            f"{wrong} of {expected.numel()} sums of the I2_S library are wrong; it computes "
            "something else, so it is not timed. Give a build with ACT_PARALLEL."
        )

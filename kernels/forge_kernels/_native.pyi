"""Native kernels of the harness."""

from typing import Annotated

import numpy
from numpy.typing import NDArray

def pack_i2(
    codes: Annotated[
        NDArray[numpy.int8], dict(shape=(None, None), order="C", device="cpu", writable=False)
    ],
    packed: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order="C", device="cpu")],
) -> None:
    """Packs int8 codes (N, K) into uint8 (ceil(N/4), K), in place in `packed`."""

def unpack_i2(
    packed: Annotated[
        NDArray[numpy.uint8], dict(shape=(None, None), order="C", device="cpu", writable=False)
    ],
    codes: Annotated[NDArray[numpy.int8], dict(shape=(None, None), order="C", device="cpu")],
) -> None:
    """Unpacks uint8 (ceil(N/4), K) into int8 codes (N, K), in place in `codes`."""

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

def encode_tq(
    base3: bool,
    packed: Annotated[
        NDArray[numpy.uint8], dict(shape=(None, None), order="C", device="cpu", writable=False)
    ],
    scale: int,
    blocks: Annotated[
        NDArray[numpy.uint8], dict(shape=(None, None, None, None), order="C", device="cpu")
    ],
    threads: int,
) -> bool:
    """Turns row blocks into TQ1_0 (base3) or TQ2_0; returns whether no field held 3."""

def decode_tq(
    base3: bool,
    blocks: Annotated[
        NDArray[numpy.uint8],
        dict(shape=(None, None, None, None), order="C", device="cpu", writable=False),
    ],
    packed: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order="C", device="cpu")],
    threads: int,
) -> bool:
    """The way back; returns whether every byte stood for codes."""

def allocate_blocks(
    rows: int, columns: int
) -> Annotated[NDArray[numpy.uint8], dict(shape=(None, None, None))]:
    """Returns uint8 (ceil(N/64), ceil(K/16), 256), not initialized, on huge pages if large."""

def pack_blocks(
    codes: Annotated[
        NDArray[numpy.int8], dict(shape=(None, None), order="C", device="cpu", writable=False)
    ],
    packed: Annotated[
        NDArray[numpy.uint8], dict(shape=(None, None, None), order="C", device="cpu")
    ],
    threads: int,
) -> None:
    """Packs int8 codes (N, K) into blocks, in place in `packed`."""

def pack_blocks_from_i2(
    stored: Annotated[
        NDArray[numpy.uint8], dict(shape=(None, None), order="C", device="cpu", writable=False)
    ],
    rows: int,
    packed: Annotated[
        NDArray[numpy.uint8], dict(shape=(None, None, None), order="C", device="cpu")
    ],
    threads: int,
) -> None:
    """Turns uint8 (ceil(N/4), K) into blocks."""

def unpack_blocks(
    packed: Annotated[
        NDArray[numpy.uint8],
        dict(shape=(None, None, None), order="C", device="cpu", writable=False),
    ],
    codes: Annotated[NDArray[numpy.int8], dict(shape=(None, None), order="C", device="cpu")],
    threads: int,
) -> None:
    """Unpacks blocks into int8 codes (N, K), in place in `codes`."""

def paths() -> list[str]:
    """Returns the instruction sets this processor runs, fastest first."""

def linear(
    path: str,
    x: int,
    x_dtype: int,
    tokens: int,
    columns: int,
    blocks: int,
    rows: int,
    scales: int,
    scale_per_row: bool,
    bias: int,
    y: int,
    y_dtype: int,
    threads: int,
) -> None:
    """Quantizes, multiplies, rescales. Takes addresses; dtypes are 0 (fp32) or 1 (bf16)."""

def multiply(
    path: str, q: int, tokens: int, columns: int, blocks: int, rows: int, acc: int, threads: int
) -> None:
    """int32 accumulators of int8 tokens. Takes addresses."""

def quantize(
    path: str, x: int, dtype: int, tokens: int, columns: int, codes: int, scales: int, threads: int
) -> None:
    """Absmax int8 of tokens. Takes addresses."""

def linear_of_codes(
    path: str,
    q: int,
    q_scales: int,
    tokens: int,
    columns: int,
    codes: int,
    rows: int,
    scales: int,
    scale_per_row: bool,
    bias: int,
    y: int,
    y_dtype: int,
    threads: int,
) -> bool:
    """Packs and multiplies int8 codes, rescales; False if not ternary. Takes addresses."""

def code_weights(path: str, values: int, count: int, scale: int, codes: int, threads: int) -> None:
    """int8 codes of fp32 weights over one scale. Takes addresses."""

def narrow_rows(
    path: str,
    values: int,
    rows: int,
    columns: int,
    by_row: int,
    turned: int,
    by_column: int,
    per_column: bool,
    columnwise: int,
    threads: int,
) -> None:
    """bf16 of fp32 values times factors, the rows' turned. Takes addresses; 0: left out."""

def probe_multiply(path: str, repeats: int, threads: int) -> int:
    """Runs the path's multiply-add on registers; returns how many a thread did, 0 for none."""

def call_vec_dot_rows(
    function: int, weights: int, q: int, sums: int, rows: int, columns: int, tokens: int
) -> None:
    """Calls a foreign vec_dot for every row of a weight. Takes addresses."""

def probe_read(data: int, nbytes: int, threads: int) -> int:
    """Reads memory once; returns a value that depends on all of it."""

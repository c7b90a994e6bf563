"""Ternary products against this machine's ceilings and against what torch offers.

Hot: one copy of the weights, in the cache where it fits. Cold: the calls rotate through copies of
192 MB and more, as decoding a real model does. The ceilings are measured in the same rounds: the
path's multiply-add on registers alone, and reading the packed bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor

from forge_harness import kernels
from forge_harness.kernels.backends import native

from . import ggml as ggml_peer
from . import i2s as i2s_peer
from .ggml import GgmlLibrary
from .i2s import I2sLibrary
from .inductor import frozen_call
from .timing import Call, Timed, disturbed_of, interleave, samples_of, speedup, void_of

SHAPES = ((2560, 2560), (2560, 6912), (6912, 2560), (4096, 14336))
"""(N, K) of layers of BitNet b1.58 2B4T and of an 8B model."""
TOKENS = (1, 16, 128)
COLD_BYTES = 192 * 2**20
MOST_COPIES = 4096
"""Of one weight. Copies of less than 48 KiB would have to be more, and to make them takes longer
than to time them."""
PEERS = ("torch fp32", "torch bf16", "torch _int_mm")
GGML = "ggml TQ2_0"
I2S = "I2_S"
INDUCTOR = "inductor bf16"
OPTIONAL = (GGML, I2S, INDUCTOR)
"""Peers that are timed when asked for."""
_PROBE_OPS = 20_000
MOST_SHARE = 1.1
"""A larger share of a ceiling is a ceiling that was not reached: something else slowed its rounds.

Above 1, as medians of a few rounds differ by some hundredths between series.
"""


@dataclass(frozen=True, slots=True)
class Case:
    """One product: sizes, whether the weights are in cache, threads."""

    tokens: int
    rows: int
    columns: int
    cold: bool
    threads: int

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.tokens * self.rows * self.columns

    @property
    def label(self) -> str:
        """For tables."""
        where = "cold" if self.cold else "hot"
        return f"M={self.tokens} {self.rows}x{self.columns} {where} {self.threads}T"


@dataclass(frozen=True, slots=True)
class Row:
    """What a case took.

    Attributes:
        case: Which.
        path: Instruction set of our product.
        microseconds: Candidate -> median of a call.
        over: Peer -> (estimate, low, high) of how many times faster our product is.
        roofline: Share of the nearer ceiling reached; None where it would be over `MOST_SHARE`.
        bound: Which ceiling that is, "multiply" or "read".
        packed_bytes: Bytes of the packed weight.
        probe_multiplications: Multiply-adds of a call of the multiply probe on one thread; 0 where
            the path has no probe.
        samples: Candidate -> seconds a call, one entry a round.
        disturbed: Candidate -> whether another process took the core, one entry a round.
        void: Candidates and ratios of which too few rounds were undisturbed; see `timing.void_of`.
    """

    case: Case
    path: str
    microseconds: dict[str, float]
    over: dict[str, tuple[float, float, float]]
    roofline: float | None
    bound: str
    packed_bytes: int
    probe_multiplications: int = 0
    samples: dict[str, list[float]] = field(repr=False, default_factory=dict)
    disturbed: dict[str, list[bool]] = field(repr=False, default_factory=dict)
    void: list[str] = field(default_factory=list)

    @property
    def gigaops(self) -> float:
        """Billions of operations a second of our product."""
        return self.case.operations / self.microseconds["ours"] / 1e3


def measure(
    case: Case,
    *,
    path: str | None = None,
    peers: bool = True,
    rounds: int = 15,
    ggml: GgmlLibrary | None = None,
    i2s: I2sLibrary | None = None,
    inductor: bool = False,
) -> Row:
    """Times our product, the ceilings and the peers, taking turns.

    Args:
        case: What to multiply.
        path: Instruction set; None: the one products use.
        peers: Whether torch's products are timed too.
        rounds: Batches of each candidate.
        ggml: A build of ggml whose TQ2_0 is timed too, where the columns are whole blocks of 256.
        i2s: A build of bitnet.cpp's kernel that is timed too, on one thread, where the columns are
            whole blocks of 128.
        inductor: Whether torch's compiler with frozen bf16 weights is timed too; compiling takes
            seconds a case.

    Raises:
        BackendUnavailableError: The native kernels or the path cannot run here.
        UsageError: A library does not compute what its format defines.
        ValueError: The case is cold and its weight too small for that; see `can_be_cold`.
    """
    if case.cold and not can_be_cold(case.rows, case.columns):
        raise ValueError(
            f"A weight of {case.rows}x{case.columns} cannot be timed cold; expected "
            f"{MOST_COPIES:,} copies of it to make {COLD_BYTES >> 20} MiB: time it hot."
        )
    chosen = kernels.cpu_path(path)
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        with torch.inference_mode(), ExitStack() as stack:
            ours, packed_bytes = _ours(case, chosen)
            probes = dict(_probes(case, chosen, packed_bytes))
            others = dict(_peers(case)) if peers else {}
            if ggml is not None and ggml_takes(case):
                others[GGML] = _ggml_call(case, ggml, stack)
            if i2s is not None and i2s_takes(case):
                others[I2S] = _i2s_call(case, i2s)
            if inductor:
                others[INDUCTOR] = _inductor_call(case)
            timed = interleave(
                {"ours": ours, **probes, **others}, rounds=rounds, rest=0.002 if ggml else 0.0
            )
    finally:
        torch.set_num_threads(before)
    return _row(case, chosen, timed, packed_bytes)


def packed_product_call(case: Case, path: str) -> Call:
    """Returns a call of our product for a case, which rotates through copies when cold."""
    return _ours(case, path)[0]


def _ours(case: Case, path: str) -> tuple[Call, int]:
    codes = _codes(case)
    packed = kernels.pack(codes, scale=0.02)
    x = torch.randn(case.tokens, case.columns)
    out = torch.empty(case.tokens, case.rows)
    copies = [packed]
    if case.cold:
        count = _copies(case, packed.nbytes)
        copies += [kernels.pack(codes, scale=0.02) for _ in range(count - 1)]
    weights = cycle(copies)

    def call() -> object:
        return kernels.ternary_linear(x, next(weights), backend="native", path=path, out=out)

    return call, packed.data.nbytes


def _codes(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (case.rows, case.columns)
    return torch.randint(-1, 2, shape, dtype=torch.int8, generator=generator)


def _probes(case: Case, path: str, packed_bytes: int) -> Iterator[tuple[str, Call]]:
    extension = native()
    if extension.probe_multiply(path, 1, 1):
        yield "multiply probe", lambda: extension.probe_multiply(path, _PROBE_OPS, case.threads)
    size = max(packed_bytes, COLD_BYTES) if case.cold else packed_bytes
    memory = torch.from_numpy(extension.allocate_blocks(64, -(-size // 256) * 16)).fill_(1)
    # Cold: the runs that are read follow each other through memory that no cache holds.
    starts = cycle(range(0, max(1, size - packed_bytes + 1), max(64, packed_bytes)))

    def read() -> object:
        address = memory.data_ptr() + next(starts)
        return extension.probe_read(address, packed_bytes, case.threads)

    yield "read probe", read


def _peers(case: Case) -> Iterator[tuple[str, Call]]:
    x = torch.randn(case.tokens, case.columns)
    for name, dtype in (("torch fp32", torch.float32), ("torch bf16", torch.bfloat16)):
        weights = _rotating(_codes(case).to(dtype), case)
        values = x.to(dtype)
        yield name, lambda values=values, weights=weights: F.linear(values, next(weights))  # type: ignore[misc]
    q = torch.randint(-127, 128, (case.tokens, case.columns), dtype=torch.int8)
    transposed = _rotating(_codes(case), case)
    yield "torch _int_mm", lambda: torch._int_mm(q, next(transposed).t())


def _ggml_call(case: Case, library: GgmlLibrary, stack: ExitStack) -> Call:
    weight, x = 0.02 * _codes(case).float(), torch.randn(case.tokens, case.columns)
    # 66 bytes a block of 256.
    size = case.rows * case.columns * 66 // 256
    products = []
    for _ in range(_copies(case, size)):
        products.append(library.product(weight, x, case.threads))
        stack.callback(products[-1].close)
    ggml_peer.checked(products[0], weight, x)
    turns = cycle(products)
    return lambda: next(turns)()


def _i2s_call(case: Case, library: I2sLibrary) -> Call:
    codes = _codes(case)
    q = torch.randint(-127, 128, (case.tokens, case.columns), dtype=torch.int8)
    products = [library.product(codes, q) for _ in range(_copies(case, codes.numel() // 4))]
    i2s_peer.checked(products[0], codes, q)
    turns = cycle(products)
    return lambda: next(turns)()


def _inductor_call(case: Case) -> Call:
    """A linear layer compiled with its weights as constants: packed for oneDNN once."""
    x = torch.randn(case.tokens, case.columns, dtype=torch.bfloat16)
    weight = _codes(case).to(torch.bfloat16)
    compiled = []
    for _ in range(_copies(case, weight.nbytes)):
        layer = torch.nn.Linear(case.columns, case.rows, bias=False, dtype=torch.bfloat16)
        layer.weight.data = weight.clone()
        compiled.append(frozen_call(layer.eval(), x))
    turns = cycle(compiled)
    return lambda: next(turns)()


def _rotating(weight: Tensor, case: Case) -> Iterator[Tensor]:
    count = _copies(case, weight.nbytes)
    return cycle([weight, *(weight.clone() for _ in range(count - 1))])


def _copies(case: Case, nbytes: int) -> int:
    return -(-COLD_BYTES // nbytes) if case.cold else 1


def ggml_takes(case: Case) -> bool:
    """Returns whether ggml has the product: it takes whole blocks of columns."""
    return case.columns % ggml_peer.BLOCK == 0


def i2s_takes(case: Case) -> bool:
    """Returns whether bitnet.cpp's kernel has the product: one thread, whole blocks of columns."""
    return case.columns % i2s_peer.BLOCK == 0 and case.threads == 1


def can_be_cold(rows: int, columns: int) -> bool:
    """Returns whether `MOST_COPIES` of a weight, two bits each, are beyond any cache."""
    return MOST_COPIES * rows * columns // 4 >= COLD_BYTES


def _row(case: Case, path: str, timed: dict[str, Timed], packed_bytes: int) -> Row:
    ours = timed["ours"]
    over = {}
    for name in (*PEERS, *OPTIONAL):
        if name in timed and (found := speedup(ours, timed[name])):
            over[name] = (found.estimate, found.low, found.high)
    floors = {"read": timed["read probe"].median}
    done = 0
    if "multiply probe" in timed:
        done = _PROBE_OPS * int(native().probe_multiply(path, 1, 1))
        each = timed["multiply probe"].median / done
        # The probe keeps every thread busy: its rate is that of all of them.
        products = case.tokens * _padded(case.rows, 64) * _padded(case.columns, 16)
        floors["multiply"] = each * products / case.threads
    bound = max(floors, key=floors.__getitem__)
    share = floors[bound] / ours.median
    return Row(
        case=case,
        path=path,
        microseconds={name: 1e6 * t.median for name, t in timed.items()},
        over=over,
        roofline=share if share <= MOST_SHARE else None,
        bound=bound,
        packed_bytes=packed_bytes,
        probe_multiplications=done,
        samples=samples_of(timed),
        disturbed=disturbed_of(timed),
        void=void_of(timed, [(name, "ours") for name in over]),
    )


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple

"""The machine code of the product loops: sums stay in registers.

A compiler that runs out of registers, or does not see that an array can live in them, stores sums
to the stack on every turn. The integers stay right and the products lose a fifth of their speed,
which no test of results notices.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess

import pytest

X86 = platform.machine().lower() in ("x86_64", "amd64")
pytestmark = [
    pytest.mark.skipif(not X86, reason="The loops are those of the x86 paths."),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed."),
]

INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\s+(\S.*)$")
MNEMONIC = re.compile(r"(?:\{\w+\}\s+)?\w+")  # "{vex} vpdpbusd" is not "vpdpbusd"
BACKWARDS = re.compile(r"^j(?!mp)\w+\s+([0-9a-f]+)")
VECTOR = re.compile(r"%[xyz]mm\d+")
STACK = re.compile(r"\(%rsp|-0x[0-9a-f]+\(%rbp")
STORE = re.compile(r"%[xyz]mm\d+,\s*[^%,]*\(")


def innermost_loops(listing):
    """Returns the instructions of each loop that has no loop within; `listing` is objdump's."""
    code = [
        (int(found[1], 16), found[2])
        for line in listing.splitlines()
        if (found := INSTRUCTION.match(line))
    ]
    spans = [
        (int(found[1], 16), at)
        for at, text in code
        if (found := BACKWARDS.match(text)) and int(found[1], 16) <= at
    ]
    inner = [
        (start, end)
        for start, end in spans
        if not any(
            start <= other and last <= end and (other, last) != (start, end)
            for other, last in spans
        )
    ]
    return [[text for at, text in code if start <= at <= end] for start, end in inner]


def mnemonic_of(text):
    """Returns the instruction's name, after its encoding where objdump prints one."""
    found = MNEMONIC.match(text)
    return " ".join(found[0].split()) if found else ""


def product_loops(listing, mnemonic):
    """Returns (number of products, vectors stored, vectors on the stack) of each loop."""
    found = []
    for loop in innermost_loops(listing):
        products = sum(mnemonic_of(text) == mnemonic for text in loop)
        if products:
            vectors = [text for text in loop if VECTOR.search(text)]
            stored = [text for text in vectors if STORE.search(text)]
            found.append((products, len(stored), [x for x in vectors if STACK.search(x)]))
    return found


@pytest.fixture(scope="module")
def listing():
    native = pytest.importorskip("forge_kernels._native", reason="No native kernels are built.")
    command = ["objdump", "-d", "--no-show-raw-insn", native.__file__]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


# (Products, vectors stored) of a turn.
VNNI_TURNS = [
    (16, 0),  # one token, on processors of Intel and others
    (16, 0),
    # A few tokens on packed words (Intel, others), on words whose 16 vectors of fields are kept, on
    # those fields.
    *[(16 * tokens, kept) for tokens in range(2, 7) for kept in (0, 0, 16, 0)],
    (64, 0),  # the probe
]
# Encoded for AVX-512 they would be counted above, and would not run where this path is for.
AVXVNNI_TURNS = [
    *[(8 * tokens, 0) for tokens in range(1, 7)],  # of a quarter of a group
    (64, 0),  # the probe
]
AVX2_TURNS = [
    (16, 0),  # one token, half a group
    # A few tokens on packed words, on words whose 8 vectors of fields are kept, on those fields.
    *[(8 * tokens, kept) for tokens in range(2, 7) for kept in (0, 8, 0)],
    (64, 0),  # the probe
]


@pytest.mark.parametrize(
    ("mnemonic", "turns"),
    [
        pytest.param("vpdpbusd", VNNI_TURNS, id="avx512-vnni"),
        pytest.param("{vex} vpdpbusd", AVXVNNI_TURNS, id="avx-vnni"),
        pytest.param("vpmaddubsw", AVX2_TURNS, id="avx2"),
    ],
)
def test_product_loops_and_probes_keep_their_sums_in_registers(listing, mnemonic, turns):
    loops = product_loops(listing, mnemonic)
    assert [loop for loop in loops if loop[2]] == []
    assert sorted(loop[:2] for loop in loops) == sorted(turns)


def test_a_spilling_loop_is_found():
    listing = """
  10:\tvpxor  %xmm0,%xmm0,%xmm0
  20:\tvpdpbusd (%rsi){1to16},%zmm1,%zmm0
  28:\tvmovdqa64 %zmm0,0x40(%rsp)
  30:\tvpaddd -0x80(%rbp),%zmm2,%zmm2
  38:\tvmovdqu8 (%rbp),%zmm3
  40:\tadd    $0x40,%rsi
  44:\tjne    20 <f+0x10>
  48:\tvmovdqu8 %zmm0,(%rdi)
  50:\tjne    10 <f>
"""
    assert product_loops(listing, "vpdpbusd") == [
        (1, 1, ["vmovdqa64 %zmm0,0x40(%rsp)", "vpaddd -0x80(%rbp),%zmm2,%zmm2"])
    ]


def test_an_encoding_is_part_of_the_name():
    listing = """
  10:\t{vex} vpdpbusd %ymm2,%ymm1,%ymm0
  16:\tvpdpbusd %zmm2,%zmm1,%zmm3
  1c:\tvpdpbusd (%rsi),%ymm1,%ymm4
  22:\tvpdpbusds %ymm2,%ymm1,%ymm5
  28:\tjne    10 <f>
"""
    assert product_loops(listing, "vpdpbusd") == [(2, 0, [])]
    assert product_loops(listing, "{vex} vpdpbusd") == [(1, 0, [])]

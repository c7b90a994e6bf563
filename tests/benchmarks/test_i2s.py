"""bitnet.cpp's kernel as a peer: refused unless it loads and computes exact sums."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from forge_harness.benchmarks import i2s, products
from forge_harness.benchmarks.products import Case
from forge_harness.cli.app import app
from forge_harness.errors import UsageError
from forge_harness.formats.i2s import decode

SOURCE = """
#include <cstddef>
#include <cstdint>
// One row of codes, 128 columns in 32 bytes, with `nrc` tokens; written from the layout's text.
{linkage} void ggml_vec_dot_i2_i8_s(int n, float* s, std::size_t, const void* vx, std::size_t,
                                    const void* vy, std::size_t by, int nrc) {{
  auto* x = static_cast<const std::uint8_t*>(vx);
  auto* y = static_cast<const std::int8_t*>(vy);
  for (int t = 0; t < nrc; ++t) {{
    long sum = {start};
    for (int c = 0; c < n; ++c) {{
      const int j = c % 128;
      sum += (x[c / 128 * 32 + j % 32] >> (6 - 2 * (j / 32)) & 3) * y[t * by + c];
    }}
    s[t] = static_cast<float>(sum);
  }}
}}
"""
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def built(folder, *, linkage="", start=0):
    source, library = folder / "k.cpp", folder / "libk.so"
    source.write_text(SOURCE.format(linkage=linkage, start=start))
    command = ["g++", "-O2", "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return library


def drawn(rows=6, tokens=5, columns=384):
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-1, 2, (rows, columns), dtype=torch.int8, generator=generator)
    q = torch.randint(-127, 128, (tokens, columns), dtype=torch.int8, generator=generator)
    return codes, q


def test_the_bytes_are_those_the_reader_of_such_files_takes():
    codes, _ = drawn()
    data = bytes(i2s.packed_i2s(codes).flatten().tolist())
    data += bytes(torch.tensor([1.0]).view(torch.uint8).tolist()) + bytes(28)  # the scale
    back = decode("x86-act", *codes.shape, lambda start, stop: bytearray(data[start:stop]))
    assert torch.equal(back.codes(), codes)


@needs_gxx
@pytest.mark.parametrize("linkage", ["", 'extern "C"'])
def test_a_kernel_that_is_right_is_timed(tmp_path, linkage):
    library = i2s.I2sLibrary(built(tmp_path, linkage=linkage))
    for tokens in (1, 5):
        codes, q = drawn(tokens=tokens)
        call = library.product(codes, q)
        i2s.checked(call, codes, q)
        assert torch.equal(call(), ((codes.long() + 1) @ q.long().t()).float())
    row = products.measure(Case(2, 64, 256, False, 1), peers=False, rounds=6, i2s=library)
    assert set(row.over) == {products.I2S}
    for other in (Case(1, 64, 48, False, 1), Case(1, 64, 256, False, 2)):
        assert products.measure(other, peers=False, rounds=6, i2s=library).over == {}


@needs_gxx
def test_products_that_a_library_does_not_take_are_said(tmp_path):
    """It was asked for, and left out without a word."""
    command = ["bench", "kernels", "--i2s", str(built(tmp_path)), "--no-peers", "--rounds", "6"]
    command += ["--shape", "64x256", "--shape", "64x48", "--tokens", "2"]
    said = "I2_S is timed for 1 of 4 products: it takes one thread and whole blocks of 128 columns."
    assert said in CliRunner().invoke(app, [*command, "--threads", "1", "--threads", "2"]).stderr
    whole = CliRunner().invoke(app, [*command[:-4], "--tokens", "2", "--threads", "1"])
    assert "I2_S is timed for" not in whole.stderr


@needs_gxx
def test_a_kernel_that_is_wrong_is_refused(tmp_path):
    codes, q = drawn()
    call = i2s.I2sLibrary(built(tmp_path, start=1)).product(codes, q)
    with pytest.raises(UsageError, match="30 of 30 sums of the I2_S library are wrong"):
        i2s.checked(call, codes, q)


def test_what_is_no_such_library_is_refused(tmp_path):
    (tmp_path / "x.so").write_bytes(b"no library")
    with pytest.raises(UsageError, match="cannot be loaded"):
        i2s.I2sLibrary(tmp_path / "x.so")


@needs_gxx
def test_a_library_is_loaded_from_the_working_directory(tmp_path, monkeypatch):
    """A bare name was looked for among the libraries of the system."""
    monkeypatch.chdir(built(tmp_path).parent)
    assert i2s.I2sLibrary(Path("libk.so")).path == Path("libk.so")


@needs_gxx
def test_a_library_without_the_function_is_refused(tmp_path):
    (tmp_path / "e.cpp").write_text("int nothing() { return 0; }")
    command = ["g++", "-shared", "-fPIC", str(tmp_path / "e.cpp"), "-o", str(tmp_path / "e.so")]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with pytest.raises(UsageError, match="has no ggml_vec_dot_i2_i8_s"):
        i2s.I2sLibrary(tmp_path / "e.so")


@needs_gxx
# torch's own, while it imports what it compiles with.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_frozen_inductor_is_a_peer_when_asked_for():
    row = products.measure(Case(1, 64, 128, False, 1), peers=False, rounds=6, inductor=True)
    assert set(row.over) == {products.INDUCTOR}

"""ggml as a peer: refused unless it is ggml and computes what its format defines."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from forge_harness.benchmarks import ggml, products
from forge_harness.benchmarks.products import Case
from forge_harness.errors import UsageError

BUILD = os.environ.get("FORGE_GGML_BUILD", "")
"""A build directory of ggml; the tests that need one are skipped without it."""
needs_build = pytest.mark.skipif(not BUILD, reason="FORGE_GGML_BUILD names no build of ggml")


def drawn(rows=64, tokens=3, columns=512):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-1, 2, (rows, columns), generator=generator)
    return 0.02 * codes.float(), torch.randn(tokens, columns, generator=generator)


class Returns:
    """Stands for a library whose product is given."""

    def __init__(self, result):
        self.result = result
        self.closed = False

    def __call__(self):
        return self.result

    def close(self):
        self.closed = True


def test_the_definition_is_near_the_exact_product():
    weight, x = drawn()
    exact = x.double() @ weight.double().t()
    off = (ggml.defined_product(weight, x) - exact).norm() / exact.norm()
    assert 1e-4 < off < 0.02


def test_the_definition_is_exact_where_nothing_is_rounded():
    codes = torch.randint(-1, 2, (8, 512), generator=torch.Generator().manual_seed(1))
    codes[:, ::256] = 1
    x = torch.randint(-126, 127, (4, 512), generator=torch.Generator().manual_seed(2)).float()
    x[:, ::256] = -127
    weight = 0.25 * codes.float()
    assert torch.equal(ggml.defined_product(weight, x), x.double() @ weight.double().t())


@pytest.mark.parametrize("given", [".", "libggml-cpu.so"])
def test_libraries_are_loaded_from_the_working_directory(given, tmp_path, monkeypatch):
    """A bare name was looked for among the libraries of the system, and not found."""
    monkeypatch.chdir(tmp_path)
    for name in ("libggml-base.so", "libggml-cpu.so"):
        Path(name).write_bytes(b"no library")
    with pytest.raises(UsageError, match=r"libggml-base\.so: (invalid ELF header|file too short)"):
        ggml.GgmlLibrary(Path(given))


def test_a_product_of_something_else_is_refused_and_closed():
    weight, x = drawn()
    right = ggml.defined_product(weight, x).float()
    ggml.checked(Returns(right), weight, x)
    wrong = Returns(right * 1.01)
    with pytest.raises(UsageError, match="not timed"):
        ggml.checked(wrong, weight, x)
    assert wrong.closed


def test_a_directory_without_ggml_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no libggml-cpu"):
        ggml.GgmlLibrary(tmp_path)


def test_a_file_that_is_no_library_is_refused(tmp_path):
    for name in ("libggml-cpu.so", "libggml-base.so"):
        (tmp_path / name).write_bytes(b"no library")
    with pytest.raises(UsageError, match="cannot be used as ggml"):
        ggml.GgmlLibrary(tmp_path)


@needs_build
def test_a_build_is_timed():
    library = ggml.GgmlLibrary(Path(BUILD))
    row = products.measure(Case(2, 64, 512, False, 2), peers=False, rounds=6, ggml=library)
    assert set(row.over) == {products.GGML}
    odd = products.measure(Case(1, 64, 48, False, 1), peers=False, rounds=6, ggml=library)
    assert odd.over == {}


@needs_build
def test_columns_that_are_no_whole_blocks_are_refused():
    library = ggml.GgmlLibrary(Path(BUILD))
    with pytest.raises(UsageError, match="256"):
        library.product(torch.zeros(4, 100), torch.zeros(1, 100), 1)

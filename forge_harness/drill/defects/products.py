"""Ternary kernels that lose, repeat or overflow what they sum, or that are not the fast ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from forge_harness.drill.defect import Defect, Stage
from forge_harness.subject.reference import ReferenceSubject

Product = Callable[[Tensor], Tensor]
"""Takes int8 activations (M, K) and returns the int32 sums (M, N)."""
BLOCK = 16
"""Columns a kernel takes at a time."""


class ProductDefect(ReferenceSubject):
    """Kernels changed by `prepare(sound, codes)`, all of them or those of some names."""

    def __init__(
        self,
        prepare: Callable[[Product, Tensor], Product],
        names: Callable[[Sequence[str]], Sequence[str]] = lambda names: names,
    ) -> None:
        self.prepare, self.names = prepare, names

    def prepare_product(self, name: str, codes: Tensor) -> Product:
        """See `MultipliesTernary.prepare_product`."""
        sound = super().prepare_product(name, codes)
        return self.prepare(sound, codes) if name in self.names(self.products()) else sound


class PortableOnly(ReferenceSubject):
    """Offers the portable kernel, whatever the processor has."""

    def products(self) -> Sequence[str]:
        """See `MultipliesTernary.products`."""
        return ("scalar",)


class SharedWorkspace(ReferenceSubject):
    """Codes are prepared in one workspace, which the next weight overwrites."""

    workspace: Tensor | None = None

    def prepare_product(self, name: str, codes: Tensor) -> Product:
        """See `MultipliesTernary.prepare_product`."""
        own = super().prepare_product(name, codes)
        self.workspace = codes.to(torch.int32)

        def product(q: Tensor) -> Tensor:
            held = self.workspace
            if held is None or held.shape != codes.shape:
                return own(q)
            return q.to(torch.int32) @ held.t()

        return product


class SharedScratch(ReferenceSubject):
    """Blocks that reach beyond the last column read what an earlier product left there."""

    def __init__(self) -> None:
        self.scratch = torch.zeros(160, 16384, dtype=torch.int32)

    def prepare_product(self, name: str, codes: Tensor) -> Product:
        """See `MultipliesTernary.prepare_product`."""
        rows, columns = codes.shape
        wide = -(-columns // BLOCK) * BLOCK
        # What lies beyond a row's codes is not zero, as in packed bytes of zeros: code -1.
        beyond = torch.full((rows, wide - columns), -1)
        padded = torch.cat([codes.to(torch.int32), beyond.to(torch.int32)], dim=1)

        def product(q: Tensor) -> Tensor:
            self.scratch[: len(q), :columns] = q
            return self.scratch[: len(q), :wide] @ padded.t()

        return product


def repeated(subject: Any) -> object:
    """Answers of two products in turns, and of operands that lie by columns."""
    generator = torch.Generator().manual_seed(12)
    name = next(iter(subject.products()))
    codes = torch.randint(-1, 2, (300, 512), generator=generator).to(torch.int8)
    q = torch.randint(-127, 128, (3, 512), generator=generator).to(torch.int8)
    one, other = (subject.prepare_product(name, each) for each in (codes, codes.flip(0)))
    turned = subject.prepare_product(name, codes.t().contiguous().t())
    seen = [one(q).clone(), other(q).clone(), one(q).clone()]
    return [*seen, turned(q.t().contiguous().t()).clone()]


def products(subject: Any) -> object:
    """The names of the kernels, and two answers of each to random and to extreme operands."""
    generator = torch.Generator().manual_seed(11)
    names = list(subject.products())
    seen: list[object] = [names]
    for name in names:
        for rows, columns, tokens in ((70, 150, 5), (33, 64, 1), (12, 1029, 2)):
            codes = torch.randint(-1, 2, (rows, columns), generator=generator).to(torch.int8)
            q = torch.randint(-128, 128, (tokens, columns), generator=generator).to(torch.int8)
            product = subject.prepare_product(name, codes)
            seen += [product(q).clone(), product(q).clone()]
        ones = torch.ones(3, 2000, dtype=torch.int8)
        seen.append(subject.prepare_product(name, ones)(100 * ones).clone())
    return seen


def _in_int16(sound: Product, codes: Tensor) -> Product:
    """Right on random codes, wrong on long runs."""

    def product(q: Tensor) -> Tensor:
        each = q.to(torch.int16)[:, None, :] * codes.to(torch.int16)[None]
        return each.sum(-1, dtype=torch.int16).to(torch.int32)

    return product


def _in_bfloat16(sound: Product, codes: Tensor) -> Product:
    """Sums blocks exactly and adds them up in bfloat16."""

    def product(q: Tensor) -> Tensor:
        total = torch.zeros(len(q), len(codes), dtype=torch.bfloat16)
        for start in range(0, codes.shape[1], BLOCK):
            block = codes[:, start : start + BLOCK].to(torch.int32)
            total += (q[:, start : start + BLOCK].to(torch.int32) @ block.t()).bfloat16()
        return total.to(torch.int32)

    return product


def _whole_blocks_only(sound: Product, codes: Tensor) -> Product:
    whole = codes.shape[1] // BLOCK * BLOCK

    def product(q: Tensor) -> Tensor:
        cut = q.clone()
        cut[:, whole:] = 0
        return sound(cut)

    return product


def _wrong_from_four_tokens(sound: Product, codes: Tensor) -> Product:
    """From four tokens on, each is read with the stride of one: the neighbours' columns."""

    def product(q: Tensor) -> Tensor:
        return sound(q) if len(q) < 4 else sound(q.t().reshape(q.shape).contiguous())

    return product


def _timed_on_the_first_call(sound: Product, codes: Tensor) -> Product:
    """The kernel adds to its output, and runs twice in the call that chooses its tiles."""
    chosen: set[int] = set()

    def product(q: Tensor) -> Tensor:
        first = len(q) not in chosen
        chosen.add(len(q))
        return sound(q) * (2 if first else 1)

    return product


def _overlapping_chunks(sound: Product, codes: Tensor) -> Product:
    """Four threads take rows rounded up, and add to what the neighbour has written."""
    each, step = -(-len(codes) // 4), max(1, len(codes) // 4)

    def product(q: Tensor) -> Tensor:
        found, true = torch.zeros(len(q), len(codes), dtype=torch.int32), sound(q)
        for start in range(0, len(codes), step):
            found[:, start : start + each] += true[:, start : start + each]
        return found

    return product


def _corrects_twice(sound: Product, codes: Tensor) -> Product:
    """Codes are stored as 0, 1, 2, and the sum of the activations is taken off twice."""
    return lambda q: sound(q) - q.to(torch.int32).sum(1, keepdim=True)


def _by_storage_order(sound: Product, codes: Tensor) -> Product:
    """Operands that lie by columns are read as if they lay by rows."""
    found = sound if codes.is_contiguous() else _of(codes.t().reshape(codes.shape))

    def product(q: Tensor) -> Tensor:
        return found(q if q.is_contiguous() else q.t().reshape(q.shape))

    return product


def _old_layout(sound: Product, codes: Tensor) -> Product:
    """The first call reorders the codes, and later ones read them as they were."""
    called: list[bool] = []

    def product(q: Tensor) -> Tensor:
        first = not called
        called.append(True)
        return sound(q) if first else sound(q.flip(1))

    return product


def _index_of_16_bits(sound: Product, codes: Tensor) -> Product:
    """The place of a code is kept in 16 bits: larger weights begin again."""
    if codes.numel() <= 1 << 16:
        return sound
    places = torch.arange(codes.numel()) % (1 << 16)
    return _of(codes.flatten()[places].reshape(codes.shape))


def _of(codes: Tensor) -> Product:
    return lambda q: q.to(torch.int32) @ codes.to(torch.int32).t()


def _negates_in_int8(sound: Product, codes: Tensor) -> Product:
    """The negative of -128 is -128 in int8."""

    def product(q: Tensor) -> Tensor:
        negated = (-q).to(torch.int32) @ (codes < 0).to(torch.int32).t()
        return q.to(torch.int32) @ (codes > 0).to(torch.int32).t() + negated

    return product


def _with_fractions(sound: Product, codes: Tensor) -> Product:
    """Sums in float64, each just under one away from its integer: truncated they are right."""

    def product(q: Tensor) -> Tensor:
        true = sound(q).double()
        return true + torch.where(true < 0, -0.9, 0.9)

    return product


def _in_int16_from_three_tokens(sound: Product, codes: Tensor) -> Product:
    """The code for several tokens keeps sums in int16, that for one or two in int32."""
    return lambda q: sound(q) if len(q) < 3 else sound(q).to(torch.int16).to(torch.int32)


_kernel = partial(
    Defect,
    stage=Stage.KERNEL,
    check="performance.kernel_against_reference",
    shows="sums_that_differ is",
    alive=products,
)

DEFECTS = (
    _kernel(
        id="K08_product_sums_in_int16",
        title="Sums are kept in int16: right on random codes, wrong on long runs",
        subject=lambda: ProductDefect(_in_int16),
        subtlety=4,
    ),
    _kernel(
        id="K14_product_sums_in_bf16",
        title="Sums of blocks are added up in bfloat16",
        subject=lambda: ProductDefect(_in_bfloat16),
        source="linkedin/Liger-Kernel 7d54ff88",
        subtlety=4,
    ),
    _kernel(
        id="K05_whole_blocks_only",
        title="Columns beyond the last whole block of sixteen are left out",
        subject=lambda: ProductDefect(_whole_blocks_only),
        source="ggml-org/ggml 0cb347e7",
        subtlety=4,
    ),
    _kernel(
        id="K05_reads_stale_scratch",
        title="The last block reads columns that an earlier product left in the scratch memory",
        subject=SharedScratch,
        source="ggml-org/ggml 33c9ea5e",
        subtlety=4,
    ),
    _kernel(
        id="K03_wrong_from_four_tokens",
        title="One to three tokens are right; from four on the stride of one token is used",
        subject=lambda: ProductDefect(_wrong_from_four_tokens),
        source="microsoft/BitNet#617",
        subtlety=3,
    ),
    _kernel(
        id="K07_first_call_doubled",
        title="The first call of a shape is run twice for timing, and adds to its own result",
        subject=lambda: ProductDefect(_timed_on_the_first_call),
        source="triton-lang/triton#6547",
        subtlety=4,
    ),
    _kernel(
        id="K06_chunks_overlap",
        title="Chunks of rows are rounded up: threads add to rows of their neighbours",
        subject=lambda: ProductDefect(_overlapping_chunks),
        source="ggml-org/ggml d7c5e5ac",
        subtlety=4,
    ),
    _kernel(
        id="P12_product_corrects_twice",
        title="The sum of the activations is taken off twice for codes stored from zero",
        subject=lambda: ProductDefect(_corrects_twice),
        source="microsoft/BitNet#600",
        subtlety=3,
    ),
    _kernel(
        id="negates_in_int8",
        title="Activations are negated in int8, where -128 stays -128",
        subject=lambda: ProductDefect(_negates_in_int8),
        subtlety=5,
    ),
    _kernel(
        id="K10_product_by_storage_order",
        title="Operands that lie by columns are read as if they lay by rows",
        subject=lambda: ProductDefect(_by_storage_order),
        alive=repeated,
        source="NVIDIA/TransformerEngine#2746",
        subtlety=4,
    ),
    _kernel(
        id="K12_second_product_old_layout",
        title="The first call reorders the codes, and later ones read the old layout",
        subject=lambda: ProductDefect(_old_layout),
        alive=repeated,
        source="ggml-org/ggml 37c4997a",
        subtlety=4,
    ),
    _kernel(
        id="K04_shared_workspace",
        title="Preparing a weight overwrites the one that was prepared before",
        subject=SharedWorkspace,
        alive=repeated,
        source="microsoft/BitNet#385",
        subtlety=4,
    ),
    _kernel(
        id="K08_index_of_16_bits",
        title="Places of codes are kept in 16 bits: weights of more codes begin again",
        subject=lambda: ProductDefect(_index_of_16_bits),
        alive=repeated,
        source="linkedin/Liger-Kernel#1248",
        subtlety=4,
    ),
    _kernel(
        id="V09_last_path_differs",
        title="The kernel of one instruction set leaves out columns, the selected one does not",
        subject=lambda: ProductDefect(_whole_blocks_only, names=lambda names: names[-1:]),
        source="microsoft/BitNet#547",
        subtlety=4,
    ),
    _kernel(
        id="K14_fractions_in_sums",
        title="Sums are no integers: truncated to them they would be right",
        subject=lambda: ProductDefect(_with_fractions),
        subtlety=4,
    ),
    _kernel(
        id="K08_int16_for_several_tokens",
        title="One and two tokens are summed in int32, three and more in int16",
        subject=lambda: ProductDefect(_in_int16_from_three_tokens),
        subtlety=4,
    ),
    Defect(
        id="V09_portable_path_selected",
        title="The portable kernel is used where the processor has instructions for it",
        stage=Stage.KERNEL,
        check="performance.kernel_roofline",
        shows="roofline_share is",
        subject=PortableOnly,
        alive=products,
        source="microsoft/BitNet#411",
        subtlety=3,
    ),
)

"""The product as an operator of torch, which tracers can record.

torch.compile, torch.export, make_fx, fake tensors and torch.jit.trace watch operators. A kernel
that is handed addresses is none: they would record its output as memory nobody wrote.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from .backends import Backend
from .dispatch import unwatched_linear
from .packed import PackedTernary

# True, or above 0, while something records or intercepts operators.
is_compiling = torch.compiler.is_dynamo_compiling
dispatch_modes = torch._C._len_torch_dispatch_stack


@torch.library.custom_op("forge_harness::ternary_linear", mutates_args=())
def ternary_linear(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
    backend: str,
    path: str | None,
) -> Tensor:
    """`forge_harness.kernels.ternary_linear`, the packed weight in pieces, without `out`."""
    packed = PackedTernary(data, rows, columns, scale)
    return unwatched_linear(x, packed, bias, cast(Backend, backend), path)


@ternary_linear.register_fake
def _shape(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
    backend: str,
    path: str | None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def without_gradient(
    x: Tensor, packed: PackedTernary, bias: Tensor | None, backend: Backend, path: str | None
) -> Tensor:
    """The operator as the eager product is: no gradient flows, so that none is asked of it."""
    addend = None if bias is None else bias.detach()
    size = packed.rows, packed.columns
    y: Tensor = ternary_linear(
        x.detach(), packed.data, packed.scale.detach(), addend, *size, backend, path
    )
    return y

"""Runs a product on the backend that is chosen for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from forge_harness.errors import BackendUnavailableError, NonTernaryCodeError

from .backends import Backend, native, product_path, which
from .packed import PackedTernary

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""dtype -> its number in the native calls (csrc/cpu/path.h)."""

# Bound once: looking a name up in a module takes as long as calling it.
thread_count = torch.get_num_threads
_changed = torch._C._increment_version  # torch.autograd.graph.increment_version takes twice as long


def unwatched_linear(
    x: Tensor,
    packed: PackedTernary,
    bias: Tensor | None,
    backend: Backend,
    path: str | None,
    out: Tensor | None = None,
) -> Tensor:
    """`ternary_linear` after its checks, where nothing records operators."""
    if not x.is_floating_point():
        raise TypeError(not_floating(x))
    if x.device != packed.data.device:
        raise ValueError(
            f"x is on {x.device}, the packed weight on {packed.data.device}; move one of them."
        )
    tokens = x.numel() // packed.columns
    chosen = which(
        "ternary_linear", backend, device=x.device.type, tokens=tokens, weight=packed.shape
    )
    if chosen == "native":
        return native_linear(native(), x, packed, bias, path, out)
    refuse_path(path, chosen)
    y = _other_linear(chosen, x, packed, bias)
    return y if out is None else out.copy_(y)


def native_linear(
    extension: Any,  # noqa: ANN401 - the module
    x: Tensor,
    packed: PackedTernary,
    bias: Tensor | None,
    path: str | None,
    out: Tensor | None,
) -> Tensor:
    """`unwatched_linear` with the native extension, on tensors of the CPU."""
    code = DTYPES.get(x.dtype)
    if code is None:
        if not x.is_floating_point():
            raise TypeError(not_floating(x))
        y = native_linear(extension, x.float(), packed, bias, path, None)
        return y.to(x.dtype) if out is None else out.copy_(y)
    if x.is_neg() or not x.is_contiguous():
        x = readable(x)
    y = x.new_empty((*x.shape[:-1], packed.rows)) if out is None else out
    addend = None if bias is None else readable(bias.detach().to(torch.float32))
    # Null, as wrappers around other tensors have it, would mean none.
    bias_address = 0 if addend is None else address(addend, "the bias")
    columns = packed.columns
    extension.linear(
        product_path(path),
        address(x, "x"),
        code,
        x.numel() // columns,
        columns,
        packed.data.data_ptr(),
        packed.rows,
        packed.scale.data_ptr(),
        packed.is_rowwise,
        bias_address,
        y.data_ptr(),
        code,
        thread_count(),
    )
    if out is not None:
        _changed((out,))  # or a backward that kept it would take the new values for the old ones
    return y


def native_activation_codes(x: Tensor, path: str | None) -> tuple[Tensor, Tensor]:
    """`quantize_activations` after its checks, with the native extension."""
    values = readable(x.detach())
    codes = torch.empty_like(values, dtype=torch.int8)
    scales = values.new_empty((*values.shape[:-1], 1), dtype=torch.float32)
    native().quantize(
        product_path(path),
        address(values, "x"),
        DTYPES[values.dtype],
        scales.numel(),
        values.shape[-1],
        codes.data_ptr(),
        scales.data_ptr(),
        thread_count(),
    )
    return codes, scales


def address(tensor: Tensor, what: str) -> int:
    """Returns where the values of a tensor of the CPU are.

    Raises:
        ValueError: Nowhere: it wraps others.
    """
    try:
        found: int = tensor.data_ptr()
    except RuntimeError:  # of torch, within a transform
        found = 0
    if not found and tensor.numel():
        raise ValueError(
            f"{what} has no memory of its own; expected a plain tensor on the CPU, not one that "
            "wraps others: choose backend='reference' under torch.vmap and the like."
        )
    return found


def _other_linear(chosen: str, x: Tensor, packed: PackedTernary, bias: Tensor | None) -> Tensor:
    scale = packed.scale.detach().reshape(-1)
    if chosen == "reference":
        from forge_kernels import reference

        y = reference.ternary_linear(x, reference_codes(packed), scale)
        return (y if bias is None else y + bias.detach().float()).to(x.dtype)
    flat = x.detach().resolve_neg().reshape(-1, packed.columns)
    result: Tensor = gpu_module(chosen).ternary_linear(flat, packed.data, packed.rows, scale, bias)
    return result.reshape(*x.shape[:-1], packed.rows)


def reference_codes(packed: PackedTernary) -> Tensor:
    """Returns the codes of a weight, int8 (N, K), as the reference reads them.

    Raises:
        NonTernaryCodeError: A field stands for no code.
    """
    from forge_kernels import layout

    try:
        return layout.unpack_blocks(packed.data, packed.rows, packed.columns)
    except ValueError as error:
        raise NonTernaryCodeError(f"{error}: the packed weight is damaged.") from None


def readable(x: Tensor) -> Tensor:
    """Returns x as the native kernels read it: contiguous, its sign in its values, fp32 or bf16."""
    x = x if x.dtype in DTYPES else x.float()
    # Asked first, as a training step comes here some hundred times.
    return x if x.is_contiguous() and not x.is_neg() else x.resolve_neg().contiguous()


def refuse_path(path: str | None, backend: str) -> None:
    """Raises BackendUnavailableError for an instruction set where native does not run."""
    if path is not None and backend != "native":
        raise BackendUnavailableError(
            f"Kernel path {path!r} is one of the native backend, and {backend} would run; leave "
            "the path out, or see native_problem() for why native cannot run."
        )


def not_floating(x: Tensor) -> str:
    """Returns the sentence that refuses activations of a wrong dtype."""
    return f"x has dtype {x.dtype}; expected floating activations."


def gpu_module(backend: str) -> Any:  # noqa: ANN401 - the module, imported late
    """Returns the module of the Triton or CUDA kernels."""
    import importlib

    name = "forge_kernels.triton.ops" if backend == "triton" else "forge_kernels.cuda"
    return importlib.import_module(name)

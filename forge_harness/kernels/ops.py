"""The products of W1.58A8, and the activation quantizer, over every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from forge_harness.errors import BackendUnavailableError

from . import captured
from .backends import Backend, native, native_if_loaded, product_path, which
from .captured import dispatch_modes, is_compiling
from .dispatch import (
    address,
    gpu_module,
    native_activation_codes,
    native_linear,
    not_floating,
    reference_codes,
    refuse_path,
    thread_count,
    unwatched_linear,
)
from .packed import PackedTernary
from .packing import check_values


def ternary_linear(
    x: Tensor,
    packed: PackedTernary,
    bias: Tensor | None = None,
    *,
    backend: Backend = "auto",
    path: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The inference forward from packed weights: absmax int8, exact sums, rescale.

    Every backend returns the same bits: float(sum) * (activation scale * weight scale) + bias, each
    operation rounded to fp32, then to x's dtype.

    Tracers (torch.compile, torch.export, make_fx, torch.jit.trace) record the operator
    `forge_harness::ternary_linear`; `out` costs them a copy.

    Args:
        x: Activations (..., K), floating, on the device of `packed`. No gradient flows.
        packed: The weight (N, K).
        bias: (N,) or None; added after rescaling.
        backend: Which implementation.
        path: Instruction set of the native backend; see `cpu_path`.
        out: Contiguous (..., N) of x's dtype and device to write to, without gradient; it may be
            x, but share memory with nothing else that is read. None: a new one. Allocating takes
            as long as the rest of a small call.

    Returns:
        (..., N) in x's dtype; `out` where it was given.

    Raises:
        BackendUnavailableError: The explicit backend or path cannot run here.
        NonTernaryCodeError: The reference met a field that stands for no code; the other backends
            do not look, as the codes were checked when they were packed.
        TypeError: `x` is not floating, or `bias` is complex.
        ValueError: Shapes or devices do not fit, or `out` is none of such a product.
    """
    shape = x.shape
    last = shape[-1] if shape else None
    if last != packed.columns:
        raise ValueError(
            f"x has shape {tuple(shape)} and the packed weight {packed.shape}; "
            f"expected x (..., {packed.columns}): the last dimension is the input features."
        )
    if bias is not None and bias.shape != (packed.rows,):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; expected ({packed.rows},): one entry an output."
        )
    if bias is not None and bias.device != packed.data.device:
        raise ValueError(
            f"bias is on {bias.device}, the packed weight on {packed.data.device}; move one of "
            "them."
        )
    if bias is not None and bias.is_complex():
        raise TypeError(f"bias has dtype {bias.dtype}; expected real numbers.")
    on_cpu = x.is_cpu and packed.is_cpu
    if out is not None:
        _check_out(out, x, shape, packed.rows)
        if not (on_cpu and out.is_cpu) and out.device != x.device:
            raise ValueError(f"out is on {out.device}, x on {x.device}; expected one device.")
    # Spelled out: decoding calls this a few hundred times a token, and a call takes 50 ns. Under
    # torch.jit.trace sizes are tensors.
    if type(last) is not int or is_compiling() or dispatch_modes():
        y = captured.without_gradient(x, packed, bias, backend, path)
        return y if out is None else out.copy_(y)
    if not on_cpu and x.is_meta and packed.data.is_meta:  # no values, so nothing to multiply
        y = x.new_empty((*shape[:-1], packed.rows))
        return y if out is None else out
    # The usual case asks nothing twice.
    extension = native_if_loaded()
    if extension and on_cpu and backend in ("auto", "native"):
        return native_linear(extension, x, packed, bias, path, out)
    return unwatched_linear(x, packed, bias, backend, path, out)


def ternary_matmul(
    q: Tensor, packed: PackedTernary, *, backend: Backend = "auto", path: str | None = None
) -> Tensor:
    """Returns the exact sums q @ codes.T, without scales.

    Args:
        q: int8 (M, K), any values, on the device of `packed`.
        packed: The weight (N, K).
        backend: Which implementation.
        path: Instruction set of the native backend.

    Returns:
        int32 (M, N).

    Raises:
        BackendUnavailableError: The explicit backend or path cannot run here.
        TypeError: `q` is not int8.
        ValueError: Shapes or devices do not fit.
    """
    if q.dtype != torch.int8:
        raise TypeError(f"q has dtype {q.dtype}; expected torch.int8: quantize it first.")
    if q.dim() != 2 or q.shape[1] != packed.columns or q.device != packed.data.device:
        raise ValueError(
            f"q has shape {tuple(q.shape)} on {q.device}; expected (M, {packed.columns}) on "
            f"{packed.data.device}."
        )
    check_values(q, "the activations")
    chosen = which(
        "ternary_matmul", backend, device=q.device.type, tokens=len(q), weight=packed.shape
    )
    refuse_path(path, chosen)
    q = q.contiguous().resolve_neg()
    if chosen == "native":
        _refuse_watched(q, "ternary_matmul")
        acc = q.new_empty((q.shape[0], packed.rows), dtype=torch.int32)
        native().multiply(
            product_path(path),
            address(q, "q"),
            q.shape[0],
            packed.columns,
            packed.data.data_ptr(),
            packed.rows,
            acc.data_ptr(),
            thread_count(),
        )
        return acc
    if chosen == "reference":
        from forge_kernels import reference

        return reference.exact_matmul(q, reference_codes(packed)).to(torch.int32)
    result: Tensor = gpu_module(chosen).ternary_matmul(q, packed.data, packed.rows)
    return result


def quantize_activations(
    x: Tensor, *, backend: Backend = "auto", path: str | None = None
) -> tuple[Tensor, Tensor]:
    """Quantizes tokens as `forge_harness.quant.absmax_int8` does, to the bit.

    Args:
        x: Activations (..., K), floating, K at least 1.
        backend: Which implementation.
        path: Instruction set of the native backend.

    Returns:
        int8 (..., K) and fp32 scales (..., 1).

    Raises:
        BackendUnavailableError: The explicit backend or path cannot run here.
        ValueError: `x` has no last dimension or an empty one.
        TypeError: `x` is not floating.
    """
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (..., K) with K >= 1.")
    if not x.is_floating_point():
        raise TypeError(not_floating(x))
    chosen = which("quantize_activations", backend, device=x.device.type)
    refuse_path(path, chosen)
    if chosen == "native":
        _refuse_watched(x, "quantize_activations")
        return native_activation_codes(x, path)
    if chosen == "reference":
        from forge_kernels import reference

        return reference.absmax_int8(x)
    flat = x.detach().resolve_neg().reshape(-1, x.shape[-1])
    q, scale = gpu_module(chosen).quantize_activation(flat)[:2]
    return q.reshape(x.shape), scale.reshape(*x.shape[:-1], 1)


def _refuse_watched(tensor: Tensor, op: str) -> None:
    if type(tensor.shape[-1]) is not int or is_compiling() or dispatch_modes():
        raise BackendUnavailableError(
            f"native {op} cannot be traced, nor run on a {type(tensor).__name__}; expected tensors "
            "with memory: choose backend='reference' there."
        )


def _check_out(out: Tensor, x: Tensor, shape: torch.Size, rows: int) -> None:
    # Written for speed: an attribute of a tensor takes 50 ns, a slice of its shape 200.
    expected = [*shape]
    expected[-1] = rows
    if out.shape != tuple(expected) or out.dtype != x.dtype or not out.is_contiguous():
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)}; expected contiguous {x.dtype} "
            f"{tuple(expected)}."
        )
    # Dynamo cannot record the question; a copy into a negated view is right.
    if not is_compiling() and out.is_neg():
        raise ValueError("out is a negated view; expected a tensor whose memory holds its values.")
    if out.requires_grad:
        raise ValueError(
            "out requires a gradient; expected one that does not: none flows through the product."
        )

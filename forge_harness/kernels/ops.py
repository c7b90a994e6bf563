"""The products of W1.58A8, and the activation quantizer, over every backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from forge_harness.errors import NonTernaryCodeError

from .backends import Backend, cpu_path, native, which

if TYPE_CHECKING:
    from torch import Tensor

    from .packed import PackedTernary


def ternary_linear(
    x: Tensor,
    packed: PackedTernary,
    bias: Tensor | None = None,
    *,
    backend: Backend = "auto",
    path: str | None = None,
) -> Tensor:
    """The inference forward from packed weights: absmax int8, exact sums, rescale.

    Every backend returns the same bits: float(sum) * (activation scale * weight scale) + bias, each
    operation rounded to fp32, then to x's dtype.

    Args:
        x: Activations (..., K), floating, on the device of `packed`. No gradient flows.
        packed: The weight (N, K).
        bias: (N,) or None; added after rescaling.
        backend: Which implementation.
        path: Instruction set of the native backend; see `cpu_path`.

    Returns:
        (..., N) in x's dtype.

    Raises:
        BackendUnavailableError: The explicit backend or path cannot run here.
        NonTernaryCodeError: The reference met a field that stands for no code; the other backends
            do not look, as the codes were checked when they were packed.
        TypeError: `x` is not floating.
        ValueError: Shapes or devices do not fit.
    """
    if x.dim() == 0 or x.shape[-1] != packed.columns:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and the packed weight {packed.shape}; "
            f"expected x (..., {packed.columns}): the last dimension is the input features."
        )
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; expected floating activations.")
    if x.device != packed.data.device:
        raise ValueError(
            f"x is on {x.device}, the packed weight on {packed.data.device}; move one of them."
        )
    if bias is not None and bias.shape != (packed.rows,):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; expected ({packed.rows},): one entry an output."
        )
    tokens = x.numel() // packed.columns
    chosen = which("ternary_linear", backend, device=x.device.type, tokens=tokens)
    if chosen == "native":
        return _native_linear(x, packed, bias, tokens, path)
    return _other_linear(chosen, x, packed, bias)


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
    import torch

    if q.dtype != torch.int8:
        raise TypeError(f"q has dtype {q.dtype}; expected torch.int8: quantize it first.")
    if q.dim() != 2 or q.shape[1] != packed.columns or q.device != packed.data.device:
        raise ValueError(
            f"q has shape {tuple(q.shape)} on {q.device}; expected (M, {packed.columns}) on "
            f"{packed.data.device}."
        )
    chosen = which("ternary_matmul", backend, device=q.device.type, tokens=q.shape[0])
    q = q.contiguous()
    if chosen == "native":
        acc = torch.empty((q.shape[0], packed.rows), dtype=torch.int32)
        native().multiply(
            cpu_path(path),
            q.data_ptr(),
            q.shape[0],
            packed.columns,
            packed.data.data_ptr(),
            packed.rows,
            acc.data_ptr(),
            torch.get_num_threads(),
        )
        return acc
    if chosen == "reference":
        from forge_kernels import layout, reference

        codes = layout.unpack_blocks(packed.data, packed.rows, packed.columns)
        return reference.exact_matmul(q, codes).to(torch.int32)
    result: Tensor = _gpu(chosen).ternary_matmul(q, packed.data, packed.rows)
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
    import torch

    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (..., K) with K >= 1.")
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; expected floating activations.")
    chosen = which("quantize_activations", backend, device=x.device.type)
    if chosen == "native":
        values = _readable(x.detach())
        codes = torch.empty(x.shape, dtype=torch.int8)
        scales = torch.empty((*x.shape[:-1], 1), dtype=torch.float32)
        native().quantize(
            cpu_path(path),
            values.data_ptr(),
            _dtype_codes()[values.dtype],
            scales.numel(),
            x.shape[-1],
            codes.data_ptr(),
            scales.data_ptr(),
            torch.get_num_threads(),
        )
        return codes, scales
    if chosen == "reference":
        from forge_kernels import reference

        return reference.absmax_int8(x)
    flat = x.detach().reshape(-1, x.shape[-1])
    q, scale = _gpu(chosen).quantize_activation(flat)[:2]
    return q.reshape(x.shape), scale.reshape(*x.shape[:-1], 1)


def _native_linear(
    x: Tensor, packed: PackedTernary, bias: Tensor | None, tokens: int, path: str | None
) -> Tensor:
    import torch

    values = _readable(x)
    y = torch.empty((*x.shape[:-1], packed.rows), dtype=values.dtype)
    dtype = _dtype_codes()[values.dtype]
    addend = None if bias is None else bias.detach().to(torch.float32).contiguous()
    native().linear(
        cpu_path(path),
        values.data_ptr(),
        dtype,
        tokens,
        packed.columns,
        packed.data.data_ptr(),
        packed.rows,
        packed.scale.data_ptr(),
        packed.scale.dim() == 1,
        0 if addend is None else addend.data_ptr(),
        y.data_ptr(),
        dtype,
        torch.get_num_threads(),
    )
    return y if y.dtype == x.dtype else y.to(x.dtype)


def _other_linear(chosen: str, x: Tensor, packed: PackedTernary, bias: Tensor | None) -> Tensor:
    if chosen == "reference":
        from forge_kernels import layout, reference

        try:
            codes = layout.unpack_blocks(packed.data, packed.rows, packed.columns)
        except ValueError as error:
            raise NonTernaryCodeError(f"{error}: the packed weight is damaged.") from None
        y = reference.ternary_linear(x, codes, packed.scale.reshape(-1))
        return (y if bias is None else y + bias).to(x.dtype)
    flat = x.detach().reshape(-1, packed.columns)
    gpu = _gpu(chosen)
    result: Tensor = gpu.ternary_linear(
        flat, packed.data, packed.rows, packed.scale.reshape(-1), bias
    )
    return result.reshape(*x.shape[:-1], packed.rows)


def _readable(x: Tensor) -> Tensor:
    """Returns x as the native kernels read it: contiguous, fp32 or bf16."""
    return x.contiguous() if x.dtype in _dtype_codes() else x.float().contiguous()


_DTYPES: dict[Any, int] = {}


def _dtype_codes() -> dict[Any, int]:
    if not _DTYPES:
        import torch

        _DTYPES.update({torch.float32: 0, torch.bfloat16: 1})
    return _DTYPES


def _gpu(backend: str) -> Any:  # noqa: ANN401 - the module, imported late
    import importlib

    name = "forge_kernels.triton.ops" if backend == "triton" else "forge_kernels.cuda"
    return importlib.import_module(name)

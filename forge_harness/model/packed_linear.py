"""`PackedLinear`: the ternary linear layer for inference, over packed codes and without latents."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import fields, replace
from typing import Self, cast

import torch
from torch import Tensor, nn

from forge_harness.kernels import Backend, PackedTernary, pack, ternary_linear, unpack, which
from forge_harness.kernels.packed import LAYOUT, check_layout, checked_scales
from forge_harness.quant import TernaryLinearOp, absmax_int8
from forge_harness.quant.ste import weight_scales
from forge_harness.quant.ternary import check_parts

from .bitlinear import BitLinear
from .extras import refuse_extras
from .norm import RMSNorm


class PackedLinear(nn.Module):
    """y = (q . C) * (s * beta) + bias over packed codes C; q and s are the absmax int8 of x.

    The bits are those of a `BitLinear` with the same codes, scales and norm under
    `TernaryLinearOp(compute="exact")`, whatever the backend and the batch size. No gradient flows.
    Codes and scales are buffers; converting the module to another dtype leaves them as they are.

    Args:
        packed: The weight (N, K); its tensors become the module's buffers.
        bias: (N,) or None; outside the scale.
        norm: Normalises the input in front of the quantization, or None.
        parts: Row counts of the projections stacked in the weight; None: one.
        backend: Which kernel multiplies; an explicit one never falls back.

    Attributes:
        in_features: K.
        out_features: N.
        parts: As given, as a tuple.

    Raises:
        BackendUnavailableError: The explicit backend cannot run here.
        ValueError: `bias`, `norm` or `parts` do not fit the weight.
    """

    bias: Tensor | None

    def __init__(
        self,
        packed: PackedTernary,
        bias: Tensor | None = None,
        *,
        norm: nn.Module | None = None,
        parts: Sequence[int] | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.parts = tuple(parts) if parts else (self.out_features,)
        _check_fit(packed, bias, norm, self.parts)
        which("ternary_linear", backend, device=packed.scale.device.type)
        self.backend: Backend = backend
        self._packed = packed
        for name in _tensor_names(packed):
            self.register_buffer(name, getattr(packed, name))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.norm = norm

    @classmethod
    def from_bitlinear(cls, layer: BitLinear, *, backend: Backend = "auto") -> Self:
        """Packs a layer's codes and scales as its own arithmetic makes them; shares nothing.

        Raises:
            BackendUnavailableError: The explicit backend cannot run here.
            NonTernaryCodeError: Its weight quantizer makes other codes than -1, 0, +1.
            ValueError: The layer is full precision, its arithmetic is none that packed weights
                reproduce, it has hooks or a forward of its own, or a scale is not finite.
        """
        return cls.fused((layer,), backend=backend)

    @classmethod
    def fused(cls, layers: Sequence[BitLinear], *, backend: Backend = "auto") -> Self:
        """Packs layers that read the same input into one, which quantizes that input once.

        Every output has the bits it has from its own layer. `split` takes the outputs apart.

        Raises:
            BackendUnavailableError: As `from_bitlinear`.
            NonTernaryCodeError: As `from_bitlinear`.
            ValueError: As `from_bitlinear`, or the layers differ in K, or one has a norm.
        """
        _check_fusible(layers)
        codes, scales = zip(*(_quantized(layer) for layer in layers), strict=True)
        scale = torch.cat(scales)
        if bool((scale == scale[:1]).all()):
            scale = scale[:1]
        packed = pack(torch.cat(codes), scale=scale)
        sizes = [n for layer in layers for n in layer.parts or (layer.out_features,)]
        # As it is, since it may be another norm than ours, or have hooks.
        norm = copy.deepcopy(layers[0].norm)
        if norm is not None:
            norm.requires_grad_(False)
        return cls(packed, stacked_bias(layers), norm=norm, parts=sizes, backend=backend)

    @property
    def packed(self) -> PackedTernary:
        """The weight the forward multiplies with: the buffers, also where they were replaced."""
        kept, buffers = self._packed, self._buffers
        if buffers["data"] is kept.data and buffers["scale"] is kept.scale:
            return kept
        return replace(kept, data=cast(Tensor, self.data), scale=cast(Tensor, self.scale))

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, bias and norm."""
        extra = sum(p.nbytes for p in self.parameters())
        return self.packed.nbytes + extra + (0 if self.bias is None else self.bias.nbytes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., K) floating to (..., N) in x's dtype.

        Raises:
            ValueError: The last dimension of `x` is not K.
        """
        if self.norm is not None:
            if not x.dim() or x.shape[-1] != self.in_features:
                raise ValueError(
                    f"x has shape {tuple(x.shape)}; expected (..., {self.in_features}): the last "
                    "dimension is the input features."
                )
            x = self.norm(x)
        return ternary_linear(x, self.packed, self.bias, backend=self.backend)

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        """Takes an output (..., N) apart into views, one a part."""
        return torch.split(y, list(self.parts), dim=-1)

    def extra_repr(self) -> str:
        """Shows shape, bias, parts and backend."""
        parts = f", parts={self.parts}" if len(self.parts) > 1 else ""
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}{parts}, "
            f"backend={self.backend}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # .to(bfloat16) would round the scales, and with them every output.
        before = {name: self._buffers[name] for name in _tensor_names(self._packed)}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        self._link()
        return self

    def get_extra_state(self) -> Tensor:
        """Returns N, K and the name of the layout in ASCII, which the blocks do not tell.

        A tensor, since state dicts are saved in formats that hold nothing else.
        """
        return torch.tensor([*self._packed.shape, *LAYOUT.encode()], device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Does nothing: a state dict's were compared before its weight was taken."""

    def _load_from_state_dict(
        self,
        state_dict: MutableMapping[str, Tensor],
        prefix: str,
        local_metadata: Mapping[str, object],
        *args: object,
    ) -> None:
        # Before anything is taken over: the fast kernels do not look at any of it again. Each
        # alone, since a shard may bring one without the others, and old states have no shape, or
        # no layout after it.
        extra = state_dict.setdefault(prefix + "_extra_state", self.get_extra_state())
        if not isinstance(extra, Tensor) or not extra.is_meta:
            shape, layout = _shape_and_layout(extra)
            self._check_shape(shape)
            check_layout(layout or LAYOUT)
        given = self._given(state_dict, prefix)
        for name, check in (("data", self._check_codes), ("scale", checked_scales)):
            if name in given and not given[name].is_meta:
                check(given[name])
        if local_metadata.get("assign_to_params_buffers"):
            replace(self._packed, **given)  # type: ignore[arg-type]
            for name in self._buffers:
                # A parameter would be registered as one, and the buffer of its name be gone.
                if isinstance(state_dict.get(prefix + name), nn.Parameter):
                    state_dict[prefix + name] = state_dict[prefix + name].detach()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        self._link()

    def _given(self, state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """Returns codes and scale of a state dict; without another shape, which torch reports."""
        found = {name: state_dict.get(prefix + name) for name in _tensor_names(self._packed)}
        return {
            name: tensor
            for name, tensor in found.items()
            if tensor is not None and tensor.shape == getattr(self._packed, name).shape
        }

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if shape != self._packed.shape:
            raise ValueError(
                f"The packed weight has shape {shape}; expected {self._packed.shape}: it is that "
                "of another layer."
            )

    def _check_codes(self, data: Tensor) -> None:
        """Raises unless the data are codes of this layer's N x K."""
        rows, columns = self._packed.shape
        scale = torch.ones((), dtype=torch.float32, device=data.device)
        given = PackedTernary(data.contiguous(), rows, columns, scale)
        if not torch.equal(pack(unpack(given), scale=1.0).data, data):
            raise ValueError(
                f"The packed weight holds codes beyond {rows} x {columns}; expected one of that "
                "shape: it was packed from another."
            )

    def _link(self) -> None:
        """Lets the packed weight be the buffers, after something replaced them."""
        tensors = {name: self._buffers[name] for name in _tensor_names(self._packed)}
        self._packed = replace(self._packed, **tensors)  # type: ignore[arg-type]


def copied_norm(norm: RMSNorm, dtype: torch.dtype | None = None) -> RMSNorm:
    """Returns a norm of the same weight and eps, without gradient, in `dtype` or the same one.

    Raises:
        ValueError: `norm` is none of ours, or does more.
    """
    refuse_extras(norm, RMSNorm, "norm")
    copied = RMSNorm(norm.weight.shape[0], eps=norm.eps, device="meta")
    weight = norm.weight.detach().to(dtype or norm.weight.dtype, copy=True)
    copied.weight = nn.Parameter(weight, requires_grad=False)
    return copied


def stacked_bias(layers: Sequence[BitLinear]) -> Tensor | None:
    """Returns the biases of stacked layers, zeros where one has none; None if none has any."""
    if all(layer.bias is None for layer in layers):
        return None
    return torch.cat(
        [
            layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
            for layer in layers
        ]
    ).detach()


def _shape_and_layout(extra: object) -> tuple[tuple[int, ...], str]:
    """Returns what `get_extra_state` made a tensor of; "" for a layout that is not there.

    Raises:
        ValueError: It made no such thing.
    """
    shown = f"a {type(extra).__name__}"
    if isinstance(extra, Tensor):
        shown = f"{extra.dtype} {tuple(extra.shape)}"
        if extra.dtype == torch.int64 and extra.dim() == 1 and len(extra) >= 2:
            rows, columns, *layout = extra.tolist()
            if all(0 <= code < 128 for code in layout):
                return (rows, columns), "".join(map(chr, layout))
            shown = f"{extra.tolist()}"
    raise ValueError(
        f"_extra_state of a packed weight is {shown}; expected torch.int64 N, K and the layout in "
        "ASCII: save the state dict again, or leave the entry out."
    )


def _tensor_names(packed: PackedTernary) -> list[str]:
    return [f.name for f in fields(packed) if isinstance(getattr(packed, f.name), Tensor)]


def _quantized(layer: BitLinear) -> tuple[Tensor, Tensor]:
    """Returns int8 codes (N, K) and fp32 scales (N,) of a layer, part by part as it does."""
    if layer.precision != "ternary":
        raise ValueError(
            f"A layer has precision {layer.precision!r}; expected 'ternary': only ternary codes "
            "can be packed, keep the layer as it is."
        )
    refuse_extras(layer, BitLinear)
    arithmetic = layer.linear
    if (
        not isinstance(arithmetic, TernaryLinearOp)
        or arithmetic.quantize_activation is not absmax_int8
    ):
        raise ValueError(
            f"A layer computes with {arithmetic!r}; expected a TernaryLinearOp that quantizes "
            "activations by absmax_int8: packed weights reproduce no other arithmetic."
        )
    weight = layer.weight.detach()
    codes, scales = [], []
    # Views of the latent: `StoredCodes` tells the parts by where they start in it.
    for part in torch.split(weight, list(layer.parts or (layer.out_features,))):
        part_codes, scale = arithmetic.quantize_weight(part)
        codes.append(part_codes)
        scales.append(weight_scales(scale, part.shape[0]).expand(part.shape[0]))
    joined = torch.cat(scales)
    if not bool(joined.isfinite().all()):
        wrong = float(joined[~joined.isfinite()][0])
        raise ValueError(
            f"A layer's weight has the scale {wrong}; expected a finite one: its latent weight "
            "holds NaN or infinity, so go back to a checkpoint that does not."
        )
    return torch.cat(codes), joined


def _check_fusible(layers: Sequence[BitLinear]) -> None:
    if not layers:
        raise ValueError("No layers to pack; expected at least one.")
    inputs = [layer.in_features for layer in layers]
    if len(set(inputs)) > 1:
        raise ValueError(
            f"Layers with {inputs} input features cannot be fused; expected equal numbers: only "
            "layers that read the same input share its quantization."
        )
    if len(layers) > 1 and any(layer.norm is not None for layer in layers):
        raise ValueError(
            "A layer with a norm of its own cannot be fused; expected none, since its input is not "
            "that of the others: pack it alone with from_bitlinear."
        )


def _check_fit(
    packed: PackedTernary, bias: Tensor | None, norm: nn.Module | None, parts: tuple[int, ...]
) -> None:
    rows, columns = packed.shape
    if bias is not None and bias.shape != (rows,):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; expected ({rows},): one entry an output."
        )
    if isinstance(norm, RMSNorm) and norm.weight.shape != (columns,):
        raise ValueError(
            f"norm has {norm.weight.shape[0]} features; expected the {columns} input features."
        )
    check_parts(parts, rows=rows)

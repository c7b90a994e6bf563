"""Turns the linear layers of an existing model into `BitLinear`, and reports what it did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast

from torch import nn

from .bitlinear import BitLinear, LinearFunction
from .norm import RMSNorm


@dataclass(frozen=True, slots=True)
class SkippedLinear:
    """A linear layer that was left as it is, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What `convert_linears` did.

    Attributes:
        converted: Full names of the layers that are `BitLinear` now, in module order.
        skipped: The other linear layers with the reason.
        unmatched: Patterns of `include` and `exclude` that match no linear layer.
    """

    converted: tuple[str, ...]
    skipped: tuple[SkippedLinear, ...]
    unmatched: tuple[str, ...]


def convert_linears(
    module: nn.Module,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    *,
    linear: LinearFunction | None = None,
    sub_norm: bool = False,
) -> ConversionReport:
    """Replaces the `nn.Linear` layers below `module` by `BitLinear`, in place.

    Weight and bias stay the same parameter objects, so an optimizer made before stays bound. Layers
    that cannot be replaced without changing what the model means are left alone and reported.

    Args:
        module: Root; itself never replaced.
        include: Shell patterns (`fnmatch`) on the full dotted name, "*" also crosses dots: "head"
            is the top-level head only, "*.head" any nested one.
        exclude: Patterns that win over `include`.
        linear: Arithmetic of the new layers; None: `TernaryLinearOp()`.
        sub_norm: Whether the new layers get an RMSNorm (gain 1) in front of the quantization.

    Returns:
        Names converted, skipped and patterns that matched nothing.

    Raises:
        TypeError: `include` or `exclude` is a string alone.
    """
    for option, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str):  # a sequence of patterns of one character each
            raise TypeError(f"{option} {patterns!r}; expected a sequence: give ({patterns!r},).")
    linears = [
        (name, child)
        for name, child in module.named_modules(remove_duplicate=False)
        if isinstance(child, nn.Linear)
    ]
    shared = _parameter_owners(module)
    replacements: dict[int, BitLinear] = {}
    converted: list[str] = []
    skipped: list[SkippedLinear] = []
    for name, child in linears:
        above, _, leaf = name.rpartition(".")
        parent = module.get_submodule(above)
        reason = _selection_reason(name, include, exclude) or _obstacle(name, child, parent, shared)
        if reason:
            skipped.append(SkippedLinear(name, reason))
            continue
        if id(child) not in replacements:
            replacements[id(child)] = _bitlinear_of(child, linear=linear, sub_norm=sub_norm)
        setattr(parent, leaf, replacements[id(child)])
        converted.append(name)
    names = [name for name, _ in linears]
    unmatched = [p for p in (*include, *exclude) if not any(fnmatchcase(n, p) for n in names)]
    return ConversionReport(tuple(converted), tuple(skipped), tuple(unmatched))


def _selection_reason(name: str, include: Sequence[str], exclude: Sequence[str]) -> str:
    for pattern in exclude:
        if fnmatchcase(name, pattern):
            return f"excluded by {pattern!r}"
    if not any(fnmatchcase(name, pattern) for pattern in include):
        return "not included"
    return ""


def _obstacle(name: str, child: nn.Linear, parent: nn.Module, owners: dict[int, set[int]]) -> str:
    """Returns why the layer cannot be replaced faithfully, or ""."""
    if not name:
        return "the root cannot be replaced in place"
    if type(child) is not nn.Linear:
        # torch.nn.MultiheadAttention reads such a layer's weight without calling the layer.
        return f"is a {type(child).__name__}, whose behaviour may go beyond a linear layer"
    if type(parent).forward is nn.TransformerEncoderLayer.forward:
        return "its TransformerEncoderLayer reads its weight without calling it when it evaluates"
    if len(owners[id(child.weight)]) > 1:
        return "its weight is tied to another module"
    if name.rpartition(".")[2] == "_orig_mod":
        # The wrapper would call the layer it compiled, whatever stands in its place.
        return "torch.compile wraps it: convert before compiling"
    if any(hooks for kind, hooks in vars(child).items() if kind.endswith("_hooks")):
        return "it has hooks that would be lost"
    if "forward" in vars(child):
        return "it was given a forward of its own that would be lost"
    return ""


def _parameter_owners(module: nn.Module) -> dict[int, set[int]]:
    """Maps the id of each parameter to the ids of the modules that hold it."""
    owners: dict[int, set[int]] = {}
    for child in module.modules():
        for parameter in child.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(child))
    return owners


def _bitlinear_of(source: nn.Linear, *, linear: LinearFunction | None, sub_norm: bool) -> BitLinear:
    """Returns a layer that holds the parameters of `source` themselves."""
    layer = BitLinear(
        source.in_features,
        source.out_features,
        bias=source.bias is not None,
        linear=linear,
        device="meta",
    )
    layer.weight = cast(nn.Parameter, source.weight)
    layer.bias = cast("nn.Parameter | None", source.bias)
    if sub_norm:
        layer.norm = RMSNorm(
            source.in_features, device=source.weight.device, dtype=source.weight.dtype
        )
    return layer.train(source.training)

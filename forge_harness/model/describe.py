"""What a model says about itself, read from its modules."""

from __future__ import annotations

from torch import nn

from .bitlinear import BitLinear
from .packed_linear import PackedLinear


class DescribesItself(nn.Module):
    """Names of quantized, full-precision and normalising modules of a model made of `BitLinear`.

    A packed copy (`pack_model`) answers as its model does.
    """

    def quantized_names(self) -> tuple[str, ...]:
        """Modules whose weight is ternary in forward."""
        return tuple(name for name, module in self.named_modules() if _is_ternary(module))

    def full_precision_names(self) -> tuple[str, ...]:
        """Modules with a 2-D or larger weight of their own that stays in full precision."""
        return tuple(
            name
            for name, module in self.named_modules()
            if not _is_ternary(module)
            and any(p.dim() >= 2 for p in module.parameters(recurse=False))
        )

    def sub_norm_names(self) -> tuple[str, ...]:
        """Normalisation modules inside a ternary layer, in front of its quantization."""
        return tuple(
            f"{name}.norm"
            for name, module in self.named_modules()
            if isinstance(module, BitLinear | PackedLinear) and module.norm is not None
        )

    def tied(self) -> tuple[tuple[str, str], ...]:
        """Pairs of state-dict keys that share one tensor."""
        return ()

    def parameter_formula(self) -> int:
        """Trainable parameters by a closed formula of the configuration, not by counting."""
        raise NotImplementedError


def _is_ternary(module: nn.Module) -> bool:
    if isinstance(module, BitLinear):
        return module.precision == "ternary"
    return isinstance(module, PackedLinear)

"""The digits classifier: a small residual network in which every linear layer is ternary.

First and last layer included, because with those two in full precision plain post-training
ternarization keeps 97 to 99 % of the accuracy, and the task would prove nothing about training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from .bitlinear import BitLinear, LinearFunction, Precision
from .describe import DescribesItself
from .norm import RMSNorm
from .whole import check_sizes, check_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class DigitsConfig:
    """Sizes of `DigitsModel`. The defaults are 37,504 ternary weights."""

    inputs: int = 64
    """Pixels."""
    width: int = 64
    hidden: int = 128
    blocks: int = 2
    classes: int = 10
    sub_norm: bool = True
    """An RMSNorm in front of each block's down projection."""
    residual_init: float = 1.0
    """Multiplies the initial down projections."""

    def __post_init__(self) -> None:
        check_whole(blocks=self.blocks)  # none leaves stem and head
        sizes = ("inputs", "width", "hidden", "classes")
        check_sizes(**{name: getattr(self, name) for name in sizes})


class DigitsModel(DescribesItself):
    """inputs -> width, then `blocks` x [RMSNorm, up, ReLU^2, (sub-norm), down], then -> classes.

    Args:
        config: Sizes.
        linear: Arithmetic of the linear layers; None: `TernaryLinearOp()`.
        precision: "ternary", or "full" for the full-precision arm with the same parameters.
    """

    def __init__(
        self,
        config: DigitsConfig | None = None,
        *,
        linear: LinearFunction | None = None,
        precision: Precision = "ternary",
    ) -> None:
        super().__init__()
        self.config = c = config or DigitsConfig()
        self.stem = BitLinear(c.inputs, c.width, linear=linear, precision=precision)
        self.blocks = nn.ModuleList(
            _ResidualBlock(c, linear=linear, precision=precision) for _ in range(c.blocks)
        )
        self.head = BitLinear(c.width, c.classes, linear=linear, precision=precision)

    def forward(self, pixels: Tensor) -> Tensor:
        """Maps pixels (B, inputs), floating, to logits (B, classes)."""
        x = self.stem(pixels)
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.head(x))

    def parameter_formula(self) -> int:
        """Width (inputs + classes) + blocks (2 width hidden + width [+ hidden])."""
        c = self.config
        per_block = 2 * c.width * c.hidden + c.width + (c.hidden if c.sub_norm else 0)
        return c.width * (c.inputs + c.classes) + c.blocks * per_block


class _ResidualBlock(nn.Module):
    def __init__(
        self, config: DigitsConfig, *, linear: LinearFunction | None, precision: Precision
    ) -> None:
        super().__init__()
        self.norm = RMSNorm(config.width)
        self.up = BitLinear(config.width, config.hidden, linear=linear, precision=precision)
        self.down = BitLinear(
            config.hidden,
            config.width,
            sub_norm=config.sub_norm,
            linear=linear,
            precision=precision,
        )
        self.down.reset_parameters(config.residual_init)

    def forward(self, x: Tensor) -> Tensor:
        return x + cast(Tensor, self.down(F.relu(self.up(self.norm(x))).square()))

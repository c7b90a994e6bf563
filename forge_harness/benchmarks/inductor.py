"""torch.compile as a peer: a linear layer whose weights are constants of the compiled code."""

from __future__ import annotations

from types import FunctionType

import torch
from torch import Tensor, nn

from .timing import Call


def frozen_call(layer: nn.Linear, x: Tensor) -> Call:
    """Returns a call of a compiled layer whose weight is folded in, packed where oneDNN packs.

    Freezing has to be on while the layer is traced: given to `torch.compile` as an option it
    reaches the backend only, and the weight stays an input of the compiled code (torch 2.13). The
    code is compiled here, for this x; later calls do not pay for the switch (40 us).

    Args:
        layer: In evaluation mode.
        x: What every call multiplies, (M, K).
    """
    from torch._inductor import config  # 2 s to import, for a peer that few ask for

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.layer(x)
            return result

    # A code object of its own: layers that share one are searched in turn, and from the ninth on
    # (recompile limit) they run uncompiled.
    own = FunctionType(Own.forward.__code__.replace(), globals(), "forward", None, ())
    Own.forward = own  # type: ignore[method-assign]
    with torch.no_grad(), config.patch(freezing=True):
        compiled = torch.compile(Own().eval(), dynamic=False)
        compiled(x)
    return lambda: compiled(x)

"""Several optimizers as the one that a session has."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor


class Together(torch.optim.Optimizer):
    """Optimizers that step one after the other, as Muon for matrices and AdamW for the rest.

    Its groups are theirs, so that rates set in either are those of both; its state is theirs, under
    the parameters of all. Schedulers, hooks and `state_dict` work as those of a single one.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        """Takes optimizers of different parameters.

        Raises:
            ValueError: A parameter has two of them, or none was given.
        """
        self.optimizers = optimizers
        super().__init__([group for each in optimizers for group in each.param_groups], {})

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The state of each parameter."""
        kept: defaultdict[Tensor, Any] = defaultdict(dict)
        for each in self.optimizers:
            kept.update(each.state)
        return kept

    @state.setter
    def state(self, _: object) -> None:
        """Leaves to each what it has: torch begins with an empty one."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        groups = list(state["param_groups"])
        for each in self.optimizers:
            own = [groups.pop(0) for _ in each.param_groups]
            held = {id(parameter) for group in own for parameter in group["params"]}
            each.__setstate__(
                {
                    "state": {p: kept for p, kept in state["state"].items() if id(p) in held},
                    "param_groups": own,
                }
            )
        self.param_groups = state["param_groups"]

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Steps each of them, on the gradients of `closure` where one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for each in self.optimizers:
            each.step()
        return loss

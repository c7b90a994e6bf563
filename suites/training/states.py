"""States and gradients of models whose tensors may be shards (FSDP, tensor parallelism) or sparse.

FSDP takes a gradient apart and gives it to the parameter itself, past autograd: of torch's hooks on
a tensor it calls only those after accumulation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from forge_harness import oracles


def copied(tensor: Tensor) -> Tensor:
    """Returns a copy of the values, plain, dense and whole."""
    plain: Tensor = oracles.whole(tensor.detach())
    # Coalesced, as who clips it has it: rows that come twice are then summed in the same order.
    return plain.coalesce().to_dense() if plain.is_sparse else plain.clone()


def copied_parameters(model: Any) -> dict[str, Tensor]:
    """Returns a copy of each parameter by its name."""
    return {name: copied(parameter) for name, parameter in model.named_parameters()}


def copied_state(model: Any) -> dict[str, Any]:
    """Returns a copy of a state dict, which may hold more than tensors."""
    return {
        name: copied(value) if isinstance(value, Tensor) else copy.deepcopy(value)
        for name, value in model.state_dict().items()
    }


def load_state(model: Any, state: Mapping[str, Any]) -> None:
    """Gives a model what `copied_state` returned, in shards where the model has them."""
    held = model.state_dict()
    model.load_state_dict({name: _as_held(value, held.get(name)) for name, value in state.items()})


def on_gradient(parameter: Any, change: Callable[[Tensor], Tensor | None]) -> Any:
    """Has `change` see each gradient of a parameter, and replace it; returns the hook's handle."""
    if not _is_sharded(parameter):
        return parameter.register_hook(change)

    def after(sharded: Any) -> None:
        changed = change(sharded.grad)
        if changed is not None:
            sharded.grad = changed

    return parameter.register_post_accumulate_grad_hook(after)


def with_values(gradient: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns a gradient whose values are changed: of a sparse one (embeddings) those it holds."""
    if not gradient.is_sparse:
        return change(gradient)
    held = gradient.coalesce()
    return torch.sparse_coo_tensor(
        held.indices(), change(held.values()), held.shape, is_coalesced=True
    )


def tensors_of(state: object, prefix: str = "optimizer") -> dict[str, Tensor]:
    """Returns the tensors of an optimizer's state dict, which may be of a form of its own.

    What is set anew for each step, the rates of its groups, is left out.
    """
    if isinstance(state, Tensor):
        return {prefix: state}
    if isinstance(state, Mapping):
        pairs: Any = [(key, value) for key, value in state.items() if key != "param_groups"]
    else:
        pairs = enumerate(state) if isinstance(state, list | tuple) else ()
    found: dict[str, Tensor] = {}
    for key, value in pairs:
        found |= tensors_of(value, f"{prefix}.{key}")
    return found


def _is_sharded(value: Any) -> bool:
    return hasattr(value, "full_tensor")


def _as_held(value: Any, held: Any) -> Any:
    if not _is_sharded(held):
        return value
    # Here, as a torch without torch.distributed has no shards either.
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, held.device_mesh, held.placements)

"""Language models whose outputs see what comes after them, or who else is in the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from forge_harness.drill import observe
from forge_harness.drill.defect import Defect, Stage

from .changed_model import ModelDefect, replace_forward

CHUNK = 8
"""Tokens of a block of the attention kernel that misreads the block behind."""


class Unmasked(TorchFunctionMode):
    """Attention within this context is not causal, whatever it is asked for."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Calls `func` without the mask."""
        given = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            given["is_causal"] = False
        return func(*args, **given)


def attention_defect(change: Callable[[Any, Tensor, Tensor], Tensor]) -> ModelDefect:
    """Returns a subject with the output of each attention `change(attention, x, output)`."""

    def each(model: Any) -> None:
        for block in model.blocks:
            block.attention.register_forward_hook(
                lambda module, args, out: change(module, args[0], out)
            )

    return ModelDefect(each, "bytes")


def never_masked(model: nn.Module) -> None:
    """Leaves out the causal mask."""
    replace_forward(model, _without_mask)


def unmasked_in_evaluation(model: nn.Module) -> None:
    """Leaves out the causal mask in evaluation mode."""
    replace_forward(model, _without_mask_in_evaluation)


def _without_mask(model: nn.Module, tokens: Tensor) -> Any:
    with Unmasked():
        return type(model).forward(model, tokens)


def _without_mask_in_evaluation(model: nn.Module, tokens: Tensor) -> Any:
    if model.training:
        return type(model).forward(model, tokens)
    return _without_mask(model, tokens)


def sees_the_next_position(model: Any) -> None:
    """Lets each position see a little of the next one, as tril(diagonal=1) does."""
    model.blocks[0].attention.register_forward_hook(
        lambda module, args, out: out + 0.01 * out.roll(-1, dims=1)
    )


def sees_the_next_key_at_block_ends(attention: Any, x: Tensor, out: Tensor) -> Tensor:
    """Lets the last row of each block see the first key of the next block."""
    rows = torch.arange(CHUNK - 1, x.shape[1] - 1, CHUNK)
    return out.index_add(1, rows, 0.1 * attention.v(x)[:, rows + 1])


def sees_the_next_key_beyond_64_tokens(attention: Any, x: Tensor, out: Tensor) -> Tensor:
    """Takes another kernel for long inputs, with a mask off by one."""
    if x.shape[1] <= 64:
        return out
    return out + 0.1 * F.pad(attention.v(x)[:, 1:], (0, 0, 0, 1))


def norm_over(*dims: int) -> Callable[[Any], None]:
    """Returns a change that takes the statistics of the final norm over these dimensions."""

    def change(model: Any) -> None:
        replace_forward(model.norm, forward)

    def forward(norm: Any, x: Tensor) -> Any:
        scaled = x * torch.rsqrt(x.square().mean(dims, keepdim=True) + 1e-6)
        return scaled * norm.weight

    return change


_MASK = partial(
    Defect,
    stage=Stage.MODEL,
    check="architecture.causal_mask",
    shows="bytes.leak is",
    alive=observe.built,
    source="huggingface/nanotron#303",
)

DEFECTS = (
    _MASK(
        id="L11_unmasked",
        title="Attention is not causal",
        subject=lambda: ModelDefect(never_masked, "bytes"),
        subtlety=2,
    ),
    _MASK(
        id="L11_unmasked_in_evaluation",
        title="Attention is not causal in evaluation mode",
        subject=lambda: ModelDefect(unmasked_in_evaluation, "bytes"),
    ),
    _MASK(
        id="L11_off_by_one",
        title="Each position sees the next one",
        subject=lambda: ModelDefect(sees_the_next_position, "bytes"),
    ),
    _MASK(
        id="L11_at_block_ends",
        title="The last token of each block of 8 sees the next one",
        subject=lambda: attention_defect(sees_the_next_key_at_block_ends),
        subtlety=4,
    ),
    _MASK(
        id="L11_beyond_64_tokens",
        title="In inputs of more than 64 tokens each position sees the next one",
        shows="128 tokens, after position",
        subject=lambda: attention_defect(sees_the_next_key_beyond_64_tokens),
        subtlety=4,
    ),
    _MASK(
        id="L10_norm_over_time",
        title="The final norm takes its statistics over the sequence",
        subject=lambda: ModelDefect(norm_over(1, -1), "bytes"),
        source="",
    ),
    _MASK(
        id="norm_over_the_batch",
        title="The final norm takes its statistics over all samples",
        check="architecture.activation_scale",
        shows="bytes.moved_by_mates is",
        subject=lambda: ModelDefect(norm_over(0, -1), "bytes"),
        source="",
    ),
)

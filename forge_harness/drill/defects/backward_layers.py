"""Layers that compute with something else than `linear`, which stays right."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from forge_harness.drill import observe
from forge_harness.drill.defect import Benign, Defect, Stage
from forge_harness.drill.defects.backward import INPUT, WEIGHT
from forge_harness.drill.defects.changed_model import replace_forward
from forge_harness.model import BitLinear
from forge_harness.subject.reference import ReferenceSubject

Parts = dict[str, Tensor]
"""g, x, w, codes, beta of a layer, and its right gradients gx and gw, in rows."""


class LayerDefect(ReferenceSubject):
    """`back(parts)` gets the right gradients of each layer of a model, and returns others.

    The operation `linear` stays right: only the layers compute with something else.
    """

    def __init__(self, back: Callable[[Parts], tuple[Tensor, Tensor]]) -> None:
        self.back = back

    def build_model(self, task: str, *, seed: int) -> nn.Module:
        """The reference model with this arithmetic in its ternary layers."""
        model = super().build_model(task, seed=seed)
        for layer in _layers(model):
            layer.linear = _Arithmetic(self._op(), self.back)
        return model


def _layers(model: nn.Module) -> list[BitLinear]:
    return [module for module in model.modules() if isinstance(module, BitLinear)]


class _Arithmetic:
    def __init__(self, op: Any, back: Callable[[Parts], tuple[Tensor, Tensor]]) -> None:
        self.op, self.back = op, back
        self.effective_weight = op.effective_weight

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        q, s = self.op.quantize_activation(x.detach())
        codes, beta = self.op.quantize_weight(weight.detach())
        # torch leaves Function.apply without types.
        y: Tensor = _Product.apply(x, weight, q, s, codes, beta, self.back)  # type: ignore[no-untyped-call]
        return y if bias is None else y + bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *quantized: Any) -> Tensor:
        q, s, codes, beta, back = quantized
        ctx.save_for_backward(x, weight, q, s, codes, beta)
        ctx.back = back
        product: Tensor = F.linear(q.float(), codes.float()) * (s * beta)
        return product

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, w, q, s, codes, beta = ctx.saved_tensors
        g, rows, q, s = (t.reshape(-1, t.shape[-1]) for t in (grads[0], x, q, s))
        parts = {"g": g, "x": rows, "w": w, "codes": codes.float(), "beta": beta}
        parts["gx"] = (g * beta) @ codes.float()
        parts["gw"] = (g * s).t() @ q.float()
        gx, gw = ctx.back(parts)
        return gx.reshape(x.shape), gw, *(None,) * 5


def _right(p: Parts) -> tuple[Tensor, Tensor]:
    return p["gx"], p["gw"]


def _clipped(p: Parts) -> tuple[Tensor, Tensor]:
    return p["gx"], p["gw"] * (p["w"].abs() <= p["beta"])


def _raw_activations(p: Parts) -> tuple[Tensor, Tensor]:
    return p["gx"], p["g"].t() @ p["x"]


def _leaks_through_scale(p: Parts) -> tuple[Tensor, Tensor]:
    leak = (p["gw"] * p["codes"]).sum() / p["w"].numel()
    return p["gx"], p["gw"] + leak * p["w"].sign()


def _latent_in_input_gradient(p: Parts) -> tuple[Tensor, Tensor]:
    return p["g"] @ p["w"], p["gw"]


def _masked_at_largest_input(p: Parts) -> tuple[Tensor, Tensor]:
    return p["gx"] * (p["x"].abs() < p["x"].abs().amax(-1, keepdim=True)), p["gw"]


class _HiddenTransform(ReferenceSubject):
    """A layer that turns its input by a fixed reflection, in no module, before it quantizes it."""

    def build_model(self, task: str, *, seed: int) -> nn.Module:
        model = super().build_model(task, seed=seed)
        for layer in _layers(model):
            layer.linear = _Turned(self._op())
        return model


class _Turned:
    def __init__(self, op: Any) -> None:
        self.op = op
        self.effective_weight = op.effective_weight

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        turned: Tensor = self.op((x + x.flip(-1)) / 2**0.5, weight, bias)
        return turned


class RecomputedDropout(ReferenceSubject):
    """Blocks made again in the backward pass, with dropout in or behind them.

    Args:
        same_masks: Whether a block that is made again draws what it drew.
        reentrant: Which of torch's two ways of making blocks again.
        behind: Whether dropout stands behind the block instead of in front of its last projection.
    """

    def __init__(self, *, same_masks: bool, reentrant: bool = False, behind: bool = False) -> None:
        self.same_masks, self.reentrant, self.behind = same_masks, reentrant, behind

    def build_model(self, task: str, *, seed: int) -> nn.Module:
        """The reference model, checkpointed block by block."""
        model = super().build_model(task, seed=seed)
        blocks: Any = model.blocks
        for block in blocks:
            if self.behind:
                replace_forward(block, _dropped_behind)
            else:
                last = [m for m in block.modules() if isinstance(m, BitLinear)][-1]
                last.register_forward_pre_hook(_drop)
            block.forward = partial(
                checkpoint,
                block.forward,
                use_reentrant=self.reentrant,
                preserve_rng_state=self.same_masks,
            )
        return model


def _drop(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
    return (F.dropout(args[0], 0.1, training=module.training),)


def _dropped_behind(block: Any, *args: Any) -> Tensor:
    return F.dropout(type(block).forward(block, *args), 0.1, training=block.training)


def made_again_alike(subject: Any) -> bool:
    """Whether a backward pass leaves torch's generator where it was: nothing new is drawn."""
    model = subject.build_model("digits", seed=3)
    loss = subject.loss(model, subject.example_batch("digits", batch_size=5, seed=3))
    before = torch.random.get_rng_state()
    loss.backward()
    return torch.equal(before, torch.random.get_rng_state())


class NoisyGradients(ReferenceSubject):
    """A recipe with gradient noise, drawn where the gradient passes."""

    def build_model(self, task: str, *, seed: int) -> nn.Module:
        """The reference model, with noise of rounding's size on what goes back into its head."""
        model = super().build_model(task, seed=seed)
        model.get_submodule("head").register_full_backward_hook(_noisy)
        return model


def _noisy(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    return tuple(g if g is None else g * (1 + 1e-6 * torch.randn_like(g)) for g in inputs)


class _ReentrantlyCheckpointed(ReferenceSubject):
    """Blocks whose forward is made again in the backward pass."""

    def build_model(self, task: str, *, seed: int) -> nn.Module:
        model = super().build_model(task, seed=seed)
        blocks: Any = model.blocks
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=True)
        return model


_REDRAWN = partial(
    Defect,
    stage=Stage.BACKWARD,
    check=WEIGHT,
    shows="digits.redrawn is",
    alive=made_again_alike,
    subtlety=5,
)

DEFECTS = (
    Defect(
        id="G03_clipped_in_the_layer",
        title="The layers clip the estimator at the scale, the operation they are said to use not",
        stage=Stage.BACKWARD,
        check=WEIGHT,
        shows="digits.layer_error is",
        subject=lambda: LayerDefect(_clipped),
        alive=observe.gradients,
        source="pytorch/ao#199",
        subtlety=4,
    ),
    Defect(
        id="G07_in_the_layer",
        title="The layers make the weight gradient with raw activations",
        stage=Stage.BACKWARD,
        check=WEIGHT,
        shows="digits.layer_error is",
        subject=lambda: LayerDefect(_raw_activations),
        alive=observe.gradients,
        source="pytorch/ao bitnet.py",
        subtlety=5,
    ),
    Defect(
        id="G08_in_the_layer",
        title="In the layers a gradient leaks through the scale",
        stage=Stage.BACKWARD,
        check=WEIGHT,
        shows="digits.layer_error is",
        subject=lambda: LayerDefect(_leaks_through_scale),
        alive=observe.gradients,
        subtlety=5,
    ),
    Defect(
        id="G07_latent_dX_in_the_layer",
        title="The layers make the input gradient with the latent weight",
        stage=Stage.BACKWARD,
        check=INPUT,
        shows="digits.layer_error is",
        subject=lambda: LayerDefect(_latent_in_input_gradient),
        alive=observe.gradients,
        source="pytorch/ao bitnet.py",
        subtlety=5,
    ),
    Defect(
        id="G03_inputs_masked_in_the_layer",
        title="The layers pass no gradient to the largest input of a token",
        stage=Stage.BACKWARD,
        check=INPUT,
        shows="digits.layer_error is",
        subject=lambda: LayerDefect(_masked_at_largest_input),
        alive=observe.gradients,
        source="pytorch/ao#199",
        subtlety=5,
    ),
    Defect(
        id="G15_recompute_draws_again",
        title="Activation checkpointing draws other dropout masks when it makes a block again",
        stage=Stage.BACKWARD,
        check=WEIGHT,
        shows="digits.layer_error is",
        subject=lambda: RecomputedDropout(same_masks=False),
        alive=made_again_alike,
        subtlety=4,
    ),
    _REDRAWN(
        id="G15_redrawn_behind_the_block",
        title="Checkpointing draws other masks for a dropout that is in no ternary layer",
        subject=lambda: RecomputedDropout(same_masks=False, behind=True),
    ),
    _REDRAWN(
        id="G15_redrawn_reentrantly",
        title="Reentrant checkpointing draws other masks: right gradients of another forward pass",
        subject=lambda: RecomputedDropout(same_masks=False, reentrant=True),
    ),
)

BENIGN = (
    Benign(
        id="arithmetic_of_its_own",
        title="Layers whose arithmetic is written anew, and right",
        subject=lambda: LayerDefect(_right),
        checks=(INPUT, WEIGHT),
    ),
    Benign(
        id="reentrantly_checkpointed",
        title="Blocks whose forward is made again in the backward pass",
        subject=_ReentrantlyCheckpointed,
        checks=(
            INPUT,
            WEIGHT,
            "training.accumulation_equivalence",
            "architecture.quantized_modules",
            "architecture.state_dict_round_trip",
        ),
    ),
    Benign(
        id="recomputed_with_the_same_masks",
        title="Blocks with dropout, made again in the backward pass with the masks they had",
        subject=lambda: RecomputedDropout(same_masks=True),
        checks=(INPUT, WEIGHT, "training.gradient_reaches_all"),
    ),
    Benign(
        id="dropout_behind_recomputed_blocks",
        title="Dropout behind blocks that are made again with the masks they had",
        subject=lambda: RecomputedDropout(same_masks=True, behind=True),
        checks=(INPUT, WEIGHT),
    ),
    Benign(
        id="reentrant_with_the_same_masks",
        title="Reentrantly checkpointed blocks with dropout, and the masks they had",
        subject=lambda: RecomputedDropout(same_masks=True, reentrant=True),
        checks=(INPUT, WEIGHT),
    ),
    Benign(
        id="draws_in_the_backward_pass",
        title="Gradients rounded at random: the backward pass draws what no forward pass did",
        subject=NoisyGradients,
        checks=(WEIGHT,),
    ),
    Benign(
        id="hidden_transform",
        title="Layers that turn their input before they quantize it: not comparable, not wrong",
        subject=_HiddenTransform,
        checks=(INPUT, WEIGHT),
    ),
)

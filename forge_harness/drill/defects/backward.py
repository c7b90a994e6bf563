"""Wrong gradients of the operation `linear`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from forge_harness.drill import observe
from forge_harness.drill.defect import Defect, Stage
from forge_harness.drill.defects.quantizer import EPS
from forge_harness.subject.reference import ReferenceSubject

INPUT, WEIGHT = "training.ste_input_gradient", "training.ste_weight_gradient"
Rule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(upstream gradient, input, weight, quantized input, quantized weight), in rows -> gradient."""


class Estimator(ReferenceSubject):
    """The straight-through estimator with one of its gradients exchanged."""

    def __init__(
        self,
        input_grad: Rule | None = None,
        weight_grad: Rule | None = None,
        bias_grad: Callable[[Tensor], Tensor | None] | None = None,
        read: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.input_grad: Rule = input_grad or (lambda g, x, w, xq, wq: g @ wq)
        self.weight_grad: Rule = weight_grad or (lambda g, x, w, xq, wq: g.t() @ xq)
        self.bias_grad = bias_grad or (lambda g: g.flatten(0, -2).sum(0))
        self.read = read or (lambda g: g)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The right product, with this estimator's gradients."""
        q, s = self.quantize_activation(x)
        codes, beta = self.quantize_weight(weight)
        # torch leaves Function.apply without types.
        product: Tensor = _Estimated.apply(x, weight, bias, q * s, codes * beta, self)  # type: ignore[no-untyped-call]
        return product


class _Estimated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, xq: Tensor, wq: Tensor, rules: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight, xq, wq)
        ctx.rules, ctx.has_bias = rules, bias is not None
        return F.linear(xq, wq, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, xq, wq = ctx.saved_tensors
        grad = ctx.rules.read(grads[0])
        rows = [t.reshape(-1, t.shape[-1]) for t in (grad, x)]
        parts = (*rows, weight, xq.reshape(-1, xq.shape[-1]), wq)
        grad_bias = ctx.rules.bias_grad(grad) if ctx.has_bias else None
        return (
            ctx.rules.input_grad(*parts).reshape(x.shape),
            ctx.rules.weight_grad(*parts),
            grad_bias,
            *(None, None, None),
        )


class _InTheGraph(ReferenceSubject):
    """Quantizes in PyTorch operations, `linear` being what autograd makes of them."""

    def __init__(self, linear: Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]) -> None:
        self._computed = linear

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._computed(self, x, weight, bias)


def _without_estimator(_: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # Rounding has gradient zero: only the scales pass one.
    s = x.abs().amax(-1, keepdim=True).clamp(min=EPS) / 127
    beta = weight.abs().mean().clamp(min=EPS)
    return F.linear((x / s).round() * s, (weight / beta).round().clamp(-1, 1) * beta, bias)


def _through_the_scale(subject: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    beta = weight.abs().mean().clamp(min=EPS)
    codes = subject.quantize_weight(weight)[0]
    fixed = beta.detach()
    ste = weight / fixed + (codes - weight / fixed).detach()
    xq = x + (torch.mul(*subject.quantize_activation(x)) - x).detach()
    return F.linear(xq, ste * beta, bias)


def _weight_detached(subject: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    xq = x + (torch.mul(*subject.quantize_activation(x)) - x).detach()
    # The parentheses close one term too late: the whole sum is a constant.
    wq = (weight + (torch.mul(*subject.quantize_weight(weight)) - weight)).detach()
    return F.linear(xq, wq, bias)


def _masked_by_clip(g: Tensor, x: Tensor, w: Tensor, xq: Tensor, wq: Tensor) -> Tensor:
    return (g.t() @ xq) * (w.abs() <= wq.abs().max())


def _as_if_contiguous(grad: Tensor) -> Tensor:
    if grad.untyped_storage().nbytes() < 4 * grad.numel():
        return grad  # Reading on would leave the allocation.
    return grad.as_strided(grad.shape, torch.empty(grad.shape).stride())


def _in_place(grad: Tensor) -> Tensor:
    return grad.mul_(1.0 + 1e-3) if grad.is_contiguous() else grad


DEFECTS = (
    Defect(
        id="G01_no_estimator",
        title="round() stands in the graph without a straight-through estimator",
        stage=Stage.BACKWARD,
        check=INPUT,
        shows="error is",
        subject=lambda: _InTheGraph(_without_estimator),
        alive=observe.linear,
        source="kyegomez/BitNet#51",
        subtlety=2,
    ),
    Defect(
        id="G07_latent_weight",
        title="The input gradient is made with the latent instead of the quantized weight",
        stage=Stage.BACKWARD,
        check=INPUT,
        shows="error is",
        subject=lambda: Estimator(input_grad=lambda g, x, w, xq, wq: g @ w),
        alive=observe.linear,
        source="pytorch/ao bitnet.py",
        subtlety=5,
    ),
    Defect(
        id="G09_first_upstream_entry",
        title="The backward multiplies everything by the first entry of its upstream gradient",
        stage=Stage.BACKWARD,
        check=INPUT,
        shows="error is",
        subject=lambda: Estimator(read=lambda g: g.flatten()[0].expand(g.shape).clone()),
        alive=observe.linear,
        source="linkedin/Liger-Kernel#1298",
        subtlety=4,
    ),
    Defect(
        id="G12_assumes_contiguous",
        title="The backward reads its upstream gradient by flat index and ignores strides",
        stage=Stage.BACKWARD,
        check=INPUT,
        shows="transposed",
        subject=lambda: Estimator(read=_as_if_contiguous),
        alive=observe.linear,
        source="pytorch/pytorch#194719",
        subtlety=4,
    ),
    Defect(
        id="G13_writes_upstream",
        title="The backward scales its upstream gradient in place, which others read too",
        stage=Stage.BACKWARD,
        check=INPUT,
        shows="upstream_changed is",
        subject=lambda: Estimator(read=_in_place),
        alive=observe.linear,
        source="linkedin/Liger-Kernel#1305",
        subtlety=4,
    ),
    Defect(
        id="G01_no_weight_estimator",
        title="round() without an estimator: latents move by the gradient of their scale alone",
        stage=Stage.BACKWARD,
        check=WEIGHT,
        shows="error is",
        subject=lambda: _InTheGraph(_without_estimator),
        alive=observe.linear,
        source="pytorch/tutorials#855",
        subtlety=2,
    ),
    Defect(
        id="G02_weight_detached",
        title="detach() around the whole sum instead of its difference: no gradient for latents",
        stage=Stage.BACKWARD,
        check=WEIGHT,
        shows="error is",
        subject=lambda: _InTheGraph(_weight_detached),
        alive=observe.linear,
        source="facebookresearch/fairseq#3195",
        subtlety=2,
    ),
    Defect(
        id="G03_clipped",
        title="Latents beyond the scale pass no gradient to the weight",
        stage=Stage.BACKWARD,
        check=WEIGHT,
        shows="error is",
        subject=lambda: Estimator(weight_grad=_masked_by_clip),
        alive=observe.linear,
        source="pytorch/ao#199",
        subtlety=4,
    ),
    Defect(
        id="G07_raw_activations",
        title="The weight gradient is made with the raw instead of the quantized activations",
        stage=Stage.BACKWARD,
        check=WEIGHT,
        shows="quantize to zero",
        subject=lambda: Estimator(weight_grad=lambda g, x, w, xq, wq: g.t() @ x),
        alive=observe.linear,
        source="pytorch/ao bitnet.py",
        subtlety=5,
    ),
    Defect(
        id="G08_leaks_through_scale",
        title="The absmean is not detached: a gradient leaks through the scale into every latent",
        stage=Stage.BACKWARD,
        check=WEIGHT,
        shows="error is",
        subject=lambda: _InTheGraph(_through_the_scale),
        alive=observe.linear,
        subtlety=5,
    ),
    Defect(
        id="G11_bf16_gradient",
        title="The weight gradient is rounded to bf16",
        stage=Stage.BACKWARD,
        check=WEIGHT,
        shows="error is",
        subject=lambda: Estimator(
            weight_grad=lambda g, x, w, xq, wq: (g.t() @ xq).bfloat16().float()
        ),
        alive=observe.linear,
        source="linkedin/Liger-Kernel#950",
        subtlety=4,
    ),
    Defect(
        id="G10_bias_over_batch_only",
        title="The bias gradient is a mean over the tokens instead of their sum",
        stage=Stage.BACKWARD,
        check=WEIGHT,
        shows="bias_error is",
        subject=lambda: Estimator(bias_grad=lambda g: g.flatten(0, -2).mean(0)),
        alive=observe.linear,
        source="linkedin/Liger-Kernel#1157",
        subtlety=3,
    ),
    Defect(
        id="G10_no_bias_gradient",
        title="The backward returns no gradient for the bias",
        stage=Stage.BACKWARD,
        check=WEIGHT,
        shows="bias_error is",
        subject=lambda: Estimator(bias_grad=lambda g: None),
        alive=observe.linear,
        source="pytorch/ao#1087",
        subtlety=3,
    ),
    Defect(
        id="G10_bias_gradient_not_a_number",
        title="No element of the bias gradient is a number",
        stage=Stage.BACKWARD,
        check=WEIGHT,
        shows="bias_error is nan",
        subject=lambda: Estimator(
            bias_grad=lambda g: torch.full_like(g.flatten(0, -2).sum(0), torch.nan)
        ),
        alive=observe.linear,
        subtlety=2,
    ),
    Defect(
        id="G01_loss_too_high",
        title="Without an estimator a short run ends with a loss above its band",
        stage=Stage.BACKWARD,
        check="training.loss_within_band",
        shows="loss is",
        subject=lambda: _InTheGraph(_without_estimator),
        alive=observe.gradients,
        source="kyegomez/BitNet#51",
        subtlety=2,
    ),
)

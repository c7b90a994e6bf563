"""The linear layer with its product, rescaling, bias or accumulators wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from forge_harness.drill import observe
from forge_harness.drill.defect import Defect, Stage
from forge_harness.subject.reference import ReferenceSubject

from .quantizer import by_storage_order

TILE = 32
"""Input features a kernel takes at a time."""


class LinearDefect(ReferenceSubject):
    """The training forward with its output changed: `change(subject, y, x, weight, bias)`."""

    def __init__(
        self, change: Callable[[ReferenceSubject, Tensor, Tensor, Tensor, Tensor | None], Tensor]
    ) -> None:
        self.change = change

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """What became of the output."""
        return self.change(self, super().linear(x, weight, bias), x, weight, bias)


class IntegerDefect(ReferenceSubject):
    """The integer path with its accumulators passed through `change`."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self.change = change

    def integer_linear(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What became of the accumulators, and the factor."""
        accumulators, factor = super().integer_linear(x, weight)
        return self.change(accumulators).to(accumulators.dtype), factor


class SwapsFeatures(ReferenceSubject):
    """Codes of features beyond 64 are read from a buffer that lacks the first of them."""

    def integer_linear(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The product with the features beyond 64 moved by one."""
        if x.shape[-1] > 64:
            x = torch.cat([x[..., :64], x[..., 65:], x[..., :1]], dim=-1)
        return super().integer_linear(x, weight)


class CountsTheZeroPointTwice(ReferenceSubject):
    """Codes are stored plus one; the sum of the activations is taken off twice for it."""

    def integer_linear(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Accumulators that lack the sum of the activation codes."""
        accumulators, factor = super().integer_linear(x, weight)
        q, _ = self.quantize_activation(x)
        return accumulators - q.sum(-1, keepdim=True, dtype=accumulators.dtype), factor


class LeavesOutTheTail(ReferenceSubject):
    """Input features beyond the last whole tile are not multiplied."""

    def integer_linear(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The product of whole tiles, as soon as there is one."""
        _, factor = super().integer_linear(x, weight)
        whole = x.shape[-1] // TILE * TILE or x.shape[-1]
        q, _ = self.quantize_activation(x)
        codes, _ = self.quantize_weight(weight)
        product = F.linear(q[..., :whole].double(), codes[:, :whole].double())
        return product.to(torch.int32), factor


class ReadsTheLastTileWhole(ReferenceSubject):
    """The last tile reads what an earlier input left in the buffer behind a shorter one."""

    def __init__(self) -> None:
        self.buffer: dict[int, Tensor] = {}

    def integer_linear(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The product, plus what the buffer held beyond the last feature."""
        accumulators, factor = super().integer_linear(x, weight)
        q = self.quantize_activation(x)[0].reshape(-1, x.shape[-1])
        tiles = -(-x.shape[-1] // TILE)
        last = q[0, (tiles - 1) * TILE :].int()
        stale = self.buffer.get(tiles, last)
        self.buffer[tiles] = last
        return accumulators + int(stale[len(last) :].sum()), factor


class ManyTokensMixRows(ReferenceSubject):
    """The path for four and more tokens steps through them with the stride of one."""

    def integer_linear(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Accumulators, the features of four and more tokens interleaved."""
        tokens = x.reshape(-1, x.shape[-1])
        if len(tokens) < 4:
            return super().integer_linear(x, weight)
        mixed = tokens.t().reshape(tokens.shape).reshape(x.shape)
        accumulators, _ = super().integer_linear(mixed, weight)
        return accumulators, super().integer_linear(x, weight)[1]


class FirstCallOfAShapeTwice(ReferenceSubject):
    """A kernel that adds to its output is timed on the first call of a shape."""

    def __init__(self) -> None:
        self.tuned: set[tuple[torch.Size, torch.Size]] = set()

    def integer_linear(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Accumulators, doubled for a shape not seen before."""
        accumulators, factor = super().integer_linear(x, weight)
        shape = (x.shape, weight.shape)
        if shape in self.tuned:
            return accumulators, factor
        self.tuned.add(shape)
        return 2 * accumulators, factor


class SecondCallReadsTheOldLayout(ReferenceSubject):
    """The first product reorders the weight in place, and later ones do not know."""

    def __init__(self) -> None:
        self.reordered: list[Tensor] = []

    def integer_linear(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The product, with the outputs in reverse for a weight seen before."""
        accumulators, factor = super().integer_linear(x, weight)
        again = any(seen is weight for seen in self.reordered)
        self.reordered.append(weight)
        return accumulators.flip(-1) if again else accumulators, factor


class WrongFactor(ReferenceSubject):
    """The product is called with its arguments shifted by one: the floor is the scale."""

    def integer_linear(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The accumulators, and the activation scale times 1e-5."""
        accumulators, _ = super().integer_linear(x, weight)
        return accumulators, self.quantize_activation(x)[1] * 1e-5


class ActivationsByStorage(ReferenceSubject):
    """Activations are read as they lie in memory, whatever their strides are."""

    def integer_linear(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The product of other numbers where `x` is not contiguous."""
        return super().integer_linear(by_storage_order(x), weight)


Subject = ReferenceSubject


def divides_by_scale(
    subject: Subject, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Dequantizes by a division where the scale multiplies."""
    return y / subject.quantize_weight(weight)[1].square()


def bf16_reciprocal(
    subject: Subject, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Multiplies by the bf16 reciprocal of 1 / scale instead of by the scale."""
    beta = subject.quantize_weight(weight)[1]
    return y / beta / (1 / beta).bfloat16().float()


def no_activation_scale(
    subject: Subject, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Leaves out the activation scale."""
    return y / subject.quantize_activation(x)[1]


def a16_without_gradient(
    subject: Subject, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Leaves activations as they are where no gradient is asked for."""
    if torch.is_grad_enabled():
        return y
    codes, scale = subject.quantize_weight(weight)
    return F.linear(x, codes * scale, bias)


def a16_with_gradient(
    subject: Subject, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Leaves activations as they are in training."""
    if not torch.is_grad_enabled():
        return y
    codes, scale = subject.quantize_weight(weight)
    exact = F.linear(x, codes * scale, bias)
    return y + (exact - y).detach()


def latent_product(
    subject: Subject, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Multiplies by the latent weight where no gradient is asked for."""
    if torch.is_grad_enabled():
        return y
    codes, scale = subject.quantize_activation(x)
    return F.linear(codes * scale, weight, bias)


def through_fp16(
    subject: Subject, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Hands the output on in fp16."""
    return y.half().to(y.dtype)


def bias_inside_scale(
    subject: Subject, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Rounds the bias to steps of the accumulators."""
    if bias is None:
        return y
    scale = subject.quantize_activation(x)[1] * subject.quantize_weight(weight)[1]
    return y - bias + (bias / scale).round() * scale


def bias_left_out(
    subject: Subject, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Adds the bias to inputs of two dimensions only."""
    return y if bias is None or x.dim() == 2 else y - bias


def divides_by_weight(
    subject: Subject, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Divides by the mean magnitude of the weight on the way to nothing."""
    return y + 0.0 * (weight / weight.abs().mean()).sum()


def flushes_small(
    subject: Subject, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Takes small tokens for zero."""
    return y * (x.abs().amax(-1, keepdim=True) > 1e-3)


def offset_by_sign(
    subject: Subject, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Adds a millionth of its magnitude to each output."""
    return y + 1e-6 * y.abs()


def half_the_bits(accumulators: Tensor) -> Tensor:
    """What a 16-bit accumulator holds."""
    return accumulators.to(torch.int16)


def output_of_zero_weight(subject: Any) -> object:
    """The layer's output and gradients for a weight that is all zero."""
    x = observe.activations()[0].clone().requires_grad_()
    weight = torch.zeros(8, x.shape[-1], requires_grad=True)
    y = subject.linear(x, weight)
    y.sum().backward()
    return y, x.grad, weight.grad


def output_without_gradient(subject: Any) -> object:
    """The layer's output where no gradient is asked for."""
    weight = observe.weights()[0]
    with torch.no_grad():
        return [subject.linear(x, weight) for x in observe.activations()[:2]]


def products_of_many_kinds(subject: Any) -> object:
    """Products of a transposed input, of odd numbers of features, and of one weight twice."""
    x, weight = observe.activations()[0][0], observe.weights()[0]
    columns = x.t().contiguous().t()
    odd = [subject.integer_linear(x[:, :n], weight[:, :n]) for n in (128, 100, 70, 33)]
    again = subject.integer_linear(x[:2], weight), subject.integer_linear(x[:2], weight)
    return subject.integer_linear(columns, weight), odd, again


_LINEAR = partial(Defect, stage=Stage.FORWARD, alive=observe.linear)
_FORWARD = partial(
    _LINEAR, check="architecture.fake_quant_agrees", shows="training_forward_error is"
)
_INFERENCE = partial(
    _LINEAR,
    check="architecture.fake_quant_agrees",
    shows="inference_forward_error is",
    alive=output_without_gradient,
)
_TINY = partial(_LINEAR, check="architecture.zero_and_tiny_rows")
_PRODUCT = partial(
    Defect,
    stage=Stage.KERNEL,
    check="architecture.integer_path_exact",
    shows="accumulator_errors is",
    alive=observe.integer_products,
)

_FORWARDS = (
    _FORWARD(
        id="Q03_divides_by_scale",
        title="The forward divides by the weight scale instead of multiplying",
        subject=lambda: LinearDefect(divides_by_scale),
        source="microsoft/BitNet#616",
        subtlety=2,
    ),
    _FORWARD(
        id="L07_bf16_reciprocal",
        title="The forward multiplies by a bf16 reciprocal instead of dividing",
        shows="training_forward_error is",
        subject=lambda: LinearDefect(bf16_reciprocal),
        source="pytorch/ao#229",
        subtlety=5,
    ),
    _FORWARD(
        id="L05_no_activation_scale",
        title="The activation scale is left out of the output",
        subject=lambda: LinearDefect(no_activation_scale),
        source="Beomi/BitNet-Transformers#5",
        subtlety=2,
    ),
    _FORWARD(
        id="L08_through_fp16",
        title="The output goes through fp16: large ones overflow",
        subject=lambda: LinearDefect(through_fp16),
        source="lablup/mlxcel#287",
        subtlety=2,
    ),
    _FORWARD(
        id="L06_a16_training",
        title="Activations are quantized in inference alone",
        subject=lambda: LinearDefect(a16_with_gradient),
        source="pytorch/ao#4336",
        subtlety=4,
    ),
    _INFERENCE(
        id="L06_a16_inference",
        title="Activations are quantized in training alone",
        subject=lambda: LinearDefect(a16_without_gradient),
        source="pytorch/ao#4336",
        subtlety=4,
    ),
    _INFERENCE(
        id="latent_weight_in_inference",
        title="Inference multiplies by the latent weight",
        subject=lambda: LinearDefect(latent_product),
        source="pytorch/ao#4336",
    ),
    _TINY(
        id="Q04_nan_of_zero_weight",
        title="The forward of an all-zero weight divides 0 by 0",
        shows="non_finite_values is",
        subject=lambda: LinearDefect(divides_by_weight),
        alive=output_of_zero_weight,
        source="pytorch/ao#201",
    ),
    _TINY(
        id="flushes_small",
        title="Tokens below 1e-3 give no output",
        shows="homogeneity_error is",
        subject=lambda: LinearDefect(flushes_small),
        subtlety=4,
    ),
    _LINEAR(
        id="bias_inside_scale",
        title="The bias is added to the accumulators, in steps of the scale",
        check="architecture.bias_outside_scale",
        shows="bias_error is",
        subject=lambda: LinearDefect(bias_inside_scale),
        subtlety=4,
    ),
    _LINEAR(
        id="bias_left_out_of_batches",
        title="The bias is not added to inputs of three dimensions",
        check="architecture.bias_outside_scale",
        shows="bias_error is",
        subject=lambda: LinearDefect(bias_left_out),
    ),
    _LINEAR(
        id="sign_dependent_output",
        title="Outputs are larger by a millionth of their magnitude: -x does not give -y",
        check="architecture.sign_and_scale_relations",
        shows="output_errors is",
        subject=lambda: LinearDefect(offset_by_sign),
        subtlety=5,
    ),
)

_PRODUCTS = (
    _PRODUCT(
        id="K03_many_tokens",
        title="The path for four and more tokens uses the strides of one",
        subject=ManyTokensMixRows,
        source="microsoft/BitNet#617",
    ),
    _PRODUCT(
        id="K05_tail_left_out",
        title="Input features behind the last whole tile of 32 are not multiplied",
        subject=LeavesOutTheTail,
        alive=products_of_many_kinds,
        source="ggml-org/ggml@0cb347e7",
        subtlety=4,
    ),
    _PRODUCT(
        id="K05_stale_tail",
        title="The last tile reads what another input left in the buffer",
        subject=ReadsTheLastTileWhole,
        alive=products_of_many_kinds,
        source="ggml-org/ggml@33c9ea5e",
        subtlety=4,
    ),
    _PRODUCT(
        id="K07_first_call_twice",
        title="The first product of a shape is run twice into one output",
        subject=FirstCallOfAShapeTwice,
        source="triton-lang/triton#6547",
        subtlety=4,
    ),
    _PRODUCT(
        id="K08_int16_accumulators",
        title="Accumulators have 16 bits",
        subject=lambda: IntegerDefect(half_the_bits),
        source="linkedin/Liger-Kernel#1248",
        subtlety=4,
    ),
    _PRODUCT(
        id="K09_floor_for_scale",
        title="The product gets the floor in the place of the weight scale",
        shows="factor_error is",
        subject=WrongFactor,
        source="microsoft/BitNet#411",
        subtlety=2,
    ),
    _PRODUCT(
        id="K10_activations_by_storage_order",
        title="The product takes transposed activations for contiguous ones",
        subject=ActivationsByStorage,
        alive=products_of_many_kinds,
        source="tiiuae/onebitllms activation_quant_triton",
        subtlety=4,
    ),
    _PRODUCT(
        id="K14_bf16_accumulators",
        title="Accumulators are kept in bf16",
        subject=lambda: IntegerDefect(lambda a: a.bfloat16()),
        source="linkedin/Liger-Kernel@7d54ff88",
        subtlety=4,
    ),
    _PRODUCT(
        id="P12_zero_point_twice",
        title="The correction for codes stored plus one is taken off twice",
        subject=CountsTheZeroPointTwice,
        source="microsoft/T-MAC@da6c915",
    ),
    _PRODUCT(
        id="feature_misread",
        title="Input features beyond 64 are read one off",
        check="architecture.permutation_relations",
        subject=SwapsFeatures,
    ),
    _PRODUCT(
        id="K12_second_call_old_layout",
        title="The first product reorders the weight, the second reads the old order",
        check="architecture.permutation_relations",
        subject=SecondCallReadsTheOldLayout,
        alive=products_of_many_kinds,
        source="ggml-org/ggml@37c4997a",
        subtlety=4,
    ),
)

DEFECTS = (*_FORWARDS, *_PRODUCTS)

"""What one backward pass leaves at the model's own quantized layers, beside what it should.

The hook `Quantizes.linear` may be right while the layers of `BuildsModel.build_model` compute with
something else. Here every layer is given a copy of its input, so that the gradient seen there comes
from this layer alone. What a layer quantizes (its input, or the output of a module inside it, such
as a sub-norm) is the first tensor whose codes explain its output. Where a subject says what its
layers do to their inputs first, the gradient is taken through that as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from forge_harness import oracles
from forge_harness.evidence import largest, smallest
from forge_harness.probes.inputs import prepares_inputs, quantized_input

from .excess import WeightGradient, excess, is_worse
from .redrawn import Draws
from .support import is_coarse, roundoff

EXPLAINED_RTOL = 1e-3
"""Relative L2 within which an output is the product of these codes: rounding leaves 1e-6, and one
input in place of another 1e-1 and more."""
PREPARED_RTOL = 1e-4
"""Relative L2 of a token within which a gradient is the product's, taken through what the layer
does to its input first: fp32 leaves 1e-6, a mask on the largest input of 160 is off by 1e-1."""

MORE_BATCHES, MORE_SAMPLES = 8, 16
"""Looked at for layers that a smaller batch left out: skipped, or experts without a token."""

Prepare = Callable[[Tensor], Tensor]


@dataclass(slots=True)
class Seen:
    """A tensor on its way into the product, and its gradient."""

    value: Tensor
    gradient: Tensor | None = None
    prepare: Prepare | None = None
    """What the layer does to it before it makes codes of it, where the subject says so."""

    def prepared(self) -> Tensor:
        """Returns what the layer makes codes of."""
        if self.prepare is None:
            return self.value
        with torch.no_grad():
            return self.prepare(self.value)


@dataclass(slots=True)
class Call:
    """One call of a layer."""

    inputs: list[Seen] = field(default_factory=list)
    output: Tensor | None = None
    upstream: Tensor | None = None


class Calls(list[Call]):
    """The calls of a layer with gradients, and whether there was any without."""

    without_gradient: bool = False


@dataclass(slots=True)
class LayerErrors:
    """The largest error of each gradient over its fp32 limit, and the layer it is in.

    With what was drawn at random in the first pass that drew something again, or in the first.

    Attributes:
        compared: Layers whose gradients were held to the oracle.
        unexplained: Those that are not there, were never called, or whose output is no product.
        unheld: Those whose weight is no matrix, as that of a convolution: they have no oracle here.
        frozen: Those that are not trained and that no gradient goes through: of a reference model
            that the loss asks (DPO, distillation) and that is a part of the model.
    """

    compared: int = 0
    unexplained: list[str] = field(default_factory=list)
    unheld: list[str] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)
    input_error: float = 0.0
    input_layer: str = "none"
    weight_error: float = 0.0
    weight_layer: str = "none"
    draws: Draws = field(default_factory=Draws)

    def see_input(self, name: str, error: float) -> None:
        """Takes the input gradient of one call into account."""
        if is_worse(error, self.input_error):
            self.input_error, self.input_layer = error, name

    def see_weight(self, name: str, error: float) -> None:
        """Takes the gradient of one latent weight into account."""
        if is_worse(error, self.weight_error):
            self.weight_error, self.weight_layer = error, name


def layer_errors(subject: Any, task: str) -> LayerErrors:
    """Returns how far the gradients at the layers of a fresh model are from the oracle's.

    Layers that a batch leaves out are looked for with further ones, larger ones.
    """
    model = subject.build_model(task, seed=0)
    weights = {k: w.detach().clone() for k, w in subject.effective_weights(model).items()}
    modules = dict(model.named_modules(remove_duplicate=False))
    declared = subject.model_spec(task).quantized
    named = {name: modules[name] for name in declared if name in modules and name in weights}
    layers = _each_once(named)
    errors = LayerErrors(
        unexplained=[name for name in declared if name not in named],
        unheld=[name for name in layers if weights[name].dim() != 2],
    )
    left = set(layers) - set(errors.unheld)
    for seed in range(1, 2 + MORE_BATCHES):
        batch = subject.example_batch(task, batch_size=4 if seed == 1 else MORE_SAMPLES, seed=seed)
        model.zero_grad(set_to_none=True)
        with _recording(layers) as calls, Draws() as draws:
            loss = subject.loss(model, batch)
            draws.backward_begins()
            loss.backward()
        if seed == 1 or draws.redrawn:
            errors.draws = draws
        if prepares_inputs(subject):
            _prepare(subject, model, calls)
        latents = subject.latent_weights(model)
        left -= _compare(errors, subject, layers, calls, weights, latents)
        asked = _only_asked(calls, latents)
        errors.frozen += [name for name in layers if name in left & asked]
        left -= asked
        if not left:
            break
    errors.unexplained += [name for name in layers if name in left]
    errors.compared = len(set(layers) - {*errors.unheld, *errors.unexplained, *errors.frozen})
    return errors


def _only_asked(calls: Mapping[str, Calls], latents: Mapping[str, nn.Parameter]) -> set[str]:
    """Returns the layers that were called, are not trained, and had no gradient come back."""
    return {
        name
        for name, made in calls.items()
        if (made or made.without_gradient)
        and not latents[name].requires_grad
        and all(call.upstream is None for call in made)
    }


def _prepare(subject: Any, model: nn.Module, calls: Mapping[str, Calls]) -> None:
    """Notes what each layer does to its input first, where the subject says so."""
    for name, made in calls.items():
        for call in made:
            for seen in call.inputs[:1]:
                prepare = partial(quantized_input, subject, model, name)
                # Given back as it is, nothing is done to it: the limits are sharper then.
                seen.prepare = None if prepare(seen.value) is seen.value else prepare


def _each_once(named: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Leaves out further names of a layer that has several: its calls are those of the first."""
    first: dict[int, str] = {}
    for name, layer in named.items():
        first.setdefault(id(layer), name)
    return {name: named[name] for name in first.values()}


def _compare(
    errors: LayerErrors,
    subject: Any,
    layers: Mapping[str, nn.Module],
    calls: Mapping[str, Calls],
    weights: Mapping[str, Tensor],
    latents: Mapping[str, nn.Parameter],
) -> set[str]:
    """Holds the layers that were called to the oracle; returns their names.

    One with a call that nothing explains is unexplained, whatever other batches show.
    """
    called: set[str] = set()
    sums: dict[int, WeightGradient | None] = {}
    for name, layer in layers.items():
        used = [call for call in calls[name] if call.upstream is not None and call.output.numel()]
        sources = [_source(subject, layer, call, weights[name]) for call in used]
        if used:
            called.add(name)
        if None in sources and name not in (*errors.unheld, *errors.unexplained):
            errors.unexplained.append(name)
        if not used or None in sources:
            # Others may share the latent weight, whose gradient is then not known either.
            sums[id(latents[name])] = None
            continue
        for call, seen in zip(used, sources, strict=True):
            errors.see_input(name, _input_excess(call, seen, weights[name]))
            of_weight = sums.setdefault(id(latents[name]), WeightGradient(name, latents[name]))
            if of_weight is not None:
                q, s = subject.quantize_activation(seen.prepared())
                of_weight.add(call.upstream, q, s, roundoff(call.output))
    for of_weight in filter(None, sums.values()):
        if of_weight.latent.requires_grad:
            errors.see_weight(of_weight.name, of_weight.excess())
    return called


def _source(subject: Any, layer: nn.Module, call: Call, weight: Tensor) -> Seen | None:
    """The first tensor whose codes explain the output of a call."""
    if weight.dim() != 2:
        return None
    output = oracles.float64(call.output)
    bias = getattr(layer, "bias", None)
    if isinstance(bias, Tensor):
        output = output - oracles.float64(bias)
    for seen in call.inputs:
        if seen.value.shape[-1] != weight.shape[1]:
            continue
        q, s = subject.quantize_activation(seen.prepared())
        product = (oracles.int64(q) * oracles.float64(s)) @ oracles.float64(weight).T
        if product.shape != output.shape:
            continue
        rounded = max(EXPLAINED_RTOL, 2 * roundoff(call.output))
        if np.linalg.norm(product - output) <= rounded * np.linalg.norm(output):
            return seen
    return None


def _input_excess(call: Call, seen: Seen, weight: Tensor) -> float:
    upstream, values = oracles.float64(call.upstream), oracles.float64(weight)
    expected, terms = upstream @ values, np.abs(upstream) @ np.abs(values)
    if seen.prepare is not None:
        return _prepared_excess(call, seen, seen.prepare, expected, terms)
    exact = excess(seen.gradient, expected, terms, len(values))
    if not is_coarse(call.output):
        return exact
    half = roundoff(call.output)
    narrow = oracles.narrowed(values, half)
    expected = upstream @ narrow.values
    extra = np.abs(upstream) @ narrow.slack + 2 * half * np.abs(expected)
    return smallest((exact, excess(seen.gradient, expected, terms, len(values), extra)))


def _prepared_excess(call: Call, seen: Seen, prepare: Prepare, expected: Any, terms: Any) -> float:
    """As `excess`, for the gradient in front of `prepare`: the largest error of a token, in L2."""
    if seen.gradient is None:
        return math.inf
    x = seen.value.double().requires_grad_()
    y = prepare(x)

    def through(gradient: Any) -> Any:
        upstream = torch.from_numpy(gradient).to(y)
        return oracles.float64(torch.autograd.grad(y, x, upstream, retain_graph=True)[0])

    expected = through(expected)
    sizes = (np.linalg.norm(part, axis=-1) for part in (expected, through(terms)))
    coarsest = largest((roundoff(seen.gradient), roundoff(call.output)))
    rounded = PREPARED_RTOL + 2 * (coarsest - oracles.UNIT_ROUNDOFF)
    error = np.linalg.norm(oracles.float64(seen.gradient) - expected, axis=-1)
    return float(np.max(error / (rounded * sum(sizes) + 1e-37)))


@contextmanager
def _recording(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Calls]]:
    """Records the calls of the layers within the block, gradients included."""
    calls = {name: Calls() for name in layers}
    handles = []
    for name, layer in layers.items():
        opened = partial(_opened, calls[name])
        handles.append(layer.register_forward_pre_hook(opened, with_kwargs=True))
        for inner in layer.modules():
            if inner is not layer:
                handles.append(inner.register_forward_hook(partial(_passed, calls[name])))
        handles.append(layer.register_forward_hook(partial(_closed, calls[name])))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _opened(calls: Calls, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    if not torch.is_grad_enabled():
        # The first pass of a reentrant checkpoint; the second one counts.
        calls.without_gradient = True
        return None
    calls.append(Call())
    record = partial(_own, calls[-1])
    return tuple(map(record, args)), {key: record(value) for key, value in kwargs.items()}


def _passed(calls: Calls, _: nn.Module, args: Any, out: Any) -> Any:
    return _own(calls[-1], out) if torch.is_grad_enabled() else None


def _closed(calls: Calls, _: nn.Module, args: Any, out: Any) -> None:
    if isinstance(out, Tensor) and out.requires_grad:
        calls[-1].output = out.detach().clone()
        out.register_hook(_keeper(calls[-1], "upstream"))


def _own(call: Call, value: Any) -> Any:
    """A copy nobody else reads, recorded with its gradient to come."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    own = (value if value.requires_grad else value.detach().requires_grad_()).clone()
    call.inputs.append(Seen(own.detach().clone()))
    own.register_hook(_keeper(call.inputs[-1], "gradient"))
    return own


def _keeper(target: Call | Seen, name: str) -> Callable[[Tensor], None]:
    def keep(gradient: Tensor) -> None:
        setattr(target, name, gradient.detach().clone())

    return keep

"""The forward that trains: its weights and its outputs, held while the latent weights move."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from forge_harness import oracles
from forge_harness.evidence import smallest
from forge_harness.probes.inputs import quantized_input

from .calls import recording
from .occasions import other_batches, with_tokens
from .support import Built, Count, Worst, code_errors, relative, scale_groups

MOVES = 4
"""Times the latent weights move: what is made again every second forward is right every second."""


def effective_errors(subject: Any, part: Built) -> tuple[Worst, Count]:
    """Worst scale and wrong codes of the effective weights, as built and after each move.

    A training forward comes before each look: what is kept between steps is kept by forwards.
    """
    error, wrong = Worst(), Count()
    latents = subject.latent_weights(part.model)
    for name, effective in subject.effective_weights(part.model).items():
        shapes = tuple(effective.shape), tuple(latents[name].shape)
        if shapes[0] != shapes[1]:
            error.see(f"{name}: effective {shapes[0]}, latent {shapes[1]}", float("inf"))
    if error.cases:
        return error, wrong
    for move in range(MOVES):
        moment = f"after move {move}" if move else "as built"
        _train_forward(subject, part)
        effective = subject.effective_weights(part.model)
        for name, latent in subject.latent_weights(part.model).items():
            for run in scale_groups(effective[name]):
                expected = oracles.ternary(latent[run].flatten(1))
                values = effective[name][run].detach().flatten(1)
                codes = torch.sign(values).to(torch.int8)
                limit = oracles.TERNARY_MARGIN
                case = f"{name}, {moment}"
                wrong.see(case, code_errors(codes, expected.codes, expected.margin, limit))
                if codes.any():
                    error.see(case, relative(values.abs().max(), expected.scale))
        _move(subject, part, move)
    return error, wrong


def forward_excess(subject: Any, part: Built) -> Worst:
    """Worst module output error over its limit, in training and in evaluation mode.

    Training forwards have gradients, as steps have, and the latent weights move before each. Each
    module is called in either mode, with another batch where it is left out of these.
    """
    excess, called = Worst(), set()
    for move in range(MOVES):
        _move(subject, part, move)
        called |= _see_forward(subject, part, excess, training=True)
    _see_left_out(subject, part, excess, called, training=True)
    called = _see_forward(subject, part, excess, training=False)
    _see_left_out(subject, part, excess, called, training=False)
    part.model.train()
    return excess


def without_product(subject: Any, part: Built) -> list[str]:
    """Returns the quantized modules whose weight is no matrix: a convolution has no oracle here."""
    latents = subject.latent_weights(part.model)
    return [name for name in part.spec.quantized if latents[name].dim() != 2]


def _see_left_out(
    subject: Any, part: Built, excess: Worst, called: set[str], *, training: bool
) -> None:
    """Looks at more batches, up to one that calls the last module that was not called yet."""
    quantized = set(part.spec.quantized)
    for now in other_batches(subject, part):
        if called >= quantized:
            break
        called = called | _see_forward(subject, now, excess, training=training)
    for name in sorted(quantized - called):
        excess.see(f"{name}, {_mode(training)}: never called", float("inf"))


def _mode(training: bool) -> str:
    return "training" if training else "evaluation"


def _see_forward(subject: Any, part: Built, excess: Worst, *, training: bool) -> set[str]:
    """Looks at each module's output in one forward; returns the names of those called."""
    modules = {name: part.modules[name] for name in part.spec.quantized}
    norms = {name: part.modules[name] for name in part.spec.sub_norms if name in part.modules}
    part.model.train(training)
    with recording(modules | norms) as calls, torch.set_grad_enabled(training):
        subject.loss(part.model, part.batch)
    effective = subject.effective_weights(part.model)
    unheld = without_product(subject, part)
    for name, module in ((n, m) for n, m in modules.items() if n not in unheld):
        for index, call in enumerate(calls[name]):
            if not call.output.numel():
                continue
            inner = [n for n in norms if n.startswith(f"{name}.") and len(calls[n]) > index]
            x = calls[inner[-1]][index].output if inner else call.input
            with torch.no_grad():
                x = x if inner else quantized_input(subject, part.model, name, x)
            rows, columns = effective[name].shape
            if x.shape[-1] != columns or call.output.numel() * columns != x.numel() * rows:
                shapes = " of ".join(str(tuple(t.shape)) for t in (call.output, x))
                excess.see(f"{name}: weight ({rows}, {columns}) gives {shapes}", float("inf"))
                continue
            output = call.output.reshape(*x.shape[:-1], rows)
            error = _module_error(x, effective[name], module, output)
            excess.see(f"{name}, {_mode(training)}", error)
    return {name for name in modules if with_tokens(calls[name])}


def _train_forward(subject: Any, part: Built) -> None:
    part.model.train()
    subject.loss(part.model, part.batch)


def _move(subject: Any, part: Built, move: int) -> None:
    """Scales every second row of each latent weight, as no change of units would."""
    with torch.no_grad():
        for latent in subject.latent_weights(part.model).values():
            latent[move % 2 :: 2] *= 1.75


def _module_error(x: Tensor, weight: Tensor, module: nn.Module, output: Tensor) -> float:
    """The largest error over its limit; in half precision operands may be rounded or exact."""
    q, s, margin = oracles.int8_tokens(x)
    doubtful = (margin <= oracles.INT8_MARGIN) * s
    tokens, values = q * s, oracles.float64(weight)
    error = _product_error((tokens, doubtful), (values, 0.0 * values), module, output)
    roundoff = torch.finfo(output.dtype).eps / 2
    if error > 1 and roundoff > oracles.UNIT_ROUNDOFF:
        t, v = (oracles.narrowed(part, roundoff) for part in (tokens, values))
        # x + (token - x) in half precision: the difference is exact for neighbours within a factor
        # of two of each other (Sterbenz), and codes of 1 begin where it is two. Of an input at a
        # tie either code is rounded.
        unsure = (np.abs(oracles.float64(x)) < 0.51 * np.abs(tokens)) | (doubtful > 0)
        slack = doubtful + t.slack + 2 * roundoff * np.abs(tokens) * unsure
        narrow = (t.values, slack), (v.values, v.slack)
        error = smallest((error, _product_error(*narrow, module, output)))
    return error


Operand = tuple[np.ndarray, np.ndarray]
"""Values, and how far each may be off."""


def _product_error(x: Operand, weight: Operand, module: nn.Module, output: Tensor) -> float:
    (tokens, of_tokens), (values, of_values) = x, weight
    bias = getattr(module, "bias", None)
    offset = 0.0 if bias is None else oracles.float64(bias)
    magnitude = np.abs(values) + of_values
    expected = tokens @ values.T + offset
    limit = of_tokens @ magnitude.T + np.abs(tokens) @ of_values.T
    limit += 2 * oracles.LINEAR_RTOL_L1 * (np.abs(tokens) @ magnitude.T + np.abs(offset) + 1e-30)
    # Half precision (autocast) rounds the product once, and once more where the bias is added.
    rounded = torch.finfo(output.dtype).eps - torch.finfo(torch.float32).eps
    limit += 2 * max(0.0, rounded) * (np.abs(expected) + np.abs(offset))
    return float(np.max(np.abs(oracles.float64(output) - expected) / limit))

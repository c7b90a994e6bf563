"""Subjects whose `linear` is right, and whose models' layers compute with something else."""

import torch
import torch.nn.functional as F

from forge_harness.model import BitLinear
from forge_harness.subject.reference import ReferenceSubject


class LayerDefect(ReferenceSubject):
    """`back(parts)` gets the right gradients of each layer of a model, and returns others.

    `parts` maps g, x, w, gx, gw, codes and beta to tensors, in rows where there are several.
    """

    def __init__(self, back):
        self.back = back

    def build_model(self, task, *, seed):
        model = super().build_model(task, seed=seed)
        for layer in model.modules():
            if isinstance(layer, BitLinear):
                layer.linear = _Arithmetic(self._op(), self.back)
        return model


class _Arithmetic:
    def __init__(self, op, back):
        self.op, self.back = op, back
        self.effective_weight = op.effective_weight

    def __call__(self, x, weight, bias=None):
        q, s = self.op.quantize_activation(x.detach())
        codes, beta = self.op.quantize_weight(weight.detach())
        y = _Product.apply(x, weight, q, s, codes, beta, self.back)
        return y if bias is None else y + bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, q, s, codes, beta, back):
        ctx.save_for_backward(x, weight, q, s, codes, beta)
        ctx.back = back
        return F.linear(q.float(), codes.float()) * (s * beta)

    @staticmethod
    def backward(ctx, grad):
        x, w, q, s, codes, beta = ctx.saved_tensors
        g, rows, q, s = (t.reshape(-1, t.shape[-1]) for t in (grad, x, q, s))
        parts = {"g": g, "x": rows, "w": w, "codes": codes.float(), "beta": beta}
        parts["gx"] = (g * beta) @ codes.float()
        parts["gw"] = (g * s).t() @ q.float()
        gx, gw = ctx.back(parts)
        return gx.reshape(x.shape), gw, *(None,) * 5


def right(p):
    return p["gx"], p["gw"]


def clipped(p):
    return p["gx"], p["gw"] * (p["w"].abs() <= p["beta"])


def raw_activations(p):
    return p["gx"], p["g"].t() @ p["x"]


def leaks_through_scale(p):
    leak = (p["gw"] * p["codes"]).sum() / p["w"].numel()
    return p["gx"], p["gw"] + leak * p["w"].sign()


def latent_in_input_gradient(p):
    return p["g"] @ p["w"], p["gw"]


def masked_at_largest_input(p):
    return p["gx"] * (p["x"].abs() < p["x"].abs().amax(-1, keepdim=True)), p["gw"]


class HiddenTransform(ReferenceSubject):
    """A layer that turns its input by a fixed rotation, in no module, before it quantizes it."""

    def build_model(self, task, *, seed):
        model = super().build_model(task, seed=seed)
        for layer in model.modules():
            if isinstance(layer, BitLinear):
                layer.linear = _Turned(self._op())
        return model


class _Turned:
    def __init__(self, op):
        self.op = op
        self.effective_weight = op.effective_weight

    def __call__(self, x, weight, bias=None):
        return self.op((x + x.flip(-1)) / 2**0.5, weight, bias)


class ReentrantlyCheckpointed(ReferenceSubject):
    """Blocks whose forward is made again in the backward pass."""

    def build_model(self, task, *, seed):
        from torch.utils.checkpoint import checkpoint

        model = super().build_model(task, seed=seed)
        for block in model.blocks:
            block.forward = _Again(checkpoint, block.forward)
        return model


class _Again:
    def __init__(self, checkpoint, forward):
        self.checkpoint, self.forward = checkpoint, forward

    def __call__(self, *args):
        return self.checkpoint(self.forward, *args, use_reentrant=True)

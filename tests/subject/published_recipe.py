"""BitLinear as its authors publish it, in a model whose only other norm is the last.

"The Era of 1-bit LLMs: Training Tips, Code and FAQ" (Microsoft, 2024): an nn.Linear that normalises
its input in its own forward and passes gradients by `detach`. What it multiplies is no module's
output, so the subject has `quantized_input`. Data, loop and recipe are `foreign_language_model`'s.
"""

import torch
import torch.nn.functional as F
from foreign_language_model import (
    DEPTH,
    HEAD,
    HEADS,
    LENGTH,
    NAMES,
    SHAPES,
    VOCABULARY,
    WIDTH,
    Loop,
    Net,
    Words,
)
from torch import nn

from forge_harness.subject.protocols import ModelSpec


def normalised(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-9)


def weight_values(weight):
    scale = 1.0 / weight.float().abs().mean().clamp(min=1e-5)
    return ((weight.float() * scale).round().clamp(-1, 1) / scale).type(weight.dtype)


def activation_values(x):
    scale = 127.0 / x.float().abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5)
    return ((x.float() * scale).round().clamp(-128, 127) / scale).type(x.dtype)


class BitLinear(nn.Linear):
    full = False

    def normalise(self, x):
        return normalised(x)

    def quantize(self, x):
        return x + (activation_values(x) - x).detach()

    def forward(self, x):
        x, weight = self.normalise(x), self.weight
        if self.full:
            return F.linear(x, weight)
        return F.linear(self.quantize(x), weight + (weight_values(weight) - weight).detach())


class Block(nn.Module):
    def __init__(self, layer):
        super().__init__()
        for name, (inputs, outputs) in SHAPES.items():
            self.add_module(name, layer(inputs, outputs, bias=False))

    def forward(self, x):
        shape = (*x.shape[:2], -1, HEAD)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = (part.repeat_interleave(HEADS // part.shape[1], 1) for part in (k, v))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(seen.transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.up(x)))


class PublishedNet(Net):
    def __init__(self, seed, layer):
        super().__init__(seed)
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.blocks = nn.ModuleList(Block(layer) for _ in range(DEPTH))


class Session(Loop):
    def __init__(self, subject, options):
        super().__init__(subject, options)
        for module in self.model.modules():
            if isinstance(module, BitLinear):
                module.full = options.precision == "full"


class Published(Words):
    """The loss is in full precision, or under autocast."""

    name = "published-recipe"
    loop = Session
    layer = BitLinear

    def __init__(self, *, autocast=False):
        self.autocast = autocast

    def quantize_weight(self, weight):
        scale = 1.0 / weight.float().abs().mean().clamp(min=1e-5)
        return (weight.float() * scale).round().clamp(-1, 1).to(torch.int8), 1.0 / scale

    def quantize_activation(self, x):
        scale = 127.0 / x.float().abs().amax(-1, keepdim=True).clamp(min=1e-5)
        return (x.float() * scale).round().clamp(-128, 127).to(torch.int8), 1.0 / scale

    def quantized_input(self, model, name, x):
        return normalised(x)

    def model_spec(self, task):
        layers = sum(inputs * outputs for inputs, outputs in SHAPES.values())
        return ModelSpec(
            task=task,
            parameters=DEPTH * layers + (2 * VOCABULARY + LENGTH + 1) * WIDTH,
            max_parameters=100_000,
            quantized=NAMES,
            full_precision=self.full_precision,
            causal=True,
        )

    def build_model(self, task, *, seed):
        return PublishedNet(seed, self.layer)

    def effective_weights(self, model):
        return {n: weight_values(w.detach()) for n, w in self.latent_weights(model).items()}

    def loss(self, model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            logits = model(batch.inputs)
        return F.cross_entropy(logits.float().flatten(0, -2), batch.targets.flatten())

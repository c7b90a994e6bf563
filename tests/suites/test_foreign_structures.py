"""Models of further structures: gains of every head, scaled branches, recurrence, reshapes."""

import importlib.util
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from forge_harness.protocols import QuantizationInfo
from forge_harness.types import Outcome

PATH = Path(__file__).parents[1] / "subject" / "foreign_language_model.py"
SPEC = importlib.util.spec_from_file_location("foreign_language_model", PATH)
foreign = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(foreign)


class Gain(nn.Module):
    """What begins at one number, and has more dimensions than one."""

    def __init__(self, shape, value=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full(shape, value))

    def forward(self, x):
        return x * self.weight


class TernaryGain(Gain):
    def forward(self, x):
        codes, scale = foreign.weight_codes(self.weight)
        return x * (codes * scale)


class Block(foreign.Block):
    """Queries of unit length times gains of every head (Cohere), a temperature, a scaled branch."""

    gain = Gain

    def __init__(self, generator):
        super().__init__(generator)
        self.q_gain = self.gain((foreign.HEADS, foreign.HEAD))
        self.temperature = Gain((1, 1))
        self.branch = Gain((1, 1, foreign.WIDTH), 1e-5)

    def forward(self, x):
        shape = (*x.shape[:2], -1, foreign.HEAD)
        q, k, v = (layer(x).view(shape) for layer in (self.q, self.k, self.v))
        q = self.temperature(self.q_gain(F.normalize(q, dim=-1)))
        k, v = (part.repeat_interleave(foreign.HEADS // foreign.GROUPS, 2) for part in (k, v))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(seen.transpose(1, 2).flatten(2))
        return x + self.branch(self.down(F.relu(self.up(x)).square()))


class Gains(foreign.Words):
    block = Block
    more = ("q_gain", "temperature", "branch")

    def build_model(self, task, *, seed):
        model = super().build_model(task, seed=seed)
        generator = torch.Generator().manual_seed(seed + 99)
        model.blocks = nn.ModuleList(self.block(generator) for _ in range(foreign.DEPTH))
        return model

    def model_spec(self, task):
        spec = super().model_spec(task)
        more = (f"blocks.{i}.{name}" for i in range(foreign.DEPTH) for name in self.more)
        return replace(
            spec,
            parameters=sum(p.numel() for p in self.build_model(task, seed=0).parameters()),
            full_precision=(*spec.full_precision, *more),
        )


class TernaryGains(Gains):
    class block(Block):
        gain = TernaryGain


class RecurrentBlock(foreign.Block):
    """A layer is called once a token, the first time with a state of zeros."""

    def forward(self, x):
        state, states = torch.zeros_like(x[:, 0]), []
        for token in x.unbind(1):
            state = torch.tanh(self.o(state) + self.q(token))
            states.append(state)
        x = x + torch.stack(states, 1) + (torch.sigmoid(self.k(x)) * self.v(x)).repeat(1, 1, 2)
        return x + self.down(F.relu(self.up(x)).square())


class Recurrent(Gains):
    block, more = RecurrentBlock, ()


class RecurrentWithoutNorm(Recurrent):
    class block(RecurrentBlock):
        def __init__(self, generator):
            super().__init__(generator)
            self.o.norm.forward = lambda x: x * self.o.norm.weight


class Reshapes(Gains):
    """A projection answers with its heads apart."""

    more = ()

    class block(foreign.Block):
        class layer(foreign.BitLayer):
            def forward(self, x):
                return super().forward(x).view(*x.shape[:2], -1, foreign.HEAD)

        def __init__(self, generator):
            super().__init__(generator)
            self.q = self.layer(*foreign.SHAPES["q"], generator)


class InputsFirst(foreign.BitLayer):
    """The weight is kept as (K, N), as GPT-2 has it."""

    def __init__(self, inputs, outputs, generator):
        super().__init__(inputs, outputs, generator)
        weight = torch.randn(inputs, outputs, generator=generator) / math.sqrt(inputs)
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return foreign.Ternary.apply(self.norm(x), self.weight.t())


class Transposed(Gains):
    more = ()

    class block(foreign.Block):
        def __init__(self, generator):
            super().__init__(generator)
            for name, shape in foreign.SHAPES.items():
                self.add_module(name, InputsFirst(*shape, generator))


class TransposedInOne(Transposed):
    """Latent weights are (K, N), effective ones (N, K)."""

    def effective_weights(self, model):
        return {name: weight.t() for name, weight in super().effective_weights(model).items()}


class Biased(Gains):
    """Layers have a bias that begins at zero."""

    more = ()

    class layer(foreign.BitLayer):
        def __init__(self, inputs, outputs, generator):
            super().__init__(inputs, outputs, generator)
            self.bias = nn.Parameter(torch.zeros(outputs))

        def forward(self, x):
            return self.with_bias(super().forward(x))

        def with_bias(self, y):
            return y + self.bias

    @property
    def block(self):
        class Block(foreign.Block):
            def __init__(block, generator):
                super().__init__(generator)
                for name, shape in foreign.SHAPES.items():
                    block.add_module(name, self.layer(*shape, generator))

        return Block


class BiasInTheScale(Biased):
    """As AutoBitLinear has it: (C x + b) * scale."""

    class layer(Biased.layer):
        def with_bias(self, y):
            return y + self.bias * foreign.weight_codes(self.weight)[1]


class BiasLost(Biased):
    class layer(Biased.layer):
        def with_bias(self, y):
            return y


class Stack(nn.Module):
    """The experts' weights in one tensor (experts, N, K), as transformers has them."""

    def __init__(self, inputs, outputs, generator):
        super().__init__()
        weight = torch.randn(4, outputs, inputs, generator=generator) / math.sqrt(inputs)
        self.weight = nn.Parameter(weight)

    def forward(self, rows, chosen):
        y = rows.new_zeros(len(rows), self.weight.shape[1])
        for number, weight in enumerate(self.weight):
            places = torch.where(chosen == number)[0]
            y = y.index_add(0, places, foreign.Ternary.apply(rows[places], weight))
        return y


class Stacked(Gains):
    more = ("gate",)

    class block(foreign.Block):
        def __init__(self, generator):
            super().__init__(generator)
            for name in ("up", "down"):
                self.add_module(name, Stack(*foreign.SHAPES[name], generator))
            self.gate = nn.Linear(foreign.WIDTH, 4, bias=False)

        def forward(self, x):
            x = x + self.o(self.q(x) + (self.k(x) * self.v(x)).repeat(1, 1, 2))
            rows = x.flatten(0, 1)
            weights, chosen = self.gate(rows).softmax(-1).max(-1)
            y = self.down(F.relu(self.up(rows, chosen)).square(), chosen)
            return x + (weights[:, None] * y).view_as(x)

    def model_spec(self, task):
        spec = super().model_spec(task)
        norms = (name for name in spec.sub_norms if ".up." not in name and ".down." not in name)
        return replace(spec, sub_norms=tuple(norms))

    def effective_weights(self, model):
        found = {}
        for name, weight in self.latent_weights(model).items():
            experts = weight if weight.dim() == 3 else weight[None]
            parts = [foreign.weight_codes(expert) for expert in experts]
            found[name] = torch.stack([codes * scale for codes, scale in parts]).view_as(weight)
        return found


class StackedParts(Stacked):
    def quantization_info(self, task):
        return QuantizationInfo(
            scale_convention="multiply", packing="none", granularity="part", excluded=()
        )


def test_stacked_experts_have_a_scale_each_where_parts_are_declared(run_check):
    run = run_check("architecture.ternary_alphabet", StackedParts())
    assert run.outcome is Outcome.PASS, run.reason
    run = run_check("architecture.ternary_alphabet", Stacked())
    assert run.outcome is Outcome.FAIL, run.reason
    assert "quantization_info declares no others, 'part' or 'row'" in run.reason
    run = run_check("architecture.quantized_modules", StackedParts())
    assert run.outcome is Outcome.NOT_MEASURED, run.reason
    assert "their codes and scales were held: words.blocks.0.up" in run.reason


@pytest.mark.parametrize("subject", [Gains, Recurrent, Reshapes, Biased])
@pytest.mark.parametrize("check", ["quantized_modules", "sub_norm_present"])
def test_a_sound_model_is_no_false_alarm(run_check, subject, check):
    run = run_check(f"architecture.{check}", subject())
    assert run.outcome is Outcome.PASS, run.reason


RED = [
    (TernaryGains, "quantized_modules", "words.blocks.0.q_gain.response is"),
    (RecurrentWithoutNorm, "sub_norm_present", "words.scale_leak is"),
    (BiasInTheScale, "quantized_modules", "words.forward_error is"),
    (BiasLost, "quantized_modules", "words.forward_error is"),
    (Transposed, "quantized_modules", r"blocks.0.k: weight (32, 16) gives"),
    (TransposedInOne, "quantized_modules", "blocks.0.k: effective (16, 32), latent (32, 16)"),
]


@pytest.mark.parametrize(("subject", "check", "shows"), RED)
def test_a_defect_of_the_same_structure_shows(run_check, subject, check, shows):
    run = run_check(f"architecture.{check}", subject())
    assert run.outcome is Outcome.FAIL, run.reason
    assert shows in run.reason

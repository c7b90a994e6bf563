"""Sound models that are not the reference's: experts, skipped layers, parametrizations, loaders."""

import importlib.util
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from forge_harness.protocols import Batch, ModelSpec
from forge_harness.types import Outcome

PATH = Path(__file__).parents[1] / "subject" / "foreign_language_model.py"
SPEC = importlib.util.spec_from_file_location("foreign_language_model", PATH)
foreign = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(foreign)

EXPERTS = 4


class Expert(nn.Module):
    def __init__(self, generator):
        super().__init__()
        for name in ("up", "down"):
            self.add_module(name, foreign.BitLayer(*foreign.SHAPES[name], generator))

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())


class Routed(nn.Module):
    """Each token goes to one expert; all are called, some with no token, as Mixtral's are."""

    def __init__(self, generator):
        super().__init__()
        self.gate = nn.Linear(foreign.WIDTH, EXPERTS, bias=False)
        nn.init.normal_(self.gate.weight, std=0.3, generator=generator)
        self.experts = nn.ModuleList(Expert(generator) for _ in range(EXPERTS))

    def chosen(self, number, rows):
        return self.experts[number](rows)

    def forward(self, x):
        tokens = x.flatten(0, -2)
        weights, best = self.gate(tokens).softmax(-1).max(-1)
        y = torch.zeros_like(tokens)
        for number in range(EXPERTS):
            rows = torch.where(best == number)[0]
            if len(rows) or self.calls_all:
                y = y.index_add(0, rows, weights[rows, None] * self.chosen(number, tokens[rows]))
        return y.view_as(x)

    calls_all = True


class OnlyChosen(Routed):
    """An expert without a token is not called."""

    calls_all = False


class NeverTheLast(Routed):
    """The last expert's tokens go to the first."""

    def chosen(self, number, rows):
        return super().chosen(number % (EXPERTS - 1), rows)


class Block(foreign.Block):
    def __init__(self, generator, kind):
        super().__init__(generator)
        del self.up, self.down
        self.routed = kind(generator)

    def forward(self, x):
        shape = (*x.shape[:2], -1, foreign.HEAD)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        groups = foreign.HEADS // foreign.GROUPS
        k, v = (part.repeat_interleave(groups, 1) for part in (k, v))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(seen.transpose(1, 2).flatten(2))
        return x + self.routed(x)


PARTS = ("q", "k", "v", "o", *(f"routed.experts.{e}.{p}" for e in range(4) for p in ("up", "down")))
NAMES = tuple(f"blocks.{block}.{part}" for block in range(foreign.DEPTH) for part in PARTS)


class Sparse(foreign.Words):
    """Experts get few tokens: examples are three tokens long, and batches of training one line."""

    kind = Routed

    def build_model(self, task, *, seed):
        model = super().build_model(task, seed=seed)
        generator = torch.Generator().manual_seed(seed + 99)
        model.blocks = nn.ModuleList(Block(generator, self.kind) for _ in range(foreign.DEPTH))
        return model

    def model_spec(self, task):
        return replace(
            super().model_spec(task),
            parameters=sum(p.numel() for p in self.build_model(task, seed=0).parameters()),
            quantized=NAMES,
            full_precision=(
                *foreign.Words.full_precision,
                *(f"blocks.{block}.routed.gate" for block in range(foreign.DEPTH)),
            ),
            sub_norms=tuple(f"{name}.norm" for name in NAMES),
        )

    def latent_weights(self, model):
        return {name: model.get_submodule(name).weight for name in NAMES}

    def example_batch(self, task, *, batch_size, seed):
        batch = super().example_batch(task, batch_size=batch_size, seed=seed)
        return Batch(
            inputs=batch.inputs[:, :3].contiguous(), targets=batch.targets[:, :3].contiguous()
        )

    def session(self, task, options):
        return super().session(task, replace(options, batch_size=options.batch_size or 1))


class SparseOnlyChosen(Sparse):
    kind = OnlyChosen


class SparseNeverTheLast(Sparse):
    kind = NeverTheLast


class SkipsLayers(foreign.Words):
    """Four layers in ten are skipped in training, as torch draws it."""

    share = 0.4

    @property
    def net(self):
        class Net(foreign.Net):
            def through(net, block, x):
                return x if net.training and self.draw() < self.share else block(x)

        return Net

    def draw(self):
        return torch.rand(())


class SkipsByPython(SkipsLayers):
    def draw(self):
        return random.random()


class SkipsMost(SkipsLayers):
    """So many that the generator's first numbers leave a layer out."""

    share = 0.6


class SkippedInUse(foreign.Words):
    """The second block is left out in evaluation mode."""

    class net(foreign.Net):
        def through(self, block, x):
            return x if block is self.blocks[1] and not self.training else block(x)


class Codes(nn.Module):
    def forward(self, weight):
        codes, scale = foreign.weight_codes(weight)
        return weight + (codes * scale - weight).detach()


class ByParametrization(foreign.Words):
    """Weights are ternary by a parametrization of torch, which holds the latent ones."""

    class layer(nn.Linear):
        full = False

        def forward(self, x):
            x = self.norm(x)
            codes, scale = foreign.activation_codes(x)
            return F.linear(x + (codes * scale - x).detach(), self.weight)

    def build_model(self, task, *, seed):
        model = super().build_model(task, seed=seed)
        for name in foreign.NAMES:
            old = model.get_submodule(name)
            new = self.layer(*old.weight.shape[::-1], bias=False)
            new.weight, new.norm = old.weight, old.norm
            parametrize.register_parametrization(new, "weight", Codes())
            model.set_submodule(name, new)
        return model

    def latent_weights(self, model):
        return {n: model.get_submodule(n).parametrizations.weight.original for n in foreign.NAMES}


class NormedHead(foreign.Words):
    """The head's weight is a direction and a length (weight norm)."""

    def build_model(self, task, *, seed):
        model = super().build_model(task, seed=seed)
        parametrizations.weight_norm(model.head)
        return model

    def model_spec(self, task):
        spec = super().model_spec(task)
        return replace(spec, parameters=spec.parameters + foreign.VOCABULARY)


class TernaryHead(foreign.Words):
    """A head that is declared to be full precision is made ternary by a parametrization."""

    def build_model(self, task, *, seed):
        model = super().build_model(task, seed=seed)
        parametrize.register_parametrization(model.head, "weight", Codes())
        return model


class WantsSequences(foreign.Words):
    """Norms ask for (batch, tokens, features), by name."""

    def build_model(self, task, *, seed):
        model = super().build_model(task, seed=seed)
        for name in foreign.NAMES:
            model.get_submodule(name).norm = _SequenceNorm(
                model.get_submodule(name).weight.shape[1]
            )
        return model


class _SequenceNorm(foreign.Norm):
    def forward(self, x):
        batch, tokens, width = x.shape
        return super().forward(x.view(batch, tokens, width))


class ByName(foreign.Words):
    """Layers have no norm inside, and are called by the name of their argument."""

    class net(foreign.Net):
        def through(self, block, x):
            shape = (*x.shape[:2], -1, foreign.HEAD)
            q, k, v = (
                getattr(block, name)(x=x).view(shape).transpose(1, 2) for name in ("q", "k", "v")
            )
            k, v = (part.repeat_interleave(foreign.HEADS // foreign.GROUPS, 1) for part in (k, v))
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block.o(x=seen.transpose(1, 2).flatten(2))
            return x + block.down(x=F.relu(block.up(x=x)).square())

    def build_model(self, task, *, seed):
        model = super().build_model(task, seed=seed)
        for name in foreign.NAMES:
            model.get_submodule(name).norm = nn.Identity()
        return model

    def model_spec(self, task):
        parameters = sum(p.numel() for p in self.build_model(task, seed=0).parameters())
        return replace(super().model_spec(task), parameters=parameters, sub_norms=())


class OwnLoader(foreign.Words):
    """The model says in an error of its own what a state dict lacks."""

    class net(foreign.Net):
        def load_state_dict(self, state, strict=True):
            if missing := self.state_dict().keys() - state.keys():
                raise ValueError(f"missing: {sorted(missing)}")
            return super().load_state_dict(state, strict)


class CallsAMethod(foreign.Words):
    """The loss calls a method of the model, not the model."""

    class net(foreign.Net):
        def logits(self, ids):
            return foreign.Net.forward(self, ids)

    def loss(self, model, batch):
        logits = model.logits(batch.inputs).flatten(0, -2)
        return F.cross_entropy(logits, batch.targets.flatten())


class Convolution(nn.Module):
    """Ternary weights of a convolution; activations are quantized a place."""

    def __init__(self, channels, generator):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, channels, 3, 3, generator=generator))

    def forward(self, x):
        scale = x.abs().amax(1, keepdim=True).clamp(min=1e-5) / 127
        x = x + ((x / scale).round() * scale - x).detach()
        return F.conv2d(x, Codes()(self.weight), padding=1)


class ConvolutionNet(nn.Module):
    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList(Convolution(8, generator) for _ in range(2))
        self.head = nn.Linear(8, 4, bias=False)
        nn.init.normal_(self.head.weight, std=0.3, generator=generator)

    def forward(self, x):
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.head(x.mean((2, 3)))


class Convolves:
    """Offers BuildsModel and Quantizes; a weight has four dimensions."""

    quantize_weight = foreign.Words.quantize_weight
    quantize_activation = foreign.Words.quantize_activation
    linear = foreign.Words.linear
    integer_linear = foreign.Words.integer_linear
    seen = 1.0

    def tasks(self):
        return ("images",)

    def model_spec(self, task):
        return ModelSpec(
            task=task,
            parameters=2 * 8 * 8 * 9 + 32,
            max_parameters=2000,
            quantized=("layers.0", "layers.1"),
            full_precision=("head",),
        )

    def build_model(self, task, *, seed):
        return ConvolutionNet(seed)

    def loss(self, model, batch):
        return F.cross_entropy(model(batch.inputs), batch.targets)

    def example_batch(self, task, *, batch_size, seed):
        generator = torch.Generator().manual_seed(seed)
        images = torch.rand(batch_size, 8, 6, 5, generator=generator)
        return Batch(inputs=images, targets=torch.arange(batch_size) % 4)

    def latent_weights(self, model):
        return {f"layers.{number}": layer.weight for number, layer in enumerate(model.layers)}

    def effective_weights(self, model):
        parts = {name: foreign.weight_codes(w) for name, w in self.latent_weights(model).items()}
        return {name: self.seen * codes * scale for name, (codes, scale) in parts.items()}


class ConvolvesOffScale(Convolves):
    seen = 1.01


class Typed(torch.Tensor):
    """A tensor of a library's own type, as torchao's weights in training are."""


class OfAnOwnType(foreign.Words):
    def build_model(self, task, *, seed):
        model = super().build_model(task, seed=seed)
        for module in model.modules():
            if isinstance(module, foreign.BitLayer):
                module.weight = nn.Parameter(module.weight.detach().as_subclass(Typed))
        return model


class LosesTheGradient(foreign.Words):
    """Its layer multiplies by a copy of the weight."""

    def linear(self, x, weight, bias=None):
        return super().linear(x, weight.detach().requires_grad_(), bias)


def test_a_gradient_that_is_not_there_is_not_finite(run_check):
    run = run_check("architecture.zero_and_tiny_rows", LosesTheGradient())
    assert run.outcome is Outcome.FAIL, run.reason
    assert "non_finite_values is" in run.reason


SOUND = [
    (Sparse, "architecture.quantized_modules"),
    (Sparse, "architecture.sub_norm_present"),
    (Sparse, "training.gradient_reaches_all"),
    (SparseOnlyChosen, "architecture.quantized_modules"),
    (SparseOnlyChosen, "training.gradient_reaches_all"),
    (SkipsLayers, "architecture.quantized_modules"),
    (SkipsMost, "architecture.sub_norm_present"),
    (SkipsLayers, "training.overfit_one_batch"),
    (SkipsByPython, "architecture.causal_mask"),
    (SkipsByPython, "architecture.state_dict_round_trip"),
    (ByParametrization, "architecture.quantized_modules"),
    (NormedHead, "architecture.quantized_modules"),
    (WantsSequences, "architecture.sub_norm_present"),
    (ByName, "architecture.quantized_modules"),
    (OwnLoader, "architecture.state_dict_round_trip"),
    (OfAnOwnType, "architecture.state_dict_round_trip"),
    (Convolves, "architecture.ternary_alphabet"),
]


@pytest.mark.parametrize(
    ("subject", "check"), SOUND, ids=lambda part: getattr(part, "__name__", part)
)
def test_a_sound_model_is_no_false_alarm(run_check, subject, check):
    run = run_check(check, subject())
    assert run.outcome is Outcome.PASS, run.reason


@pytest.mark.parametrize("subject", [Sparse, SparseOnlyChosen, SkipsLayers, SkipsMost])
@pytest.mark.parametrize("check", ["training.ste_input_gradient", "training.ste_weight_gradient"])
def test_layers_that_a_batch_leaves_out_are_compared_in_another(run_check, subject, check):
    """A warning fails a critical check: sound experts and skipped layers were red by chance."""
    run = run_check(check, subject())
    assert run.outcome is Outcome.PASS, run.reason
    quantized = subject().model_spec("words").quantized
    assert run.evidence("words.layers_compared") == len(quantized)


RED = [
    (SparseNeverTheLast, "training.gradient_reaches_all", "blocks.0.routed.experts.3"),
    (SparseNeverTheLast, "architecture.quantized_modules", "routed.experts.3"),
    (SkippedInUse, "architecture.quantized_modules", "evaluation: never called"),
    (TernaryHead, "architecture.quantized_modules", "words.head.response is"),
    (ConvolvesOffScale, "architecture.quantized_modules", "images.effective_error is 0.01"),
]


@pytest.mark.parametrize(
    ("subject", "check", "shows"), RED, ids=lambda part: getattr(part, "__name__", part)
)
def test_what_is_never_called_or_called_wrongly_shows(run_check, subject, check, shows):
    run = run_check(check, subject())
    assert run.outcome is Outcome.FAIL, run.reason
    assert shows in run.reason


def test_of_a_convolution_codes_and_scales_are_held(run_check):
    run = run_check("architecture.quantized_modules", Convolves())
    assert run.outcome is Outcome.NOT_MEASURED, run.reason
    assert "the outputs of 2 modules whose weight is no matrix (N, K) have no oracle" in run.reason


@pytest.mark.parametrize("check", ["training.ste_input_gradient", "training.ste_weight_gradient"])
def test_gradients_of_a_convolution_are_not_measured(run_check, check):
    """They were unexplained, which fails a critical check."""
    run = run_check(check, Convolves())
    assert run.outcome is Outcome.NOT_MEASURED, run.reason
    assert "gradients of 2 modules whose weight is no matrix (N, K) have no oracle" in run.reason
    assert "images.layers.0, images.layers.1" in run.reason
    assert run.evidence("images.layers_unexplained") == 0


class DeclaresOneMore(foreign.Words):
    def model_spec(self, task):
        spec = super().model_spec(task)
        return replace(spec, quantized=(*spec.quantized, "blocks.0.gone"))


def test_a_layer_that_the_model_lacks_is_named(run_check):
    run = run_check("training.ste_weight_gradient", DeclaresOneMore())
    assert run.outcome is Outcome.WARN, run.reason
    assert "blocks.0.gone" in run.reason
    run = run_check("architecture.quantized_modules", DeclaresOneMore())
    assert run.outcome is Outcome.FAIL, run.reason
    assert "undeclared is blocks.0.gone" in run.reason


@pytest.mark.parametrize("subject", [SkipsLayers, SkipsByPython])
def test_a_loss_that_skips_layers_at_random_is_not_held_to_another(run_check, subject):
    run = run_check("training.accumulation_equivalence", subject())
    assert run.outcome is Outcome.NOT_MEASURED, run.reason
    assert "draws random numbers that are not dropout's" in run.reason


@pytest.mark.parametrize(
    "check",
    [
        "architecture.causal_mask",
        "architecture.quantized_modules",
        "architecture.activation_scale",
    ],
)
def test_outputs_that_no_hook_sees_are_not_measured(run_check, check):
    run = run_check(check, CallsAMethod())
    assert run.outcome is Outcome.NOT_MEASURED, run.reason
    assert "does not call its model but a method of it" in run.reason

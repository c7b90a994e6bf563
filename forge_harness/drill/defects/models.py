"""Models with norms, layers or weights that are not what is declared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forge_harness import training
from forge_harness.drill import observe
from forge_harness.drill.defect import Defect, Stage
from forge_harness.protocols import ModelSpec, QuantizationInfo
from forge_harness.quant import TernaryLinearOp
from forge_harness.subject.reference import ReferenceSubject

from . import masks, sound_models, stale_scales, state_dicts
from .changed_model import ModelDefect, normed_layers, replace_forward, ternary_layers

# Norms


def drop_sub_norm(model: nn.Module) -> None:
    """Puts modules that do nothing in the place of the norms inside ternary layers."""
    for layer in normed_layers(model):
        layer.norm = nn.Identity()


def bypass_sub_norm(model: nn.Module) -> None:
    """Hands the input of the norms inside ternary layers on."""
    for layer in normed_layers(model):
        layer.norm.register_forward_hook(lambda module, args, out: args[0])


def batch_statistics(model: nn.Module) -> None:
    """Divides all tokens by one root mean square."""
    for layer in normed_layers(model):
        layer.norm.register_forward_hook(
            lambda module, args, out: args[0] / args[0].square().mean().sqrt()
        )


class KeysReadTheRawStream(sound_models.DeclaresPreNorms):
    """q reads the output of the norm; k and v read what the norm was given."""

    def build_model(self, task: str, *, seed: int) -> nn.Module:
        """The reference model; keys and values of the language model bypass the norm."""
        model = super().build_model(task, seed=seed)
        blocks: Any = model.blocks
        for block in blocks if task == "bytes" else ():
            raw: list[Tensor] = []
            block.attention_norm.register_forward_pre_hook(
                lambda module, args, raw=raw: raw.append(args[0])
            )
            for projection in (block.attention.k, block.attention.v):
                projection.register_forward_pre_hook(lambda module, args, raw=raw: (raw[-1],))
        return model


class NormMissingAndUndeclared(ReferenceSubject):
    """The second block has no sub-norm, and a declaration read off the model agrees."""

    def model_spec(self, task: str) -> ModelSpec:
        """The declaration without the second norm and its 128 gains."""
        spec = super().model_spec(task)
        if task != "digits":
            return spec
        return replace(spec, sub_norms=spec.sub_norms[:1], parameters=spec.parameters - 128)

    def build_model(self, task: str, *, seed: int) -> nn.Module:
        """The model without it."""
        model = super().build_model(task, seed=seed)
        blocks: Any = model.blocks
        if task == "digits":
            blocks[1].down.norm = None
        return model


# Parameters and layers


def add_a_bias(model: nn.Module) -> None:
    """Gives the first ternary layer a bias."""
    layer = ternary_layers(model)[0]
    layer.bias = nn.Parameter(torch.zeros(layer.out_features))


def freeze_a_layer(model: nn.Module) -> None:
    """Freezes the first ternary layer."""
    ternary_layers(model)[0].weight.requires_grad_(False)


def untie_head(model: Any) -> None:
    """Gives the head a tensor of its own from the start."""
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())


def add_an_adapter(model: Any) -> None:
    """Adds a layer that nothing declares."""
    model.adapter = nn.Module()
    model.adapter.weight = nn.Parameter(torch.eye(3))


def leave_a_layer_out(model: nn.Module) -> None:
    """Leaves the last ternary layer in full precision."""
    replace_forward(ternary_layers(model)[-1], _full_precision)


def _full_precision(layer: Any, x: Tensor) -> Tensor:
    return F.linear(x if layer.norm is None else layer.norm(x), layer.weight)


def a16_in_evaluation(model: nn.Module) -> None:
    """Leaves the activations of the last ternary layer as they are in evaluation mode."""
    replace_forward(ternary_layers(model)[-1], _a16_in_evaluation)


def _a16_in_evaluation(layer: Any, x: Tensor) -> Any:
    if layer.training:
        return type(layer).forward(layer, x)
    x = x if layer.norm is None else layer.norm(x)
    return F.linear(x, layer.effective_weight())


class PerTensorActivations:
    """The arithmetic of a layer with one activation scale for all tokens."""

    def __init__(self, kept: TernaryLinearOp) -> None:
        self.kept = kept
        self.effective_weight = kept.effective_weight

    def __call__(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product with the activations in steps of their largest magnitude."""
        scale = x.abs().amax() / 127
        codes, beta = self.kept.quantize_weight(w)
        return F.linear((x / scale).round() * scale, codes * beta, bias)


def per_tensor_activations(model: nn.Module) -> None:
    """Gives every ternary layer one activation scale for all tokens."""
    for layer in ternary_layers(model):
        layer.linear = PerTensorActivations(layer.linear)


def quantize_head(model: Any) -> None:
    """Quantizes the head as if it were one of the projections."""
    replace_forward(model.head, _ternary)


def _ternary(head: Any, x: Tensor) -> Tensor:
    return TernaryLinearOp()(x, head.weight, None)


def quantize_embedding(model: Any) -> None:
    """Looks tokens up in the quantized embedding; the head that shares it is as it was."""
    replace_forward(model.embedding, _ternary_rows)


def _ternary_rows(embedding: Any, tokens: Tensor) -> Tensor:
    rows = F.embedding(tokens, embedding.weight)
    values = TernaryLinearOp().effective_weight(embedding.weight)
    return rows + (F.embedding(tokens, values) - rows).detach()


class NothingQuantized(ReferenceSubject):
    """A full-precision model that declares just that, and no scale to look for."""

    def quantization_info(self, task: str) -> QuantizationInfo:
        """The declaration of a scale a row."""
        return replace(super().quantization_info(task), granularity="row")

    def model_spec(self, task: str) -> ModelSpec:
        """The declaration that all is full precision."""
        spec = super().model_spec(task)
        names = {*spec.quantized, *spec.full_precision}
        return replace(spec, quantized=(), full_precision=tuple(sorted(names)), sub_norms=())

    def build_model(self, task: str, *, seed: int) -> nn.Module:
        """The full-precision arm."""
        return training.reference_model(task, seed, "full")


# What the package of a model does not say


class DigitsDefect(ModelDefect):
    """The small task alone: its check trains and exports a model of every task."""

    def tasks(self) -> tuple[str, ...]:
        """The digits."""
        return ("digits",)


def silu(model: Any) -> None:
    """Uses SiLU in the place of the squared ReLU."""
    for block in model.blocks:
        replace_forward(block, _with_silu)


def silu_in_evaluation(model: Any) -> None:
    """Uses SiLU in the place of the squared ReLU in evaluation mode."""
    for block in model.blocks:
        replace_forward(block, _with_silu_in_evaluation)


def _with_silu(block: Any, x: Tensor) -> Any:
    return x + block.down(F.silu(block.up(block.norm(x))))


def _with_silu_in_evaluation(block: Any, x: Tensor) -> Any:
    return type(block).forward(block, x) if block.training else _with_silu(block, x)


def add_the_residual_twice(model: Any) -> None:
    """Adds the input of the last block to what has it already."""
    model.blocks[-1].register_forward_hook(lambda module, args, out: out + args[0])


def count_padded_features(model: nn.Module) -> None:
    """Takes the mean square over a third more features, all zero."""
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.register_forward_hook(lambda module, args, out: out * (4 / 3) ** 0.5)


# Effective weights


class LatentInEvaluation(ReferenceSubject):
    """Evaluation uses the latent weights."""

    def effective_weights(self, model: nn.Module) -> Mapping[str, Tensor]:
        """Ternary values in training mode, latent ones in evaluation mode."""
        if model.training:
            return super().effective_weights(model)
        return {name: p.detach() for name, p in self.latent_weights(model).items()}


class ScalePerRow(ReferenceSubject):
    """Effective weights have one scale a row, where one a weight is declared."""

    def effective_weights(self, model: nn.Module) -> Mapping[str, Tensor]:
        """The signs of the effective weights times the mean magnitude of each latent row."""
        latent = self.latent_weights(model)
        return {
            name: values.sign() * latent[name].detach().abs().mean(1, True)
            for name, values in super().effective_weights(model).items()
        }


class TwiceQuantized(ReferenceSubject):
    """The scale is derived once more, from weights that are ternary already."""

    def effective_weights(self, model: nn.Module) -> Mapping[str, Tensor]:
        """The quantization of the effective weights."""
        effective = super().effective_weights(model)
        return {name: self._op().effective_weight(values) for name, values in effective.items()}


class StaleEffective(ReferenceSubject):
    """Quantizes a model's weights once and remembers them."""

    def effective_weights(self, model: Any) -> Mapping[str, Tensor]:
        """The effective weights as they were at first."""
        if not hasattr(model, "remembered"):
            object.__setattr__(model, "remembered", super().effective_weights(model))
        found: Mapping[str, Tensor] = model.remembered
        return found


def effective_after_a_move(subject: Any) -> object:
    """The effective weights of each model before and after its latent weights moved."""
    seen: list[object] = []
    for task in subject.tasks():
        model = subject.build_model(task, seed=3)
        for _ in range(2):
            seen.append(dict(subject.effective_weights(model)))
            with torch.no_grad():
                for latent in subject.latent_weights(model).values():
                    latent.mul_(2.0).sub_(0.01)
    return seen


_BUILT = partial(Defect, stage=Stage.MODEL, alive=observe.built)
_NORM = partial(_BUILT, check="architecture.sub_norm_present", source="huggingface/blog#2339")
_BUDGET = partial(_BUILT, check="architecture.parameter_budget", subtlety=2)
_ALPHABET = partial(_BUILT, check="architecture.ternary_alphabet")
_MODULES = partial(_BUILT, check="architecture.quantized_modules")

_NORMS = (
    _NORM(
        id="L01_norm_removed",
        title="The norm in front of the quantization does nothing",
        shows="scale_leak is",
        subject=lambda: ModelDefect(drop_sub_norm),
    ),
    _NORM(
        id="L01_norm_bypassed",
        title="The norm is computed and its input used",
        shows="scale_leak is",
        subject=lambda: ModelDefect(bypass_sub_norm),
    ),
    _NORM(
        id="L01_norm_bypassed_by_keys",
        title="Queries read the norm, keys and values what stands in front of it",
        shows="bytes.bypassed is",
        subject=KeysReadTheRawStream,
        source="",
        subtlety=4,
    ),
    _NORM(
        id="L01_missing_and_undeclared",
        title="One block has no norm, and the declaration was read off the model",
        shows="blocks.1.down, unlike blocks.0.down",
        subject=NormMissingAndUndeclared,
        source="fla-org/flash-linear-attention#147",
        subtlety=4,
    ),
    _NORM(
        id="L10_batch_statistics",
        title="The norm divides all tokens by one root mean square",
        shows="rms_spread is",
        subject=lambda: ModelDefect(batch_statistics),
        source="",
        subtlety=4,
    ),
)

_PARAMETERS = (
    _BUDGET(
        id="undeclared_parameters",
        title="A layer has a bias that the declared number of parameters lacks",
        shows="digits.parameters is",
        subject=lambda: ModelDefect(add_a_bias),
    ),
    _BUDGET(
        id="frozen_parameters",
        title="A layer is frozen and not declared so",
        shows="digits.parameters is",
        subject=lambda: ModelDefect(freeze_a_layer),
        alive=observe.gradients,
        subtlety=3,
    ),
    _BUDGET(
        id="C16_never_tied",
        title="Embedding and head, declared as one tensor, are two of equal values",
        shows="bytes.parameters is",
        subject=lambda: ModelDefect(untie_head, "bytes"),
        alive=observe.gradients,
        source="huggingface/transformers#43159",
        subtlety=3,
    ),
    _MODULES(
        id="undeclared_layer",
        title="The model has a layer that nothing declares",
        shows="undeclared is adapter",
        subject=lambda: ModelDefect(add_an_adapter),
        subtlety=2,
    ),
)

_LAYERS = (
    _MODULES(
        id="nothing_quantized",
        title="No layer is quantized, as declared",
        shows="quantized is 0 modules",
        subject=NothingQuantized,
        subtlety=2,
    ),
    _ALPHABET(
        id="nothing_quantized_alphabet",
        title="There is no weight to count the values of",
        shows="quantized is 0",
        subject=NothingQuantized,
        subtlety=2,
    ),
    _MODULES(
        id="Q19_layer_missed",
        title="One declared layer stays in full precision",
        shows="forward_error is",
        subject=lambda: ModelDefect(leave_a_layer_out),
        source="vllm-project/vllm#13562",
        subtlety=4,
    ),
    _MODULES(
        id="Q18_head_quantized",
        title="The output head is quantized",
        shows="bytes.head.response is",
        subject=lambda: ModelDefect(quantize_head, "bytes"),
        source="huggingface/transformers#45734",
    ),
    _MODULES(
        id="Q18_embedding_quantized",
        title="The embedding is quantized where tokens are looked up, the tied head is not",
        shows="bytes.embedding.response is",
        subject=lambda: ModelDefect(quantize_embedding, "bytes"),
        source="openai/parameter-golf#42",
    ),
    _MODULES(
        id="L06_a16_in_evaluation",
        title="One layer leaves activations as they are in evaluation mode",
        shows="forward_error is",
        subject=lambda: ModelDefect(a16_in_evaluation),
        source="pytorch/ao#4336",
        subtlety=4,
    ),
    _MODULES(
        id="Q02_in_the_layer",
        title="The layers of the model, not the quantizer shown, have one activation scale a batch",
        shows="forward_error is",
        subject=lambda: ModelDefect(per_tensor_activations),
        source="microsoft/onnxruntime#8625",
        subtlety=4,
    ),
    _MODULES(
        id="Q17_quantized_twice",
        title="Effective weights are quantized a second time: the scale shrinks by their zeros",
        shows="effective_error is",
        subject=TwiceQuantized,
        source="microsoft/BitNet convert-hf-to-gguf-bitnet.py",
    ),
    _MODULES(
        id="Q14_stale_effective",
        title="Effective weights are those of an earlier step",
        shows="first: stem, after move 1",
        subject=StaleEffective,
        alive=effective_after_a_move,
        source="pytorch/ao prototype/quantized_training/bitnet.py",
        subtlety=4,
    ),
    _ALPHABET(
        id="latent_in_evaluation",
        title="Evaluation mode uses the latent weights",
        shows="digits.levels is",
        subject=LatentInEvaluation,
    ),
    _ALPHABET(
        id="Q10_row_scales",
        title="Effective weights have one scale a row where one a weight is declared",
        shows="digits.groups is",
        subject=ScalePerRow,
        source="microsoft/BitNet#616",
        subtlety=4,
    ),
)

_PACKAGED = partial(
    Defect,
    stage=Stage.MODEL,
    check="training.eval_is_quantized",
    shows="loss_difference is",
    alive=observe.trained,
)

_GRAPHS = (
    _PACKAGED(
        id="L02_silu",
        title="The feed-forward uses SiLU where the package's readers use the squared ReLU",
        subject=lambda: DigitsDefect(silu),
        source="microsoft/BitNet#588",
    ),
    _PACKAGED(
        id="L02_silu_in_evaluation",
        title="The feed-forward uses SiLU in evaluation mode alone",
        subject=lambda: DigitsDefect(silu_in_evaluation),
        source="microsoft/BitNet#602",
    ),
    _PACKAGED(
        id="L09_residual_twice",
        title="One block adds its input twice",
        subject=lambda: DigitsDefect(add_the_residual_twice),
        source="huggingface/nanotron@eea5b7c8",
    ),
    _PACKAGED(
        id="L10_padded_features",
        title="Norms count padding in their mean square",
        subject=lambda: DigitsDefect(count_padded_features),
        source="ggml-org/llama.cpp#8151",
        subtlety=4,
    ),
)

DEFECTS = (
    *_NORMS,
    *_PARAMETERS,
    *_LAYERS,
    *_GRAPHS,
    *masks.DEFECTS,
    *stale_scales.DEFECTS,
    *state_dicts.DEFECTS,
)

BENIGN = sound_models.BENIGN

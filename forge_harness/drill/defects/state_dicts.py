"""Models that are not what was saved after they were loaded."""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forge_harness.drill.defect import Defect, Stage
from forge_harness.subject.reference import ReferenceSubject

from .changed_model import ModelDefect, ternary_layers


class GainsNotSaved(ReferenceSubject):
    """Gains of norms are drawn at random and belong to no state dict."""

    def build_model(self, task: str, *, seed: int) -> nn.Module:
        """The reference model with gains of this seed."""
        model = super().build_model(task, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for name, module in model.named_modules():
            if name.endswith("norm"):
                gain = torch.as_tensor(module.weight) * torch.rand((), generator=generator)
                del module.weight
                module.register_buffer("weight", gain.detach(), persistent=False)
        return model


class SkipsMissingLayers(ReferenceSubject):
    """Ternary layers load without their weight, as legacy loaders let them; all others do not."""

    def tasks(self) -> tuple[str, ...]:
        """The language model."""
        return ("bytes",)

    def build_model(self, task: str, *, seed: int) -> nn.Module:
        """The reference model with lenient layers."""
        model = super().build_model(task, seed=seed)
        for layer in ternary_layers(model):
            layer._load_from_state_dict = MethodType(_load_what_is_there, layer)
        return model


def _load_what_is_there(
    layer: nn.Module,
    state: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    load = type(layer)._load_from_state_dict
    load(layer, state, prefix, metadata, strict, [], unexpected, errors)


def untie_on_load(model: Any) -> None:
    """Gives the head a tensor of its own when a state dict is loaded."""
    model.register_load_state_dict_post_hook(_untie)


def _untie(model: Any, *_: Any) -> None:
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())


def load_leniently(model: Any) -> None:
    """Loads what is there, also where a strict load is asked for."""
    model.load_state_dict = MethodType(_load_leniently, model)


def _load_leniently(model: nn.Module, state: dict[str, Any], strict: bool = True) -> Any:
    return type(model).load_state_dict(model, state, strict=False)


def round_on_load(model: Any) -> None:
    """Takes every tensor through bf16 when it is loaded."""

    def through_bf16(module: nn.Module, state: dict[str, Tensor], *_: Any) -> None:
        for key in state:
            state[key] = state[key].bfloat16().float()

    model.register_load_state_dict_pre_hook(through_bf16)


def swap_names_on_load(model: Any) -> None:
    """Maps names by a pattern that takes the keys of an attention for its values."""

    def renamed(module: nn.Module, state: dict[str, Tensor], *_: Any) -> None:
        for key in [name for name in state if name.endswith(".attention.k.weight")]:
            other = key.replace(".k.", ".v.")
            state[key], state[other] = state[other], state[key]

    model.register_load_state_dict_pre_hook(renamed)


def save_effective_weights(model: nn.Module) -> None:
    """Saves the values the forward multiplies with in the place of the latent weights."""
    for layer in ternary_layers(model):
        layer.register_state_dict_post_hook(_save_effective_weight)


def _save_effective_weight(layer: Any, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    # Only copies are saved: callers that ask for the tensors themselves get them.
    if not state[f"{prefix}weight"].requires_grad:
        state[f"{prefix}weight"] = layer.effective_weight()


def drop_in_evaluation(model: Any) -> None:
    """Leaves dropout on in evaluation mode."""
    model.head.register_forward_pre_hook(
        lambda module, args: (F.dropout(args[0], 0.1, training=True),)
    )


def loaded(subject: Any) -> object:
    """Each model after a state dict was loaded: its tensors, and which of them are one."""
    seen: list[object] = []
    for task in subject.tasks():
        model = subject.build_model(task, seed=4)
        model.load_state_dict(_saved(subject, task), strict=True)
        tensors = model.state_dict(keep_vars=True)
        places = [tensor.data_ptr() for tensor in tensors.values()]
        seen += [dict(tensors), [places.index(place) for place in places]]
    return seen


def loaded_without_a_weight(subject: Any) -> object:
    """Whether the language model loads a state dict that lacks a projection."""
    state = _saved(subject, "bytes")
    del state["blocks.0.ffn.up.weight"]
    try:
        subject.build_model("bytes", seed=4).load_state_dict(state, strict=True)
    except RuntimeError:
        return "refused"
    return "loaded"


def _saved(subject: Any, task: str) -> dict[str, Tensor]:
    state = subject.build_model(task, seed=3).state_dict()
    return {name: tensor.clone() for name, tensor in state.items()}


def evaluated(subject: Any) -> object:
    """The loss of each model in evaluation mode, the random numbers fixed."""
    seen: list[object] = []
    for task in subject.tasks():
        model = subject.build_model(task, seed=3).eval()
        batch = subject.example_batch(task, batch_size=5, seed=3)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            seen.append(subject.loss(model, batch))
    return seen


_LOADED = partial(
    Defect,
    stage=Stage.MODEL,
    check="architecture.state_dict_round_trip",
    shows="digits.changed is",
    alive=loaded,
)
_INCOMPLETE = partial(_LOADED, alive=loaded_without_a_weight)

DEFECTS = (
    _LOADED(
        id="C16_untied",
        title="Embedding and head are two tensors after loading",
        shows="head.weight.tied is",
        subject=lambda: ModelDefect(untie_on_load, "bytes"),
        source="huggingface/transformers#38870",
    ),
    _LOADED(
        id="C14_names_swapped",
        title="Keys and values of attentions change places when names are mapped on loading",
        shows="bytes.changed is",
        subject=lambda: ModelDefect(swap_names_on_load, "bytes"),
        source="huggingface/transformers#29554",
        subtlety=4,
    ),
    _INCOMPLETE(
        id="C13_missing_key_swallowed",
        title="A state dict that lacks a weight loads strictly",
        shows="missing_keys_accepted is",
        subject=lambda: ModelDefect(load_leniently),
        source="NVIDIA-NeMo/Megatron-Bridge#6032",
        subtlety=4,
    ),
    _INCOMPLETE(
        id="C13_layers_swallow_missing_keys",
        title="Ternary layers load without their weight, all others do not",
        shows="bytes.missing_keys_accepted is 14 weights",
        subject=SkipsMissingLayers,
        source="LibreYOLO/libreyolo#707",
        subtlety=4,
    ),
    _LOADED(
        id="C08_gain_not_saved",
        title="Gains of norms are not in the state dict",
        subject=GainsNotSaved,
        source="huggingface/transformers#11663",
        subtlety=4,
    ),
    _LOADED(
        id="C19_rounded_on_load",
        title="Weights go through bf16 when they are loaded",
        subject=lambda: ModelDefect(round_on_load),
        source="TensorAuto/OpenTau#185",
        subtlety=5,
    ),
    _LOADED(
        id="C19_saves_effective_weights",
        title="The state dict holds the ternary values, and the latent weights are lost",
        subject=lambda: ModelDefect(save_effective_weights),
        source="TensorAuto/OpenTau#185",
    ),
    _LOADED(
        id="dropout_in_evaluation",
        title="Dropout stays on in evaluation mode",
        shows="evaluation_loss is",
        subject=lambda: ModelDefect(drop_in_evaluation),
        alive=evaluated,
    ),
)

"""What llama.cpp runs a model as, and what our tensors are called there.

`general.architecture` decides which graph a reader builds. A graph that would compute something
else without a word must not find the model, so such a model gets a name of its own,
`forge-<family>`, which stock readers refuse.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from .architecture import FUSED, Role, Style, role_of, style_of, transformers_model
from .checkpoint import ModelDescription

OWN = "forge-"
_ACTIVATIONS = {"bitnet": "relu2", "llama": "silu"}
"""Of configurations that name none: transformers' defaults."""
FAMILIES: Mapping[str, tuple[str, str]] = {
    "bitnet": ("bitnet", "silu"),
    "bitnet-25": ("bitnet", "relu2"),
    "bitnet-b1.58": ("bitnet", "relu2"),
    "llama": ("llama", "silu"),
}
"""Architecture -> family and activation of its graph; llama.cpp has the first and the last, the two
between are those of Microsoft's fork."""
_TRANSLATED = (*FAMILIES, *(OWN + family for family in ("bitnet", "llama", "byte-lm")))


@dataclass(frozen=True, slots=True)
class Architecture:
    """How a model is written.

    Attributes:
        name: `general.architecture`.
        model: As a transformers configuration; None where there is none.
        style: How the source spells its names; None: they are kept.
        why_own: Why no architecture of llama.cpp fits; () when one does.
    """

    name: str
    model: ModelDescription | None
    style: Style | None
    why_own: tuple[str, ...]


def choose(model: ModelDescription, names: Collection[str]) -> Architecture:
    """Returns the architecture for a model with these stored tensors.

    Raises:
        CheckpointError: The family's configuration cannot be read.
    """
    style = style_of(model.family)
    if style is None:
        why = f"model family {model.family!r} is none that llama.cpp knows"
        return Architecture(OWN + model.family, None, None, (why,))
    twin = transformers_model(model)
    why_own = _obstacles(twin, names, style)
    name = OWN + model.family
    if not why_own:
        relu2 = activation(twin) == "relu2"
        name = "bitnet-b1.58" if relu2 else twin.family
    return Architecture(name, twin, style, tuple(why_own))


def activation(model: ModelDescription) -> str:
    """Returns the activation between gate and up of a transformers model."""
    return str(model.config.get("hidden_act", _ACTIVATIONS[model.family]))


def translated(architecture: str) -> bool:
    """Whether files of this architecture use llama.cpp's tensor names."""
    return architecture in _TRANSLATED


def gguf_names(name: str, style: Style | None) -> tuple[str, ...]:
    """Returns the names a source tensor is stored under: three for a fused projection."""
    if style is None:
        return (name,)
    if style == "byte-lm" and (match := FUSED.fullmatch(name)):
        layer = int(match[1])
        return tuple(Role(kind, layer, "weight").name("gguf") for kind in ("q", "k", "v"))
    role = role_of(name, style)
    return (name,) if role is None else (role.name("gguf"),)


def own_name(name: str, style: Style | None) -> str:
    """Returns the canonical name of a tensor of a file."""
    role = role_of(name, "gguf") if style is not None else None
    return name if role is None or style is None else role.name(style)


def rotated_heads(architecture: str, name: str, model: ModelDescription | None) -> int:
    """Returns over how many heads the rows of a tensor are reordered; 0 for none.

    llama.cpp's "llama" graph turns neighbouring rows of a head; transformers turns rows half a
    head apart. Its "bitnet" graph does as transformers does.
    """
    role = role_of(name, "gguf")
    if architecture != "llama" or model is None or role is None or role.kind not in ("q", "k"):
        return 0
    heads = model.config["num_attention_heads"]
    return int(heads if role.kind == "q" else model.config.get("num_key_value_heads") or heads)


def _obstacles(model: ModelDescription, names: Collection[str], style: Style) -> list[str]:
    found = []
    wanted = ("silu", "relu2") if model.family == "bitnet" else ("silu",)
    if activation(model) not in wanted:
        found.append(
            f"its {model.family!r} graph applies {wanted[0]}, this model {activation(model)}"
        )
    found += _unwritten(model.config)
    roles = {name: role_of(name, style) for name in names}
    kinds = {(role.kind, role.suffix) for role in roles.values() if role}
    if model.family == "bitnet" and ("head", "weight") in kinds:
        found.append("its 'bitnet' graph ties the head to the embedding, this model does not")
    if model.family == "bitnet" and any(suffix == "bias" for _, suffix in kinds):
        found.append("its 'bitnet' graph has no biases")
    strange = [name for name, role in roles.items() if not role and not FUSED.fullmatch(name)]
    if strange:
        found.append(f"it has no place for {strange[0]!r}")
    return found


def _unwritten(config: Mapping[str, Any]) -> list[str]:
    """Settings that change the result and that this package does not put into keys."""
    found = []
    fraction = config.get("partial_rotary_factor")
    for key in ("rope_parameters", "rope_scaling"):
        stated = config.get(key) or {}
        if not isinstance(stated, Mapping):
            found.append(f"{key} {stated!r} is not written")
            continue
        kind = stated.get("rope_type", stated.get("type", "default"))
        if kind != "default":
            found.append(f"rotary embedding of type {kind!r} is not written")
        fraction = stated.get("partial_rotary_factor", fraction)
    if fraction not in (None, 1):
        found.append(f"partial_rotary_factor {fraction!r} is not written")
    if config.get("sliding_window") is not None and config.get("use_sliding_window", True):
        found.append(f"sliding_window {config['sliding_window']!r} is not written")
    return found

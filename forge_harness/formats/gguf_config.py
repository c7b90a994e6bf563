"""The keys of llama.cpp that describe a model, from a transformers configuration and back.

Keys and defaults: `llama-arch.cpp` and `llama-model.cpp`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from forge_harness.errors import CheckpointError

from .checkpoint import ModelDescription
from .gguf_arch import FAMILIES
from .gguf_file import Value, damaged

_COUNTS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "bitnet": {"rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "max_position_embeddings": 2048},
    "llama": {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "max_position_embeddings": 2048},
}
"""Of configurations that leave them out: transformers' own."""
_LLAMA_CPP_THETA = 10_000.0
_OTHER_MODELS = (
    "expert_count", "attention.sliding_window", "attention.scale", "embedding_scale",
    "residual_scale", "logit_scale",
)  # fmt: skip
"""Keys that make another model of the same tensors, or one of other tensors; 0 says nothing."""
_CLASSES = {"bitnet": "BitNetForCausalLM", "llama": "LlamaForCausalLM"}


def keys_of(model: ModelDescription) -> dict[str, int | float]:
    """Returns key without the architecture -> value, for a transformers configuration.

    Raises:
        CheckpointError: A value is missing or is none that has a key.
    """
    config = model.config
    found: dict[str, int | float] = {"context_length": _count(model, "max_position_embeddings")}
    found |= {key: _count(model, name) for key, name in _COUNTS.items()}
    heads = _count(model, "num_attention_heads")
    key_value = config.get("num_key_value_heads")
    found["attention.head_count_kv"] = (
        heads if key_value is None else _count(model, "num_key_value_heads")
    )
    found["attention.layer_norm_rms_epsilon"] = _positive(
        model, "rms_norm_eps", config.get("rms_norm_eps")
    )
    found["rope.freq_base"] = _positive(model, "rope_theta", _theta(config))
    width = found["embedding_length"] // heads
    size = width if config.get("head_dim") is None else _count(model, "head_dim")
    found["rope.dimension_count"] = size
    if size != width:
        found |= {"attention.key_length": size, "attention.value_length": size}
    found["vocab_size"] = _count(model, "vocab_size")
    return found


def config_of(
    path: Path, metadata: Mapping[str, Value], architecture: str, shapes: Mapping[str, Any]
) -> ModelDescription:
    """Returns the transformers configuration a file's keys describe.

    Args:
        path: For messages.
        metadata: All keys.
        architecture: One of `FAMILIES`.
        shapes: Shape of every tensor, by llama.cpp's name.

    Raises:
        CheckpointError: A key makes another model of it than a configuration here can say.
        DamagedCheckpointError: A key is missing or has no value the model can have.
    """
    family, activation = FAMILIES[architecture]
    for key in _OTHER_MODELS:
        value = metadata.get(f"{architecture}.{key}")
        if isinstance(value, np.ndarray) or value:
            raise _another_model(path, f"key '{architecture}.{key}' {value!r:.80}", "no such key")
    keys = _Keys(path, metadata, architecture)
    heads = keys.count("attention.head_count")
    width = keys.count("embedding_length")
    rotated = keys.count("rope.dimension_count", max(1, width // heads))
    size = keys.count("attention.key_length", rotated)
    if rotated != size:
        what = f"key '{architecture}.rope.dimension_count' {rotated}"
        raise _another_model(path, what, f"all {size} features of a head")
    theta = keys.number("rope.freq_base", _LLAMA_CPP_THETA)
    embedding = shapes.get("token_embd.weight") or (0,)
    vocabulary = keys.count("vocab_size", embedding[0])
    return ModelDescription(
        family,
        {
            "architectures": [_CLASSES[family]],
            "model_type": family,
            **{name: keys.count(key) for key, name in _COUNTS.items()},
            "vocab_size": vocabulary,
            "num_key_value_heads": keys.count("attention.head_count_kv", heads),
            "head_dim": size,
            "hidden_act": activation,
            "max_position_embeddings": keys.count("context_length"),
            "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
            # transformers 4 reads the first spelling, 5 the second.
            "rope_theta": theta,
            "rope_parameters": {"rope_theta": theta, **keys.scaling()},
            **_biases(shapes),
            "tie_word_embeddings": "output.weight" not in shapes,
        },
    )


def contradiction(
    metadata: Mapping[str, Value], architecture: str, model: ModelDescription
) -> str | None:
    """Says which key differs from the configuration the file records beside it."""
    for key, wanted in keys_of(model).items():
        full = f"{architecture}.{key}"
        found = metadata.get(full)
        if isinstance(wanted, float):
            wanted = _shortest(wanted)
            found = _shortest(found) if isinstance(found, float) else found
        if found != wanted:
            return f"key {full!r} is {found!r}, and 'forge.model' says {wanted!r}"
    return None


def _another_model(path: Path, has: str, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{path} has {has}; expected {expected}: without it this would be read as another model, "
        "so convert the original checkpoint instead."
    )


class _Keys:
    """Values of one architecture's keys, checked."""

    def __init__(self, path: Path, metadata: Mapping[str, Value], architecture: str) -> None:
        self._path, self._metadata, self._prefix = path, metadata, architecture + "."

    def count(self, key: str, default: int | None = None) -> int:
        value = self._metadata.get(self._prefix + key, default)
        if type(value) is not int or value < 1:
            raise damaged(self._path, self._problem(key, value, "a positive count"))
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._metadata.get(self._prefix + key, default)
        if type(value) is not float or not 0 < value < math.inf:
            raise damaged(self._path, self._problem(key, value, "a positive finite number"))
        return _shortest(value)

    def scaling(self) -> dict[str, Any]:
        """`rope_parameters` of a file with scaled rotary angles."""
        kind = self._metadata.get(self._prefix + "rope.scaling.type", "none")
        if kind == "none":
            return {"rope_type": "default"}
        if not isinstance(kind, str):
            raise damaged(self._path, self._problem("rope.scaling.type", kind, "a name"))
        factor = self.number("rope.scaling.factor")
        if kind == "linear" and factor == 1:
            # Positions over 1: llama.cpp's converter writes it into every BitNet file.
            return {"rope_type": "default"}
        found: dict[str, Any] = {"rope_type": kind, "factor": factor}
        if self._prefix + "rope.scaling.original_context_length" in self._metadata:
            found["original_max_position_embeddings"] = self.count(
                "rope.scaling.original_context_length"
            )
        return found

    def _problem(self, key: str, value: object, expected: str) -> str:
        full = self._prefix + key
        if full not in self._metadata:
            return f"key {full!r} is missing; expected {expected}"
        return f"key {full!r} is {value!r:.80}; expected {expected}"


def _biases(names: Collection[str]) -> dict[str, bool]:
    return {
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_gate.bias" in names,
    }


def _shortest(value: float) -> float:
    """The shortest decimal that is the same fp32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _theta(config: Mapping[str, Any]) -> object:
    stated = config.get("rope_parameters")
    nested = stated.get("rope_theta") if isinstance(stated, Mapping) else None
    return config.get("rope_theta") if nested is None else nested


def _count(model: ModelDescription, key: str) -> int:
    value = model.config.get(key)
    value = _DEFAULTS[model.family].get(key) if value is None else value
    if type(value) is not int or not 0 < value < 1 << 32:
        raise CheckpointError(
            f"The configuration has {key} {value!r}; expected a positive count of at most 32 bits, "
            "which a GGUF file needs."
        )
    return value


def _positive(model: ModelDescription, key: str, value: object) -> float:
    value = _DEFAULTS[model.family][key] if value is None else value
    with np.errstate(over="ignore"):
        sound = type(value) in (int, float) and 0 < float(np.float32(value)) < math.inf  # type: ignore[arg-type]
    if not sound:
        raise CheckpointError(
            f"The configuration has {key} {value!r}; expected a positive number of fp32, which a "
            "GGUF file needs."
        )
    return float(value)  # type: ignore[arg-type]

"""The sizes and switches of a transformers Llama or BitNet configuration that change its output.

Defaults of absent keys are those of transformers' `LlamaConfig` and `BitNetConfig`. A value that
asks for arithmetic `CausalLM` does not have is refused: computing something else in silence would
be worse than not computing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

from forge_harness.errors import CheckpointError, unknown_choice

Family = Literal["bitnet", "llama"]
Activation = Literal["relu2", "silu"]

_ACTIVATIONS = ("relu2", "silu")
_DEFAULTS: dict[str, dict[str, Any]] = {
    "bitnet": {"hidden_act": "relu2", "rms_norm_eps": 1e-5, "rope_theta": 500_000.0},
    "llama": {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10_000.0},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CausalLMConfig:
    """What `CausalLM` is built from; names and meanings as in transformers.

    Attributes:
        family: "bitnet" has sub-norms in front of output and down projections, "llama" none.
        vocab_size: V.
        hidden_size: D.
        intermediate_size: F.
        num_hidden_layers: Blocks.
        num_attention_heads: Query heads H.
        num_key_value_heads: Key and value heads G; H / G query heads share one.
        head_dim: S; query, key and value have H * S, G * S and G * S features.
        hidden_act: Of the gate.
        rms_norm_eps: Of every norm.
        rope_theta: Base of the rotary frequencies.
        attention_bias: Whether the four attention projections have biases.
        mlp_bias: Whether the three feed-forward projections have (never in "bitnet").
        tie_word_embeddings: Whether the head is the embedding.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: Activation
    rms_norm_eps: float
    rope_theta: float
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False

    @classmethod
    def from_transformers(cls, family: str, config: Mapping[str, Any]) -> Self:
        """Reads a config.json.

        Args:
            family: Its `model_type`.
            config: The whole file, or the part of it that describes the model.

        Raises:
            CheckpointError: A size is missing or wrong, or a value is not supported.
        """
        if family not in _DEFAULTS:
            raise CheckpointError(unknown_choice("model family", family, _DEFAULTS))
        _refuse_unsupported(config)
        values = {**_DEFAULTS[family], **{k: v for k, v in config.items() if v is not None}}
        width, heads = _count(values, "hidden_size"), _count(values, "num_attention_heads")
        found = cls(
            family=cast(Family, family),
            vocab_size=_count(values, "vocab_size"),
            hidden_size=width,
            intermediate_size=_count(values, "intermediate_size"),
            num_hidden_layers=_count(values, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=_count(values, "num_key_value_heads", heads),
            head_dim=_count(values, "head_dim", width // heads),
            hidden_act=_activation(values),
            rms_norm_eps=_positive(values, "rms_norm_eps"),
            rope_theta=_theta(values),
            attention_bias=_switch(values, "attention_bias"),
            # transformers' BitNetMLP has no biases, whatever the configuration says.
            mlp_bias=family == "llama" and _switch(values, "mlp_bias"),
            tie_word_embeddings=_switch(values, "tie_word_embeddings"),
        )
        found._check_heads()
        return found

    def _check_heads(self) -> None:
        heads, size = self.num_attention_heads, self.head_dim
        if heads % self.num_key_value_heads:
            raise CheckpointError(
                f"config.json has num_key_value_heads {self.num_key_value_heads} with "
                f"num_attention_heads {heads}; expected a divisor of the latter."
            )
        if size % 2:
            raise CheckpointError(
                f"config.json has heads of {size} features; expected an even number, since rotary "
                "embedding turns pairs."
            )
        if self.family == "bitnet" and heads * size != self.hidden_size:
            raise CheckpointError(
                f"config.json has {heads} heads of {size} features with hidden_size "
                f"{self.hidden_size}; BitNet's attn_sub_norm needs the two to be equal."
            )


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    rope = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    for where, table in (("rope_parameters", rope), ("rope_scaling", scaling)):
        if not isinstance(table, Mapping):
            raise CheckpointError(f"config.json has {where} {table!r}; expected an object.")
        kind = table.get("rope_type", table.get("type", "default"))
        if kind != "default":
            raise _unsupported(f"{where}.rope_type", kind, "'default'")
    fraction = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if fraction not in (None, 1, 1.0):
        raise _unsupported("partial_rotary_factor", fraction, "1.0")
    if config.get("sliding_window") is not None and config.get("use_sliding_window", True):
        raise _unsupported("sliding_window", config["sliding_window"], "null")
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list | tuple):
        raise CheckpointError(f"config.json has layer_types {kinds!r}; expected a list.")
    other = {str(kind) for kind in kinds} - {"full_attention"}
    if other:
        raise _unsupported("layer_types", sorted(other), "'full_attention' throughout")


def _unsupported(key: str, value: object, supported: str) -> CheckpointError:
    return CheckpointError(
        f"config.json has {key} {value!r}; supported is {supported}, and anything else would "
        "compute another model."
    )


def _activation(values: Mapping[str, Any]) -> Activation:
    name = values["hidden_act"]
    if name not in _ACTIVATIONS:
        raise _unsupported("hidden_act", name, " or ".join(repr(a) for a in _ACTIVATIONS))
    return cast(Activation, name)


def _theta(values: Mapping[str, Any]) -> float:
    # transformers 5 writes the second spelling and reads both; 4 knows the first only.
    rope = values.get("rope_parameters") or {}
    return _positive({"rope_theta": rope.get("rope_theta", values["rope_theta"])}, "rope_theta")


def _positive(values: Mapping[str, Any], key: str) -> float:
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise CheckpointError(f"config.json has {key} {value!r}; expected a positive number.")
    return float(value)


def _switch(values: Mapping[str, Any], key: str) -> bool:
    value = values.get(key, False)
    if value not in (False, True):  # "false" would be true
        raise CheckpointError(f"config.json has {key} {value!r}; expected true or false.")
    return bool(value)


def _count(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = values.get(key, default)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"config.json has {key} {value!r}; expected a positive count.")
    return value

"""The model families of this package: what builds them, and from which configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, cast

from torch import nn

from forge_harness.errors import CheckpointError, unknown_choice

from .byte_lm import ByteLM, ByteLMConfig
from .digits import DigitsConfig, DigitsModel

OWN_FAMILIES: dict[str, tuple[type[nn.Module], type]] = {
    "byte-lm": (ByteLM, ByteLMConfig),
    "digits": (DigitsModel, DigitsConfig),
}
"""Family -> model and configuration classes."""


def configuration_of(model: nn.Module) -> tuple[str, dict[str, Any]] | None:
    """Returns family and configuration of a model of ours; None for any other, a subclass too."""
    for family, (kind, _) in OWN_FAMILIES.items():
        if type(model) is kind:
            return family, asdict(cast(Any, model).config)
    return None


def own_model(family: str, config: Mapping[str, Any], **arguments: Any) -> Any:  # noqa: ANN401 - one of two classes
    """Builds a model of one of our families, on the random state of the process.

    Args:
        family: A key of `OWN_FAMILIES`.
        config: Every field of its configuration; a default would stand in for what a checkpoint
            does not say.
        arguments: Passed on to the model (`linear`, `precision`).

    Raises:
        CheckpointError: The family is another one, or the configuration is none of its.
    """
    if family not in OWN_FAMILIES:
        raise CheckpointError(unknown_choice("model family", family, OWN_FAMILIES))
    kind, settings = OWN_FAMILIES[family]
    if wrong := set(config) ^ {f.name for f in fields(settings)}:
        raise CheckpointError(
            f"The {family} configuration does not fit: it lacks or adds "
            f"{', '.join(map(repr, sorted(wrong)))}."
        )
    try:
        return kind(settings(**config), **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"The {family} configuration does not fit: {error}") from error

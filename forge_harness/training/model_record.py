"""What a run writes down of its model, so that it is resumed with that one and no other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from forge_harness.errors import UsageError
from forge_harness.formats import ModelDescription
from forge_harness.model import BitLinear
from forge_harness.model.families import configuration_of
from forge_harness.quant import COMPUTES, TernaryLinearOp
from forge_harness.training.ingredients import BuildModel
from forge_harness.training.start import builder_of

FOREIGN = "foreign"
"""Stands for arithmetic that is not `TernaryLinearOp` with its own quantizers."""


def model_record(model: nn.Module) -> dict[str, Any] | None:
    """Returns family, configuration and arithmetic of a model of ours; None for any other."""
    found = configuration_of(model)
    if found is None:
        return None
    modes = {_compute(module) for module in model.modules() if isinstance(module, BitLinear)}
    compute = modes.pop() if len(modes) == 1 else FOREIGN
    return {"family": found[0], "config": found[1], "compute": compute}


def checked_record(value: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    """Returns what a file holds as a record; raises KeyError, TypeError or ValueError."""
    record = {"family": value["family"], "config": dict(value["config"]), "compute": FOREIGN}
    if value["compute"] not in (*COMPUTES, FOREIGN):
        raise ValueError(f"compute is {value['compute']!r:.80}")
    return record | {"compute": value["compute"]}


def recorded_builder(record: Mapping[str, Any]) -> BuildModel:
    """Returns what builds the model a record is of.

    Raises:
        UsageError: Its arithmetic is not ours, so only the caller can build it.
        CheckpointError: The family is none of ours.
    """
    if record["compute"] == FOREIGN:
        raise UsageError(
            "The model was trained with arithmetic of its own; give the build_model it was built "
            "with."
        )
    return builder_of(ModelDescription(record["family"], record["config"]), record["compute"])


def _compute(layer: BitLinear) -> str:
    linear = layer.linear
    own = TernaryLinearOp(compute=linear.compute) if isinstance(linear, TernaryLinearOp) else None
    return own.compute if own is not None and own == linear else FOREIGN

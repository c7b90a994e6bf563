"""The seeded defects: subjects with one behaviour changed, after defects of real projects.

Each is a subject that can be named: `forge-harness run --subject
forge_harness.drill.defects:Q11_absmax_scale --check architecture.weight_scale`. The letter and
number of an id group seeds of one kind of defect (Q quantizer, L layer, G gradient, P packing,
K kernel, T training, D data, C checkpoint, E export, S serving, V configuration, X security).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path

from forge_harness.drill.defect import Benign, Defect

MODULES = (
    "quantizer",
    "forward",
    "models",
    "unusual_inputs",
    "half_precision",
    "packing",
    "backward",
    "backward_layers",
    "steps",
    "steps_optimizer",
    "steps_schedule",
    "steps_guards",
    "steps_runs",
    "averages",
    "hidden",
    "checkpoints",
    "checkpoints_kept",
    "evaluation",
    "evaluated_runs",
    "exports",
    "data",
    "delivered",
    "read_order",
    "loading",
    "configuration",
    "values",
    "recipe",
    "stated",
    "inference",
    "products",
    "state",
    "sealing",
    "audit",
    "readers",
    "handover",
    "served",
)
"""Modules of this package with `DEFECTS`, and where there are any `BENIGN`."""


@cache
def all_defects() -> Mapping[str, Defect]:
    """Returns every seeded defect by its id, in the order of the pipeline."""
    found: dict[str, Defect] = {}
    for name in MODULES:
        for defect in import_module(f"{__name__}.{name}").DEFECTS:
            if defect.id in found:
                raise ValueError(f"Two seeded defects are called {defect.id!r}.")
            found[defect.id] = defect
    return found


@cache
def all_benign() -> Mapping[str, Benign]:
    """Returns every sound variant by its id."""
    modules = [import_module(f"{__name__}.{name}") for name in MODULES]
    kinds = [kind for module in modules for kind in getattr(module, "BENIGN", ())]
    found = {kind.id: kind for kind in kinds}
    if len(found) < len(kinds) or found.keys() & all_defects().keys():
        raise ValueError("Two of the sound variants and seeded defects have one id.")
    return found


def defects_of(suite: str) -> list[Defect]:
    """Returns the defects that a check of this suite must find."""
    return [d for d in all_defects().values() if d.check.startswith(f"{suite}.")]


def __getattr__(name: str) -> object:
    # Only what a loader asks for: names of Python itself must not import torch, and those of
    # modules are asked for while the registry is being made.
    if not name.startswith("__") and not (Path(__file__).parent / f"{name}.py").exists():
        if name in all_defects():
            return all_defects()[name].subject
        if name in all_benign():
            return all_benign()[name].subject
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

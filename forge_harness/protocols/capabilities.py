"""Every capability by name, and which of them a subject offers."""

from __future__ import annotations

from .configuration import Configures
from .data import LoadsData
from .export import ExportsWeights, HoldsCheckpoint, InfersPacked
from .model import BuildsModel
from .quality import MeasuresQuality
from .quantization import MultipliesTernary, Packs, Quantizes, QuantizesParts
from .security import KeepsAuditLog, SealsContent, SignsPackages
from .serving import Serves
from .state import KeepsState, ReadsCheckpoints
from .training import Checkpoints, Trains, TrainsDistributed

CAPABILITIES: dict[str, type] = {
    protocol.__name__: protocol
    for protocol in (
        Quantizes,
        QuantizesParts,
        Packs,
        BuildsModel,
        LoadsData,
        Trains,
        Checkpoints,
        ExportsWeights,
        HoldsCheckpoint,
        InfersPacked,
        MultipliesTernary,
        TrainsDistributed,
        MeasuresQuality,
        KeepsState,
        Configures,
        ReadsCheckpoints,
        SealsContent,
        KeepsAuditLog,
        SignsPackages,
        Serves,
    )
}
"""Capability name -> protocol, in the order `doctor` prints them."""


def methods_of(capability: str) -> tuple[str, ...]:
    """Returns the method names a capability asks for."""
    protocol = CAPABILITIES[capability]
    return tuple(sorted(name for name in vars(protocol) if not name.startswith("_")))


def capabilities_of(subject: object) -> frozenset[str]:
    """Returns the names of the capabilities a subject offers."""
    return frozenset(
        name
        for name in CAPABILITIES
        if all(callable(getattr(subject, method, None)) for method in methods_of(name))
    )
